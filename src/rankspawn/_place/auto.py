"""The default of all commands and of ``launch``: bind each rank to its node if that leaves no node idle."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .._binding import Binding, PlacementError
from .._ids import format_ids
from .devices import as_devices, find_visible
from .memory import policy_of_rank
from .openmp import threads_of_ranks
from .plan import Placed, homes_of_ranks
from .topology import Topology
from .usable import Home, usable_machine
from .visible import Device, DeviceError, Visible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._binding import MemoryMode, MemoryPolicy


def plan_auto(
    topology: Topology,
    *,
    nprocs: int | None = None,
    devices: Sequence[str | Device] | None = None,
    reserve_cores: int = 0,
    threads_per_core: int | None = None,
    memory_policy: MemoryMode | MemoryPolicy | None = None,
) -> tuple[Placed, ...]:
    """Bind each rank to its node if several nodes have usable CPUs and each of these gets ranks; else bind none.

    So the default does not leave half of a machine idle because all GPUs are on one node, and does not take CPUs away
    from a single rank. The bindings are optional: a refusal does not fail the start. Unbound ranks still respect
    ``reserve_cores`` and ``threads_per_core``, and a memory policy for them covers all nodes that they may use.

    The arguments are those of ``place``.

    Raises:
        PlacementError: An argument is out of range, or names a device that is not there.
    """
    machine = usable_machine(topology, None, reserve_cores, threads_per_core)
    problem = ""
    try:
        seen = find_visible(topology) if devices is None else Visible(as_devices(topology, devices))
    except DeviceError as error:
        if devices is not None or nprocs is None:
            raise
        seen, problem = Visible(()), str(error)
    homes, _ = homes_of_ranks(machine, seen.devices, nprocs, None)
    problem = problem or next((home.problem for home in homes if home.problem), "")
    is_bound = not problem and len(machine.cores) > 1 and {home.node for home in homes} == machine.cores.keys()
    if not is_bound:
        note = [f"auto binds no rank to a node: {problem}"] if problem and len(machine.cores) > 1 else []
        alone = next(iter(machine.cores)) if len(machine.cores) == 1 else None
        homes = [Home(home.node if home.device else alone, list(note), home.device) for home in homes]
    homes[0].notes += seen.notes
    whole = frozenset().union(*map(machine.on, machine.cores))
    narrowed = reserve_cores > 0 or threads_per_core is not None
    bindings = []
    for home in homes:
        cpus = machine.on(home.node) if is_bound and home.node is not None else whole
        policy = policy_of_rank(machine, memory_policy, home, cpus, seen.devices, False)
        bindings.append(Binding(cpus if is_bound or narrowed else None, policy, False))
    threads = threads_of_ranks(topology, machine.allowed, [binding.cpus for binding in bindings])
    return tuple(
        Placed(binding, home.device, home.node, count, tuple(home.notes))
        for home, binding, count in zip(homes, bindings, threads, strict=True)
    )


def unbound(topology: Topology, nprocs: int) -> tuple[Placed, ...]:
    """Bind no rank. OMP_NUM_THREADS is each rank's share of the cores."""
    if nprocs < 1:
        raise PlacementError(f"nprocs: expected a positive integer, got {nprocs}")
    threads = threads_of_ranks(topology, topology.allowed_cpus, [None] * nprocs)
    return tuple(Placed(Binding(None, None, False), omp_threads=count) for count in threads)


def idle_note(topology: Topology, ranks: Sequence[Placed]) -> str:
    """Say which allowed cores no rank may use: "64 cores unused: nodes 2-3, 6-7"; "" if each has a rank."""
    used = frozenset().union(*(topology.allowed_cpus if r.binding.cpus is None else r.binding.cpus for r in ranks))
    idle = [core.cpus for core in topology.cores if used.isdisjoint(core.cpus)]
    idle = [core for core in idle if not topology.allowed_cpus.isdisjoint(core)]
    if not idle:
        return ""
    left = topology.allowed_cpus.intersection(cpu for core in idle for cpu in core)
    whole = [node for node in topology.nodes if (own := node.cpus & topology.allowed_cpus) and own <= left]
    others = left.difference(*(node.cpus for node in whole))
    where = [_counted("node", [node.id for node in whole])] if whole else []
    where += [_counted("CPU", others)] if others else []
    return f"{len(idle)} core{'s' * (len(idle) > 1)} unused: {'; '.join(where)}"


def _counted(what: str, ids: Collection[int]) -> str:
    return f"{what}{'s' * (len(ids) > 1)} {format_ids(ids).replace(',', ', ')}"
