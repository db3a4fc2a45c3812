"""Which CPUs and which memory for which rank: topology, devices, mode and ranks in, one Binding a rank out.

With torch's inputs (``gpu_index``, all visible GPUs) the four modes give the CPU sets of torch.numa.binding wherever
that gives any; each function here says the rule that it keeps. Beyond torch: splits over the ranks that are launched,
machines without accelerators, reserved cores, threads per core, memory, and an answer or a clear error where torch
raises, or piles ranks up.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from .._binding import MEMORY_MODES, AffinityMode, Binding, MemoryPolicy, PlacementError
from .._frozen import Frozen
from .._ids import format_ids, parse_ids
from .._public import public
from .devices import as_devices, find_devices, locate
from .openmp import omp_num_threads
from .topology import Node, Topology
from .usable import Home, Machine, Threads, usable_machine
from .visible import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._binding import MemoryMode


class Placed(Frozen):
    """The place of one rank, and why.

    device: the accelerator that it follows, None without. node: the NUMA node that it was put on, None where that is
    not known. omp_threads: what OMP_NUM_THREADS should be, see ``omp_num_threads``. notes: what was assumed or given
    up, in words.
    """

    binding: Binding
    device: Device | None = None
    node: int | None = None
    omp_threads: int = 1
    notes: tuple[str, ...] = ()


@public
def place(
    topology: Topology,
    mode: AffinityMode | str,
    *,
    nprocs: int | None = None,
    gpu_index: int | None = None,
    devices: Sequence[str | Device] | None = None,
    allowed_cpus: Iterable[int] | None = None,
    reserve_cores: int = 0,
    threads_per_core: int | None = None,
    memory: MemoryMode | MemoryPolicy | None = None,
    required: bool = True,
) -> tuple[Binding, ...]:
    """Where each rank goes: one Binding for each, by local rank. Pure: the machine is neither read nor changed, but for
    the devices, where they are not given.

    topology: the machine.
    mode: how CPUs follow from a rank's device.
    nprocs: how many ranks are launched; as many as devices if left out. Placed i follows device i, or i modulo the
        number of devices. Splits are made over these ranks, not over the devices that no rank follows.
    gpu_index: as torch counts: the one rank that follows the visible device of this index, with splits over all
        devices; the answer has one element. Where ``nprocs`` ranks share fewer devices, or there are none, and torch
        raises, it is rank ``gpu_index`` of these; without devices and nprocs, of one rank for each node with usable
        CPUs.
    devices: PCI addresses or Device objects in local-rank order, empty for none. None finds those of the topology's
        root: with this process's environment where the root is "/", with none set elsewhere.
        Without devices, ranks go in blocks over the nodes, in proportion to their usable cores.
    allowed_cpus: instead of the topology's own; CPUs that are not online fall away.
    reserve_cores: physical cores of the machine that no rank gets, dealt over the nodes, lowest first.
    threads_per_core: hardware threads used of each core, the lowest first; None for all.
    memory: a mode, applied over the nodes of each rank's CPUs, or a whole policy for every rank alike; None leaves
        memory alone, which is local to the CPU that touches first.
    required: False leaves a rank unbound, with a note, where it cannot be placed; CPUs and memory each on their own.

    What was assumed or given up is said as RuntimeWarnings. Raises PlacementError, with the option or file and its
    value, where no placement can be made.
    """
    mode = _mode(mode)
    machine = usable_machine(topology, allowed_cpus, reserve_cores, threads_per_core)
    placed = _placed(machine, mode, nprocs, gpu_index, devices, memory, required)
    for note in dict.fromkeys(note for home, _ in placed for note in home.notes):
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    return tuple(binding for _, binding in placed)


def plan(
    topology: Topology,
    mode: AffinityMode | str,
    *,
    nprocs: int | None = None,
    gpu_index: int | None = None,
    devices: Sequence[str | Device] | None = None,
    allowed_cpus: Iterable[int] | None = None,
    reserve_cores: int = 0,
    threads_per_core: int | None = None,
    memory: MemoryMode | MemoryPolicy | None = None,
    required: bool = True,
) -> tuple[Placed, ...]:
    """As ``place``, with what else there is to say of each rank; its notes are there, and nobody is warned."""
    mode = _mode(mode)
    machine = usable_machine(topology, allowed_cpus, reserve_cores, threads_per_core)
    placed = _placed(machine, mode, nprocs, gpu_index, devices, memory, required)
    threads = _threads(topology, machine.allowed, [binding.cpus for _, binding in placed])
    return tuple(
        Placed(binding, home.device, home.node, count, tuple(home.notes))
        for (home, binding), count in zip(placed, threads, strict=True)
    )


def _placed(
    machine: Machine,
    mode: AffinityMode,
    nprocs: int | None,
    gpu_index: int | None,
    devices: Sequence[str | Device] | None,
    memory: MemoryMode | MemoryPolicy | None,
    required: bool,
) -> list[tuple[Home, Binding]]:
    """The ranks that are asked for: each one's home, with the notes of it, and binding."""
    found = find_devices(machine.topology) if devices is None else as_devices(machine.topology, devices)
    homes, chosen = _homes(machine, found, nprocs, gpu_index)
    drafts = [(homes[i], _cpus(machine, mode, homes, i, required)) for i in chosen]
    return [
        (home, Binding(cpus, _memory(machine, memory, home, cpus, found, required), required)) for home, cpus in drafts
    ]


