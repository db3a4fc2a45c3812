"""One start of all ranks by ``rankspawn run``: watched, shown, ended, and told of."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._binding import BindingError
from .._group.launch import launch
from .._output.failure import describe, pass_on
from .._output.logs import rank_files
from .options import CommandError
from .progress import Progress, say
from .signals import asks_for_suspension, read_signals, suspend

if TYPE_CHECKING:
    import socket

    from .._group.group import RankGroup
    from .._group.launch import Job
    from .._output.logs import LogFolder, RankFiles
    from .._output.report import Attempt
    from .._place.plan import Rank

_TOO_MANY = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def run_attempt(
    args: argparse.Namespace,
    job: Job,
    ranks: Sequence[Rank | None],
    folder: LogFolder,
    signals: socket.socket,
    attempts: list[Attempt],
) -> tuple[int, bool]:
    """One start of all ranks: the exit status, and whether it is the last word."""
    files = rank_files(folder.path, job.nprocs, job.restart_count, streams=args.log_dir is not None or args.tee)
    # A rank that writes to the terminal itself, or by --tee, would do so behind a line that is to be wiped out.
    progress = Progress(args.log_dir is not None and not args.tee, job.first_rank)
    with _tee(args, job, files, folder):
        try:
            with progress.starting(job.nprocs) as follow:
                group = launch(
                    _command(args),
                    job.nprocs,
                    job=job,
                    bindings=[None if rank is None else rank.binding for rank in ranks],
                    rank_env=[_threads(rank, job.nprocs) for rank in ranks],
                    files=files,
                    guard=args.guard,
                    cgroup=args.cgroup,
                    keep_going=args.keep_going,
                    grace=args.grace,
                    progress=follow,
                )
        except OSError as error:
            if not hasattr(error, "rank") or isinstance(error, BindingError):
                raise
            say(f"cannot start the ranks: {error}")
            # As a shell: 127 when the program is not there, 126 when it cannot be executed.
            return 1 if error.errno in _TOO_MANY else 127 if isinstance(error, FileNotFoundError) else 126, True
        try:
            with group:
                _first_reports(args, job, attempts, group)
                asked, signalled = _supervise(group, job, signals, progress)
        finally:
            if args.report or args.timeline:
                attempts.append(group.attempt())
    # A job that somebody wanted to end is not started again, whatever it was that ended it.
    last = signalled or job.restart_count == job.max_restarts
    return _tell_end(group, job, asked, last=last, kept=folder.keep)


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
def _tee(args: argparse.Namespace, job: Job, files: Sequence[RankFiles], folder: LogFolder) -> Iterator[None]:
    """Show what the ranks write, for --tee."""
    if not args.tee:
        yield
        return
    from .._output.tee import Tee, sources

    local = args.local_ranks_filter
    shown = None if local is None else {job.first_rank + rank for rank in local}
    tee = Tee(sources(files, job.first_rank), ranks=shown)
    try:
        tee.start()
    except RuntimeError as error:
        raise CommandError(f"--tee: {error}") from error
    try:
        yield
    finally:
        if tee.finish():
            folder.keep = True


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


def _threads(rank: Rank | None, nprocs: int) -> dict[str, str]:
    """OMP_NUM_THREADS, unless the user set it: the cores of the rank's mask; unbound, 1 for several, as torchrun."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    if rank is not None:
        return {"OMP_NUM_THREADS": str(rank.omp_threads)}
    return {"OMP_NUM_THREADS": "1"} if nprocs > 1 else {}


def _command(args: argparse.Namespace) -> list[str]:
    if args.no_python:
        return list(args.command)
    # PYTHON_EXEC as torchrun: another interpreter for the ranks.
    python = os.environ.get("PYTHON_EXEC", sys.executable)
    return [python, "-u", *(["-m"] if args.module else []), *args.command]


def _first_reports(args: argparse.Namespace, job: Job, attempts: Sequence[Attempt], group: RankGroup) -> None:
    """Write the reports as soon as the ranks run: what cannot be written is to be known before their work is done."""
    if not (args.report or args.timeline):
        return
    try:
        _write_reports(args, job, [*attempts, group.attempt()], first=True)
    except OSError as error:
        args.report = args.timeline = None  # nor is it tried at the end
        raise CommandError(f"{error.filename}: {error.strerror}") from error


def write_reports_at_end(args: argparse.Namespace, job: Job, attempts: Sequence[Attempt]) -> None:
    if not attempts:
        return
    try:
        _write_reports(args, job, attempts)
    except OSError as error:
        say(f"{error.filename}: {error.strerror}")


def _write_reports(args: argparse.Namespace, job: Job, attempts: Sequence[Attempt], *, first: bool = False) -> None:
    """first: not to pipes and the like, of which a reader would have two."""
    from .._output.report import group_report, write_report, write_text
    from .._output.timeline import timeline_svg

    report = group_report(attempts, command=_command(args), nprocs=job.nprocs, run_id=job.run_id)
    if args.report and not (first and _is_special(args.report)):
        write_report(report, args.report)
    if args.timeline and not (first and _is_special(args.timeline)):
        write_text(timeline_svg(report), args.timeline)


def _is_special(path: str) -> bool:
    return os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)) and not os.path.isdir(path)
