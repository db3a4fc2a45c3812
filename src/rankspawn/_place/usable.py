"""The part of a machine that a plan may use: the cores of each node that are allowed, not reserved, and online."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .._binding import PLACEMENT_KINDS, PlacementError, refuse_other_kinds
from .._ids import format_ids
from .topology import Topology
from .visible import Device

Threads = tuple[int, ...]


class Home:
    """The node of a rank while it is planned.

    Attributes:
        node: The node's id; None if unknown.
        notes: What was assumed or given up, in words. Planning adds to it.
        device: The accelerator that the rank follows; None if it follows none.
        problem: Why the rank cannot be placed; "" if it can.
    """

    def __init__(self, node: int | None, notes: list[str], device: Device | None = None) -> None:
        self.node, self.notes, self.device, self.problem = node, notes, device, ""


class Machine:
    """The cores that ranks may use.

    Args:
        topology: The machine.
        allowed: The CPUs that ranks may use.
        threads_per_core: How many hardware threads of each core are used, the lowest first; None for all.

    Attributes:
        cores: The cores of each node that has any: tuples of threads, in the order of the lowest thread, as in torch.
        one_thread: Whether ``threads_per_core`` was given.

    Raises:
        PlacementError: No CPU is left.
    """

    def __init__(self, topology: Topology, allowed: frozenset[int], threads_per_core: int | None) -> None:
        self.topology = topology
        self.allowed = allowed
        self.one_thread = threads_per_core is not None
        usable = {node.id: node.cpus & allowed for node in topology.nodes}
        node_of = {cpu: id for id, cpus in usable.items() for cpu in cpus}
        cores: dict[int, list[Threads]] = {id: [] for id in usable}
        for core in topology.cores:
            threads: Sequence[int] = core.cpus
            node = node_of.get(threads[0], -1)
            if node >= 0 and usable[node].issuperset(threads):  # Nearly always true, and quick.
                cores[node].append(core.cpus[:threads_per_core])
                continue
            threads = [cpu for cpu in threads if cpu in node_of]
            for node in sorted({node_of[cpu] for cpu in threads}):  # More than one only in trees made by hand.
                cores[node].append(tuple([cpu for cpu in threads if node_of[cpu] == node][:threads_per_core]))
        self.cores = {id: cores[id] for id in sorted(cores) if cores[id]}
        if not self.cores:
            nodes = format_ids(cpu for node in topology.nodes for cpu in node.cpus)
            raise PlacementError(f"no CPU is left: allowed are {format_ids(allowed) or 'none'}, in nodes are {nodes}")

    def reserve(self, count: int) -> None:
        """Keep ``count`` cores free of ranks: each time the lowest core of the node with the most cores left."""
        total = sum(map(len, self.cores.values()))
        if not 0 <= count < total:
            raise PlacementError(f"reserve_cores {count}: must be from 0 to {total - 1}, with {total} usable cores")
        for _ in range(count):
            most = max(self.cores, key=lambda node: (len(self.cores[node]), -node))
            del self.cores[most][0]
        self.cores = {node: cores for node, cores in self.cores.items() if cores}

    def on(self, node: int) -> frozenset[int]:
        """Return the usable CPUs of a node."""
        return frozenset(cpu for core in self.cores.get(node, ()) for cpu in core)


def usable_machine(
    topology: Topology, allowed_cpus: Iterable[int] | None, reserve_cores: int, threads_per_core: int | None
) -> Machine:
    """Find what ranks may use; the arguments are those of ``place``.

    Raises:
        PlacementError: An argument is out of range, or no CPU is left.
        TypeError: An argument has the wrong type.
    """
    given = {"allowed_cpus": allowed_cpus, "reserve_cores": reserve_cores, "threads_per_core": threads_per_core}
    refuse_other_kinds(PLACEMENT_KINDS, given)
    if threads_per_core is not None and threads_per_core < 1:
        raise PlacementError(f"threads_per_core: expected a positive integer, got {threads_per_core}")
    allowed = topology.allowed_cpus if allowed_cpus is None else frozenset(allowed_cpus) & topology.cpus
    machine = Machine(topology, allowed, threads_per_core)
    if reserve_cores:
        machine.reserve(reserve_cores)
    return machine
