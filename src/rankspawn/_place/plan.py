"""Decides the CPUs and the memory of each rank: topology, devices, mode and ranks in, a Binding for each rank out.

With torch's inputs (``gpu_index``, all visible GPUs) the four modes give the CPU sets of torch.numa.binding wherever
torch gives any. Beyond torch, this module splits CPUs over the launched ranks, and handles machines without
accelerators, reserved cores, threads per core, and memory. Where torch raises, or gives ranks the same CPUs, it
gives an answer or a clear error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from .._binding import PLACEMENT_KINDS, AffinityMode, Binding, PlacementError, affinity_mode, refuse_other_kinds
from .._frozen import Frozen
from .._public import public
from .devices import as_devices, find_visible, locate
from .memory import policy_of_rank
from .modes import cpus_of_rank
from .openmp import threads_of_ranks
from .topology import Topology, nearest
from .usable import Home, Machine, usable_machine
from .visible import Device, Visible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._binding import MemoryMode, MemoryPolicy, ModeName


class Placed(Frozen):
    """The place of one rank, and why.

    Attributes:
        binding: Its CPUs and memory policy.
        device: The accelerator that it follows; None if it follows none.
        node: Its NUMA node; None if unknown.
        omp_threads: Its OMP_NUM_THREADS, see ``omp_num_threads``.
        notes: What was assumed or given up, in words.
    """

    binding: Binding
    device: Device | None = None
    node: int | None = None
    omp_threads: int = 1
    notes: tuple[str, ...] = ()


@public
def place(
    topology: Topology,
    numa: AffinityMode | ModeName,
    *,
    nprocs: int | None = None,
    gpu_index: int | None = None,
    devices: Sequence[str | Device] | None = None,
    allowed_cpus: Iterable[int] | None = None,
    reserve_cores: int = 0,
    threads_per_core: int | None = None,
    memory_policy: MemoryMode | MemoryPolicy | None = None,
    required: bool = True,
) -> tuple[Binding, ...]:
    """Decide where each rank goes. This changes nothing, and looks up only the devices, unless you give them.

    A RuntimeWarning says what was assumed or given up.

    Args:
        topology: The machine.
        numa: How CPUs follow from a rank's device: one of torch's four modes.
        nprocs: How many ranks are launched; None for one rank for each device. Rank i follows device i, or i modulo the
            number of devices. CPUs are split over these ranks, not over devices that no rank follows.
        gpu_index: As in torch: place only the rank that follows the visible device of this index, with CPUs split over
            all devices. The answer has one element. If ``nprocs`` ranks share fewer devices, or there are no devices
            (torch raises), it is rank ``gpu_index`` of these ranks. Without devices and ``nprocs``, there is one rank
            for each node with usable CPUs.
        devices: PCI addresses or Device objects in local-rank order; empty for none. None looks for the devices of the
            topology's root, with this process's environment if the root is "/", and with an empty one otherwise.
            Without devices, ranks go in blocks over the nodes, in proportion to the nodes' usable cores.
        allowed_cpus: CPUs that ranks may use, instead of the topology's own. CPUs that are not online are ignored.
        reserve_cores: How many physical cores of the machine no rank gets. They come from all nodes, lowest first.
        threads_per_core: How many hardware threads of each core are used, the lowest first; None for all.
        memory_policy: A mode, which applies to the nodes of each rank's CPUs, or one policy for every rank. None keeps
            the inherited policy. By default a page then comes from the node of the CPU that touches it first.
        required: If False, a rank that cannot be placed stays unbound, with a warning; CPUs and memory separately.

    Returns:
        A Binding for each rank, by local rank.

    Raises:
        PlacementError: No placement is possible. The message names the option or file, and its value.
        TypeError: An argument has the wrong type: the message names the argument and says what is expected.
    """
    if not isinstance(topology, Topology):
        raise TypeError(f"topology: expected a Topology, got {topology!r}; Topology.read() is this machine's")
    refuse_other_kinds(PLACEMENT_KINDS, {"nprocs": nprocs, "gpu_index": gpu_index, "required": required})
    mode = affinity_mode(numa)
    machine = usable_machine(topology, allowed_cpus, reserve_cores, threads_per_core)
    placed = _placed(machine, mode, nprocs, gpu_index, devices, memory_policy, required)
    for note in dict.fromkeys(note for home, _ in placed for note in home.notes):
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    return tuple(binding for _, binding in placed)


def plan(
    topology: Topology,
    numa: AffinityMode | str,
    *,
    nprocs: int | None = None,
    gpu_index: int | None = None,
    devices: Sequence[str | Device] | None = None,
    allowed_cpus: Iterable[int] | None = None,
    reserve_cores: int = 0,
    threads_per_core: int | None = None,
    memory_policy: MemoryMode | MemoryPolicy | None = None,
    required: bool = True,
) -> tuple[Placed, ...]:
    """Do what ``place`` does, but return all about each rank, and notes instead of warnings."""
    mode = affinity_mode(numa)
    machine = usable_machine(topology, allowed_cpus, reserve_cores, threads_per_core)
    placed = _placed(machine, mode, nprocs, gpu_index, devices, memory_policy, required)
    threads = threads_of_ranks(topology, machine.allowed, [binding.cpus for _, binding in placed])
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
    memory_policy: MemoryMode | MemoryPolicy | None,
    required: bool,
) -> list[tuple[Home, Binding]]:
    """Find the home, with its notes, and the binding of each requested rank."""
    seen = find_visible(machine.topology) if devices is None else Visible(as_devices(machine.topology, devices))
    homes, chosen = homes_of_ranks(machine, seen.devices, nprocs, gpu_index)
    homes[chosen[0]].notes += seen.notes
    drafts = [(homes[i], cpus_of_rank(machine, mode, homes, i, required)) for i in chosen]
    bound = []
    for i, (home, cpus) in zip(chosen, drafts, strict=True):
        policy = policy_of_rank(machine, memory_policy, home, cpus, seen.devices, required)
        if cpus is None:
            is_left = "is left unbound" if policy is None else "keeps the CPUs that it inherits"
            home.notes.append(f"rank {i} {is_left}: {home.problem}")
        bound.append((home, Binding(cpus, policy, required)))
    return bound


def homes_of_ranks(
    machine: Machine, devices: tuple[Device, ...], nprocs: int | None, gpu_index: int | None
) -> tuple[list[Home], range | tuple[int]]:
    """Find the node of each rank that takes part in splits, and the indices of the requested ranks.

    Raises:
        PlacementError: A number is out of range, or is missing.
    """
    if nprocs is not None and nprocs < 1:
        raise PlacementError(f"nprocs: expected a positive integer, got {nprocs}")
    if gpu_index is not None and gpu_index < 0:
        raise PlacementError(f"gpu_index: expected a non-negative integer, got {gpu_index}")
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
            raise PlacementError("there are no accelerators to count: give the number of ranks, nprocs")
        return _dealt(machine, count), range(count)
    if gpu_index >= count:
        raise PlacementError(
            f"gpu_index {gpu_index}: no accelerator was found, and {count} ranks are placed here; pass nprocs"
        )
    return _dealt(machine, count), (gpu_index,)


def _dealt(machine: Machine, count: int) -> list[Home]:
    """Place ranks in blocks over the nodes: rank i goes to the node of core i*cores/ranks.

    If there are enough cores, no node gets more ranks than cores. Otherwise hardware threads count instead of cores.
    """
    spots = [node for node, cores in machine.cores.items() for _ in cores]
    if count > len(spots):
        spots = [node for node, cores in machine.cores.items() for core in cores for _ in core]
    return [Home(spots[i * len(spots) // count], []) for i in range(count)]


def _home(machine: Machine, device: Device) -> Home:
    """Find the node with CPUs that a device belongs to. torch takes numa_node, and node 0 if that is -1."""
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
        near = nearest(own, machine.topology.nodes_with_cpus())
        home.notes.append(
            f"device {device.address} is on node {node}, which has no CPUs: using the nearest node that has, {near}"
        )
        home.node = near
    return home
