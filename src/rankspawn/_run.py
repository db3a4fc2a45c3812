"""``rankspawn run``: the ranks of a script, watched until the last has ended."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ._binding import BindingError, parse_ids
from ._openmp import affinity_warnings
from ._options import CommandError, add_placement_options, placement
from ._progress import Progress
from ._topology import Topology

# What starts and watches processes is imported where it is used, the standard library's part of it too: the commands
# beside this one start none, and their time is mostly that of imports.
if TYPE_CHECKING:
    import socket

    from ._group import RankGroup
    from ._launch import Job
    from ._placement import Rank
    from ._report import Attempt

_ASKING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGTSTP")


def add_run_options(run: argparse.ArgumentParser) -> None:
    """Adds the options of ``run`` and, as ``run``, a function of the parsed arguments that gives the exit status and
    raises CommandError, PlacementError and BindingError."""
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
    add("--max-restarts", "--max_restarts", type=_natural, default=0, metavar="N", help="start all again, so often")
    add("--grace", type=_seconds, metavar="SECONDS", help="from SIGTERM to SIGKILL; 30 if left out")
    add("--guard", action="store_true", help="if this launcher is killed, end what the ranks started, too")
    add("--cgroup", metavar="DIR", help="a delegated cgroup v2; the ranks live in one that is made there")
    add = run.add_argument_group("output").add_argument
    add("--log-dir", "--log_dir", metavar="DIR", help="a folder for each rank's stdout.log and stderr.log")
    add("--tee", action="store_true", help="log files, and their lines here too, with [rank N]: before them")
    add("--local-ranks-filter", "--local_ranks_filter", type=_ids, metavar="LIST", help="--tee shows these: 0,2-3")
    add("--report", metavar="FILE.json", help="times, bindings, exits and use of each rank")
    add("--timeline", metavar="FILE.svg", help="the same as a drawing")
    add_placement_options(run)
    # One list for both: argparse would take a double dash that stands right behind a SCRIPT of its own.
    add("command", nargs=argparse.REMAINDER, metavar="SCRIPT ARGS", help="what each rank runs")
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
    from ._engine import mechanisms

    ranks = _checked_plan(args)
    try:
        engine = bool(mechanisms()) and sys.platform == "linux"
    except ValueError as error:
        args.parser.error(str(error))
    if not engine:
        print("rankspawn: without its engine ranks may outlive this launcher; see rankspawn doctor", file=sys.stderr)
    # Whoever ignored it for us would make the kernel forget the statuses of our ranks.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    attempts: list[Attempt] = []
    with _signals_as_bytes() as signals, _folder(args.log_dir) as folder:
        job = _job(args)
        try:
            while True:
                status, final = _attempt(args, job, ranks, folder, signals, attempts)
                if final or job.restart_count == args.max_restarts:
                    return status
                # Another port: the last attempt's ranks may have left theirs in a state that refuses a listener.
                port = job.master_port if args.master_port else _free_port(job.master_addr)
                job = job._replace(restart_count=job.restart_count + 1, master_port=port)
                print(f"rankspawn: restart {job.restart_count} of {args.max_restarts}", file=sys.stderr)
        finally:
            if attempts:
                _write_reports(args, job, attempts)


def _attempt(
    args: argparse.Namespace,
    job: Job,
    ranks: Sequence[Rank | None],
    folder: str,
    signals: socket.socket,
    attempts: list[Attempt],
) -> tuple[int, bool]:
    """One start of all ranks: the exit status, and whether it is the last word."""
    from ._failure import describe
    from ._launch import launch
    from ._logs import rank_files

    progress = Progress(sys.stderr)
    try:
        with progress.starting(job.nprocs) as follow:
            group = launch(
                _command(args),
                job.nprocs,
                job=job,
                bindings=[None if rank is None else rank.binding for rank in ranks],
                rank_env=[_threads(rank, job.nprocs) for rank in ranks],
                files=rank_files(folder, job.nprocs, job.restart_count, streams=args.log_dir is not None or args.tee),
                tee=args.tee,
                tee_ranks=args.local_ranks_filter,
                guard=args.guard,
                cgroup=args.cgroup,
                keep_going=args.keep_going,
                grace=args.grace,
                progress=follow,
            )
    except BindingError:
        raise
    except OSError as error:
        print(f"rankspawn: cannot start the ranks: {error}", file=sys.stderr)
        # As a shell: 127 when the program is not there, 126 when it cannot be executed.
        return (127 if isinstance(error, FileNotFoundError) else 126), True
    try:
        with group:
            if args.report or args.timeline:
                group.note_effective()
            asked = _supervise(group, signals, progress)
    except TimeoutError as error:
        print(f"rankspawn: {error}", file=sys.stderr)
        return 1, True
    finally:
        attempts.append(group.attempt())
    if failures := group.failures():
        print(f"rankspawn: {describe(failures[0], failures[1:])}", end="", file=sys.stderr)
    if asked is not None:
        return 128 + asked, True
    if not failures:
        return 0, True
    # As a shell says it.
    failed = failures[0].returncode
    return (failed if failed > 0 else 128 - failed), False


def _supervise(group: RankGroup, signals: socket.socket, progress: Progress) -> int | None:
    """Watch until every rank has ended; the first signal that asked us to end."""
    asked: int | None = None
    failed = killing = False
    group.watch(signals.fileno())
    running = True
    while running:
        running = group.advance(progress.ending(group))
        if running and not failed and group.first_failure is not None:
            failed = True
            progress.say(f"rank {group.first_failure} has failed" + (": ending the others" if group.stopping else ""))
        if group.killing and not killing:
            killing = True
            progress.say("what did not end in time is killed")
        for sig in _read(signals):
            if sig == getattr(signal, "SIGTSTP", None):
                _suspend(group)
            elif sig == signal.SIGINT and group.stopping:
                progress.say("killing the ranks")
                group.kill()
            else:
                asked = sig if asked is None and not group.stopping else asked
                group.stop(sig)
    progress.clear()
    return asked


def _suspend(group: RankGroup) -> None:
    """Ctrl-Z. The ranks get SIGSTOP: SIGTSTP would do nothing in a session that no shell controls (credentials(7))."""
    group.send_signal(signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)
    # Here, when the shell has continued us.
    group.send_signal(signal.SIGCONT)


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
        print(f"rankspawn: {note}", file=sys.stderr)
    return ranks


def _job(args: argparse.Namespace) -> Job:
    """What the options say of the job, and, where they do not, what the step that we run in says."""
    from ._launch import Job
    from ._step import Step

    nnodes, node_rank = args.nnodes, args.node_rank
    if nnodes is None and node_rank is None:
        node = Step.read(os.environ).node(args.master_addr, args.master_port)
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
    address = address or "127.0.0.1"
    port = port or _free_port(address)
    return Job(args.nproc_per_node, port, address, run_id or "none", nnodes, node_rank, 0, args.max_restarts)


@contextmanager
def _folder(parent: str | None) -> Iterator[str]:
    """Where the log files and the error files go: a new folder in ``parent``, or a temporary one."""
    import tempfile

    if parent is None:
        with tempfile.TemporaryDirectory(prefix="rankspawn-") as folder:
            yield folder
        return
    try:
        os.makedirs(parent, exist_ok=True)
        made = tempfile.mkdtemp(prefix="none_", dir=parent)  # torchrun's name for a job without --rdzv-id
    except OSError as error:
        raise CommandError(f"--log-dir {parent}: {error.strerror}: {error.filename}") from error
    print(f"rankspawn: logs in {made}", file=sys.stderr)
    yield made


def _free_port(address: str) -> int:
    from ._launch import free_port

    try:
        return free_port(address)
    except OSError as error:
        raise CommandError(
            f"--master-addr {address}: no port can be found there ({error.strerror}); if it is another machine's, give"
            " --master-port too"
        ) from error


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


@contextmanager
def _signals_as_bytes() -> Iterator[socket.socket]:
    """A socket from which the number of each signal that asks something of us can be read, in place of its action.

    A signal that was ignored when we were started (nohup) stays ignored.
    """
    import socket

    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    asking = [getattr(signal, name) for name in _ASKING if hasattr(signal, name)]
    before = {sig: signal.getsignal(sig) for sig in asking if signal.getsignal(sig) is not signal.SIG_IGN}
    wakeup = signal.set_wakeup_fd(writer.fileno())
    try:
        for sig in before:
            signal.signal(sig, lambda *_: None)
        yield reader
    finally:
        for sig, action in before.items():
            signal.signal(sig, action)
        signal.set_wakeup_fd(wakeup)
        reader.close()
        writer.close()


def _read(signals: socket.socket) -> bytes:
    try:
        return signals.recv(256)
    except BlockingIOError:
        return b""


def _write_reports(args: argparse.Namespace, job: Job, attempts: Sequence[Attempt]) -> None:
    if not (args.report or args.timeline):
        return
    from ._report import group_report, write_report, write_text
    from ._timeline import timeline_svg

    report = group_report(attempts, command=_command(args), nprocs=job.nprocs, run_id=job.run_id)
    try:
        if args.report:
            write_report(report, args.report)
        if args.timeline:
            write_text(timeline_svg(report), args.timeline)
    except OSError as error:
        print(f"rankspawn: {error.filename}: {error.strerror}", file=sys.stderr)
