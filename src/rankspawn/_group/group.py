"""The ranks of one job on this machine: watched at once, ended together, none left behind.

``launch`` makes a group. A wait, in a thread or in asyncio, does two things in turn: it looks which ranks have ended
(``_end.watch``), and does what is due: a failure ends the others, and SIGKILL ends what does not end when asked.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from .._end.deadline import left, passed, sooner, until
from .._end.deferral import Deferral
from .._end.ranks import SIGKILL, SignalTo, name_running, name_stuck, signal_ranks
from .._end.watch import Watch
from .._public import public
from .asked import check_grace, check_signal, check_signal_to, check_timeout
from .descriptors import enough_descriptors
from .ending import Ending
from .hangs import Hangs
from .lines import Lined
from .reporting import Reporting
from .unclosed import Owned

if TYPE_CHECKING:
    from types import TracebackType

    from .._output.lines import RankLine
    from .._output.report import Attempt
    from .hangs import HangAsked
    from .order import Started
    from .restarts import Restarts

GRACE_SECONDS = 30.0
"""Seconds from asking ranks to end until they are killed; torchrun waits as long."""


@public
class RankGroup(Reporting, Lined, Hangs, Owned):
    """Ranks that live and die together. Leaving the ``with`` block ends those that still run, and what they started.

    The group signals, waits for and kills a rank with its whole session: all processes that descend from the rank,
    except those that call setsid themselves. It reaps no rank before the group ends. Until then the rank's number and
    that of its session stay its own, so that orphans can be found and signalled without a race on every kernel.

    Any thread may call ``stop`` and ``send_signal``. One thread waits at a time, and others wait for it; in one asyncio
    loop any number of tasks may wait. A signal handler may call every method. A group that is garbage-collected before
    it was closed is killed, with a ResourceWarning.

    ``len(group)``, ``group[local_rank]`` and ``for rank in group`` are those of ``group.ranks``.

    Attributes:
        ranks: The Popen objects, in rank order.
        files: Where each rank writes; None where the ranks have this process's output.
        job: What the ranks know about the job: their variables.
        stop_asked: The signal and the grace of the last ``stop``; None until the ranks are asked to end.
        stacks: The looks at what the ranks of this attempt did, in order: by ``dump()`` and ``launch(stacks=True)``.
        hung: The local ranks that stood still when ``on_hang`` ended this attempt; empty if it has not.
        tell_hang: A function, called with the text of each hang. The default logs it.
    """

    def __init__(
        self,
        started: Started,
        *,
        resources: ExitStack,
        keep_going: bool,
        grace: float,
        signal_to: SignalTo,
        restarts: Restarts | None,
        last: Callable[[], object] | None = None,
        stacks: bool = False,
        on_line: Callable[[RankLine], object] | None = None,
        hang: HangAsked | None = None,
    ) -> None:
        self._resources, self._restarts, self._last = resources, restarts, last
        self._keep_going, self._grace, self._signal_to = keep_going, grace, signal_to
        self._takes_stacks, self._on_line, self._loops, self._hang_asked = stacks, on_line, [], hang
        self._past: list[Attempt] = []
        self._watched: list[int] = []
        self.stop_asked: tuple[int, float | None] | None = None
        self.begin(started)
        self._closed = False
        self._note_open()

    def begin(self, started: Started) -> None:
        """Take over the ranks of an attempt."""
        guard, ranks, files = started.guard, tuple(started.ranks), started.files
        with Deferral(), enough_descriptors(ranks):
            self._watch = watch = Watch(ranks)
            if guard is not None and guard.process.pidfd is not None:
                watch.once(guard.process.pidfd, guard.warn_of_its_end)
            for descriptor in self._watched:
                watch.add(descriptor)
        self.ranks, self.files, self.job = ranks, None if files is None else tuple(files), started.job
        self._called_ns, self._templates = started.called_ns, started.templates
        self._note_birth()
        self._begin_lines()
        self._begin_hang_watch()
        self._ending = Ending(started, watch, grace=self._grace, signal_to=self._signal_to)
        if self._takes_stacks:
            self._ending.before_kill = self._look_before_kill
        if self.stop_asked is not None:  # while they were being started
            self._ending.ask(*self.stop_asked)

    def end_attempt(self) -> dict[int, str]:
        """End what ended ranks left behind, before the next attempt. Returns what is stuck: pid -> its rank."""
        if stuck := self._ending.kill_and_reap(self._look):
            return stuck
        self._end_lines()
        self._past.append(self.attempt())
        self._watch.close()
        for rank in self.ranks:
            rank._pidfd = None
        return {}

    # ---- watching ---------------------------------------------------------------------------------------------------

    def poll(self) -> tuple[int | None, ...]:
        """Return what each rank ended with, as ``Popen.returncode``, or None for a rank that runs. Does not wait."""
        self._look(0)
        return tuple(self._watch.returncodes.get(number) for number in range(len(self.ranks)))

    def wait_any(self, timeout: float | None = None) -> list[int]:
        """Wait until a rank ends. A failure ends no other rank here.

        Args:
            timeout: Seconds; None waits without end.

        Returns:
            The numbers of the ranks that have ended since the last look, in rank order. An empty list means that the
            timeout is over or that no rank is left.

        Raises:
            TimeoutError: A rank that was asked to end, and then killed, does not end.
        """
        check_timeout(timeout)
        end = until(timeout)
        news = self._watch.news
        while self._watch.running:
            due = self._look_for_hang(self._ending.do_due())
            if (ended := self._look(left(sooner(end, due)), news)) or passed(end):
                return ended
            news = self._watch.news
        return []

    def wait(self, timeout: float | None = None, *, check: bool = False) -> tuple[int, ...]:
        """Wait until every rank has ended.

        When the first rank fails, the group ends the others, unless it was launched with ``keep_going``: it sends
        SIGTERM, and after its grace SIGKILL to all that still runs. With ``max_restarts`` it then starts all ranks
        again: ``ranks``, ``files`` and ``job`` are those of the last attempt, ``report`` has all. Once the ranks are
        asked to end, it also waits for what they started, within the grace: a shell may end before its program.

        Args:
            timeout: Seconds; None waits without end.
            check: Raise if a rank has ended with another returncode than 0.

        Returns:
            What each rank ended with, as ``Popen.returncode``. Before Linux 6.15 this is 0 for a rank that other code
            has reaped (os.waitpid(-1, ...), an ignored SIGCHLD), as for ``Popen``, because its status is lost.

        Raises:
            TimeoutError: The timeout is over, or a killed rank does not end. The message names the ranks.
            RanksFailedError: A rank has failed, and ``check`` is true.
            OSError: The ranks cannot be started again, as from launch().
        """
        check_timeout(timeout)
        end = until(timeout)
        while self.advance(left(end)):
            if passed(end):
                raise TimeoutError(name_running(self.running, len(self.ranks)))
        if check:
            self.check()
        return self._all_returncodes()

    def advance(self, timeout: float | None = 0) -> bool:
        """Take one turn of ``wait``, for loops of one's own.

        Waits for a rank to end, a watched descriptor to become readable or something to be due, and does what is due.

        Args:
            timeout: Seconds to wait at most; None waits without end.

        Returns:
            Whether there is something left to wait for.

        Raises:
            TimeoutError: A killed rank does not end.
        """
        news = self._watch.news  # before the checks: news that come after them end the look below
        self._end_after_failure()
        self._look_for_hang(self._ending.do_due())
        waits = self._watch.running or self._ending.lingering
        if waits and self._look(left(sooner(until(timeout), self._due())), news):
            self._end_after_failure()
        self._ending.look_at_sessions()
        self._hand_lines()
        if self._watch.running or self._ending.lingering:
            return True
        self._end_lines()
        return self._restarts is not None and self._restarts.after_end(self)

    def watch(self, descriptor: int) -> None:
        """Have ``advance`` also return when a descriptor, as for select(2), is readable. The caller still owns it."""
        self._watch.add(descriptor)
        self._watched.append(descriptor)

    def __await__(self) -> Generator[Any, None, tuple[int, ...]]:
        """``await group`` is ``wait()`` in any asyncio loop. Cancelling it leaves the ranks as they are."""
        return self._wait_in_loop().__await__()

    async def _wait_in_loop(self) -> tuple[int, ...]:
        news = self._watch.news
        while self.advance():
            await self._watch.sleep(self._due(), news)
            news = self._watch.news
        return self._all_returncodes()

    def _look(self, timeout: float | None, news: int | None = None) -> list[int]:
        self._check_owner()
        return self._look_for_deaths(timeout, news, self._ending.cgroup_path)

    def _all_returncodes(self) -> tuple[int, ...]:
        return tuple(self._watch.returncodes[number] for number in range(len(self.ranks)))

    # ---- ending -----------------------------------------------------------------------------------------------------

    def send_signal(self, sig: int, to: SignalTo = "session") -> None:
        """Signal every rank, also those that have ended, because their children may run. This is no request to end.

        Args:
            sig: The signal.
            to: Which processes of each rank: all in its "session", its process "group", or the "rank" itself.

        Raises:
            PermissionError: This process may not signal a rank of another user. All others were signalled.
        """
        check_signal(sig)
        check_signal_to("to", to)
        self._check_owner()
        signal_ranks(self.ranks, sig, to=to)
        if to == "session":
            self._ending.tell_left_by_reaped(sig)

    @property
    def is_closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def is_restarting(self) -> bool:
        """Whether the ranks are being started again."""
        return self._restarts is not None and self._restarts.is_active

    def stop(self, sig: int = signal.SIGTERM, grace: float | None = None) -> None:
        """Ask every rank to end, and return at once. A wait, then or later, kills what outlives the grace.

        Any thread and any signal handler may call it, like ``send_signal``. ``signal_to`` of launch() says which
        processes get the signal at once. A process that ignores ``sig`` gets SIGTERM when the ranks have ended: what a
        shell starts in the background ignores SIGINT, for example.

        Args:
            sig: The signal that asks. Stopped processes are continued, so that they can act on it.
            grace: Seconds until SIGKILL; the group's own if left out. Asking again cannot make it longer.

        Raises:
            PermissionError: As from ``send_signal``.
        """
        check_signal(sig)
        check_grace(grace)
        self._check_owner()
        self.stop_asked = sig, grace  # first: an attempt that is being started looks here
        self._ending.ask(sig, grace)

    def terminate(self, grace: float | None = None) -> None:
        """End and reap every rank, with all that is in its session: SIGTERM, and SIGKILL after the grace.

        An exception that interrupts it, such as a second Ctrl-C, is raised once the ranks have been killed.

        Args:
            grace: Seconds from SIGTERM to SIGKILL; the group's own if left out.

        Raises:
            TimeoutError: A killed process does not end. The message names the process and its state.
        """
        check_grace(grace)
        with Deferral(self._watch.ring) as deferred:
            self._terminate(deferred, grace)

    def _terminate(self, deferred: Deferral, grace: float | None = None) -> None:
        try:
            if self._watch.running:
                with suppress(PermissionError):
                    self.stop(signal.SIGTERM, grace)
                self._watch.look_seldom(self.kill_at)
            deferred.deliver()
            while not passed(self.kill_at) and self.advance(left(self.kill_at)):
                deferred.deliver()
        finally:
            self._kill()

    def kill(self) -> None:
        """Kill every rank and all that is in its session, at once, and reap the ranks.

        Raises:
            TimeoutError: As from ``terminate``.
        """
        # What a signal handler raises, as Ctrl-C's does, waits until no process is left.
        with Deferral():
            self._kill()

    def _kill(self) -> None:
        self._check_owner()
        self.stop_asked = SIGKILL, 0.0
        if stuck := self._ending.kill_and_reap(self._look):
            raise TimeoutError(name_stuck(stuck))

    def close(self) -> None:
        """End what runs, as ``terminate`` does, and close descriptors, guard and cgroup. Harmless when done twice.

        If a forked copy of this process (os.fork) closes its copy of the group, or ends, nothing happens to the ranks.

        Raises:
            TimeoutError: As from ``terminate``.
        """
        if self._owner != os.getpid() or (self._is_over and self._ending.has_all_reaped):
            return
        if self._restarts is not None and self._restarts.postpone_close():
            return
        try:
            with Deferral(self._watch.ring) as deferred:
                try:
                    self._terminate(deferred)
                finally:
                    self._let_go()
        finally:
            # Last, and outside: it gives handlers back.
            if self._last is not None:
                self._last()

    def _let_go(self) -> None:
        """Close descriptors, guard, cgroup, tee and logs."""
        self._closed = True
        self._resources.callback(self._end_lines)  # before what holds the files goes
        self._watch.close()
        self._ending.let_go_of_ranks()
        self._note_over()
        self._resources.close()

    def _end_after_failure(self) -> None:
        first = self.first_failure
        if first is not None and not self.stopping and self._watch.running and not self._keep_going:
            if self._takes_stacks:
                self._look_after_failure(first)
            with suppress(PermissionError):
                self._ending.ask(signal.SIGTERM, None)

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._takes_stacks and isinstance(error, TimeoutError) and self._watch.running and not self.stopping:
            self._take_stacks("after a TimeoutError")
        self.close()

    async def __aenter__(self) -> RankGroup:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._watch.running:
                with suppress(PermissionError):
                    self.stop()
            await self
        except BaseException:
            self.kill()  # it was cancelled: there is no grace, because the loop would stand still meanwhile
            raise
        finally:
            self.close()
