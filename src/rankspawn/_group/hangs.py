"""``launch(hang_timeout=)``: notices that a whole job hangs, and says which rank stands where.

A wait for the group looks a few times in each ``hang_timeout``; there is no thread. While ranks write lines, a look
reads the sizes of their files; while they compute, also the CPU time of each rank. Only if a job does neither does a
look read all processes of the machine, and only after ``hang_timeout`` does it take the stacks.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from .._end.deadline import passed, sooner
from .._frozen import Frozen
from .._ids import name_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Literal

    from .._end.watch import Watch
    from .._output.logs import RankFiles
    from .._stacks.take import Stacks
    from .._start.popen import Popen
    from .ending import Ending
    from .job import Job

    OnHang = Literal["report", "end", "restart"]

_LONGEST_PAUSE = 30.0
"""The most seconds between two readings of /proc, so that a hang is seen soon after a long ``hang_timeout``."""
_LOOKS_APART = 2.0
"""The most seconds from the first to the second look at the stacks."""
_LITTLE = 0.01
"""The share of one CPU up to which a rank counts as idle: its threads may wake now and then to look at a clock."""

_ACTIONS = {
    "report": "the ranks run on",
    "end": "ending the ranks",
    "restart": "ending the ranks, to start them again",
}


class HangAsked(Frozen):
    """How to watch for hangs.

    Attributes:
        seconds: For how long nothing may move.
        action: What to do about a hang.
    """

    seconds: float
    action: OnHang


def checked_hang(seconds: object, action: object, max_restarts: int) -> HangAsked | None:
    """Check ``hang_timeout`` and ``on_hang``; None if neither was given.

    Raises:
        TypeError: ``seconds`` is no number.
        ValueError: The arguments do not fit, or this system has no procfs.
    """
    if action not in _ACTIONS:
        raise ValueError(f"on_hang: expected 'report', 'end' or 'restart', got {action!r}")
    if seconds is None:
        if action != "report":
            raise ValueError(f"on_hang={action!r} needs hang_timeout")
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"hang_timeout: expected a number of seconds, got {seconds!r}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"hang_timeout: expected a number of seconds above 0, got {seconds}")
    if action == "restart" and not max_restarts:
        raise ValueError("on_hang='restart' needs max_restarts")
    from .._stacks.take import can_look

    if not can_look():
        raise ValueError("hang_timeout needs Linux's /proc, which this system does not have")
    return HangAsked(float(seconds), action)  # type: ignore[arg-type]


class HangWatch:
    """Notices when the ranks of an attempt stand still.

    Args:
        asked: For how long nothing may move, and what to do about a hang.
        files: Where each rank writes, by local rank; None where they have the launcher's output.
        proc: Where procfs is mounted.

    Attributes:
        action: What to do about a hang.
        due: When to look next, in seconds of time.monotonic().
    """

    def __init__(self, asked: HangAsked, files: Sequence[RankFiles] | None, proc: str = "/proc") -> None:
        self._seconds, self.action, self._files, self._proc = asked.seconds, asked.action, files, proc
        self._pause = min(asked.seconds / 4, _LONGEST_PAUSE)
        self._tick = 1 / os.sysconf("SC_CLK_TCK")
        self._looked_at = time.monotonic()
        self.due = self._looked_at + self._pause
        self._quiet = 0.0
        self._told = False
        self._first: Stacks | None = None
        self._sizes: dict[int, object] = {}
        self._own: dict[int, tuple[float, int]] = {}
        self._all: dict[int, tuple[float, int]] = {}

    def look(self, running: Mapping[int, int], take: Callable[[], Stacks]) -> tuple[float, Stacks, Stacks] | None:
        """Look whether anything has moved.

        Args:
            running: The pids of the ranks that run, by local rank.
            take: Takes the stacks of these.

        Returns:
            If nothing has moved for ``hang_timeout``: for how many seconds, and two looks at the stacks. It returns
            this once, until something moves again; else None.
        """
        from .._stacks.still import at_a_debugger, attended, can_run, unmoved

        now = time.monotonic()
        since, self._looked_at, self.due = now - self._looked_at, now, now + self._pause
        first, self._first = self._first, None
        pids = self._unmoved_processes(running, since)
        if pids is None:
            self._quiet, self._told = 0.0, False
            return None
        # If this process itself did not run, because it was suspended for example, the ranks may not have run either.
        self._quiet += min(since, 2 * self._pause)
        if self._quiet < self._seconds or self._told:
            return None
        if any(can_run(pid, self._proc) for pid in pids):
            return None
        if any(attended(pid, self._proc) for pid in pids):
            self._quiet = 0.0
            return None
        if first is None:
            self._first = take()
            if at_a_debugger(self._first):
                self._first, self._quiet = None, 0.0
            else:
                self._looked_at = time.monotonic()
                self.due = self._looked_at + min(self._pause, _LOOKS_APART)
            return None
        second = take()
        if not unmoved(first, second):
            self._quiet = 0.0
            return None
        self._told = True
        return self._quiet, first, second

    def _unmoved_processes(self, running: Mapping[int, int], since: float) -> list[int] | None:
        """All processes of the ranks if none has written or computed since the last look; else None.

        The cheapest question comes first.
        """
        from .._stacks.still import used

        most = max(1.5 * self._tick, _LITTLE * since)
        sizes = {number: self._size(number) for number in running}
        own = {number: used([pid], self._proc) for number, pid in running.items()}
        moved = sizes != self._sizes or self._is_busy(self._own, own, most)
        self._sizes, self._own = sizes, own
        if moved:
            self._all = {}
            return None
        below = self._below(running)
        everything = {number: used(pids, self._proc) for number, pids in below.items()}
        moved = self._is_busy(self._all, everything, most)
        self._all = everything
        return None if moved else [pid for pids in below.values() for pid in pids]

    def _is_busy(
        self, before: Mapping[int, tuple[float, int]], now: Mapping[int, tuple[float, int]], most: float
    ) -> bool:
        for number, (seconds, written) in now.items():
            past = before.get(number)
            if past is None or seconds - past[0] > most or (written != past[1] and self._size(number) is None):
                return True
        return False

    def _below(self, running: Mapping[int, int]) -> dict[int, list[int]]:
        """The processes of each rank, by local rank."""
        from .._stacks.kernel import processes_below

        below = processes_below(running.values(), self._proc)
        return {number: below[pid] for number, pid in running.items()}

    def _size(self, number: int) -> object:
        """What changes with each line of a rank: its files' sizes; None if one of its streams goes to no file."""
        if self._files is None:
            return None
        found = []
        for path in (self._files[number].stdout, self._files[number].stderr):
            try:
                about = None if path is None else os.stat(path)
            except OSError:
                about = None
            if about is None or not stat.S_ISREG(about.st_mode):
                return None
            found.append((about.st_size, about.st_mtime_ns))
        return found


