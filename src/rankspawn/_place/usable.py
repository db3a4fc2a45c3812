"""What a plan may use of a machine: the cores of each node, without those that are forbidden, reserved or off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .._binding import PlacementError
from .._ids import format_ids
from .topology import Topology
from .visible import Device

Threads = tuple[int, ...]


class Home:
    """The node of a rank while it is planned: id, or None and the problem; ``notes`` grows."""

    def __init__(self, node: int | None, notes: list[str], device: Device | None = None) -> None:
        self.node, self.notes, self.device, self.problem = node, notes, device, ""


class Machine:
    """What a plan may use: the cores of each node without what is forbidden, reserved or switched off.

    Cores are tuples of threads, in the order of their lowest thread, as torch sorts them.
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
            if node >= 0 and usable[node].issuperset(threads):  # Nearly always, and quick.
                cores[node].append(core.cpus[:threads_per_core])
                continue
            threads = [cpu for cpu in threads if cpu in node_of]
            for node in sorted({node_of[cpu] for cpu in threads}):  # More than one in trees made by hand.
                cores[node].append(tuple([cpu for cpu in threads if node_of[cpu] == node][:threads_per_core]))
        self.cores = {id: cores[id] for id in sorted(cores) if cores[id]}
        if not self.cores:
            nodes = format_ids(cpu for node in topology.nodes for cpu in node.cpus)
            raise PlacementError(f"no CPU is left: allowed are {format_ids(allowed) or 'none'}, in nodes are {nodes}")

    def reserve(self, count: int) -> None:
        """Keep ``count`` cores of the machine free of ranks: the lowest ones, from the node with the most left."""
        total = sum(map(len, self.cores.values()))
        if not 0 <= count < total:
            raise PlacementError(f"--reserve-cores {count}: must be from 0 to {total - 1}, with {total} usable cores")
        for _ in range(count):
            most = max(self.cores, key=lambda node: (len(self.cores[node]), -node))
            del self.cores[most][0]
        self.cores = {node: cores for node, cores in self.cores.items() if cores}

    def on(self, node: int) -> frozenset[int]:
        """The usable CPUs of a node."""
        return frozenset(cpu for core in self.cores.get(node, ()) for cpu in core)


def usable_machine(
    topology: Topology, allowed_cpus: Iterable[int] | None, reserve_cores: int, threads_per_core: int | None
) -> Machine:
    if threads_per_core is not None and threads_per_core < 1:
        raise PlacementError(f"--threads-per-core {threads_per_core}: must be 1 or more")
    allowed = topology.allowed_cpus if allowed_cpus is None else frozenset(allowed_cpus) & topology.cpus
    machine = Machine(topology, allowed, threads_per_core)
    if reserve_cores:
        machine.reserve(reserve_cores)
    return machine
