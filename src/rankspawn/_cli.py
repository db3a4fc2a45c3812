"""The ``rankspawn`` command."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, get_args

from ._binding import AffinityMode, BindingError, MemoryMode
from ._group import Job, RankGroup, free_port, launch
from ._topology import PlacementError, Topology

if TYPE_CHECKING:
    from ._placement import Rank

# How long ranks that were told to end may take until they are killed; torchrun waits as long.
_GRACE_SECONDS = 30.0
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's own arguments if left out); returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (PlacementError, BindingError) as error:
        print(f"rankspawn: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rankspawn", description="Starts the ranks of a job, each born bound.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="start one rank of a script for each device, and stop all when one fails",
        description="Starts N ranks with the variables that torchrun sets (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,"
        " ...), waits for them, and exits with the status of the rank that failed first.",
    )
    run.add_argument("--nproc-per-node", "--nproc_per_node", type=_positive, default=1, metavar="N", help="ranks")
    run.add_argument(
        "--numa-binding", "--numa_binding", type=AffinityMode, choices=list(AffinityMode), metavar="MODE",
        help="bind each rank: " + ", ".join(mode.value for mode in AffinityMode),
    )  # fmt: skip
    run.add_argument(
        "--memory-policy", choices=get_args(MemoryMode), metavar="MODE",
        help="memory policy over the rank's nodes: " + ", ".join(get_args(MemoryMode)),
    )  # fmt: skip
    run.add_argument(
        "--numa-binding-optional", action="store_true", help="start a rank unbound, and say so, if it cannot be bound"
    )
    run.add_argument("--log-dir", "--log_dir", metavar="DIR", help="one folder for each rank's stdout and stderr")
    run.add_argument("--master-addr", "--master_addr", default="127.0.0.1", metavar="ADDR")
    run.add_argument("--master-port", "--master_port", type=int, default=0, metavar="PORT", help="default: a free port")
    run.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module, as for python -m")
    run.add_argument("--no-python", "--no_python", action="store_true", help="SCRIPT is a program of its own")
    run.add_argument("script", metavar="SCRIPT")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    run.set_defaults(run=_run)

    doctor = commands.add_parser("doctor", help="say what this machine allows")
    doctor.set_defaults(run=_doctor)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number


def _doctor(args: argparse.Namespace) -> int:
    from ._doctor import report

    return report()


def _run(args: argparse.Namespace) -> int:
    if args.module and args.no_python:
        print("rankspawn run: --module and --no-python exclude each other", file=sys.stderr)
        return 2
    if args.memory_policy and not args.numa_binding:
        print("rankspawn run: --memory-policy needs --numa-binding, which gives each rank its nodes", file=sys.stderr)
        return 2
    ranks = _plan(args)
    log_dir = None
    if args.log_dir is not None:
        os.makedirs(args.log_dir, exist_ok=True)
        log_dir = tempfile.mkdtemp(prefix="none_", dir=args.log_dir)
        print(f"rankspawn: logs in {log_dir}", file=sys.stderr)
    job = Job(args.nproc_per_node, "none", args.master_addr, args.master_port or free_port(args.master_addr))
    with _signals_as_bytes() as signals:
        try:
            group = launch(
                _command(args),
                job,
                bindings=[None if rank is None else rank.binding for rank in ranks],
                env=os.environ,
                rank_env=[_threads(rank, job.nprocs) for rank in ranks],
                log_dir=log_dir,
            )
        except OSError as error:
            print(f"rankspawn: cannot start the ranks: {error}", file=sys.stderr)
            # As a shell: 127 when the program is not there, 126 when it cannot be executed.
            return 127 if isinstance(error, FileNotFoundError) else 126
        with group:
            return _supervise(group, signals)


def _plan(args: argparse.Namespace) -> Sequence[Rank | None]:
    if args.numa_binding is None:
        return [None] * args.nproc_per_node
    from ._placement import plan

    ranks = plan(
        Topology.read(),
        args.numa_binding,
        nprocs=args.nproc_per_node,
        memory=args.memory_policy,
        required=not args.numa_binding_optional,
    )
    for note in dict.fromkeys(note for rank in ranks for note in rank.notes):
        print(f"rankspawn: {note}", file=sys.stderr)
    return ranks


def _threads(rank: Rank | None, nprocs: int) -> dict[str, str]:
    """OMP_NUM_THREADS, unless the user set it: the cores of the rank's mask; unbound, 1 for several, as torchrun."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    if rank is not None:
        return {"OMP_NUM_THREADS": str(rank.omp_threads)}
    return {"OMP_NUM_THREADS": "1"} if nprocs > 1 else {}


def _command(args: argparse.Namespace) -> list[str]:
    if args.no_python:
        return [args.script, *args.arguments]
    return [sys.executable, "-u", *(["-m"] if args.module else []), args.script, *args.arguments]


@contextmanager
def _signals_as_bytes() -> Iterator[socket.socket]:
    """A socket from which the number of each signal that asks us to end can be read, in place of its action.

    A signal that was ignored when we were started (nohup) stays ignored.
    """
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    asking = [getattr(signal, name) for name in _FORWARDED if hasattr(signal, name)]
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


def _supervise(group: RankGroup, signals: socket.socket) -> int:
    """Watch until every rank has ended; the exit status."""
    status: int | None = None
    kill_at: float | None = None
    group.watch(signals.fileno())
    while group.running:
        left = None if kill_at is None else kill_at - time.monotonic()
        if left is not None and left <= 0:
            print("rankspawn: ranks still run: killing them", file=sys.stderr)
            group.kill()
            break
        for number in group.wait_any(left):
            returncode = group.ranks[number].returncode
            if returncode and status is None:
                print(f"rankspawn: rank {number} {_how_it_ended(returncode)}", file=sys.stderr)
                status = returncode if returncode > 0 else 128 - returncode
                group.send_signal(signal.SIGTERM)
                kill_at = time.monotonic() + _GRACE_SECONDS
        for sig in _read(signals):
            if sig == signal.SIGINT and status is not None:
                group.kill()
                continue
            status = 128 + sig if status is None else status
            group.send_signal(sig)
            kill_at = time.monotonic() + _GRACE_SECONDS
    return status or 0


def _read(signals: socket.socket) -> bytes:
    try:
        return signals.recv(256)
    except BlockingIOError:
        return b""


def _how_it_ended(returncode: int) -> str:
    if returncode > 0:
        return f"exited with status {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
