"""The ranks of one job on this machine: watched at once, ended together, none left behind.

``launch`` makes a group. Whoever waits, here or in asyncio, does two things in turn: look who has ended
(``_end.watch``), and do what is due: a failure ends the others, and what was told to end and does not is killed.
"""

from __future__ import annotations

import errno
import os
import signal
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from .._end.deadline import left, passed, sooner, until
from .._end.ranks import KILL_SECONDS, SIGKILL, kill_sessions, living, name_running, name_stuck, signal_groups
from .._end.reap import reap
from .._end.watch import POLL_SECONDS, Watch
from .._public import public

if TYPE_CHECKING:
    from types import TracebackType

    from .._binding import Binding
    from .._end.cgroup import GroupCgroup
    from .._end.guard import Guard
    from .._output.failure import Failure
    from .._output.form import GroupReport
    from .._output.logs import RankFiles
    from .._output.report import Attempt
    from .._start.popen import Popen

GRACE_SECONDS = 30.0
"""How long ranks that were told to end may take until they are killed; torchrun waits as long."""

_CONTINUE = (signal.SIGCONT,) if hasattr(signal, "SIGCONT") else ()


@public
class RankGroup:
    """Ranks that live and die together. Leaving the ``with`` block ends those that still run, and what they started.

    ranks: the Popen objects, in rank order. files: where each writes; None where they have this process's output.

    A rank that has ended is not reaped before the group is: until then its number, and that of its session, is its own,
    and whatever it left behind can be found and signalled without a race on every kernel.

    ``stop`` and ``send_signal`` are for any thread. Of those that wait one does so at a time, the others behind it; in
    one asyncio loop any number of tasks may. A signal handler may call all of it. A group that nobody holds any more,
    and that was not closed, is killed, with a ResourceWarning.
    """

    def __init__(
        self,
        ranks: Sequence[Popen],
        *,
        resources: ExitStack,
        keep_going: bool,
        grace: float,
        files: Sequence[RankFiles] | None,
        cgroup: GroupCgroup | None,
        guard: Guard | None,
        called_ns: int,
        run_id: str,
    ) -> None:
        self.ranks = tuple(ranks)
        self.files = None if files is None else tuple(files)
        self._resources = resources
        self._keep_going = keep_going
        self._grace = grace
        self._cgroup = cgroup
        self._called_ns = called_ns
        self._run_id = run_id
        self._watch = Watch(self.ranks)
        if guard is not None and guard.process.pidfd is not None:
            self._watch.once(guard.process.pidfd, guard.warn_of_its_end)
        self._collected: dict[int, tuple[Any, bool]] = {}
        self._effective: dict[int, Binding | None] = {}
        self._kill_at: float | None = None
        self._give_up_at: float | None = None
        self._living: dict[int, int] | None = None
        self._lingering = False
        self._asked: set[int] = set()
        self._owner, self._closed = os.getpid(), False

    # ---- watching ---------------------------------------------------------------------------------------------------

    @property
    def running(self) -> tuple[int, ...]:
        """The ranks that have not been seen to end, by number."""
        return tuple(self._watch.running.copy())

    @property
    def returncodes(self) -> dict[int, int]:
        """What the others ended with, by number, as ``Popen.returncode``."""
        return dict(self._watch.returncodes)

    @property
    def first_failure(self) -> int | None:
        """The rank that was the first to be seen to fail; None while none has."""
        return self._watch.first_failure

    def pids(self) -> tuple[int, ...]:
        """The process ids, in rank order; each is its rank's own until the group is closed."""
        return tuple(rank.pid for rank in self.ranks)

    def poll(self) -> tuple[int | None, ...]:
        """What each rank has ended with, as ``Popen.returncode``; None for those that run. Nothing is waited for."""
        self._look(0)
        return tuple(self._watch.returncodes.get(number) for number in range(len(self.ranks)))

    def wait_any(self, timeout: float | None = None) -> list[int]:
        """Wait until a rank ends; the numbers of those that have ended since the last look, in rank order.

        A failure ends nobody here. An empty list means that ``timeout`` seconds passed or that no rank is left. Raises
        TimeoutError when a rank that was told to end, and then killed, does not end.
        """
        end = until(timeout)
        while self._watch.running:
            due = self._kill_in_time()
            if (ended := self._look(left(sooner(end, due)))) or passed(end):
                return ended
        return []

    def wait(self, timeout: float | None = None) -> tuple[int, ...]:
        """Wait until every rank has ended; what each ended with, as ``Popen.returncode``.

        The first rank that fails ends the others: SIGTERM, and SIGKILL for what still runs after the group's grace;
        unless the group was launched with ``keep_going``. When the ranks have been told to end, what runs in their
        process groups is waited for, too: the rank may be a shell that ends before the program that it runs.

        Before Linux 6.15 a rank that somebody else has waited for (os.waitpid(-1, ...), an ignored SIGCHLD) has ended
        with 0, as for ``Popen``: nobody can know.

        Raises TimeoutError, which names the ranks, after ``timeout`` seconds, and when a killed rank does not end.
        """
        end = until(timeout)
        while self.advance(left(end)):
            if passed(end):
                raise TimeoutError(name_running(self.running, len(self.ranks)))
        return self._all_returncodes()

    def advance(self, timeout: float | None = 0) -> bool:
        """One turn of ``wait``, for loops of one's own: wait at most ``timeout`` seconds for a rank to end, a watched
        descriptor to become readable or something to be due; do what is due. True while ``wait`` would go on."""
        self._end_after_failure()
        due = self._kill_in_time()
        if (self._watch.running or self._lingering) and self._look(left(sooner(until(timeout), self._linger(due)))):
            self._end_after_failure()
        asked = self._kill_at is not None and not self.killing and not passed(self._kill_at)
        self._living, self._lingering = living(self.ranks) if asked and not self._watch.running else (None, False)
        if self._lingering and signal.SIGTERM not in self._asked:
            # What a shell starts in the background ignores SIGINT, and would be waited for in vain.
            with suppress(PermissionError):
                self.stop()
        return bool(self._watch.running) or self._lingering

    def watch(self, descriptor: int) -> None:
        """Have ``advance`` return when ``descriptor`` is readable, too."""
        self._watch.add(descriptor)

    def __await__(self) -> Generator[Any, None, tuple[int, ...]]:
        """``await group`` is ``wait()`` in any asyncio loop. Cancelling it leaves the ranks as they are."""
        return self._wait_in_loop().__await__()

    async def _wait_in_loop(self) -> tuple[int, ...]:
        while self.advance():
            await self._watch.sleep(self._linger(self._due))
        return self._all_returncodes()

    def _look(self, timeout: float | None) -> list[int]:
        self._check_owner()
        return self._watch.look(timeout)

    def _linger(self, due: float | None) -> float | None:
        """When to look again: nothing tells of the end of what the ranks have started."""
        return sooner(due, until(POLL_SECONDS)) if self._lingering else due

    def _all_returncodes(self) -> tuple[int, ...]:
        return tuple(self._watch.returncodes[number] for number in range(len(self.ranks)))

    # ---- ending -----------------------------------------------------------------------------------------------------

    def send_signal(self, sig: int) -> None:
        """Signal the process group of every rank, also of those that have ended: their children may run.

        Raises PermissionError, after the others have been signalled, when a rank may not be signalled: it runs as
        another user.
        """
        self._check_owner()
        signal_groups(self.ranks, sig)

    @property
    def stopping(self) -> bool:
        """Whether the ranks have been told to end."""
        return self._kill_at is not None

    @property
    def killing(self) -> bool:
        """Whether those that still ran then have been killed, because they had not ended in time."""
        return self._give_up_at is not None

    @property
    def kill_at(self) -> float | None:
        """When those that still run are killed (time.monotonic()); None where they have not been told to end."""
        return self._kill_at

    def stop(self, sig: int = signal.SIGTERM, grace: float | None = None) -> None:
        """Ask every rank to end, and return at once. Whoever waits, then or later, kills what still runs ``grace``
        seconds (the group's own if left out) after that. Who asks again cannot make it longer.

        For any thread and for signal handlers, as ``send_signal``, whose errors it raises.
        """
        self._asked.add(sig)
        self._kill_at = sooner(self._kill_at, until(self._grace if grace is None else grace))
        self._watch.ring()
        self._check_owner()
        # One that is stopped does not act on it before it is continued.
        signal_groups(self.ranks, sig, *_CONTINUE)

    def terminate(self, grace: float | None = None) -> None:
        """End every rank and all that is in its session: SIGTERM, at most ``grace`` seconds (the group's own if left
        out), SIGKILL. The ranks are reaped.

        Raises TimeoutError, which names the process and its state, when one does not end when it is killed. An
        exception that interrupts it, as a second Ctrl-C does, comes when the ranks have been killed.
        """
        try:
            if self._watch.running:
                with suppress(PermissionError):
                    self.stop(signal.SIGTERM, grace)
            while not passed(self._kill_at) and self.advance(left(self._kill_at)):
                pass
        finally:
            self.kill()

    def kill(self) -> None:
        """As ``terminate``, with SIGKILL alone."""
        try:
            stuck = self._kill_and_reap()
        except BaseException:
            # What a signal handler raises, as Ctrl-C's does, waits until nobody is left.
            self._kill_and_reap()
            raise
        if stuck:
            raise TimeoutError(name_stuck(stuck))

    def close(self) -> None:
        """End what runs, as ``terminate``, and let go of descriptors, guard and cgroup. Harmless when done twice.

        A forked copy of this process (os.fork) that closes its copy of the group, or ends, does nothing to the ranks.
        """
        reaped = all(rank.returncode is not None for rank in self.ranks)
        if self._owner != os.getpid() or (self._closed and reaped):
            return
        try:
            self.terminate()
        finally:
            self._closed = True
            self._watch.close()
            for rank in self.ranks:
                if rank.returncode is not None:
                    rank._pidfd = None
            self._resources.close()

    def __del__(self, getpid: Callable[[], int] = os.getpid, warn: Callable[..., None] = warnings.warn) -> None:
        if getattr(self, "_closed", True) or self._owner != getpid():
            return
        try:
            self.kill()
        finally:
            self.close()
            warn(f"a group of ranks was not closed: pids {self.pids()}", ResourceWarning, source=self)

    def _check_owner(self) -> None:
        if self._owner != os.getpid():
            raise ChildProcessError(
                errno.ECHILD, f"the ranks are children of process {self._owner}, of which this is a forked copy"
            )

    @property
    def _due(self) -> float | None:
        """When the next thing is to be done: to kill, or to give up."""
        return self._kill_at if self._give_up_at is None else self._give_up_at

    def _end_after_failure(self) -> None:
        if self.first_failure is not None and self._kill_at is None and self._watch.running and not self._keep_going:
            with suppress(PermissionError):
                self.stop()

    def _kill_in_time(self) -> float | None:
        """Kill when the grace is over; the time at which the next thing is due."""
        if self._give_up_at is None and passed(self._kill_at):
            self._kill_running()
        if self._watch.running and passed(self._give_up_at):
            raise TimeoutError(name_stuck(self._stuck()))
        return self._due

    def _kill_running(self) -> None:
        """SIGKILL to every process group. Whoever waits gives up in a while."""
        self._give_up_at = self._give_up_at or until(KILL_SECONDS)
        self._watch.ring()
        if self._cgroup is not None:
            self._cgroup.kill()
        with suppress(PermissionError):
            self.send_signal(SIGKILL)

    def _kill_and_reap(self) -> dict[int, str]:
        """The end, in time; who is left then, by pid, and whose it is."""
        self._check_owner()
        if self._watch.running:
            self._kill_running()
        end = (self._give_up_at or time.monotonic() + KILL_SECONDS) - 1.0
        while self._watch.running and not passed(end):
            self._look(left(end))
        # A second at least is for the sessions: a rank that does not end must not keep the others' children alive.
        numbered, codes = dict(enumerate(self.ranks)), self._watch.returncodes
        stuck = kill_sessions(numbered, codes, 1.0 + (left(end) or 0), self._living)
        if self._cgroup is not None:
            self._cgroup.kill()
            if not self._cgroup.wait_empty(1.0 + (left(end) or 0)):
                stuck.update(dict.fromkeys(self._cgroup.pids(), "the cgroup"))
        for number, rank in numbered.items():
            if (collected := reap(rank, codes.get(number))) is not None:
                self._collected[number] = collected
        self._look(0)
        return {**stuck, **self._stuck()}

    def _stuck(self) -> dict[int, str]:
        return {rank.pid: f"rank {number}" for number, rank in self._watch.running.copy().items()}

    # ---- telling ----------------------------------------------------------------------------------------------------

    def report(self) -> GroupReport:
        """What was asked, what took effect, when each rank started and ended, and what it used, as plain data.

        What a rank is bound to can be read while it runs only: the first report, or ``note_effective``, keeps it.
        """
        from .._output.report import group_report

        command: Any = self.ranks[0].args
        return group_report([self.attempt()], command=command, nprocs=len(self.ranks), run_id=self._run_id)

    def attempt(self) -> Attempt:
        """The same, as one of several attempts that a report is made of."""
        from .._output.report import attempt

        self.note_effective()
        return attempt(
            self.ranks,
            called_ns=self._called_ns,
            exited_ns=self._watch.exited_ns,
            returncodes=self._watch.returncodes,
            effective=self._effective,
            collected=self._collected,
        )

    def note_effective(self) -> None:
        """Read from the kernel what each running rank is bound to, for ``report``."""
        for number, rank in self._watch.running.copy().items():
            if self._effective.get(number) is None:
                self._effective[number] = rank.binding_report.effective

    def failures(self) -> list[Failure]:
        """The ranks that have failed, with what is known of each; first the one whose failure came first."""
        from .._output.failure import failures

        return failures(self.ranks, self._watch.returncodes, self._watch.exited_ns, self.files)

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            self.kill()  # it was cancelled: no time is left for a grace, in which the loop would stand still
            raise
        finally:
            self.close()
