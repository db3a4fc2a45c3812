"""The memory policy of one rank: a mode over the nodes of its CPUs, or a whole policy."""

from __future__ import annotations

from collections.abc import Iterable

from .._binding import MemoryPolicy, PlacementError, check_memory_policy
from .._ids import format_ids
from .topology import Node, Topology, nearest
from .usable import Home, Machine
from .visible import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._binding import MemoryMode


def policy_of_rank(
    machine: Machine,
    memory: MemoryMode | MemoryPolicy | None,
    home: Home,
    cpus: frozenset[int] | None,
    devices: Iterable[Device],
    required: bool,
) -> MemoryPolicy | None:
    """Find the memory policy of one rank.

    Args:
        machine: What ranks may use.
        memory: A mode, applied over the nodes of the rank's CPUs, or over its home if it has no CPUs of its own; or a
            whole policy; None for no policy.
        home: The rank's node. This function adds notes about what it assumed or gave up.
        cpus: The rank's CPUs; None if the rank stays unbound.
        devices: The accelerators of the machine.
        required: Whether an impossible policy is an error.

    Raises:
        PlacementError: The mode is unknown, or the policy is impossible and ``required`` is true.
        TypeError: ``memory`` is neither a mode nor a policy.
    """
    topology = machine.topology
    check_memory_policy(memory)
    if memory is None:
        return None
    if isinstance(memory, MemoryPolicy):
        policy, problem = memory, ""
        absent = memory.nodes - topology.allowed_nodes
        if absent:
            problem = f"nodes {format_ids(absent)} are absent or not allowed ({format_ids(topology.allowed_nodes)} are)"
    elif memory in ("default", "local"):
        return MemoryPolicy(memory)
    else:
        near = [n for n in topology.nodes if (n.cpus & cpus if cpus is not None else n.id == home.node)]
        nodes, problem = _memory_nodes(topology, near, home, devices)
        if nodes:
            one = home.node if home.node in nodes else min(nodes)
            policy = MemoryPolicy(memory, frozenset((one,)) if memory == "preferred" else nodes)
    if not problem:
        return policy
    if required:
        raise PlacementError(f"memory policy {memory}: {problem}")
    home.notes.append(f"memory is left to the inherited policy: {memory}: {problem}")
    return None


def _memory_nodes(
    topology: Topology, near: list[Node], home: Home, devices: Iterable[Device]
) -> tuple[frozenset[int], str]:
    """Find the nodes of ``near`` that are allowed and have memory, else the nearest such node; or the problem.

    An accelerator's memory can be a node of its own, without CPUs (as on a GH200). No rank gets such a node.
    """
    if not near:
        return frozenset(), "the rank's node is unknown"
    usable = [node for node in topology.nodes if node.id in topology.allowed_nodes]
    if any(node.memory for node in usable):
        usable = [node for node in usable if node.memory]
    nodes = frozenset(node.id for node in near) & frozenset(node.id for node in usable)
    if nodes:
        return nodes, ""
    names = format_ids(node.id for node in near)
    of_devices = {device.node for device in devices}
    others = [node for node in usable if node.cpus or node.id not in of_devices]
    have_none = all(not node.memory for node in near)
    if not others or not have_none:
        why = "has no memory" if have_none else "is not allowed"
        return frozenset(), f"node {names} {why} (allowed: {format_ids(topology.allowed_nodes) or 'none'})"
    taken = nearest(near[0], others)
    home.notes.append(f"node {names} has no memory: using the nearest node that has, {taken}")
    return frozenset((taken,)), ""
