"""``rankspawn bind``: binds this process for its local rank, and executes the program in it."""

from __future__ import annotations

import argparse
import os
import signal

from .._binding import AffinityMode, Binding, PlacementError
from .._ids import format_ids
from .._output.console import flush, say
from .._place.glance import sets_threads
from .._place.openmp import openmp_warnings, quota_note, threads_of_ranks
from .._place.topology import Topology
from .._procfs import read_stat
from .options import AUTO_BINDS, PlacementOptions, add_placement_options, natural, placement
from .step import Step, StepError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._place.plan import Placed
    from .._start.outcome import RefusedStep


def add_bind_options(bind: argparse.ArgumentParser) -> None:
    """Add the options of ``bind``.

    ``args.run(args)`` executes the program. If it cannot, it returns the exit status; it raises PlacementError and
    BindingError.
    """
    bind.usage = "rankspawn bind [OPTIONS] [--] PROGRAM [ARGS ...]"
    bind.description = (
        "Binds this process for its local rank, which it reads from the variables of Open MPI, MPICH, Intel MPI, PALS,"
        " Slurm or torchrun, sets OMP_NUM_THREADS unless it is set, and executes PROGRAM."
    )
    bind.add_argument(
        "--local-rank", type=natural, metavar="N", help="the local rank (default: what the launcher's variables say)"
    )
    bind.add_argument(
        "--nproc-per-node",
        "--nproc_per_node",
        type=natural,
        metavar="N",
        help="how many ranks on this machine (default: what the variables say)",
    )
    bind.add_argument("-v", "--verbose", action="store_true", help="print the binding")
    add_placement_options(bind)
    # One list for both, because argparse would remove a double dash right after a PROGRAM argument of its own.
    bind.add_argument("command", nargs=argparse.REMAINDER, metavar="PROGRAM ARGS", help="the program and its arguments")
    bind.set_defaults(run=_bind)


def _bind(args: argparse.Namespace) -> int:
    from .._start.engine import bind_thread

    parser: argparse.ArgumentParser = args.parser
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("PROGRAM is missing")
    if os.name != "posix":
        parser.error(
            "bind works on POSIX systems only, because elsewhere a process cannot execute another program in its place"
        )
    step = Step.read(os.environ)
    local_rank, local_size = _position(step, args.local_rank, args.nproc_per_node)
    rank = _placed(PlacementOptions.read(args), local_rank, local_size, step)
    refused = bind_thread(rank.binding)
    # The environment is the same for all ranks of the node, so only rank 0 warns about it.
    warnings = openmp_warnings(os.environ) if local_rank == 0 else ()
    said = [str(_made(rank.binding, refused))] if args.verbose else []
    for note in (*rank.notes, *warnings, *(f"the system refused {one}" for one in refused), *said):
        say(f"local rank {local_rank}: {note}")
    if not sets_threads(os.environ.get("OMP_NUM_THREADS")):
        os.environ["OMP_NUM_THREADS"] = str(rank.omp_threads)
    return _become(command)


def _position(step: Step, local_rank: int | None, local_size: int | None) -> tuple[int, int]:
    """Find the local rank and the number of local ranks: from the options, else from the job step.

    Args:
        step: The job step that this process is in.
        local_rank: ``--local-rank``; None if the user did not give it.
        local_size: ``--nproc-per-node``; None if the user did not give it.

    Raises:
        StepError: No variable says it, or two variables contradict each other.
    """
    if local_rank is None:
        local_rank = step.local_rank
        if local_rank is None:
            none = "no launcher variable (LOCAL_RANK, SLURM_LOCALID, ...) is set"
            by = f"{step.launcher} sets no variable for it" if step.launcher else none
            raise StepError(f"cannot tell the local rank: {by}; pass --local-rank")
        torchs = os.environ.get("LOCAL_RANK", str(local_rank))
        if torchs != str(local_rank):
            raise StepError(f"LOCAL_RANK={torchs} contradicts {step.variable}={local_rank}: pass --local-rank")
    if local_size is None:
        local_size = step.local_size
    if local_size is None:
        raise StepError("cannot tell how many ranks this node has: pass --nproc-per-node")
    if local_rank >= local_size:
        raise StepError(f"local rank {local_rank} does not exist: this node has {local_size} ranks, counted from 0")
    return local_rank, local_size


