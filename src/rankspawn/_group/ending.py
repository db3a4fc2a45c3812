"""Ends a group's ranks: which processes are signalled and when, which are waited for, and when the rest is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .._end.deadline import left, passed, sooner, until
from .._end.ranks import KILL_SECONDS, SIGKILL, SignalTo, kill_sessions, living, name_stuck, nobody_lives, signal_ranks
from .._end.reap import is_reaped, reap
from .._end.sessions import describe_left, ignores, signal_one, why_blind
from .._end.watch import POLL_SECONDS

if TYPE_CHECKING:
    from .._end.watch import Watch
    from .._start.popen import Popen
    from .order import Started

_CONTINUE = (signal.SIGCONT,) if hasattr(signal, "SIGCONT") else ()


class Ending:
    """Which signals the ranks of a group have had, and what is due. A rank here means all of its session.

    Any thread and any signal handler may call its methods.

    Attributes:
        kill_at: When the ranks that still run will be killed, in seconds of time.monotonic(); None: they were not asked
            to end.
        killed_at: When they were killed, before the look at what they did; None: they were not.
        give_up_at: When the wait for killed ranks gives up; None: they have not been killed.
        lingering: Whether the ranks have ended as asked, but processes that they started have not.
        collected: By rank, what reap() has returned.
        sent: By rank, the signals that asked it to end, or killed it, while it ran.
        before_kill: A function, called once, before the first SIGKILL.
    """

    def __init__(
        self,
        started: Started,
        watch: Watch,
        *,
        grace: float,
        signal_to: SignalTo,
    ) -> None:
        self._ranks, self._watch = started.ranks, watch
        self._grace, self._signal_to = grace, signal_to
        self._cgroup, self._guard = started.cgroup, started.guard
        self._mark = f"RANKSPAWN_CALL_NS={started.called_ns}"
        for rank in self._ranks:
            rank._is_kept = hasattr(os, "waitid")
        self.kill_at: float | None = None
        self.killed_at: float | None = None
        self.give_up_at: float | None = None
        self.lingering = False
        self.collected: dict[int, tuple[Any, bool]] = {}
        self.sent: dict[int, set[int]] = {}
        self._asked: set[int] = set()
        self._half_at: float | None = None  # when half of the grace has gone
        # Signals that the rest of a rank's session has yet to get, by the rank's number.
        self._rest: dict[int, tuple[int, ...]] = {}
        self._living: dict[int, int] | None = None
        self._nobody = False  # certainly nobody lives in the ranks' sessions: they stay empty
        self.before_kill: Callable[[], object] | None = None
        self._deaf: set[int] | None = None  # the processes that ignored every signal when it was sent

    @property
    def due(self) -> float | None:
        """When the next thing is to be done: to signal the rest, to kill, or to give up."""
        end = self.kill_at if self.give_up_at is None else self.give_up_at
        if self.lingering:  # no descriptor shows the end of what the ranks have started
            return sooner(end, until(POLL_SECONDS))
        return sooner(end, self._half_at) if self._rest else end

    @property
    def cgroup_path(self) -> str | None:
        """The directory of the group's own cgroup; None where it has none."""
        return None if self._cgroup is None else self._cgroup.path

    @property
    def guard_pid(self) -> int | None:
        """The process that guards the group; None where there is none."""
        return None if self._guard is None else self._guard.process.pid

    def ask(self, sig: int, grace: float | None) -> None:
        """Ask the ranks to end.

        Args:
            sig: The signal.
            grace: Seconds until they are killed; None is the group's. It cannot delay the end that an earlier call set.

        Raises:
            PermissionError: A rank may not be signalled. All others have been.
        """
        seconds = self._grace if grace is None else grace
        if not seconds:
            self.before_kill = None  # a caller that gives no time to end wants no look either
        self._asked.add(sig)
        self._note(sig)
        self.kill_at = sooner(self.kill_at, until(seconds))
        self._half_at = sooner(self._half_at, until(seconds / 2))
        self._watch.ring()
        if sig != signal.SIGTERM and signal.SIGTERM not in self._asked:
            deaf = {pid for pid in living(self._ranks) or () if ignores(pid, sig)}
            self._deaf = deaf if self._deaf is None else self._deaf & deaf
        signals = (sig, *_CONTINUE)  # a stopped process acts on it only once it is continued
        if self._signal_to != "session":
            for number in self._watch.running.copy():
                self._rest[number] = (*self._rest.get(number, ()), *signals)
        first = [rank for number, rank in enumerate(self._ranks) if number in self._rest]
        others = [rank for number, rank in enumerate(self._ranks) if number not in self._rest]
        try:
            if first:
                signal_ranks(first, *signals, to=self._signal_to)
        finally:
            if others:
                signal_ranks(others, *signals)
                self.tell_left_by_reaped(*signals)

    def do_due(self) -> float | None:
        """Do what is due now; return when the next thing is due.

        Raises:
            TimeoutError: A killed rank does not end.
        """
        if self._rest:
            self._tell_rest()
        if self.give_up_at is None and passed(self.kill_at) and (self._watch.running or self.lingering):
            self.kill()
        if self._watch.running and passed(self.give_up_at):
            raise TimeoutError(name_stuck(self.stuck()))
        return self.due

    def _tell_rest(self) -> None:
        """Signal the rest of the sessions: of ranks that have ended, and of all once half of the grace is over.

        Raises nothing: the first signal has raised for those that may not be signalled.
        """
        half = passed(self._half_at)
        by_signals: dict[tuple[int, ...], list[Popen]] = {}
        for number in [number for number in self._rest.copy() if half or number not in self._watch.running]:
            if (signals := self._rest.pop(number, None)) is not None:
                by_signals.setdefault(signals, []).append(self._ranks[number])
        for signals, ranks in by_signals.items():
            with suppress(PermissionError):
                signal_ranks(ranks, *signals, told=self._signal_to)

    def look_at_sessions(self) -> None:
        """Note, after the ranks' end, whether their sessions have members to wait for until the grace is over."""
        if self._watch.running or self.kill_at is None or self.give_up_at is not None:
            self._living, self.lingering = None, False
            return
        if self._rest:
            self._tell_rest()
        if passed(self.kill_at):
            if self.lingering:
                self.kill()
            self._living, self.lingering = None, False
            return
        self._nobody = nobody_lives(self._ranks, self._ranks)
        self._living = {} if self._nobody else living(self._ranks)
        self.lingering = bool(self._living) or bool(self._left_by_reaped()[0])
        if self._living and self._deaf and signal.SIGTERM not in self._asked:
            self._terminate_deaf(self._living)

    def _terminate_deaf(self, found: dict[int, int]) -> None:
        """Send SIGTERM to processes that ignored the signal: what a shell starts in the background ignores SIGINT.

        A process that began to ignore the signal later gets none, because it may be saving its work.
        """
        deaf, self._deaf = self._deaf or set(), None
        for pid in deaf & found.keys():
            with suppress(OSError):
                signal_one(pid, found[pid], (signal.SIGTERM, *_CONTINUE))

    def kill(self) -> None:
        """Send SIGKILL to all. A wait for their end gives up after a while."""
        self.killed_at = self.killed_at or time.monotonic()
        look, self.before_kill = self.before_kill, None
        if look is not None:
            look()
        self.give_up_at = self.give_up_at or until(KILL_SECONDS)
        self._note(SIGKILL)
        self._rest.clear()
        self._watch.ring()
        if self._cgroup is not None:
            self._cgroup.kill()
        with suppress(PermissionError):
            signal_ranks(self._ranks, SIGKILL)

    def _note(self, sig: int) -> None:
        for number in self._watch.running.copy():
            self.sent.setdefault(number, set()).add(sig)

    def kill_and_reap(self, look: Callable[..., object]) -> dict[int, str]:
        """Kill and reap all, within a limited time.

        Args:
            look: Waits for a rank's end, as Watch.look() does.

        Returns:
            The processes that are left: pid -> the rank that they belong to.
        """
        if self._watch.running:
            self.kill()
        end = (self.give_up_at or time.monotonic() + KILL_SECONDS) - 1.0
        self._watch.look_seldom(end)
        news = self._watch.news
        while self._watch.running and not passed(end):
            look(left(end), news)
            news = self._watch.news
        # A second at least is for the sessions: a rank that does not end must not keep the others' children alive.
        numbered, codes = dict(enumerate(self._ranks)), self._watch.returncodes
        blind = next((why_blind(rank.pid) for rank in self._ranks if not is_reaped(rank)), "")
        seconds = 1.0 + (left(end) or 0)
        stuck = {} if self._nobody else kill_sessions(numbered, codes, seconds, self._living)
        stuck.update(self._kill_left_by_reaped(1.0 + (left(end) or 0)))
        if self._cgroup is not None:
            self._cgroup.kill()
            if not self._cgroup.wait_empty(1.0 + (left(end) or 0)):
                stuck.update(dict.fromkeys(self._cgroup.pids(), "the cgroup"))
        self.collected.update(reap(numbered, codes))
        look(0)
        if blind and self._cgroup is None:
            warnings.warn(
                "processes that the ranks started in process groups of their own may run on, because their sessions"
                f" cannot be searched: {blind}; --cgroup, cgroup= ends them",
                RuntimeWarning,
                stacklevel=2,
            )
        return {**stuck, **self.stuck()}

    @property
    def has_all_reaped(self) -> bool:
        """Whether every rank has been reaped, by the group or by other code."""
        return all(map(is_reaped, self._ranks))

    def let_go_of_ranks(self) -> None:
        """Close the descriptors of reaped ranks. A rank that cannot be ended is reaped by a later wait."""
        for rank in self._ranks:
            if is_reaped(rank):
                rank._pidfd = None
            elif rank.returncode is None:
                rank._is_kept = False

    # ---- ranks that other code has reaped: see _end/reaped.py -------------------------------------------------------

    def _reaped(self) -> dict[int, int]:
        """The ranks that other code was seen to have reaped: number of the session -> which rank it was."""
        if sys.platform != "linux":
            return {}
        numbered = enumerate(self._ranks)
        return {rank.pid: number for number, rank in numbered if is_reaped(rank) and number not in self.collected}

    def _left_by_reaped(self) -> tuple[dict[int, int], dict[int, int]]:
        """As members_by_mark()."""
        if not (reaped := self._reaped()):
            return {}, {}
        from .._end.reaped import members_by_mark

        return members_by_mark(reaped.keys(), self._mark)

    def tell_left_by_reaped(self, *signals: int) -> None:
        """Signal the processes that are known to be theirs."""
        own, _ = self._left_by_reaped()
        if own:
            from .._end.reaped import signal_by_mark

            signal_by_mark(own, self._mark, signals)

    def _kill_left_by_reaped(self, seconds: float) -> dict[int, str]:
        """Kill what they started. Returns what does not end: pid -> the rank that it belongs to."""
        own, unknown = self._left_by_reaped()
        if not own and not unknown:
            return {}
        from .._end.reaped import kill_by_mark

        if self._guard is not None:
            self._guard.end_what_is_left()
        reaped = self._reaped()
        own, unknown = kill_by_mark(reaped.keys(), self._mark, seconds)
        if unknown:
            told = "; ".join(f"rank {reaped[number]}: {describe_left(pid)}" for pid, number in unknown.items())
            warnings.warn(
                f"other code of this program has reaped ranks, so processes that they started may still run: {told}",
                RuntimeWarning,
                stacklevel=2,
            )
        return {pid: f"rank {reaped[number]}" for pid, number in own.items()}

    def stuck(self) -> dict[int, str]:
        """The ranks that still run: pid -> which rank it is."""
        return {rank.pid: f"rank {number}" for number, rank in self._watch.running.copy().items()}