class Hangs:
    """The part of a RankGroup that watches for a hang. The group makes the attributes.

    Attributes:
        hung: The local ranks that stood still when ``on_hang`` ended the ranks; empty if it has not.
        tell_hang: A function, called with the text of a hang. The default logs it.
    """

    ranks: tuple[Popen, ...]
    files: tuple[RankFiles, ...] | None
    job: Job
    stacks: list[Stacks]
    stacks_at_failure: Stacks | None
    hung: tuple[int, ...]
    _watch: Watch
    _ending: Ending
    _hang_asked: HangAsked | None
    _hang_reason: str

    if TYPE_CHECKING:

        @property
        def stopping(self) -> bool: ...
        def stop(self, sig: int = ..., grace: float | None = None) -> None: ...
        def _look_at(self, because: str, *, running: bool = False, seconds: float = 2.0) -> Stacks: ...
        def _keep(self, found: Stacks) -> None: ...

    def tell_hang(self, text: str) -> None:
        import logging

        logging.getLogger("rankspawn").warning("%s", text)

    def _begin_hang_watch(self) -> None:
        """Begin to watch the ranks of a new attempt."""
        asked = self._hang_asked
        self._hang_watch = None if asked is None else HangWatch(asked, self.files)
        self._hang_lock = threading.Lock()

    def _hang_due(self) -> float | None:
        """When to look next."""
        return None if self._hang_watch is None or self.stopping or not self._watch.running else self._hang_watch.due

    def _look_for_hang(self, due: float | None = None) -> float | None:
        """Look if it is time, and do what ``on_hang`` says. Returns the earlier of ``due`` and the next look."""
        watch = self._hang_watch
        if watch is None or not passed(self._hang_due()) or not self._hang_lock.acquire(blocking=False):
            return sooner(due, self._hang_due())
        try:
            running = {number: rank.pid for number, rank in self._watch.running.copy().items()}
            found = watch.look(running, lambda: self._look_at("first look at a hang", running=True))
            if found is not None:
                self._act_on_hang(watch.action, *found)
        finally:
            self._hang_lock.release()
        return sooner(due, self._hang_due())

    def _act_on_hang(self, action: OnHang, seconds: float, first: Stacks, second: Stacks) -> None:
        from .._stacks.still import unmoved

        still = unmoved(first, second)
        well = name_ranks(self.job.first_rank + one for one, code in self._watch.returncodes.copy().items() if not code)
        second.because = (
            f"hang: for {seconds:.0f} s no rank has written a line or used CPU time"
            + (f", {well} ended with status 0" if well else "")
            + f", {name_ranks(still)} stood still"
        )
        for look in (first, second):
            self._keep(look)
        self.tell_hang("; ".join([f"{second.because}: {second.folded}", _ACTIONS[action], *second.notes]))
        if action == "report":
            return
        self.hung = tuple(sorted(rank - self.job.first_rank for rank in still))
        self._hang_reason, self.stacks_at_failure = second.because, second
        with suppress(PermissionError):
            if action == "end":
                self.stop()  # so that no restart follows
            else:
                self._ending.ask(signal.SIGTERM, None)