def _placed(options: PlacementOptions, local_rank: int, local_size: int, step: Step) -> Placed:
    """Place this rank among those of the node, within the CPU mask that it inherited.

    If the launcher gave the mask to this rank alone, it is not divided again, because no other rank uses a part of it.
    """
    topology = Topology.read()
    own = _is_bound(step.variable) if step.own_masks is None else step.own_masks
    note = step.crowding(local_size, topology.allowed_cpus, topology.cpus)
    if own:
        inherited = format_ids(topology.allowed_cpus)
        note = (
            f"{step.launcher} bound this rank to CPUs {inherited}, so rankspawn keeps it there;"
            f" {step.unbound} lets rankspawn choose"
        )
        if options.numa_binding == "auto" and options.say_only_mode:
            options = options.replace(numa_binding="none")
        if options.numa_binding == AffinityMode.EXCLUSIVE:
            if not options.numa_binding_optional:
                raise PlacementError(f"exclusive: {note}")
            options = options.replace(numa_binding=AffinityMode.NODE)
    try:
        ranks = placement(options, topology, local_size)
    except PlacementError as error:
        raise PlacementError(f"{error} ({note})" if note else str(error)) from None
    rank = ranks[local_rank]
    if own:
        cpus = topology.allowed_cpus if rank.binding.cpus is None else rank.binding.cpus
        rank = rank.replace(omp_threads=threads_of_ranks(topology, cpus, [None], local_size)[0])
    # Only rank 0 prints what is the same for all ranks.
    quota = quota_note(len(topology.allowed_cpus), topology.root)
    shared = [note, AUTO_BINDS if options.auto_binds(ranks) else "", quota] if local_rank == 0 else []
    return rank.replace(notes=(*rank.notes, *filter(None, shared)))


def _made(binding: Binding, refused: Sequence[RefusedStep]) -> Binding:
    """Return the binding that the process really has: without refused steps, and cut down where granted in part."""
    from .._start.outcome import GRANTED_IN_PART, BindingReport

    codes = {step.step: step.errno for step in refused}
    cpus = None if "sched_setaffinity" in codes else binding.cpus
    memory = None if "set_mempolicy" in codes else binding.memory
    if GRANTED_IN_PART in codes.values() and (now := BindingReport(binding, (), os.getpid()).effective):
        cpus = now.cpus if codes.get("sched_setaffinity") == GRANTED_IN_PART else cpus
        memory = now.memory if codes.get("set_mempolicy") == GRANTED_IN_PART else memory
    return Binding(cpus, memory, binding.required)


def _is_bound(variable: str) -> bool:
    """Whether the launcher bound this process by itself: it may use CPUs that this process lacks but could get.

    A cpuset may withhold CPUs from this process, and only the kernel knows which. So this function asks for a wider
    mask, of which sched_setaffinity sets the allowed part, and then restores the old mask.

    Args:
        variable: A variable that only the launcher's own processes have.
    """
    mine = os.sched_getaffinity(0)
    launchers = _mask_of_launcher(variable) if variable else mine
    if launchers <= mine:
        return False
    try:
        os.sched_setaffinity(0, launchers | mine)
    except PermissionError:  # a seccomp profile, which will refuse the binding, too
        return False
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, mine)
    return allowed > mine


def _mask_of_launcher(variable: str, proc: str = "/proc") -> set[int]:
    """Find the CPUs of the launcher's daemon; empty if the daemon is not an ancestor, as in a container.

    The daemon is the nearest ancestor that does not have ``variable``. A script around this command has it.

    Args:
        variable: A variable that only the launcher's own processes have.
        proc: The folder of the kernel's files about processes.
    """
    pid = os.getppid()
    while pid > 1:
        try:
            with open(f"{proc}/{pid}/environ", "rb") as environ:
                started = any(one.startswith(f"{variable}=".encode()) for one in environ.read().split(b"\0"))
            if not started:
                break
            pid = read_stat(f"{proc}/{pid}").parent
        except PermissionError:  # the process of another user: the daemon
            break
        except (FileNotFoundError, ProcessLookupError):
            return set()
    return os.sched_getaffinity(pid) if pid > 1 else set()


def _become(command: list[str]) -> int:
    """Execute ``command`` in this process. If that fails, return the exit status that a shell would."""
    flush()
    # Python ignores these signals, and the program would inherit that: execve resets only signals with a handler.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        from .._start.unexecuted import why_unexecuted

        say(f"{command[0]}: {error.strerror}{why_unexecuted(error, command[0])}")
        return 127 if isinstance(error, FileNotFoundError) else 126
