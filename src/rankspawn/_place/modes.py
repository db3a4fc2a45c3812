"""The CPUs of one rank by the four modes of torch.numa.binding. Each function states its rule."""

from __future__ import annotations

from .._binding import AffinityMode, PlacementError
from .._ids import format_ids
from .usable import Home, Machine, Threads


def cpus_of_rank(
    machine: Machine, mode: AffinityMode, homes: list[Home], index: int, required: bool
) -> frozenset[int] | None:
    """Find the CPUs of one rank.

    Args:
        machine: What ranks may use.
        mode: How CPUs follow from the rank's node.
        homes: The node of each rank. The rank's own gets notes, and the problem if it has no CPUs.
        index: The rank.
        required: Whether a rank that cannot be placed is an error.

    Returns:
        The CPUs; None if there are none and the rank may stay unbound.

    Raises:
        PlacementError: The rank cannot be placed, and ``required`` is true.
    """
    home = homes[index]
    cpus: frozenset[int] = frozenset()
    if home.node is not None:
        if mode is AffinityMode.SOCKET:
            cpus = _socket(machine, home.node)
        if home.node not in machine.cores:
            usable = format_ids(cpu for node in machine.cores for cpu in machine.on(node))
            home.problem = (
                f"node {home.node} has no usable CPU: it has {_node_cpus(machine, home.node)}, ranks may use {usable}"
                + (f" (device {home.device.address})" if home.device else "")
            )
        elif mode is AffinityMode.NODE:
            cpus = machine.on(home.node)
        elif mode is not AffinityMode.SOCKET:
            sharing = [i for i, other in enumerate(homes) if other.node == home.node]
            split = _exclusive if mode is AffinityMode.EXCLUSIVE else _core_complex
            cpus = split(machine, home, sharing.index(index), len(sharing))
    if cpus:
        return cpus
    if required:
        raise PlacementError(f"rank {index}: {home.problem}")
    return None


def _node_cpus(machine: Machine, id: int) -> str:
    node = machine.topology.node(id)
    return (format_ids(node.cpus) if node else "") or "none"


def _socket(machine: Machine, home: int) -> frozenset[int]:
    """Find all usable CPUs of the home's socket; a node belongs to the socket of its lowest usable CPU, as in torch.

    torch looks at every possible node, and raises if one has no allowed CPU. Here such nodes are skipped, even if the
    home is one of them.
    """

    def socket_of(node: int) -> int | None:
        known = machine.topology.node(node)
        lowest = min(machine.on(node) or (known.cpus if known else ()), default=-1)
        return next((socket.id for socket in machine.topology.sockets if lowest in socket.cpus), None)

    own = socket_of(home)
    return frozenset().union(*(machine.on(node) for node in machine.cores if socket_of(node) == own))


def _exclusive(machine: Machine, home: Home, position: int, count: int) -> frozenset[int]:
    """Find the share of one of ``count`` ranks: whole cores in order; the first ranks get one more, as in torch.

    With fewer cores than ranks, torch raises. Here the ranks then divide the hardware threads, with a note. If there
    are too few of these as well, or ``threads_per_core`` was given, the rank has no CPUs and a problem.
    """
    assert home.node is not None
    units = machine.cores[home.node]
    if count > len(units):
        threads: list[Threads] = [(cpu,) for core in units for cpu in core]
        if machine.one_thread or count > len(threads):
            home.problem = (
                f"exclusive: {count} ranks on node {home.node}, which has {len(units)} usable cores"
                f" (CPUs {format_ids(machine.on(home.node))})"
            )
            return frozenset()
        home.notes.append(f"{count} ranks share the {len(units)} cores of node {home.node}, by hardware threads")
        units = threads
    each, extra = divmod(len(units), count)
    start = position * each + min(position, extra)
    return frozenset(cpu for unit in units[start : start + each + (position < extra)] for cpu in unit)


def _core_complex(machine: Machine, home: Home, position: int, count: int) -> frozenset[int]:
    """Find the usable CPUs of one last-level cache of the node, as in torch.

    Caches with more CPUs come first, and among equals those with lower CPUs. If there are more ranks than caches, the
    ranks begin again at the first cache.
    """
    assert home.node is not None
    cpus = machine.on(home.node)
    groups = [(cache.cpus & cpus, min(cache.cpus)) for cache in machine.topology.caches if cache.cpus & cpus]
    if not groups:
        home.notes.append(f"core-complex: no cache information for node {home.node}; using the whole node")
        return cpus
    groups.sort(key=lambda group: (-len(group[0]), group[1]))
    return groups[position % len(groups)][0]
