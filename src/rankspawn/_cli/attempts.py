"""``rankspawn run``'s attempts: all ranks started, watched, shown and ended; and again after a failure."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .._group.launch import launch
from .._ids import format_ids
from .._output.logs import RankFiles, rank_files
from .._output.noted import noted
from .._place.glance import sets_threads
from .._start.outcome import BindingError
from .colours import red
from .program import missing_interpreter
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

_MACRO = re.compile(r"\$(?:local_rank\b|\{local_rank\})")
_MOMENT = 0.05
"""Seconds in which a signal that is sent to all processes of a job (Slurm) reaches the launcher behind a rank."""


def run_attempts(settings: RunSettings, folder: LogFolder, signals: Signals) -> int:
    """Start the ranks, and after a failure start them again, as often as the job allows.

    Args:
        settings: What was asked.
        folder: Where the ranks' files are made.
        signals: The signals that are sent to this process.

    Returns:
        The exit status; negative for a signal that this process is to die of.

    Raises:
        CommandError: What was asked cannot be done.
        OSError: The system refuses something, other than to start a rank.
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
                for sig in signals.read():  # that came when there was no rank to hand them to
                    if signals.asks_for_end(sig):
                        return status_of(sig)
                # Where no port was given, each attempt has another: the last one's ranks may have left theirs in a
                # state that refuses a listener.
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
    """Start all ranks once and watch them end; the status, and whether it is the last word."""
    streams = settings.streams
    files = None
    if folder.path:
        files = rank_files(folder.path, job.nprocs, job.restart_count, streams=any(streams.filed))
    elif streams.hidden:
        files = [RankFiles(None, None, os.devnull)] * job.nprocs
    if files is not None:
        files = streams.files(files)
    # A rank that writes to the terminal itself, or by --tee, would do so behind a line that is to be wiped out.
    progress = Progress(streams.silent, job.first_rank)
    with shown(streams, job, files or (), folder, signals.fileno()) as tee:
        try:
            group = _launch(settings, job, files, progress, None if folder.keep else folder.path or None, template)
        except OSError as error:
            if not hasattr(error, "rank") or isinstance(error, BindingError):
                raise
            say(f"cannot start the ranks: {error}{missing_interpreter(error, settings.command[0])}")
            # As a shell: 127 when the program is not there, 126 when it cannot be executed.
            return 1 if error.errno in _TOO_MANY else 127 if isinstance(error, FileNotFoundError) else 126, True
        try:
            with group, noted(group.ranks):
                reports.note_bindings(group)
                for line in refusals(group, job.first_rank):
                    say(line)
                reports.write_first(group)
                stragglers = Stragglers(group, job.first_rank, settings.wait, stacks=settings.stacks)
                supervision = Supervision(group, job, signals, progress, stragglers)
                supervision.run()
        finally:
            reports.add(group)
    # A job that somebody wanted to end is not started again, whatever it was that ended it.
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
    """The command, or a function of the local rank where an argument has torchrun's ${local_rank} in it."""
    with_macro = [number for number, word in enumerate(command) if number and _MACRO.search(word)]
    if not with_macro:
        return list(command)

    def of_rank(rank: int) -> list[str]:
        words = list(command)
        for number in with_macro:
            words[number] = _MACRO.sub(str(rank), words[number])
        return words

    return of_rank


