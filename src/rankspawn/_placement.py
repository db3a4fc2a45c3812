"""Which CPUs and which memory for which rank: Topology, devices, mode and ranks in, one Binding a rank out.

With torch's inputs (``gpu_index``, all visible GPUs) the four modes give the CPU sets of torch.numa.binding, wherever
that gives any; its rules are told at each function. What goes beyond is in ``plan``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rankspawn._binding import AffinityMode, Binding, MemoryMode, MemoryPolicy, format_ids, parse_ids
from rankspawn._devices import Device, as_devices, find_devices
from rankspawn._topology import Core, Node, PlacementError, Topology


@dataclass(frozen=True)
class Rank:
    """The place of one rank, and why.

    device: the accelerator that it follows, None without. node: the NUMA node that it was put on, None where it is
    left unbound. cores: the physical cores of its mask. notes: what was assumed or given up, in words.
    """

    binding: Binding
    device: Device | None
    node: int | None
    cores: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Machine:
    """What a plan may use: the topology without what is forbidden, reserved or switched off."""

    topology: Topology
    cpus: frozenset[int]
    nodes: tuple[Node, ...]
    required: bool
    said: list[str]

    def on(self, node: int) -> frozenset[int]:
        return next((one.cpus for one in self.nodes if one.id == node), frozenset()) & self.cpus

    def cores(self, cpus: frozenset[int]) -> list[tuple[int, ...]]:
        """The threads among ``cpus``, core by core, in the order of each core's lowest thread, as torch sorts them."""
        found = [tuple(cpu for cpu in core.cpus if cpu in cpus) for core in self.topology.cores]
        return [threads for threads in found if threads]


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
    """One Binding for each rank; ``plan`` tells more, and has the meaning of each argument.

    Where ``required`` is false, what had to be given up is said as a RuntimeWarning.
    Raises PlacementError where no placement can be made.
    """
    ranks = plan(
        topology,
        mode,
        nprocs=nprocs,
        gpu_index=gpu_index,
        devices=devices,
        allowed_cpus=allowed_cpus,
        reserve_cores=reserve_cores,
        threads_per_core=threads_per_core,
        memory=memory,
        required=required,
    )
    for note in dict.fromkeys(note for rank in ranks for note in rank.notes):
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    return tuple(rank.binding for rank in ranks)


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
) -> tuple[Rank, ...]:
    """TODO"""
    mode = AffinityMode(mode)
    allowed = topology.allowed_cpus if allowed_cpus is None else frozenset(allowed_cpus) & topology.cpus
    machine = _Machine(topology, allowed, topology.nodes_with_cpus(), required, [])
    found = find_devices(topology) if devices is None else as_devices(topology, devices)
    homes: list[int | None]
    if gpu_index is not None and found:
        if gpu_index >= len(found):
            raise PlacementError(f"gpu_index {gpu_index}: {len(found)} devices are visible")
        homes = [_home(machine, device) for device in found]
        chosen = [gpu_index]
    else:
        nodes = [node.id for node in machine.nodes if machine.on(node.id)]
        if nprocs is None:
            nprocs = len(found) or max(len(nodes), (gpu_index or 0) + 1)
        homes = [_home(machine, found[i % len(found)]) for i in range(nprocs)] if found else []
        if not found:
            homes = [nodes[i * len(nodes) // nprocs] for i in range(nprocs)]
        chosen = list(range(nprocs)) if gpu_index is None else [gpu_index]
    return tuple(
        Rank(Binding(cpus, None, required), found[i % len(found)] if found else None, homes[i], len(machine.cores(cpus)))
        for i in chosen
        for cpus in [_cpus_of(machine, mode, homes, i)]
    )


def _home(machine: _Machine, device: Device) -> int:
    if device.node < 0 and len(machine.nodes) == 1:
        return machine.nodes[0].id
    if device.node < 0:
        raise PlacementError(f"device {device.address}: its NUMA node is unknown (numa_node is {device.node})")
    return device.node


def _cpus_of(machine: _Machine, mode: AffinityMode, homes: list[int | None], index: int) -> frozenset[int]:
    home = homes[index]
    assert home is not None
    cpus = machine.on(home)
    if not cpus:
        raise PlacementError(f"rank {index}: no CPU of node {home} is allowed (allowed: {format_ids(machine.cpus)})")
    if mode is AffinityMode.NODE:
        return cpus
    if mode is not AffinityMode.EXCLUSIVE:
        raise PlacementError(f"{mode.value} comes next")
    cores = machine.cores(cpus)
    count = Counter(homes)[home]
    if count > len(cores):
        raise PlacementError(f"node {home} has {len(cores)} allowed cores for {count} ranks: exclusive needs one a rank")
    position = homes[:index].count(home)
    each, extra = divmod(len(cores), count)
    start = position * each + min(position, extra)
    return frozenset(cpu for core in cores[start : start + each + (position < extra)] for cpu in core)


__all__ = ["Core", "Mapping", "PlacementError", "Rank", "parse_ids", "place", "plan"]
