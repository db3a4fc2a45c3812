"""``rankspawn ps``: the jobs on this machine, and what each of their ranks does and uses now."""

from __future__ import annotations

import argparse
import sys
import time

from .options import seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._stacks.now import JobNow, RankNow

_COLUMNS = tuple("RANK,PID,S,BOUND TO,THREADS,CPU,WAITED,RSS,FAR,GPU,UP,SILENT,LAST LINE".split(","))
_WIDEST = 60  # characters of a last line
_WIDEST_COMMAND = 200


def add_ps_options(ps: argparse.ArgumentParser) -> None:
    """Add the options of ``ps``; ``args.run(args)`` runs it."""
    ps.description = (
        "Shows the jobs on this machine, of any launcher, whose ranks this user may look at. For each rank: its state,"
        " its binding, CPU time, the time that it waited for a CPU, memory, and the last line of its log with its age."
        " BOUND TO has a ! if threads may use CPUs outside the binding."
    )
    ps.add_argument(
        "--pages",
        action="store_true",
        help="count each rank's pages on nodes that it does not run on (FAR); takes long for ranks with much memory",
    )
    ps.add_argument("--json", action="store_true", help="print JSON (default: text)")
    ps.add_argument(
        "--watch",
        nargs="?",
        type=seconds,
        const=2.0,
        metavar="SECONDS",
        help="repeat until interrupted (default without SECONDS: every 2)",
    )
    ps.set_defaults(run=_ps)


def _ps(args: argparse.Namespace) -> int:
    from .._output.noted import read_noted
    from .._stacks.now import jobs_now

    while True:
        jobs = jobs_now(read_noted(), pages=args.pages)
        if args.watch is not None and not args.json and sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")
        print(_as_json(jobs) if args.json else _as_text(jobs), flush=True)
        if args.watch is None:
            return 0
        time.sleep(args.watch)


def _as_json(jobs: Sequence[JobNow]) -> str:
    import json

    told = []
    for job in jobs:
        ranks = [{**_fields(rank), "silent": _silent(rank), "last_line": _last_line(rank)} for rank in job.ranks]
        told.append({**_fields(job), "ranks": ranks})
    return json.dumps(told)


def _fields(thing: JobNow | RankNow) -> dict[str, object]:
    return {name: getattr(thing, name) for name in thing.__match_args__}


def _as_text(jobs: Sequence[JobNow]) -> str:
    if not jobs:
        return "found no running rank that this user may look at"
    from .._stacks.fold import printable

    lines = []
    for job in jobs:
        of = f" of {job.world}" if job.world else ""
        command = printable(job.command)
        if len(command) > _WIDEST_COMMAND:
            command = command[:_WIDEST_COMMAND] + " ..."
        lines.append(f"job {printable(job.job or '-')}: {len(job.ranks)}{of} ranks, launcher {job.launcher}: {command}")
        rows = [_COLUMNS, *map(_row, job.ranks)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        for row in rows:
            lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines)


def _row(rank: RankNow) -> tuple[str, ...]:
    bound = rank.cpus
    if rank.strays:
        bound += f" ! asked {rank.asked}, {rank.strays} threads"
    silent = _silent(rank)
    from .._stacks.fold import printable

    return (
        str(rank.rank),
        str(rank.pid),
        rank.state,
        bound,
        str(rank.threads),
        _time(rank.cpu),
        _time(rank.delay),
        _size(rank.rss),
        "-" if rank.off_node is None else _size(rank.off_node),
        "-" if rank.gpu is None else _size(rank.gpu),
        _time(rank.age),
        "-" if silent is None else _time(silent),
        printable(_last_line(rank))[:_WIDEST],
    )


def _silent(rank: RankNow) -> float | None:
    """Seconds since the rank last wrote to one of its log files; None if it has none."""
    from .._stacks.now import age_of

    ages = [age for path in {rank.stdout, rank.stderr} - {None} if path and (age := age_of(path)) is not None]
    return min(ages, default=None)


def _last_line(rank: RankNow) -> str:
    from .._output.logs import last_lines

    newest = ""
    for path in (rank.stdout, rank.stderr):
        try:
            lines = last_lines(path, 1, 4096) if path else []
        except OSError:
            continue
        newest = lines[-1] if lines else newest
        if newest:
            break
    return newest


def _time(spent: float) -> str:
    if spent < 100:
        return f"{spent:.1f}s"
    minutes, left = divmod(round(spent), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _size(count: int) -> str:
    for unit, size in (("G", 1 << 30), ("M", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count >> 10}K"