def plan_lists(
    topology: Topology,
    nprocs: int,
    *,
    cpus: str | None = None,
    mems: str | None = None,
    memory: MemoryMode = "bind",
    allowed_cpus: Iterable[int] | None = None,
    required: bool = True,
) -> tuple[Placed, ...]:
    """Ranks placed by hand: ``--cpus`` and ``--mems`` give one list for each rank, with colons between
    ("0-3:4-7"), or one for all. ``memory`` is the mode that is applied over the nodes of ``mems``.

    Raises PlacementError for a malformed list, a wrong number of them, and ids that this process may not use.
    """
    usable = topology.allowed_cpus if allowed_cpus is None else frozenset(allowed_cpus) & topology.cpus
    cpu_lists = _lists("--cpus", cpus, nprocs, usable)
    mem_lists = _lists("--mems", mems, nprocs, topology.allowed_nodes)
    threads = _threads(topology, usable, cpu_lists)
    ranks = []
    for rank, (ids, nodes) in enumerate(zip(cpu_lists, mem_lists, strict=True)):
        try:
            policy = None if nodes is None else MemoryPolicy(memory, nodes)
        except ValueError as error:
            raise PlacementError(f"--mems {mems!r}, rank {rank}: {error}") from None
        on = [node.id for node in topology.nodes if ids is not None and node.cpus & ids]
        ranks.append(Placed(Binding(ids, policy, required), None, on[0] if len(on) == 1 else None, threads[rank]))
    return tuple(ranks)


def _lists(flag: str, text: str | None, nprocs: int, usable: frozenset[int]) -> list[frozenset[int] | None]:
    if text is None:
        return [None] * nprocs
    parts = text.split(":")
    if len(parts) not in (1, nprocs):
        raise PlacementError(f"{flag} {text!r} has {len(parts)} lists for {nprocs} ranks: give one each or one for all")
    found: list[frozenset[int] | None] = []
    for rank, part in enumerate(parts):
        try:
            ids = parse_ids(part)
        except ValueError as error:
            raise PlacementError(f"{flag} {text!r}, rank {rank}: {error}") from None
        if not ids or not ids <= usable:
            wrong = f"{format_ids(ids - usable)} may not be used" if ids else "the list is empty"
            raise PlacementError(f"{flag} {text!r}, rank {rank}: {wrong} (allowed: {format_ids(usable)})")
        found.append(ids)
    return found if len(found) == nprocs else found * nprocs


def _mode(mode: AffinityMode | str) -> AffinityMode:
    try:
        return AffinityMode(getattr(mode, "value", mode))  # torch's own AffinityMode is another class
    except ValueError:
        raise PlacementError(f"affinity mode {mode!r} is none of {', '.join(m.value for m in AffinityMode)}") from None


def _homes(
    machine: Machine, devices: tuple[Device, ...], nprocs: int | None, gpu_index: int | None
) -> tuple[list[Home], range | tuple[int]]:
    """The node of each rank over which splits are made, and the indices of the ranks that are asked for."""
    if nprocs is not None and nprocs < 1:
        raise PlacementError(f"nprocs {nprocs}: must be 1 or more")
    if gpu_index is not None and gpu_index < 0:
        raise PlacementError(f"gpu_index {gpu_index}: must be 0 or more")
    if devices:
        count = len(devices) if nprocs is None else nprocs
        if gpu_index is not None:
            count = max(count, len(devices))
            if gpu_index >= count:
                raise PlacementError(f"gpu_index {gpu_index}: only {len(devices)} devices are visible")
        homes = [_home(machine, devices[i % len(devices)]) for i in range(count)]
        return homes, range(count) if gpu_index is None else (gpu_index,)
    count = len(machine.cores) if nprocs is None else nprocs
    if gpu_index is None:
        if nprocs is None:
            raise PlacementError("nprocs is needed: there are no devices to count")
        return _dealt(machine, count), range(count)
    if gpu_index >= count:
        raise PlacementError(
            f"gpu_index {gpu_index}: no accelerator was found, and {count} ranks are placed here; pass nprocs"
        )
    return _dealt(machine, count), (gpu_index,)