def _rank_env(settings: RunSettings) -> list[dict[str, str]] | None:
    """The variables that each rank has beside the job's."""
    own: list[dict[str, str]] = [{} for _ in settings.omp_threads]
    # As for torchrun, what the user has set counts.
    if not sets_threads(os.environ.get("OMP_NUM_THREADS")):
        for variables, count in zip(own, settings.omp_threads, strict=True):
            variables["OMP_NUM_THREADS"] = str(count)
    for variables, device in zip(own, settings.own_devices, strict=False):
        variables.update({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": device})
    return own if any(own) else None


class Supervision:
    """Watches the ranks of one attempt until all have ended, and does what signals ask.

    Args:
        group: The ranks.
        job: What they were told.
        signals: The signals that are sent to this process.
        progress: Where it is shown who still runs.
        stragglers: Ranks that go on when another has ended well.

    Attributes:
        group: The ranks.
        asked: The signal because of which the ranks were told to end; None where none was the cause.
        interrupted: Whether a signal has come that asks for the end, be it after a failure.
        seconds: How long they had had to end by then.
    """

    def __init__(
        self, group: RankGroup, job: Job, signals: Signals, progress: Progress, stragglers: Stragglers
    ) -> None:
        self.group = group
        self.asked: int | None = None
        self.interrupted = False
        self.seconds = 0.0
        self._job, self._signals, self._progress, self._stragglers = job, signals, progress, stragglers
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
                due = [self._progress.state(self.group), self._stragglers.left()]
                before = self.group.running
                running = self.group.advance(min((one for one in due if one is not None), default=None))
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
                # All others have been signalled. Whoever is not ours to kill is named when the time is over.
                self._progress.say(f"cannot signal a rank: {error.strerror}")
        self._progress.clear()

    def _named(self, ranks: Sequence[int]) -> str:
        word = "ranks " if len(ranks) > 1 else "rank " if ranks else ""
        return word + format_ids([self._job.first_rank + rank for rank in ranks])

    def _act(self, came: bytes) -> None:
        """Do what these signals ask."""
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
        """Whether it has been said why the ranks are told to end."""
        return self.asked is not None or self._failed

    def _end(self, sig: int) -> None:
        """Tell the ranks to end because of a signal."""
        if self.asked is None and (not self.group.stopping or self._is_cause(sig)):
            self.asked = sig
            self._progress.say(f"{name_of(sig)}: ending the ranks")
        if self._told_at is None:
            self._told_at = time.monotonic()
        self.group.stop(self._signals.for_ranks(sig))

    def _say_hang(self, text: str) -> None:
        self._progress.say(text)
        self._said = len(self.group.stacks)  # the text has what its looks have found

    def _say_stacks(self) -> None:
        """Say what looks at the ranks have found; that of a failure stands in the text about it."""
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
        """Say, once, that a rank has failed; not of one that died of what the launcher was sent, too."""
        first = self.group.first_failure
        if first is None or self._failed or self.asked is not None:
            return
        if self.group.hung:
            self._failed = True  # the hang has been said
            return
        if self._signals.asks_for_end(_signal_of(self.group.returncodes[first])):
            self._act(self._signals.read(_MOMENT))
        if self.asked is None:
            self._failed = True
            if running:
                more = ": ending the others" if self.group.stopping else ""
                self._progress.say(red(f"rank {self._job.first_rank + first} has failed{more}"))

    def _is_cause(self, sig: int) -> bool:
        """Whether the first failure is a rank that died of the same signal a moment ago: it was sent to both."""
        first = self.group.first_failure
        return not self._failed and first is not None and _signal_of(self.group.returncodes[first]) == sig


def _signal_of(returncode: int) -> int:
    """The signal that a process died of, or by a shell's status that its command did; 0 where there is none."""
    return -returncode if returncode < 0 else returncode - 128 if returncode > 128 else 0


def _tell_end(supervision: Supervision, *, last: bool, kept: bool, tee: Shown | None) -> tuple[int, bool]:
    """Say how the ranks ended; the status (as of ``run_attempts``), and whether it is the job's."""
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
    # A rank that had to be ended because it stood still may have ended with 0 then.
    return (failed if failed > 0 else 128 - failed if failed else 1), last


def _unasked(failures: Sequence[Failure], supervision: Supervision) -> list[Failure]:
    """Of an interrupted job: those that ended neither as they were told to nor because the launcher killed them."""
    by_us = {
        failure.rank: _signal_of(failure.returncode)
        for failure in failures
        # Where the signal was sent to all processes of the job, a rank may have died of it before it was sent ours.
        if _signal_of(failure.returncode) in {*failure.sent, supervision.asked}
    }
    forced = [rank for rank, sig in by_us.items() if sig == SIGKILL]
    if forced:
        from .._output.failure import describe_interruption

        say(describe_interruption(forced, supervision.seconds))
    return [failure for failure in failures if failure.rank not in by_us]
