"""``rankspawn run``'s attempts: it starts, watches and ends all ranks, and starts them again after a failure."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .._end.orphans import Orphans
from .._group.launch import launch
from .._ids import name_ranks
from .._output.logs import RankFiles, rank_files
from .._output.noted import noted
from .._place.glance import sets_threads
from .._start.outcome import BindingError
from .._start.unexecuted import why_unexecuted
from .colours import red
from .progress import Progress, say
from .refusals import refusals
from .reports import Reports
from .signals import EndAsked, name_of, status_of, suspend
from .stragglers import Stragglers
from .streams import shown
from .warm import template_for

if TYPE_CHECKING:
    from .._group.group import RankGroup
    from .._group.job import Job
    from .._output.failure import Failure
    from .._output.logs import LogFolder
    from .._warm.template import Template
    from .settings import RunSettings
    from .signals import Signals
    from .streams import Shown

SIGKILL = getattr(signal, "SIGKILL", None)
_TOO_MANY = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)

_MACRO = r"\$(?:local_rank\b|\{local_rank\})"
_MOMENT = 0.05
"""Seconds in which a signal that is sent to all processes of a job (Slurm) reaches the launcher behind a rank."""


def run_attempts(settings: RunSettings, folder: LogFolder, signals: Signals) -> int:
    """Start the ranks. After a failure, start them again, as often as the job allows.

    Args:
        settings: The settings of the run.
        folder: The folder of the ranks' files.
        signals: The signals that this process receives.

    Returns:
        The exit status; a negative signal number if this process must die of that signal.

    Raises:
        CommandError: The settings cannot be carried out.
        OSError: The system refuses something other than the start of a rank.
    """
    reports = Reports(settings, signals.fileno())
    job = settings.job
    try:
        lasts = job.max_restarts > 0
        with template_for(settings.warm, settings.preload, signals.raise_for_end, lasts=lasts) as template:
            while True:
                status, final = _run_attempt(settings, job, folder, signals, reports, template)
                if final:
                    return status
                for sig in signals.read():  # signals that came while there was no rank to receive them
                    if signals.asks_for_end(sig):
                        return status_of(sig)
                # If the user gave no port, each attempt takes a new one, because the last attempt's ranks may have
                # left their port in a state that refuses a listener.
                job = job._replace(restart_count=job.restart_count + 1)
                say(f"restart {job.restart_count} of {job.max_restarts}")
    except EndAsked as asked:  # while the template was importing
        say(f"{name_of(asked.sig)}: no rank was started")
        return status_of(asked.sig)
    finally:
        reports.write_last()


def _run_attempt(
    settings: RunSettings, job: Job, folder: LogFolder, signals: Signals, reports: Reports, template: Template | None
) -> tuple[int, bool]:
    """Start all ranks once and watch them end. Return the status, and whether the job ends with it."""
    streams = settings.streams
    files = None
    if folder.path:
        files = rank_files(folder.path, job.nprocs, job.restart_count, streams=any(streams.filed))
    elif streams.hidden:
        files = [RankFiles(None, None, os.devnull)] * job.nprocs
    if files is not None:
        files = streams.files(files)
    # No state line while a rank writes to the terminal itself, or by --tee: its output would end up behind that line.
    progress = Progress(streams.silent, job.first_rank)
    with shown(streams, job, files or (), folder, signals.fileno()) as tee:
        try:
            group = _launch(settings, job, files, progress, None if folder.keep else folder.path or None, template)
        except OSError as error:
            if not hasattr(error, "rank") or isinstance(error, BindingError):
                raise
            say(f"cannot start the ranks: {error}{why_unexecuted(error, settings.command[0])}")
            # As in a shell: 127 if the program does not exist, 126 if it cannot be executed.
            return 1 if error.errno in _TOO_MANY else 127 if isinstance(error, FileNotFoundError) else 126, True
        try:
            with group, noted(group.ranks):
                reports.note_bindings(group)
                for line in refusals(group, job.first_rank):
                    say(line)
                reports.write_first(group)
                stragglers = Stragglers(group, job.first_rank, settings.wait, stacks=settings.stacks)
                theirs = template.children if template is not None else set
                orphans = Orphans(lambda children: children - group.children() - theirs())
                supervision = Supervision(group, job, signals, progress, stragglers, orphans)
                supervision.run()
        finally:
            reports.add(group)
    # A job that a signal interrupted does not start again, whatever ended its ranks.
    last = supervision.interrupted or job.restart_count == job.max_restarts
    last = last or (bool(group.hung) and settings.on_hang == "end")
    return _tell_end(supervision, last=last, kept=folder.keep, tee=tee)


def _launch(
    settings: RunSettings,
    job: Job,
    files: Sequence[RankFiles] | None,
    progress: Progress,
    temporary: str | None,
    template: Template | None,
) -> RankGroup:
    with progress.starting(job.nprocs) as follow:
        return launch(
            _command_of_rank(settings.command),
            job.nprocs,
            job=job,
            bindings=settings.bindings,
            rank_env=_rank_env(settings),
            files=files,
            stdin=settings.stdin,
            guard=settings.guard,
            cgroup=settings.cgroup,
            temporary=temporary,
            keep_going=settings.keep_going,
            grace=settings.grace,
            signal_to=settings.signal_to,
            stacks=settings.stacks,
            hang_timeout=settings.hang_timeout,
            on_hang=settings.on_hang,
            progress=follow,
            warm=template or False,
        )


def _command_of_rank(command: Sequence[str]) -> list[str] | Callable[[int], list[str]]:
    """The command; if an argument contains torchrun's ${local_rank}, a function from the local rank to it."""
    with_macro = [number for number, word in enumerate(command) if number and re.search(_MACRO, word)]
    if not with_macro:
        return list(command)

    def of_rank(rank: int) -> list[str]:
        words = list(command)
        for number in with_macro:
            words[number] = re.sub(_MACRO, str(rank), words[number])
        return words

    return of_rank