def _dealt(machine: Machine, count: int) -> list[Home]:
    """Ranks in blocks over the nodes: rank i goes where core i*cores/ranks is, so that no node gets more ranks than
    cores while there are enough; where there are not, hardware threads are counted instead."""
    spots = [node for node, cores in machine.cores.items() for _ in cores]
    if count > len(spots):
        spots = [node for node, cores in machine.cores.items() for core in cores for _ in core]
    return [Home(spots[i * len(spots) // count], []) for i in range(count)]


def _home(machine: Machine, device: Device) -> Home:
    """The node with CPUs that a device belongs to. torch takes numa_node, and node 0 for -1."""
    node, notes = locate(machine.topology, device)
    home = Home(node, list(notes), device)
    if node is None:
        home.problem = (
            f"device {device.address}: its NUMA node is unknown: numa_node is {device.node}, and"
            f" {len(machine.topology.nodes_with_cpus())} nodes have CPUs; name the CPUs with --cpus, or allow falling"
            " back to no binding"
        )
        return home
    own = machine.topology.node(node)
    if own is not None and not own.cpus:
        near = _nearest(own, machine.topology.nodes_with_cpus())
        home.notes.append(f"device {device.address} is on node {node}, which has no CPUs: the nearest is {near}")
        home.node = near
    return home


def _nearest(node: Node, others: Iterable[Node]) -> int:
    return min(others, key=lambda other: (node.distance(other.id), other.id)).id


def _cpus(machine: Machine, mode: AffinityMode, homes: list[Home], index: int, required: bool) -> frozenset[int] | None:
    """The CPUs of rank ``index``; None, with a note, where there are none and that is allowed."""
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
    home.notes.append(f"rank {index} is left unbound: {home.problem}")
    return None


def _node_cpus(machine: Machine, id: int) -> str:
    node = machine.topology.node(id)
    return (format_ids(node.cpus) if node else "") or "none"


def _socket(machine: Machine, home: int) -> frozenset[int]:
    """All usable CPUs of the nodes of the home's socket; a node belongs to the socket of its lowest usable CPU (torch).

    torch asks this of every possible node, and raises where one has no CPU that is allowed. Here they are passed over;
    the home itself may be one of them.
    """

    def socket_of(node: int) -> int | None:
        known = machine.topology.node(node)
        lowest = min(machine.on(node) or (known.cpus if known else ()), default=-1)
        return next((socket.id for socket in machine.topology.sockets if lowest in socket.cpus), None)

    own = socket_of(home)
    return frozenset().union(*(machine.on(node) for node in machine.cores if socket_of(node) == own))


def _exclusive(machine: Machine, home: Home, position: int, count: int) -> frozenset[int]:
    """The share of one of ``count`` ranks: whole cores, in order, the first ranks get one more where uneven (torch).

    With fewer cores than ranks torch raises. Here single hardware threads are dealt, and it is said; with too few of
    those, or where one thread per core was asked for, it is the rank's problem.
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
    """One last-level cache's usable CPUs within the node; those with the most CPUs first, then by their lowest CPU;
    ranks beyond the number of caches begin again at the first (torch)."""
    assert home.node is not None
    cpus = machine.on(home.node)
    groups = [(cache.cpus & cpus, min(cache.cpus)) for cache in machine.topology.caches if cache.cpus & cpus]
    if not groups:
        home.notes.append(f"core-complex: the caches of node {home.node} are not told; its whole node is taken")
        return cpus
    groups.sort(key=lambda group: (-len(group[0]), group[1]))
    return groups[position % len(groups)][0]


def _memory(
    machine: Machine,
    memory: MemoryMode | MemoryPolicy | None,
    home: Home,
    cpus: frozenset[int] | None,
    devices: Iterable[Device],
    required: bool,
) -> MemoryPolicy | None:
    """The policy of one rank: the mode over the nodes of its CPUs, or its home where its CPUs were given up."""
    topology = machine.topology
    if memory is None:
        return None
    if isinstance(memory, MemoryPolicy):
        policy, problem = memory, ""
        absent = memory.nodes - topology.allowed_nodes
        if absent:
            problem = f"nodes {format_ids(absent)} are absent or not allowed ({format_ids(topology.allowed_nodes)} are)"
    elif memory in ("default", "local"):
        return MemoryPolicy(memory)
    elif memory not in MEMORY_MODES:
        raise PlacementError(f"memory policy {memory!r} is none of {', '.join(MEMORY_MODES)}")
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
    """Those of ``near`` that have memory and are allowed, or the nearest that are; else the problem.

    The memory of an accelerator can be a node of its own, without CPUs (field: GH200): no rank is sent there.
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
    nearest = _nearest(near[0], others)
    home.notes.append(f"node {names} has no memory: the nearest that has, {nearest}, is taken")
    return frozenset((nearest,)), ""


def _threads(topology: Topology, allowed: frozenset[int], masks: Iterable[frozenset[int] | None]) -> tuple[int, ...]:
    """OMP_NUM_THREADS of each rank; one that is left unbound may use all that is allowed."""
    return omp_num_threads(topology, [allowed if mask is None else mask for mask in masks])
