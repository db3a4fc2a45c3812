"""``rankspawn run``'s attempts: all ranks started, watched, shown and ended; and again after a failure."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from .._group.launch import launch
from .._output.failure import describe, pass_on
from .._output.logs import rank_files
from .._start.outcome import BindingError
from .options import CommandError
from .progress import Progress, say
from .refusals import refusals
from .reports import Reports
from .settings import usable_port
from .signals import asks_for_suspension, read_signals, suspend

if TYPE_CHECKING:
    import socket

    from .._group.group import RankGroup
    from .._group.job import Job
    from .._output.logs import LogFolder, RankFiles
    from .settings import RunSettings

_TOO_MANY = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def run_attempts(settings: RunSettings, folder: LogFolder, signals: socket.socket) -> int:
    """Start the ranks, and after a failure start them again, as often as the job allows; the exit status."""
    reports = Reports(settings, signals.fileno())
    job = settings.job
    try:
        while True:
            status, final = _run_attempt(settings, job, folder, signals, reports)
            if final:
                return status
            for sig in read_signals(signals):  # that came when there was no rank to hand them to
                if not asks_for_suspension(sig):
                    return 128 + sig
            # Another port: the last attempt's ranks may have left theirs in a state that refuses a listener.
            port = usable_port(job.master_addr) if settings.new_port else job.master_port
            job = job._replace(restart_count=job.restart_count + 1, master_port=port)
            say(f"restart {job.restart_count} of {job.max_restarts}")
    finally:
        reports.write_last()


def _run_attempt(
    settings: RunSettings, job: Job, folder: LogFolder, signals: socket.socket, reports: Reports
) -> tuple[int, bool]:
    """One start of all ranks: the exit status, and whether it is the last word."""
    logged = settings.log_dir is not None
    files = rank_files(folder.path, job.nprocs, job.restart_count, streams=logged or settings.tee)
    # A rank that writes to the terminal itself, or by --tee, would do so behind a line that is to be wiped out.
    progress = Progress(logged and not settings.tee, job.first_rank)
    with _shown(settings, job, files, folder, signals):
        try:
            group = _launch(settings, job, files, progress)
        except OSError as error:
            if not hasattr(error, "rank") or isinstance(error, BindingError):
                raise
            say(f"cannot start the ranks: {error}")
            # As a shell: 127 when the program is not there, 126 when it cannot be executed.
            return 1 if error.errno in _TOO_MANY else 127 if isinstance(error, FileNotFoundError) else 126, True
        try:
            with group:
                for line in refusals(group, job.first_rank):
                    say(line)
                reports.write_first(group)
                asked, signalled = _supervise(group, job, signals, progress)
        finally:
            reports.add(group)
    # A job that somebody wanted to end is not started again, whatever it was that ended it.
    last = signalled or job.restart_count == job.max_restarts
    return _tell_end(group, job, asked, last=last, kept=folder.keep)


def _launch(settings: RunSettings, job: Job, files: Sequence[RankFiles], progress: Progress) -> RankGroup:
    with progress.starting(job.nprocs) as follow:
        return launch(
            list(settings.command),
            job.nprocs,
            job=job,
            bindings=settings.bindings,
            # As for torchrun, what the user has set counts.
            rank_env=None
            if "OMP_NUM_THREADS" in os.environ
            else [{"OMP_NUM_THREADS": str(count)} for count in settings.omp_threads],
            files=files,
            guard=settings.guard,
            cgroup=settings.cgroup,
            keep_going=settings.keep_going,
            grace=settings.grace,
            progress=follow,
        )


def _supervise(group: RankGroup, job: Job, signals: socket.socket, progress: Progress) -> tuple[int | None, bool]:
    """Watch until every rank has ended; the signal because of which they were told to end, and whether any came."""
    asked: int | None = None
    failed = killing = signalled = False
    group.watch(signals.fileno())
    running = True
    while running:
        try:
            running = group.advance(progress.ending(group))
            if running and not failed and asked is None and group.first_failure is not None:
                failed = True
                progress.say(
                    f"rank {job.first_rank + group.first_failure} has failed"
                    + (": ending the others" if group.stopping else "")
                )
            if group.killing and not killing:
                killing = True
                progress.say("what did not end in time is killed")
            for sig in read_signals(signals):
                if asks_for_suspension(sig):
                    progress.clear()
                    suspend(group)
                    continue
                signalled = True
                if sig == signal.SIGINT and group.stopping:
                    killing = True
                    progress.say("killing the ranks")
                    group.kill()
                else:
                    if not group.stopping:
                        asked = sig
                        progress.say(f"{signal.Signals(sig).name}: ending the ranks")
                    group.stop(sig)
        except PermissionError as error:
            # All others have been signalled. Whoever is not ours to kill is named when the time is over.
            progress.say(f"a rank may not be signalled: {error.strerror}")
    progress.clear()
    return asked, signalled


@contextmanager
def _shown(
    settings: RunSettings, job: Job, files: Sequence[RankFiles], folder: LogFolder, signals: socket.socket
) -> Iterator[None]:
    """Show what the ranks write, for --tee."""
    if not settings.tee:
        yield
        return
    from .._output.tee import show

    with ExitStack() as showing:
        try:
            showing.enter_context(show(files, job.first_rank, settings.shown_ranks, folder, signals.fileno()))
        except RuntimeError as error:
            raise CommandError(f"--tee: {error}") from error
        yield


def _tell_end(group: RankGroup, job: Job, asked: int | None, *, last: bool, kept: bool) -> tuple[int, bool]:
    """Say how the ranks ended; the exit status as a shell says it, and whether it is the job's."""
    failures = group.failures()
    if asked is not None:
        # Who ended as it was told to has nothing to tell.
        failures = [failure for failure in failures if failure.returncode not in (-asked, 128 + asked)]
    if failures:
        say(describe(failures[0], failures[1:], kept=kept, first_rank=job.first_rank).rstrip("\n"))
        theirs = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if theirs and failures[0].error is not None and last:
            try:
                pass_on(failures[0].error, failures[0].returncode, theirs)
            except OSError as error:
                say(f"TORCHELASTIC_ERROR_FILE: {error.strerror}: {theirs}")
    if asked is not None:
        return 128 + asked, True
    if not failures:
        return 0, True
    failed = failures[0].returncode
    return (failed if failed > 0 else 128 - failed), last
