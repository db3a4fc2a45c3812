"""Sees which of a group's ranks have ended: epoll(7) over their pidfds, in a selector of all that may wake a wait."""

from __future__ import annotations

import os
import select
import selectors
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from . import way as _way
from .deadline import left, passed
from .reap import returncodes

if TYPE_CHECKING:
    import asyncio

    from .._start.popen import Popen

POLL_SECONDS = 0.02
"""Seconds between looks at a rank whose end no descriptor shows: without a pidfd (not Linux), or under a debugger."""

_SELDOM_LOOKS, _SELDOM_SECONDS = 20, 0.005

_RANKS = object()  # says in the selector that a rank has ended

_LONGEST = 86400.0
"""The longest single sleep, in seconds: epoll_wait(2) counts milliseconds in an int, and a timeout may be infinite."""


class Watch:
    """Sees ranks end, without reaping them.

    One thread looks at a time, and others wait for it. A signal handler may look while its own thread does. Nothing is
    lost when a handler raises in the middle of a look. Iterate over a copy of ``running``, because another thread's
    look may shorten it meanwhile.

    Attributes:
        running: The ranks that have not been seen to end, by number, in rank order.
        returncodes: How the others ended, as ``Popen.returncode``.
        exited_ns: When their end was seen, in ns of CLOCK_MONOTONIC.
        first_failure: The number of the first that was seen to end with another returncode than 0; None while none has.
    """

    def __init__(self, ranks: Sequence[Popen]) -> None:
        self.running = dict(enumerate(ranks))
        self.returncodes: dict[int, int] = {}
        self.exited_ns: dict[int, int] = {}
        self.first_failure: int | None = None
        # Not registered yet: many have ended by the first look, and need not be.
        self._new = list(self.running)
        self._polled: set[int] = set()
        self._sleepers: set[asyncio.Future[None]] = set()
        self._looks = self._rings = 0
        self._looking, self._ringing = threading.RLock(), threading.RLock()
        self._selector = selectors.DefaultSelector()
        # Their pidfds: number by descriptor, and the epoll that has them. It goes as a whole when the last rank has
        # ended: taking each out is a good part of the time in which many end. It is made here, because two threads, or
        # a look and a signal handler's look, would each make one at the first wait.
        self._pidfds: dict[int, int] = {}
        self._ends: Any = None
        # Where there is no eventfd there is no pidfd either, so no sleep is long.
        self._bell = -1
        if hasattr(os, "eventfd"):
            try:
                self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._ends = select.epoll()
            except BaseException:
                self._selector.close()
                raise
            self._selector.register(self._bell, selectors.EVENT_READ)
            self._selector.register(self._ends, selectors.EVENT_READ, _RANKS)

    def add(self, descriptor: int) -> None:
        """Have ``look`` return, too, when ``descriptor`` is readable."""
        self._selector.register(descriptor, selectors.EVENT_READ)

    def once(self, descriptor: int, call: Callable[[], None]) -> None:
        """Have ``look`` call ``call``, and look at it no more, when ``descriptor`` is readable."""
        self._selector.register(descriptor, selectors.EVENT_READ, call)

    def fileno(self) -> int | None:
        """A descriptor that is readable when ``look`` has something to return; None where there is none."""
        self._register()
        fileno = None if self._polled else getattr(self._selector, "fileno", None)
        return None if fileno is None else int(fileno())

    def look_seldom(self, end: float | None) -> None:
        """Look at ranks that are being ended: until ``end``, or for a tenth of a second, without a wake for each end.

        Many end at once, and to wake for each takes longer than they take to end.
        """
        for _ in range(_SELDOM_LOOKS):
            ranks = [rank for rank in self.running.copy().values() if rank.pidfd is not None]
            if not ranks or passed(end):
                return
            _way.way.await_ends(ranks, _SELDOM_SECONDS)
            self._in_turn(lambda: self._ended(self.running.copy()), 0)

    @property
    def news(self) -> int:
        """A number that grows when any thread sees a rank's end, and with each ring().

        A caller that compares it with an older value knows whether it has missed an event.
        """
        return len(self.returncodes) + self._rings

    def look(self, timeout: float | None, news: int | None = None) -> list[int]:
        """See which ranks have ended.

        Args:
            timeout: Seconds to wait for the first; None waits without end.
            news: The value of ``news`` from before the caller decided what to wait for. If it has changed since, the
                look does not wait: another thread or a signal handler may have seen that event, or called ring().

        Returns:
            The ranks that have ended since the last look. An empty list also means that an added descriptor is
            readable, that ring() was called, or that it is time to look again.
        """
        return self._in_turn(lambda: self._look(timeout if news in (None, self.news) else 0), timeout)

    def ring(self) -> None:
        """Make a look that sleeps return. For any thread, and for signal handlers."""
        with self._ringing:  # or the bell's number might be another file's by the time of the write
            self._rings += 1  # a look in another thread may take the bell's event
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)
        self._wake_sleepers()

    async def sleep(self, due: float | None, news: int | None = None) -> None:
        """Sleep in the running asyncio loop until ``look`` would return, ring() is called, or ``due`` comes.

        Args:
            due: In seconds of time.monotonic(); None for never.
            news: As for ``look``.
        """
        import asyncio

        descriptor = self.fileno()
        if descriptor is None:
            return await asyncio.sleep(POLL_SECONDS)
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        self._sleepers.add(woken)
        if news not in (None, self.news):
            _wake(woken)
        # A loop has one reader for a descriptor: it wakes all of the group's sleepers.
        loop.add_reader(descriptor, self._wake_sleepers)
        seconds = left(due)
        timer = None if seconds is None else loop.call_later(min(seconds, _LONGEST), _wake, woken)
        try:
            await woken
        finally:
            self._sleepers.discard(woken)
            if not self._sleepers and self._is_open():
                loop.remove_reader(descriptor)
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """Close the descriptors. Ranks that still run are polled from then on. Harmless when done twice."""
        with self._ringing:
            bell, self._bell = self._bell, -1
            if bell >= 0:
                os.close(bell)
        for woken in self._sleepers.copy():
            # Before its number is another file's. The sleepers wake, and see that no rank is left.
            woken.get_loop().remove_reader(self._selector.fileno())
        self._wake_sleepers()
        self._polled.update(self.running)
        self._new.clear()
        self._close_ends()
        self._selector.close()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """For a watch without an owner, as an interrupt may leave it."""
        if getattr(self, "_bell", -1) >= 0:
            close(self._bell)

    def _in_turn(self, look: Callable[[], list[int]], timeout: float | None) -> list[int]:
        """Look. If another thread does, wait for the end of its look, and return nothing."""
        if not self._looking.acquire(blocking=False):
            # Behind another thread. What it has seen may be all that this one waits for.
            if self._looking.acquire(timeout=-1 if timeout is None else min(timeout, _LONGEST)):
                self._looking.release()
            return []
        self._looks += 1
        try:
            ended = look()
        finally:
            self._looks -= 1
            if self._looks:
                self.ring()  # a handler's look: the one that it interrupted has other things to wait for now
            self._looking.release()
        if ended:
            self._wake_sleepers()
        return ended

    def _look(self, timeout: float | None) -> list[int]:
        if self._new:
            ended = self._ended(self._new)
            self._register()
            if ended:
                return ended
        if self._polled:
            timeout = POLL_SECONDS if timeout is None else min(timeout, POLL_SECONDS)
        for key in self._select(_LONGEST if timeout is None else min(timeout, _LONGEST)):
            if key.fd == self._bell:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._bell)
            elif callable(key.data):
                self._selector.unregister(key.fd)
                key.data()
            elif key.data is _RANKS:
                self._note_ends()
        ended = self._ended(sorted(self._polled))
        self._polled.intersection_update(self.running)
        return ended

    def _select(self, timeout: float) -> list[selectors.SelectorKey]:
        if not self._selector.get_map():
            # Closed, perhaps by another thread after this one had seen ranks that run; or Windows, whose select refuses
            # to wait for nothing.
            time.sleep(min(timeout, POLL_SECONDS))
            return []
        try:
            return [key for key, _ in self._selector.select(timeout)]
        except OSError:
            if self._is_open():
                raise
            return []  # a signal handler has closed it

    def _is_open(self) -> bool:
        return self._selector.get_map() is not None

    def _register(self) -> None:
        """Watch the pidfds of ranks that are new and still run."""
        for number in self._new:
            rank = self.running.get(number)
            if rank is None:
                continue
            if (pidfd := rank.pidfd) is None:
                self._polled.add(number)
                continue
            if (ends := self._ends) is None:
                break  # a signal handler or another thread has seen the last end meanwhile, or has closed this watch
            self._pidfds[pidfd] = number  # first: another thread may see the end at once
            try:
                ends.register(pidfd, select.EPOLLIN)
            except FileExistsError:
                pass  # it is: an exception ended the first try behind it, or another thread registers them, too
            except ValueError:
                break  # a signal handler has seen the last end meanwhile, or has closed this watch
            except OSError:  # fs.epoll.max_user_watches is reached
                self._polled.add(number)
        self._new.clear()

    def _note_ends(self) -> None:
        """Look from now on at the ranks whose pidfds say that they have ended."""
        ends = self._ends
        with suppress(ValueError):  # a signal handler has closed it
            for pidfd, _ in () if ends is None else ends.poll(0):
                # In this order: an exception in between loses nothing. And it stays one that is polled while a debugger
                # holds it: its pidfd says the end long before the end can be collected.
                self._polled.add(self._pidfds[pidfd])
                with suppress(OSError):
                    ends.unregister(pidfd)

    def _close_ends(self) -> None:
        """Drop the epoll: no rank is left whose end a pidfd could show."""
        if self._ends is not None:
            with suppress(KeyError, ValueError, RuntimeError):  # done before, and then interrupted; or all is closed
                self._selector.unregister(self._ends)
            self._ends.close()
            self._ends = None

    def _ended(self, numbers: Iterable[int]) -> list[int]:
        ended = []
        ranks = {number: rank for number in numbers if (rank := self.running.get(number)) is not None}
        for number, code in zip(ranks, returncodes([*ranks.values()]) if ranks else (), strict=True):
            if code is not None and number in self.running:
                self.exited_ns[number] = time.monotonic_ns()
                self.returncodes[number] = code
                if code and self.first_failure is None:
                    self.first_failure = number
                self.running.pop(number, None)
                ended.append(number)
        if not self.running:
            self._close_ends()
        return ended

    def _wake_sleepers(self) -> None:
        for woken in self._sleepers.copy():
            with suppress(RuntimeError):  # its loop has been closed
                woken.get_loop().call_soon_threadsafe(_wake, woken)


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