def _rank_env(settings: RunSettings) -> list[dict[str, str]] | None:
    """The variables that each rank gets in addition to the job's."""
    own: list[dict[str, str]] = [{} for _ in settings.omp_threads]
    # As in torchrun, the user's own value wins.
    if not sets_threads(os.environ.get("OMP_NUM_THREADS")):
        for variables, count in zip(own, settings.omp_threads, strict=True):
            variables["OMP_NUM_THREADS"] = str(count)
    for variables, device in zip(own, settings.own_devices, strict=False):
        variables.update({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": device})
    return own if any(own) else None


class Supervision:
    """Watches the ranks of one attempt until all have ended, and carries out signals.

    Args:
        group: The ranks.
        job: Their job.
        signals: The signals that this process receives.
        progress: Shows which ranks still run.
        stragglers: Notices ranks that still run long after another ended with status 0.
        orphans: Reaps the processes that this process has adopted.

    Attributes:
        group: The ranks.
        asked: The signal that made this launcher end the ranks; None if a signal was not the cause.
        interrupted: Whether a signal asked for the end of the job, before or after a failure.
        seconds: How long the ranks had had to end when this launcher killed them.
    """

    def __init__(
        self,
        group: RankGroup,
        job: Job,
        signals: Signals,
        progress: Progress,
        stragglers: Stragglers,
        orphans: Orphans,
    ) -> None:
        self.group = group
        self.asked: int | None = None
        self.interrupted = False
        self.seconds = 0.0
        self._job, self._signals, self._progress = job, signals, progress
        self._stragglers, self._orphans = stragglers, orphans
        self._told_at: float | None = None
        self._failed = self._killing = False
        self._said = 0
        group.tell_hang = self._say_hang  # type: ignore[method-assign]

    def run(self) -> None:
        """Return when every rank has ended.

        Raises:
            TimeoutError: A rank does not end although it was killed.
        """
        self.group.watch(self._signals.fileno())
        running = True
        while running:
            try:
                due = [self._progress.state(self.group), self._stragglers.left(), self._orphans.left()]
                before = self.group.running
                running = self.group.advance(min((one for one in due if one is not None), default=None))
                self._orphans.reap()
                if self.group.stopping and self._told_at is None:
                    self._told_at = time.monotonic()
                if self.group.killing and not self._killing:
                    self._say_killing(f"the grace period is over: killing {self._named(before) or 'what is left'}")
                self._say_stacks()
                self._act(self._signals.read())
                self._note_failure(running)
                if self._stragglers.act(self._progress.say):
                    self._failed, self._told_at = True, time.monotonic()
                    self.group.stop()
            except PermissionError as error:
                # All others got the signal. The ranks that this user may not kill are named when the time is over.
                self._progress.say(f"cannot signal a rank: {error.strerror}")
        self._progress.clear()

    def _named(self, ranks: Sequence[int]) -> str:
        return name_ranks(self._job.first_rank + rank for rank in ranks)

    def _act(self, came: bytes) -> None:
        """Carry out these signals."""
        for sig in came:
            if self._signals.hands_on(sig):
                self.group.send_signal(sig, to="rank")
            elif self._signals.asks_for_suspension(sig):
                self._progress.clear()
                suspend(self.group)
            elif self._signals.asks_for_stacks(sig):
                self.group.dump(because=name_of(sig))
                self._say_stacks()
            elif self._signals.asks_for_end(sig):
                self.interrupted = True
                if sig == signal.SIGINT and self.group.stopping and self.asked_or_failed:
                    self._say_killing("killing the ranks")
                    self.group.kill()
                    self._say_stacks()
                else:
                    self._end(sig)

    @property
    def asked_or_failed(self) -> bool:
        """Whether a line on stderr already says why this launcher ends the ranks."""
        return self.asked is not None or self._failed

    def _end(self, sig: int) -> None:
        """End the ranks because of a signal."""
        if self.asked is None and (not self.group.stopping or self._is_cause(sig)):
            self.asked = sig
            self._progress.say(f"{name_of(sig)}: ending the ranks")
        if self._told_at is None:
            self._told_at = time.monotonic()
        self.group.stop(self._signals.for_ranks(sig))

    def _say_hang(self, text: str) -> None:
        self._progress.say(text)
        self._said = len(self.group.stacks)  # the text already contains what the looks found

    def _say_stacks(self) -> None:
        """Print what looks at the ranks found, except a failure's: the report of the failure contains it."""
        for look in self.group.stacks[self._said :]:
            if look is not self.group.stacks_at_failure:
                if look.folded or not look.notes:
                    self._progress.say(f"{look.because}: {look.folded or 'no rank runs'}")
                for note in look.notes:
                    self._progress.say(note)
        self._said = len(self.group.stacks)

    def _say_killing(self, text: str) -> None:
        self._killing, now = True, time.monotonic()
        self.seconds = round((self.group.killed_at or now) - (self._told_at or now), 1)
        self._progress.say(text)

    def _note_failure(self, running: bool) -> None:
        """Say once that a rank has failed, unless it died of a signal that the launcher received, too."""
        first = self.group.first_failure
        if first is None or self._failed or self.asked is not None:
            return
        if self.group.hung:
            self._failed = True  # _say_hang() has reported it
            return
        if self._signals.asks_for_end(_signal_of(self.group.returncodes[first])):
            self._act(self._signals.read(_MOMENT))
        if self.asked is None:
            self._failed = True
            if running:
                more = ": ending the others" if self.group.stopping else ""
                self._progress.say(red(f"rank {self._job.first_rank + first} has failed{more}"))

    def _is_cause(self, sig: int) -> bool:
        """Whether the first rank to fail died of the same signal, which was then sent to both."""
        first = self.group.first_failure
        return not self._failed and first is not None and _signal_of(self.group.returncodes[first]) == sig


def _signal_of(returncode: int) -> int:
    """The signal that a process, or the command of a shell (128 + signal), died of; 0 if there is none."""
    return -returncode if returncode < 0 else returncode - 128 if returncode > 128 else 0


def _tell_end(supervision: Supervision, *, last: bool, kept: bool, tee: Shown | None) -> tuple[int, bool]:
    """Report how the ranks ended. Return the status (as of ``run_attempts``), and whether the job ends with it."""
    failures = supervision.group.failures()
    asked = supervision.asked
    if asked is not None:
        failures = _unasked(failures, supervision)
    if failures:
        from .._output.failure import describe
        from .._output.recorded import pass_on

        above = "" if tee is None else tee.prefix_above(failures[0])
        say(red(describe(failures[0], failures[1:], kept=kept, shown=above).rstrip("\n")))
        theirs = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if theirs and failures[0].error is not None and last:
            try:
                others = next((failure.others for failure in failures if failure.others), "")
                pass_on(failures[0].error, failures[0].returncode, theirs, others)
            except OSError as error:
                say(f"TORCHELASTIC_ERROR_FILE: {error.strerror}: {theirs}")
    if asked is not None:
        return status_of(asked), True
    if not failures:
        return 0, True
    failed = failures[0].returncode
    # A rank that this launcher ended because it hung may still have ended with status 0.
    return (failed if failed > 0 else 128 - failed if failed else 1), last


def _unasked(failures: Sequence[Failure], supervision: Supervision) -> list[Failure]:
    """Of an interrupted job, the failures that neither the launcher's signals nor the job's own signal caused."""
    by_us = {
        failure.rank: _signal_of(failure.returncode)
        for failure in failures
        # If all processes of the job got the signal, a rank may have died of it before our own signal reached it.
        if _signal_of(failure.returncode) in {*failure.sent, supervision.asked}
    }
    forced = [rank for rank, sig in by_us.items() if sig == SIGKILL]
    if forced:
        from .._output.failure import describe_interruption

        say(describe_interruption(forced, supervision.seconds))
    return [failure for failure in failures if failure.rank not in by_us]
