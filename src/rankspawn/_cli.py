"""The ``rankspawn`` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from ._binding import BindingError
from ._openmp import affinity_warnings
from ._options import add_placement_options, placement
from ._show import add_commands
from ._topology import PlacementError, Topology

# What starts and watches processes is imported where it is used, the standard library's part of it too: `plan` and
# `topology` start none, and their time is mostly that of imports.
if TYPE_CHECKING:
    import socket

    from ._group import RankGroup
    from ._placement import Rank

# How long ranks that were told to end may take until they are killed; torchrun waits as long.
_GRACE_SECONDS = 30.0
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")


class CommandError(Exception):
    """The command cannot do what it was asked; the message is for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's own arguments if left out); returns the exit status."""
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(args.run(args))
    except (CommandError, PlacementError, BindingError) as error:
        print(f"rankspawn: {error}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """argparse's, but the terminal is asked for its width when something is printed. argparse asks for it with each
    argument that is added, and imports shutil for that, with all compressions of archives."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=partial(argparse.HelpFormatter, width=80), **options)

    def format_help(self) -> str:
        self.formatter_class = argparse.HelpFormatter
        return super().format_help()

    def format_usage(self) -> str:
        self.formatter_class = argparse.HelpFormatter
        return super().format_usage()


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="rankspawn", description="Starts the ranks of a job, each born bound."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        usage="rankspawn run [OPTIONS] SCRIPT [ARGS ...]",
        help="start the ranks of a script, and stop all when one fails",
        description="Starts N ranks with the variables that torchrun sets (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,"
        " ...), waits for them, and exits with the status of the rank that failed first.",
    )
    run.add_argument("--nproc-per-node", "--nproc_per_node", type=_positive, default=1, metavar="N", help="ranks")
    run.add_argument("--log-dir", "--log_dir", metavar="DIR", help="a folder for each rank's stdout.log and stderr.log")
    run.add_argument("--master-addr", "--master_addr", default="127.0.0.1", metavar="ADDR", help="where rank 0 listens")
    run.add_argument("--master-port", "--master_port", type=_port, metavar="PORT", help="default: a free one")
    run.add_argument("-m", "--module", action="store_true", help="SCRIPT is a module, as for python -m")
    run.add_argument("--no-python", "--no_python", action="store_true", help="SCRIPT is a program of its own")
    add_placement_options(run)
    # One list for both: argparse would take a double dash that stands right behind a SCRIPT of its own.
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT ARGS", help="what each rank runs")
    run.set_defaults(run=_run, parser=run)

    add_commands(commands)
    doctor = commands.add_parser("doctor", help="say what this machine allows")
    doctor.set_defaults(run=_doctor)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number


def _port(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return number


def _mechanisms(args: argparse.Namespace) -> tuple[int, ...]:
    """The engine's mechanisms; an unknown RANKSPAWN_MECHANISM is a usage error."""
    from ._engine import mechanisms

    parser: argparse.ArgumentParser = args.parser
    try:
        return mechanisms()
    except ValueError as error:
        parser.error(str(error))


def _doctor(args: argparse.Namespace) -> int:
    from ._doctor import report

    _mechanisms(args)
    return report()


def _run(args: argparse.Namespace) -> int:
    from ._group import Job, launch

    engine = bool(_mechanisms(args)) and sys.platform == "linux"
    ranks = _checked_plan(args)
    log_dir = _new_log_dir(args.log_dir)
    job = Job(args.nproc_per_node, "none", args.master_addr, args.master_port or _free_port(args.master_addr))
    if not engine:
        print("rankspawn: without its engine ranks may outlive this launcher; see rankspawn doctor", file=sys.stderr)
    # Whoever ignored it for us would make the kernel forget the statuses of our ranks.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with _signals_as_bytes() as signals:
        try:
            group = launch(
                _command(args),
                job,
                bindings=[None if rank is None else rank.binding for rank in ranks],
                env=os.environ,
                rank_env=[_threads(rank, job.nprocs) for rank in ranks],
                log_dir=log_dir,
                die_with_parent=engine,
            )
        except BindingError:
            raise
        except OSError as error:
            print(f"rankspawn: cannot start the ranks: {error}", file=sys.stderr)
            # As a shell: 127 when the program is not there, 126 when it cannot be executed.
            return 127 if isinstance(error, FileNotFoundError) else 126
        with group:
            return _supervise(group, signals)


def _checked_plan(args: argparse.Namespace) -> Sequence[Rank | None]:
    """The place of each rank, None for ranks that stay unbound; usage errors end the process with status 2."""
    if args.command[:1] == ["--"]:
        del args.command[0]
    if not args.command:
        args.parser.error("SCRIPT is missing")
    if args.module and args.no_python:
        args.parser.error("--module and --no-python exclude each other")
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


def _new_log_dir(parent: str | None) -> str | None:
    if parent is None:
        return None
    import tempfile

    try:
        os.makedirs(parent, exist_ok=True)
        made = tempfile.mkdtemp(prefix="none_", dir=parent)  # torchrun's name for a job without --rdzv-id
    except OSError as error:
        raise CommandError(f"--log-dir {parent}: {error.strerror}: {error.filename}") from error
    print(f"rankspawn: logs in {made}", file=sys.stderr)
    return made


def _free_port(address: str) -> int:
    from ._group import free_port

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
    """A socket from which the number of each signal that asks us to end can be read, in place of its action.

    A signal that was ignored when we were started (nohup) stays ignored.
    """
    import socket

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
        ask = None
        for number in group.wait_any(left):
            returncode = group.returncodes[number]
            if returncode and status is None:
                print(f"rankspawn: rank {number} {_how_it_ended(returncode)}", file=sys.stderr)
                status = returncode if returncode > 0 else 128 - returncode
                ask = signal.SIGTERM
        for sig in _read(signals):
            if sig == signal.SIGINT and status is not None:
                group.kill()
            else:
                status = 128 + sig if status is None else status
                ask = signal.Signals(sig)
        if ask is not None:
            group.send_signal(ask)
            # From the first time that they were asked: who repeats a signal must not make it longer.
            kill_at = kill_at or time.monotonic() + _GRACE_SECONDS
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
