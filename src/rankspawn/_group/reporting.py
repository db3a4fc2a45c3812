"""What a group knows about its ranks: their pids, how they ended, why they failed, and a report of it all."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, overload

# Not when a rank fails: no descriptor may be left then to read the module.
from .._end.deaths import Deaths

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .._binding import Binding
    from .._canvas import Svg
    from .._end.watch import Watch
    from .._output.failure import Failure
    from .._output.form import GroupReport, TemplateReport
    from .._output.logs import RankFiles
    from .._output.report import Attempt
    from .._stacks.take import Stacks
    from .._start.popen import Popen
    from .ending import Ending
    from .job import Job


_REQUESTS = {
    code for sig in ("SIGINT", "SIGTERM", "SIGHUP") if (n := getattr(signal, sig, 0)) for code in (-n, 128 + n)
}
"""The returncodes of a rank that was asked to end, or of a shell that reports so."""

_MOMENT = 0.25  # seconds


class Reporting:
    """The part of a RankGroup that changes nothing. The group makes the attributes.

    Attributes:
        ranks: As in RankGroup, like the two below.
        files: Where each rank writes.
        job: What the ranks know about the job.
        stacks: The looks at what the ranks did: those of ``dump()``, and the group's own with ``launch(stacks=True)``.
        stacks_at_failure: The look that was taken when the first rank had failed; None if there is none.
    """

    ranks: tuple[Popen, ...]
    files: tuple[RankFiles, ...] | None
    job: Job
    _watch: Watch
    _ending: Ending
    _past: list[Attempt]
    _called_ns: int
    _closed: bool
    _templates: Sequence[TemplateReport]

    def _note_birth(self) -> None:
        """Note what ranks inherit, when they have just been started."""
        self._why: dict[int, str] = {}
        self._deaths: Deaths | None = None
        self.stacks: list[Stacks] = []
        self.stacks_at_failure: Stacks | None = None
        self.hung: tuple[int, ...] = ()
        self._hang_reason = ""
        self._effective: dict[int, Binding | None] = {}
        self._inherited = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None

    def __len__(self) -> int:
        return len(self.ranks)

    def __iter__(self) -> Iterator[Popen]:
        return iter(self.ranks)

    @overload
    def __getitem__(self, local_rank: int) -> Popen: ...
    @overload
    def __getitem__(self, local_rank: slice) -> tuple[Popen, ...]: ...
    def __getitem__(self, local_rank: int | slice) -> Popen | tuple[Popen, ...]:
        return self.ranks[local_rank]

    def __repr__(self) -> str:
        count, running = len(self.ranks), len(self._watch.running)
        state = [f"{running} run" if running else "all have ended"]
        if 0 < running == count:
            state = ["all run"]
        if self.first_failure is not None:
            state.append(f"rank {self.job.first_rank + self.first_failure} failed first")
        if self._closed:
            state.append("closed")
        elif running and self._ending.kill_at is not None:
            state.append("being killed" if self._ending.give_up_at is not None else "asked to end")
        return f"<RankGroup of {count} rank{'s' * (count > 1)}: {', '.join(state)}>"

    @property
    def running(self) -> tuple[int, ...]:
        """The ranks that have not been seen to end, by number."""
        return tuple(self._watch.running.copy())

    @property
    def returncodes(self) -> dict[int, int]:
        """What the ended ranks ended with, by number, as ``Popen.returncode``."""
        return dict(self._watch.returncodes)

    @property
    def first_failure(self) -> int | None:
        """The first rank that was seen to fail, or one that stood still in a hang that was ended; else None."""
        return self.hung[0] if self.hung else self._watch.first_failure

    @property
    def stopping(self) -> bool:
        """Whether the ranks have been asked to end."""
        return self._ending.kill_at is not None

    @property
    def killing(self) -> bool:
        """Whether ranks have been killed because they had not ended in time."""
        return self._ending.give_up_at is not None

    @property
    def kill_at(self) -> float | None:
        """When the ranks that still run will be killed (time.monotonic()); None until they are asked to end."""
        return self._ending.kill_at

    @property
    def killed_at(self) -> float | None:
        """When they were killed, on the same clock; None if they were not."""
        return self._ending.killed_at

    def pids(self) -> tuple[int, ...]:
        """The process ids, in rank order; each is its rank's own until the group is closed."""
        return tuple(rank.pid for rank in self.ranks)

    def children(self) -> set[int]:
        """The children of this process that the group waits for by itself: the ranks, and the guard if there is one.

        A program that runs as the first process of a container, and reaps orphans there, leaves these to the group.
        """
        guard = self._ending.guard_pid
        return {*self.pids(), *(() if guard is None else (guard,))}

    def failures(self) -> list[Failure]:
        """The ranks that have failed, with what is known of each; the first to fail comes first."""
        if self.first_failure is None:
            return []
        from .._output.failure import failures

        return failures(
            self.ranks,
            self._watch.returncodes,
            self._watch.exited_ns,
            self.files,
            self._ending.sent,
            self.job.first_rank,
            others="" if self.stacks_at_failure is None else self.stacks_at_failure.folded,
            why=self._reasons(),
            called_ns=self._called_ns,
            hung=self.hung,
        )

    def _reasons(self) -> dict[int, str]:
        """Why ranks have ended, as far as it is known, by local rank."""
        return {**self._why, **dict.fromkeys(self.hung, self._hang_reason)}

    def _look_for_deaths(self, timeout: float | None, news: int | None, cgroup: str | None) -> list[int]:
        """See which ranks have ended, and why, while the kernel still knows it.

        The kernel's counters are read before any rank dies, but not before the ranks have lived a moment, so that short
        jobs do not pay for it. Until then no look takes longer than that moment.
        """
        if self._deaths is None and self._watch.running and not sys.is_finalizing():
            young = _MOMENT - (time.monotonic_ns() - self._called_ns) / 1e9
            if young > 0:
                timeout = young if timeout is None else min(timeout, young)
            else:
                self._deaths = self._new_deaths(cgroup)
        ended = self._watch.look(timeout, news)
        codes = {number: code for number in ended if (code := self._watch.returncodes[number])}
        if codes and not sys.is_finalizing():  # while finalizing, nothing can be imported, and no caller will ask
            if self._deaths is None:
                self._deaths = self._new_deaths(cgroup, counts=not {-9, 137}.intersection(codes.values()))
            sent = self._ending.sent
            dead = {one: (self.ranks[one], code, sent.get(one, ())) for one, code in codes.items()}
            self._why |= self._deaths.why(dead)
        return ended

    def _new_deaths(self, cgroup: str | None, *, counts: bool = True) -> Deaths:
        return Deaths(self._called_ns, cgroup, counts=counts)

    def dump(self, seconds: float = 2.0, *, because: str = "asked for") -> Stacks:
        """Take the stacks of all ranks and of what they started, from outside: no process gets a signal.

        The standard library reads Python frames if rank and launcher run the same version of Python, 3.14 or newer;
        else py-spy does (``pip install "rankspawn[stacks]"``). For everything else the look has what the kernel says.
        If ranks have log files, the text is appended to ``attempt_N/stacks.txt`` beside their folders.

        Args:
            seconds: How long it may take.
            because: The reason for the look, in words; it is part of the text.

        Returns:
            The look. ``str()`` of it is the whole text, and ``folded`` is one line. ``stacks`` and ``report()`` keep
            it.
        """
        return self._take_stacks(because, seconds=seconds)

    def _look_after_failure(self, first: int) -> None:
        """Look at the others, unless the first was asked to end from outside, which says nothing about the others."""
        if self.stacks_at_failure is None and self.returncodes[first] not in _REQUESTS:
            because = f"rank {self.job.first_rank + first} has failed"
            self.stacks_at_failure = self._take_stacks(because, running=True)

    def _look_before_kill(self) -> None:
        self._take_stacks("before SIGKILL")

    def _take_stacks(self, because: str, *, running: bool = False, seconds: float = 2.0) -> Stacks:
        """Look at all ranks, or at those that run, and keep what was seen."""
        found = self._look_at(because, running=running, seconds=seconds)
        self._keep(found)
        return found

    def _look_at(self, because: str, *, running: bool = False, seconds: float = 2.0) -> Stacks:
        from .._stacks.take import take

        numbers = self.running if running else range(len(self.ranks))
        return take({self.ranks[one].pid: self.job.first_rank + one for one in numbers}, because, seconds)

    def _keep(self, found: Stacks) -> None:
        """Keep what was seen, and add it to the file beside the logs."""
        from .._stacks.take import add_to

        logs = None if self.files is None else self.files[0].stderr
        if logs is not None:
            add_to(logs.parent.with_name("stacks.txt"), found)
        self.stacks.append(found)

    def check(self) -> None:
        """Raise if a rank has been seen to fail. Call it after ``await group``, or between looks in a loop of your own.

        Raises:
            RanksFailedError: It has all ranks that have failed so far, and its text says which, how and why.
        """
        if self.first_failure is not None:
            from .._output.failure import RanksFailedError

            failed = self.failures()
            raise RanksFailedError(failed, self.ranks[failed[0].local_rank].args)

    def report(self) -> GroupReport:
        """Report what was asked, what took effect, when each rank started and ended, and what it used, as plain data.

        The binding of a rank can be read only while the rank runs: the first report, or ``note_effective``, keeps it.
        For a rank that has ended before, the report has the binding that it was born with.
        """
        from .._output.report import group_report

        command: Any = self.ranks[0].args
        return group_report(
            [*self._past, self.attempt()], command=command, nprocs=len(self.ranks), run_id=self.job.run_id
        )

    def timeline(self) -> Svg:
        """Draw the report: a row for each rank, with its start, its run, its end and its binding.

        Returns:
            The text of an SVG file, which a notebook shows as a picture.
        """
        from .._output.timeline import timeline_svg

        return timeline_svg(self.report())

    def attempt(self) -> Attempt:
        """The present attempt, as one of several that a report is made of."""
        from .._output.report import attempt

        self.note_effective()
        return attempt(
            self.ranks,
            called_ns=self._called_ns,
            exited_ns=self._watch.exited_ns,
            returncodes=self._watch.returncodes,
            effective=self._effective,
            collected=self._ending.collected,
            stacks=self.stacks,
            templates=self._templates,
            why=self._reasons(),
        )

    def note_effective(self) -> None:
        """Read from the kernel what each running rank is bound to, for ``report``.

        For a rank that has ended before the first look, it is the binding that the rank was born with.
        """
        running = self._watch.running.copy()
        for number, rank in enumerate(self.ranks):
            if self._effective.get(number) is None:
                report = rank.binding_report
                now = report.effective if number in running else None
                self._effective[number] = now or report.at_birth(self._inherited)
