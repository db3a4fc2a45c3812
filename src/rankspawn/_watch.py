"""Who of a group's ranks has ended: one selector (epoll(7) on Linux) over their pidfds."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._popen import Popen

POLL_SECONDS = 0.02
"""How often a rank without a pidfd is looked at (not Linux, or no descriptor was left for one)."""


class Watch:
    """Sees ranks end, without reaping them.

    running: the ranks that have not been seen to end, by number, in rank order.
    returncodes: of the others, as ``Popen.returncode``. exited_ns: when that was seen, in ns of CLOCK_MONOTONIC.
    """

    def __init__(self, ranks: Sequence[Popen]) -> None:
        self.running = dict(enumerate(ranks))
        self.returncodes: dict[int, int] = {}
        self.exited_ns: dict[int, int] = {}
        self._selector = selectors.DefaultSelector()
        # Not registered yet: many have ended by the first look, and need not be.
        self._new = list(self.running)
        self._pidfds: dict[int, int] = {}
        self._polled: set[int] = set()

    def add(self, descriptor: int) -> None:
        """Have ``look`` return, too, when ``descriptor`` is readable."""
        self._selector.register(descriptor, selectors.EVENT_READ, None)

    def fileno(self) -> int | None:
        """A descriptor that is readable when ``look`` has something to say; None where there is none."""
        self._register()
        fileno = None if self._polled else getattr(self._selector, "fileno", None)
        return None if fileno is None else int(fileno())

    def look(self, timeout: float | None) -> list[int]:
        """The ranks that have ended since the last look, after a wait of at most ``timeout`` seconds for the first.

        An empty list also means that an added descriptor is readable, or that it is time to look again.
        """
        if self._new and (ended := self._ended(self._new)):
            self._register()
            return ended
        self._register()
        if self._polled:
            timeout = POLL_SECONDS if timeout is None else min(timeout, POLL_SECONDS)
        woken = {key.data for key, _ in self._selector.select(timeout)} - {None}
        ended = self._ended(sorted(woken | self._polled))
        for number in woken:
            self._selector.unregister(self._pidfds.pop(number))
        # A rank that a debugger holds has a pidfd that says the end long before the end can be collected.
        self._polled |= woken
        self._polled.difference_update(ended)
        return ended

    def close(self) -> None:
        """Let go of the descriptor. Harmless when done twice."""
        self._selector.close()

    def _register(self) -> None:
        """Watch the pidfds of ranks that are new and still run."""
        new, self._new = self._new, []
        for number in new:
            if number in self.running:
                pidfd = self.running[number].pidfd
                if pidfd is None:
                    self._polled.add(number)
                else:
                    self._selector.register(pidfd, selectors.EVENT_READ, number)
                    self._pidfds[number] = pidfd

    def _ended(self, numbers: Iterable[int]) -> list[int]:
        ended = []
        for number in numbers:
            status = _status(self.running[number])
            if status is not None:
                self.returncodes[number] = status
                self.exited_ns[number] = time.monotonic_ns()
                ended.append(number)
        for number in ended:
            del self.running[number]
        return ended


def _status(rank: Popen) -> int | None:
    """How a rank has ended, as a returncode, without reaping it; None while it runs."""
    if rank.returncode is not None or not hasattr(os, "waitid"):
        return rank.poll()
    try:
        ended = os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return rank.poll()  # reaped behind our back
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def until(timeout: float | None) -> float | None:
    """The end of a timeout, in seconds of time.monotonic(); None is never, here and in the three below."""
    return None if timeout is None else time.monotonic() + timeout


def left(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())


def passed(end: float | None) -> bool:
    return end is not None and time.monotonic() >= end


def sooner(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else min(one, other)
