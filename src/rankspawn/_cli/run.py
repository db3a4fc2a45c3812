"""``rankspawn run``: the ranks of a script, watched until the last has ended."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._binding import parse_ids
from .._place.openmp import affinity_warnings
from .._place.topology import Topology
from .options import CommandError, add_placement_options, placement
from .progress import say

# What starts and watches processes is imported where it is used, the standard library's part of it too: the commands
# beside this one start none, and their time is mostly that of imports.
if TYPE_CHECKING:
    from .._group.launch import Job
    from .._output.logs import LogFolder
    from .._output.report import Attempt
    from .._place.plan import Rank


def add_run_options(run: argparse.ArgumentParser) -> None:
    """Adds the options of ``run`` and, as ``run``, a function of the parsed arguments that gives the exit status and
    raises CommandError, PlacementError and OSError."""
    run.usage = "rankspawn run [OPTIONS] SCRIPT [ARGS ...]"
    run.description = (
        "Starts N ranks with the variables that torchrun sets (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, ...), waits"
        " for them, and exits with the status of the rank that failed first."
    )
    add = run.add_argument
    add("--nproc-per-node", "--nproc_per_node", type=_positive, default=1, metavar="N", help="ranks on this machine")
    add("-m", "--module", action="store_true", help="SCRIPT is a module, as for python -m")
    add("--no-python", "--no_python", action="store_true", help="SCRIPT is a program of its own")
    add = run.add_argument_group(
        "several machines", "One launcher on each; under srun or mpirun all is found."
    ).add_argument
    add("--nnodes", type=_positive, metavar="N", help="how many machines")
    add("--node-rank", "--node_rank", type=_natural, metavar="R", help="which of them this is, from 0")
    add("--master-addr", "--master_addr", metavar="ADDR", help="where rank 0 listens; the first machine")
    add("--master-port", "--master_port", type=_port, metavar="PORT", help="of one machine: a free one")
    add = run.add_argument_group("failure").add_argument
    add("--keep-going", action="store_true", help="a rank that fails does not end the others")
    add(
        "--max-restarts",
        "--max_restarts",
        type=_natural,
        default=0,
        metavar="N",
        help="after a failure start all again, at most N times",
    )
    add("--grace", type=_seconds, metavar="SECONDS", help="from SIGTERM to SIGKILL; 30 if left out")
    add("--guard", action="store_true", help="if this launcher is killed, end what the ranks started, too")
    add("--cgroup", metavar="DIR", help="a delegated cgroup v2; the ranks live in one that is made there")
    add = run.add_argument_group("output").add_argument
    add("--log-dir", "--log_dir", metavar="DIR", help="a folder for each rank's stdout.log and stderr.log")
    add("--tee", action="store_true", help="log files, and their lines here too, each behind its [rank N]:")
    add("--local-ranks-filter", "--local_ranks_filter", type=_ids, metavar="LIST", help="--tee shows these: 0,2-3")
    add("--report", metavar="FILE.json", help="times, bindings, exits and use of each rank")
    add("--timeline", metavar="FILE.svg", help="the same as a drawing")
    add_placement_options(run)
    # One list for both: argparse would take a double dash that stands right behind a SCRIPT of its own.
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT ARGS", help="what each rank runs")
    run.set_defaults(run=_run)


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _port(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _ids(text: str) -> frozenset[int]:
    try:
        return parse_ids(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(args: argparse.Namespace) -> int:
    """Start the ranks, again as often as --max-restarts allows; the exit status."""
    from .._start.engine import mechanisms
    from .attempts import run_attempt, write_reports_at_end
    from .signals import asks_for_suspension, read_signals, signals_as_bytes

    ranks = _checked_plan(args)
    try:
        engine = bool(mechanisms()) and sys.platform == "linux"
    except ValueError as error:
        args.parser.error(str(error))
    if not engine:
        say("without its engine ranks may outlive this launcher; see rankspawn doctor")
    _make_room(args.nproc_per_node * (3 if args.tee else 1))
    # Whoever ignored it for us would make the kernel forget the statuses of our ranks.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    attempts: list[Attempt] = []
    warnings.showwarning = lambda message, *where: say(str(message))
    with signals_as_bytes() as signals, _folder(args.log_dir) as folder:
        job = _job(args)
        try:
            while True:
                status, final = run_attempt(args, job, ranks, folder, signals, attempts)
                if final:
                    return status
                for sig in read_signals(signals):  # that came when there was no rank to hand them to
                    if not asks_for_suspension(sig):
                        return 128 + sig
                # Another port: the last attempt's ranks may have left theirs in a state that refuses a listener.
                port = job.master_port if args.master_port else _free_port(job.master_addr)
                job = job._replace(restart_count=job.restart_count + 1, master_port=port)
                say(f"restart {job.restart_count} of {args.max_restarts}")
        finally:
            write_reports_at_end(args, job, attempts)


def _checked_plan(args: argparse.Namespace) -> Sequence[Rank | None]:
    """The place of each rank, None for ranks that stay unbound; usage errors end the process with status 2."""
    if args.command[:1] == ["--"]:
        del args.command[0]
    if not args.command:
        args.parser.error("SCRIPT is missing")
    if args.tee and re.fullmatch(r"[0-3](,?\d+:[0-3])*|(\d+:[0-3],?)+", args.command[0]):
        args.parser.error(f"--tee takes no value (here: {args.command[0]}): all that is logged is shown")
    if args.module and args.no_python:
        args.parser.error("--module and --no-python exclude each other")
    if args.local_ranks_filter is not None and not args.tee:
        args.parser.error("--local-ranks-filter needs --tee")
    placed = args.numa_binding or args.cpus or args.mems
    details = ("memory_policy", "devices", "reserve_cores", "threads_per_core", "numa_binding_optional")
    for detail in details:
        if getattr(args, detail) and not placed:
            args.parser.error(f"--{detail.replace('_', '-')} needs --numa-binding, or --cpus or --mems")
    if not placed:
        return [None] * args.nproc_per_node
    ranks = placement(args, Topology.read(), args.nproc_per_node)
    for note in dict.fromkeys([*(note for rank in ranks for note in rank.notes), *affinity_warnings(os.environ)]):
        say(note)
    return ranks


def _job(args: argparse.Namespace) -> Job:
    """What the options say of the job, and, where they do not, what the step that we run in says."""
    from .._group.launch import Job
    from .step import Step

    nnodes, node_rank = args.nnodes, args.node_rank
    if nnodes is None and node_rank is None:
        step = Step.read(os.environ)
        node = step.node(args.master_addr, args.master_port)
        if step.launcher and hasattr(os, "sched_getaffinity"):
            if crowded := step.crowding(args.nproc_per_node, os.sched_getaffinity(0), set(range(os.cpu_count() or 1))):
                say(crowded)
        address, port, run_id = node.master_addr, node.master_port, node.run_id
        nnodes, node_rank = node.nnodes, node.node_rank
    else:
        address, port, run_id = args.master_addr, args.master_port, None
        nnodes = 1 if nnodes is None else nnodes
        if node_rank is None and nnodes > 1:
            args.parser.error("--nnodes needs --node-rank: which of the machines this is")
        node_rank = node_rank or 0
        if node_rank >= nnodes:
            args.parser.error(f"--node-rank {node_rank} of --nnodes {nnodes}: they are counted from 0")
        if nnodes > 1 and not (address and port):
            args.parser.error("--nnodes needs --master-addr and --master-port: where rank 0 listens")
    if nnodes > 1 and args.max_restarts:
        # The ranks of one machine would meet those that another has not ended yet.
        args.parser.error("--max-restarts is for one machine: several are restarted together by rankspawn torchrun")
    address = address or "127.0.0.1"
    port = port or _free_port(address)
    return Job(args.nproc_per_node, port, address, run_id or "none", nnodes, node_rank, 0, args.max_restarts)


@contextmanager
def _folder(parent: str | None) -> Iterator[LogFolder]:
    """Where the log files and the error files go: a new folder in ``parent``, or a temporary one."""
    from .._output.logs import LogFolder

    try:
        if parent is not None:
            os.makedirs(parent, exist_ok=True)
        folder = LogFolder(parent)
    except OSError as error:
        raise CommandError(f"{'' if parent is None else '--log-dir: '}{error.strerror}: {error.filename}") from error
    with folder:
        if parent is not None:
            say(f"logs in {folder.path}")
        yield folder


def _make_room(descriptors: int) -> None:
    """Raise the soft limit of open files, which is often 1024, by no more than is needed: the ranks inherit it."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = descriptors + 24  # our own
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise CommandError(f"so many ranks need {needed} open files, and this process may have {hard} (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _free_port(address: str) -> int:
    from .._group.launch import free_port

    try:
        return free_port(address)
    except OSError as error:
        raise CommandError(
            f"--master-addr {address}: no port can be found there ({error.strerror}); if it is another machine's, give"
            " --master-port too"
        ) from error
