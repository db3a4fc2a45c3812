"""The ranks of one job on this machine: watched at once, ended together, none left behind.

``launch`` in _launch.py makes a group. Whoever waits, here or in asyncio, does two things in turn: look who has ended
(_watch.py), and do what is due: a failure ends the others, and what was told to end and does not is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from ._sessions import describe_stuck, kill_members
from ._watch import POLL_SECONDS, Watch, left, passed, sooner, until

if TYPE_CHECKING:
    import asyncio
    from types import TracebackType

    from ._binding import Binding
    from ._cgroup import GroupCgroup
    from ._failure import Failure
    from ._logs import RankFiles
    from ._popen import Popen
    from ._report import Attempt, GroupReport

_KILL = signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM

GRACE_SECONDS = 30.0
"""How long ranks that were told to end may take until they are killed; torchrun waits as long."""

KILL_SECONDS = 10.0
"""How long a killed process may take to be gone; one in uninterruptible sleep may never be."""


class RankGroup:
    """Ranks that live and die together. Leaving the ``with`` block ends those that still run, and what they started.

    ranks: the Popen objects, in rank order. files: where each writes; None where they have this process's output.
    first_failure: the rank that was the first to be seen to fail, None while none has.

    A rank that has ended is not reaped before the group is: until then its number, and that of its session, is its own,
    and whatever it left behind can be found and signalled without a race on every kernel.

    One thread at a time may wait; ``send_signal`` is for any thread.
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
        called_ns: int,
        run_id: str,
    ) -> None:
        self.ranks = tuple(ranks)
        self.files = None if files is None else tuple(files)
        self.first_failure: int | None = None
        self._resources = resources
        self._keep_going = keep_going
        self._grace = grace
        self._cgroup = cgroup
        self._called_ns = called_ns
        self._run_id = run_id
        self._watch = Watch(self.ranks)
        self._collected: dict[int, tuple[Any, bool]] = {}
        self._effective: dict[int, Binding | None] = {}
        self._kill_at: float | None = None
        self._give_up_at: float | None = None

    # ---- watching ---------------------------------------------------------------------------------------------------

    @property
    def running(self) -> tuple[int, ...]:
        """The ranks that have not been seen to end, by number."""
        return tuple(self._watch.running)

    @property
    def returncodes(self) -> dict[int, int]:
        """What the others ended with, by number, as ``Popen.returncode``."""
        return dict(self._watch.returncodes)

    def pids(self) -> tuple[int, ...]:
        """The process ids, in rank order; each is its rank's own until the group is closed."""
        return tuple(rank.pid for rank in self.ranks)

    def poll(self) -> tuple[int | None, ...]:
        """What each rank has ended with, as ``Popen.returncode``; None for those that run. Nothing is waited for."""
        self._look(0)
        return tuple(self._watch.returncodes.get(number) for number in range(len(self.ranks)))

    def wait_any(self, timeout: float | None = None) -> list[int]:
        """Wait until a rank ends; the numbers of those that have ended since the last look, in rank order.

        Ends nobody, whatever a rank ended with. An empty list means that ``timeout`` seconds passed or that no rank is
        left.
        """
        end = until(timeout)
        while self._watch.running:
            if (ended := self._look(left(end))) or passed(end):
                return ended
        return []

    def wait(self, timeout: float | None = None) -> tuple[int, ...]:
        """Wait until every rank has ended; what each ended with, as ``Popen.returncode``.

        The first rank that fails ends the others: SIGTERM, and SIGKILL for what still runs after the group's grace;
        unless the group was launched with ``keep_going``.

        Raises TimeoutError, which names the ranks, after ``timeout`` seconds, and when a killed rank does not end.
        """
        end = until(timeout)
        while self.advance(left(end)):
            if passed(end):
                some = ", ".join(map(str, self.running[:20])) + (", ..." if len(self.running) > 20 else "")
                raise TimeoutError(f"{len(self.running)} of {len(self.ranks)} ranks still run: {some}")
        return self._all_returncodes()

    def advance(self, timeout: float | None = 0) -> bool:
        """One turn of ``wait``, for loops of one's own: wait at most ``timeout`` seconds for a rank to end, a watched
        descriptor to become readable or something to be due; do what is due. True while ranks run."""
        due = self._do_what_is_due()
        if self._watch.running and self._look(sooner(timeout, left(due))):
            self._do_what_is_due()
        return bool(self._watch.running)

    def watch(self, descriptor: int) -> None:
        """Have ``advance`` return when ``descriptor`` is readable, too."""
        self._watch.add(descriptor)

    def __await__(self) -> Generator[Any, None, tuple[int, ...]]:
        """``await group`` is ``wait()`` in any asyncio loop. Cancelling it leaves the ranks as they are."""
        return self._wait_in_loop().__await__()

    async def _wait_in_loop(self) -> tuple[int, ...]:
        import asyncio

        loop = asyncio.get_running_loop()
        while self.advance():
            due, descriptor = self._do_what_is_due(), self._watch.fileno()
            if descriptor is None:
                await asyncio.sleep(POLL_SECONDS)
                continue
            woken = loop.create_future()
            loop.add_reader(descriptor, _wake, woken)
            timer = None if due is None else loop.call_later(max(0.0, due - time.monotonic()), _wake, woken)
            try:
                await woken
            finally:
                loop.remove_reader(descriptor)
                if timer is not None:
                    timer.cancel()
        return self._all_returncodes()

    def _look(self, timeout: float | None) -> list[int]:
        ended = self._watch.look(timeout)
        if self.first_failure is None:
            self.first_failure = next((number for number in ended if self._watch.returncodes[number]), None)
        return ended

    def _all_returncodes(self) -> tuple[int, ...]:
        return tuple(self._watch.returncodes[number] for number in range(len(self.ranks)))

    # ---- ending -----------------------------------------------------------------------------------------------------

    def send_signal(self, sig: int) -> None:
        """Signal the process group of every rank, also of those that have ended: their children may run.

        Raises PermissionError, after the others have been signalled, when a rank may not be signalled: it runs as
        another user.
        """
        refused = None
        for rank in self.ranks:
            try:
                _signal(rank, sig)
            except PermissionError as error:
                refused = error
        if refused is not None:
            raise refused

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
        """Ask every rank to end, and return at once. Whoever waits from now on kills what still runs ``grace`` seconds
        (the group's own if left out) after the first time that they were asked."""
        if self._kill_at is None:
            # From the first time on: who repeats a signal must not make it longer.
            self._kill_at = time.monotonic() + (self._grace if grace is None else grace)
        self.send_signal(sig)

    def terminate(self, grace: float | None = None) -> None:
        """End every rank and all that is in its session: SIGTERM, at most ``grace`` seconds (the group's own if left
        out), SIGKILL. The ranks are reaped.

        Raises TimeoutError, which names the process and its state, when one does not end when it is killed.
        """
        if self._watch.running:
            self.stop(signal.SIGTERM, grace)
            while self._watch.running and not passed(self._kill_at):
                self._look(left(self._kill_at))
        self.kill()

    def kill(self) -> None:
        """As ``terminate``, with SIGKILL alone."""
        if self._watch.running:
            end = self._kill_running()
            while self._watch.running and not passed(end):
                self._look(left(end))
        stuck = self._end_sessions()
        if self._cgroup is not None:
            self._cgroup.kill()
            if not self._cgroup.wait_empty(self._patience()):
                stuck.update(dict.fromkeys(self._cgroup.pids(), "the cgroup"))
        for number, rank in enumerate(self.ranks):
            self._reap(number, rank)
        if stuck:
            raise TimeoutError(_describe(stuck))

    def close(self) -> None:
        """End what runs, as ``terminate``, and let go of descriptors, guard and cgroup. Harmless when done twice.

        A KeyboardInterrupt meanwhile (a second Ctrl-C) kills, and is raised after that.
        """
        try:
            try:
                self.terminate()
            except KeyboardInterrupt:
                self.kill()
                raise
        finally:
            self._watch.close()
            self._resources.close()

    def _do_what_is_due(self) -> float | None:
        """End the others after a failure; kill when the grace is over; the time at which the next thing is due."""
        if self.first_failure is not None and self._kill_at is None and self._watch.running and not self._keep_going:
            self.stop()
        if self._give_up_at is None and passed(self._kill_at):
            self._kill_running()
        if self._watch.running and passed(self._give_up_at):
            raise TimeoutError(_describe(self._end_sessions()))
        return self._kill_at if self._give_up_at is None else self._give_up_at

    def _kill_running(self) -> float:
        """SIGKILL to every process group; the time at which whoever waits gives up, and tells who may not be killed."""
        if self._give_up_at is None:
            self._give_up_at = time.monotonic() + KILL_SECONDS
        if self._cgroup is not None:
            self._cgroup.kill()
        with suppress(PermissionError):
            self.send_signal(_KILL)
        return self._give_up_at

    def _end_sessions(self) -> dict[int, str]:
        """Kill what is left in the ranks' sessions; who does not end, by pid, and whose it is."""
        unreaped: dict[int, int] = {}
        ended = set()
        for number, rank in enumerate(self.ranks):
            if rank.returncode is None:
                unreaped[rank.pid] = number
                if number not in self._watch.running:
                    ended.add(rank.pid)
            else:
                # Somebody has waited for it: its number may be another's, and only the kernel can tell (Linux 6.9).
                with suppress(PermissionError):
                    _signal(rank, _KILL)
        stuck = kill_members(unreaped.keys(), self._patience(), ended) if unreaped else {}
        return {pid: f"rank {unreaped[session]}" for pid, session in stuck.items()}

    def _patience(self) -> float:
        """For how many seconds more what was killed is waited for."""
        return KILL_SECONDS if self._give_up_at is None else max(0.0, self._give_up_at - time.monotonic())

    def _reap(self, number: int, rank: Popen) -> None:
        """Collect a rank that has ended; one that will not end is left to the system."""
        if rank.returncode is None and hasattr(os, "wait4"):
            with rank._waitpid_lock:  # type: ignore[attr-defined]
                with suppress(ChildProcessError):
                    pid, status, usage = os.wait4(rank.pid, os.WNOHANG)
                    if pid:
                        self._collected[number] = usage, os.WCOREDUMP(status)
                        rank._handle_exitstatus(status)
        rank.poll()  # without wait4, or reaped behind our back: the class has its own way to say so

    # ---- telling ----------------------------------------------------------------------------------------------------

    def report(self) -> GroupReport:
        """What was asked, what took effect, when each rank started and ended, and what it used, as plain data.

        What a rank is bound to can be read while it runs only: the first report, or ``note_effective``, keeps it.
        """
        from ._report import group_report

        command: Any = self.ranks[0].args
        return group_report([self.attempt()], command=command, nprocs=len(self.ranks), run_id=self._run_id)

    def attempt(self) -> Attempt:
        """The same, as one of several attempts that a report is made of."""
        from ._processes import ProcessTree
        from ._report import Attempt, rank_report

        self.note_effective()
        tree = ProcessTree()
        told = []
        for number, rank in enumerate(self.ranks):
            usage, core = self._collected.get(number, (None, None))
            told.append(
                rank_report(
                    number,
                    rank,
                    called_ns=self._called_ns,
                    exited_ns=self._watch.exited_ns.get(number),
                    returncode=self._watch.returncodes.get(number),
                    effective=self._effective.get(number),
                    usage=usage,
                    core=core,
                    tree=tree,
                )
            )
        called_at = time.time() - (time.monotonic_ns() - self._called_ns) / 1e9
        return Attempt(self._called_ns, called_at, told)

    def note_effective(self) -> None:
        """Read from the kernel what each running rank is bound to, for ``report``."""
        for number, rank in self._watch.running.items():
            if self._effective.get(number) is None:
                self._effective[number] = rank.binding_report.effective

    def failures(self) -> list[Failure]:
        """The ranks that have failed, with what is known of each; first the one whose failure came first."""
        from ._failure import failures

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
        if self._watch.running:
            self.stop()
            await self
        self.close()


def _signal(rank: Popen, sig: int) -> None:
    """Signal a rank's process group; nothing when nobody is left in it."""
    with suppress(ProcessLookupError):
        if os.name == "posix":
            rank.send_signal_group(sig)
        else:
            rank.send_signal(sig)


def _describe(stuck: Mapping[int, str]) -> str:
    """For the error: who survives SIGKILL, and why."""
    return "; ".join(f"{whose}: {describe_stuck(pid)}" for pid, whose in stuck.items())


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
