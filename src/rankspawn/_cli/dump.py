"""``rankspawn dump``: what the ranks of a running job do, seen from another terminal."""

from __future__ import annotations

import argparse
import os

from .options import CommandError, seconds
from .progress import say

DESCRIPTION = (
    "Shows what every thread of a running job is doing: its ranks and the processes that they started. It only looks"
    " from outside; no process gets a signal. The job may be torchrun's, or any other whose ranks have"
    " torchrun's variables."
)


def add_dump_options(dump: argparse.ArgumentParser) -> None:
    """Add the options of ``dump``; ``args.run(args)`` runs it."""
    dump.description = DESCRIPTION
    add = dump.add_argument
    add(
        "job",
        metavar="PID|JOB",
        help="a process id (the launcher's or any other), or the job's id (TORCHELASTIC_RUN_ID)",
    )
    add("--seconds", type=seconds, default=2.0, metavar="SECONDS", help="how long it may take (default: 2)")
    add("--json", action="store_true", help="print JSON, in the form of --report (default: text)")
    add("--folded", action="store_true", help="print one line that names ranks at the same place together")
    dump.set_defaults(run=_dump)


def _dump(args: argparse.Namespace) -> int:
    from .._stacks.take import take

    found = take(_ranks(args.job), "asked for", args.seconds)
    if not found.processes:
        raise CommandError(
            f"nothing runs in {args.job}: it has just ended" + "".join(f"; {one}" for one in found.notes)
        )
    if args.json:
        import json

        from .._output.report import stacks_report

        print(json.dumps(stacks_report(found), indent=2))
    elif args.folded:
        print(found.folded)
    else:
        print(found, end="")
    if args.folded or args.json:
        for note in found.notes:
            say(note)
    return 0


def _ranks(job: str, proc: str = "/proc") -> dict[int, int | None]:
    """Find the processes of ``job``: a process id, or, if no process has that number, a job id (as Slurm's)."""
    from .._stacks.ranks import ranks_below, ranks_of_job

    if not os.path.isdir(f"{proc}/self"):
        raise CommandError(f"dump needs {proc}, which is not mounted here")
    if job.isdecimal() and os.path.isdir(f"{proc}/{int(job)}"):
        return ranks_below(int(job), proc)
    found = ranks_of_job(job, proc)
    if not found:
        what = "no process has this id, and " if job.isdecimal() else ""
        raise CommandError(f"{job}: {what}no rank that this user may look at has this TORCHELASTIC_RUN_ID")
    return found
