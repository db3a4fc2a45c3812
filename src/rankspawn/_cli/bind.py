"""``rankspawn bind``: binds itself for the local rank that the environment tells, and becomes the program."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from .._binding import AffinityMode, PlacementError
from .._ids import format_ids
from .._place.openmp import affinity_warnings, omp_num_threads
from .._place.topology import Topology
from .options import PlacementOptions, add_placement_options, placement
from .step import Step, StepError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._place.plan import Placed


def add_bind_options(bind: argparse.ArgumentParser) -> None:
    """Adds the options of ``bind`` and, as ``run``, a function of the parsed arguments that gives the exit status where
    the program was not executed, and raises PlacementError and BindingError."""
    bind.usage = "rankspawn bind [OPTIONS] [--] PROGRAM [ARGS ...]"
    bind.description = (
        "Binds itself for the local rank in the environment (of Open MPI, MPICH, Intel MPI, PALS, Slurm, torchrun),"
        " sets OMP_NUM_THREADS unless it is set, and becomes PROGRAM."
    )
    bind.add_argument("--local-rank", type=_count, metavar="N", help="instead of the environment's")
    bind.add_argument(
        "--nproc-per-node", "--nproc_per_node", type=_count, metavar="N", help="ranks here; else the environment's"
    )
    bind.add_argument("-v", "--verbose", action="store_true", help="say the binding")
    add_placement_options(bind)
    # One list for both: argparse would take a double dash that stands right behind a PROGRAM of its own.
    bind.add_argument("command", nargs=argparse.REMAINDER, metavar="PROGRAM ARGS", help="what to execute")
    bind.set_defaults(run=_bind)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _bind(args: argparse.Namespace) -> int:
    from .._start.engine import bind_thread

    parser: argparse.ArgumentParser = args.parser
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("PROGRAM is missing")
    if os.name != "posix":
        parser.error("a process can become another program on POSIX systems alone")
    step = Step.read(os.environ)
    local_rank, local_size = _position(step, args.local_rank, args.nproc_per_node)
    rank = _placed(PlacementOptions.read(args), local_rank, local_size, step)
    refused = bind_thread(rank.binding)
    # The environment, and how a launcher binds, is the same for all: one of them speaks of it.
    warnings = affinity_warnings(os.environ) if local_rank == 0 else ()
    said = [str(rank.binding)] if args.verbose else []
    for note in (*rank.notes, *warnings, *(f"refused, {one}" for one in refused), *said):
        print(f"rankspawn: local rank {local_rank}: {note}", file=sys.stderr)
    os.environ.setdefault("OMP_NUM_THREADS", str(rank.omp_threads))
    return _become(command)


def _position(step: Step, local_rank: int | None, local_size: int | None) -> tuple[int, int]:
    """The local rank, and of how many: as given, else as the step says.

    Raises StepError where nothing says it, or two variables say different things.
    """
    if local_rank is None:
        local_rank = step.local_rank
        if local_rank is None:
            by = f"{step.launcher} does not tell" if step.launcher else "no variable of a launcher tells"
            raise StepError(f"{by} the local rank: give --local-rank")
        torchs = os.environ.get("LOCAL_RANK", str(local_rank))
        if torchs != str(local_rank):
            raise StepError(
                f"LOCAL_RANK={torchs} and {step.variable}={local_rank} say different things: give --local-rank"
            )
    if local_size is None:
        local_size = step.local_size
    if local_size is None:
        raise StepError("nothing tells how many ranks this node has: give --nproc-per-node")
    if local_rank >= local_size:
        raise StepError(f"local rank {local_rank} is not one of {local_size}")
    return local_rank, local_size


def _placed(options: PlacementOptions, local_rank: int, local_size: int, step: Step) -> Placed:
    """The place of this rank among those of the node, within the mask that it inherited.

    A mask that the launcher gave to this rank alone is not shared out a second time: no part of it is for the others.
    """
    topology = Topology.read()
    own = _is_bound(step.variable) if step.own_masks is None else step.own_masks
    note = step.crowding(local_size, topology.allowed_cpus, topology.cpus)
    if own:
        inherited = format_ids(topology.allowed_cpus)
        note = (
            f"{step.launcher} bound this rank by itself to CPUs {inherited}, and it stays within these;"
            f" {step.unbound} leaves the choice to rankspawn"
        )
        if options.numa_binding == AffinityMode.EXCLUSIVE:
            if not options.numa_binding_optional:
                raise PlacementError(f"exclusive: {note}")
            options = options.replace(numa_binding=AffinityMode.NODE)
    try:
        rank = placement(options, topology, local_size)[local_rank]
    except PlacementError as error:
        raise PlacementError(f"{error} ({note})" if note else str(error)) from None
    if own:
        cpus = topology.allowed_cpus if rank.binding.cpus is None else rank.binding.cpus
        rank = rank.replace(omp_threads=omp_num_threads(topology, [cpus])[0])
    # It is the same with the others: one says it for all.
    return rank.replace(notes=(*rank.notes, note)) if note and local_rank == 0 else rank


def _is_bound(variable: str) -> bool:
    """Whether the launcher uses CPUs that this process could use too, and was not given: then it was bound by itself.

    variable: what only the processes have that the launcher started. What a cpuset withholds is withheld from all, and
    known to the kernel alone: it answers a wider mask with the part that is allowed.
    """
    mine = os.sched_getaffinity(0)
    launchers = _mask_of_launcher(variable) if variable else mine
    if launchers <= mine:
        return False
    try:
        os.sched_setaffinity(0, launchers | mine)
    except PermissionError:  # a seccomp profile, which refuses the binding too
        return False
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, mine)
    return allowed > mine


def _mask_of_launcher(variable: str, proc: str = "/proc") -> set[int]:
    """The CPUs of the nearest ancestor that is not itself one of the launcher's processes, as a script around this
    command is: of its daemon. None where there is no such ancestor, as in a container."""
    pid = os.getppid()
    while pid > 1:
        try:
            with open(f"{proc}/{pid}/environ", "rb") as environ:
                started = any(one.startswith(f"{variable}=".encode()) for one in environ.read().split(b"\0"))
            if not started:
                break
            with open(f"{proc}/{pid}/stat", "rb") as stat:
                pid = int(stat.read().rpartition(b")")[2].split()[1])
        except PermissionError:  # another user's, as a daemon is
            break
        except FileNotFoundError:
            return set()
    return os.sched_getaffinity(pid) if pid > 1 else set()


def _become(command: list[str]) -> int:
    """Execute ``command`` in this process; the exit status, as a shell's, where that cannot be done."""
    # The interpreter ignores these, and what is ignored stays so; what is caught falls back to its default.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    sys.stderr.flush()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"rankspawn: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126
