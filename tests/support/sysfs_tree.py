"""Builds a sysfs tree in a folder from a short description, for tests of machines that are not at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from rankspawn._ids import format_ids

CPU = "sys/devices/system/cpu"
NODE = "sys/devices/system/node"
PCI = "sys/bus/pci/devices"
KIB = 1 << 10
GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A PCI device. node: what numa_node says. local: local_cpulist; None is that node's CPUs, or all for -1."""

    node: int
    address: str = ""
    local: str | None = None
    vendor: int = 0x10DE
    device: int = 0x2330
    kind: int = 0x030200
    driver: str = "nvidia"


@dataclass(frozen=True)
class Machine:
    """A machine of equal nodes: sockets x nodes (per socket) x caches (per node) x cores (per cache) x threads.

    siblings: "split" numbers all first threads and then all second ones, as x86 firmware does; "adjacent" core by core.
    memory_only: how many nodes without CPUs come after the others. cpu_stride, cpu_base: make ids sparse. node_ids: the
    nodes' ids. offline: CPUs that are present and not online. allowed, mems: what /proc/self/status says; None for both
    writes no status. masks: masks instead of lists, as old kernels wrote. nul: a NUL byte ends each file. node_dir:
    False leaves the node folder out. big: how many cores of each cache are of the performance kind, on a hybrid
    machine; kinds: whether "pmu" or "capacity" tells so. caches_written: False leaves the cache folders out.
    no_memory: nodes without memory. extra: more files, by path.
    """

    sockets: int = 1
    nodes: int = 1
    caches: int = 1
    cores: int = 4
    threads: int = 1
    siblings: str = "split"
    memory_only: int = 0
    cpu_stride: int = 1
    cpu_base: int = 0
    node_ids: tuple[int, ...] = ()
    offline: frozenset[int] = frozenset()
    gpus: tuple[Gpu, ...] = ()
    allowed: str | None = None
    mems: str | None = None
    masks: bool = False
    nul: bool = False
    node_dir: bool = True
    big: int | None = None
    kinds: str = "pmu"
    caches_written: bool = True
    no_memory: frozenset[int] = frozenset()
    extra: dict[str, str] = field(default_factory=dict, hash=False)

    def cores_of(self) -> list[tuple[int, int, int, tuple[int, ...]]]:
        """(socket, node position, cache number, threads) of each core, in order, with offline CPUs."""
        per_node = self.caches * self.cores
        total = self.sockets * self.nodes * per_node
        found = []
        for core in range(total):
            node = core // per_node
            if self.siblings == "split":
                ids = [core + thread * total for thread in range(self.threads)]
            else:
                ids = [core * self.threads + thread for thread in range(self.threads)]
            threads = tuple(one * self.cpu_stride + self.cpu_base for one in ids)
            found.append((node // self.nodes, node, core // self.cores, threads))
        return found

    def id_of(self, position: int) -> int:
        """The id of the node at this position."""
        return self.node_ids[position] if self.node_ids else position

    def node_cpus(self) -> dict[int, frozenset[int]]:
        """The online CPUs of each node, by its id; memory-only nodes have none."""
        found: dict[int, set[int]] = {self.id_of(i): set() for i in range(self.sockets * self.nodes + self.memory_only)}
        for _, node, _, threads in self.cores_of():
            found[self.id_of(node)].update(cpu for cpu in threads if cpu not in self.offline)
        return {id: frozenset(cpus) for id, cpus in found.items()}


def address(index: int) -> str:
    """A PCI address for the device at this index."""
    return f"0000:{0x10 + index:02x}:00.0"


def as_mask(ids: frozenset[int]) -> str:
    """Ids as a kernel mask, in words of 32 bits."""
    bits = sum(1 << one for one in ids)
    words = []
    while bits or not words:
        words.append(f"{bits & 0xFFFFFFFF:08x}")
        bits >>= 32
    return ",".join(reversed(words))


class _Writer:
    def __init__(self, root: Path, machine: Machine) -> None:
        self.root, self.machine = f"{root}/", machine
        self.made: set[str] = set()

    def text(self, path: str, text: str) -> None:
        # Plain calls are quicker than pathlib's, and a machine of 1,024 CPUs has 17,000 files.
        folder = path.rpartition("/")[0]
        if folder not in self.made:
            os.makedirs(self.root + folder, exist_ok=True)
            self.made.add(folder)
        with open(self.root + path, "w") as file:
            file.write(f"{text}\n" + ("\0" if self.machine.nul else ""))

    def ids(self, lists: str, masks: str, ids: frozenset[int]) -> None:
        if self.machine.masks:
            self.text(masks, as_mask(ids))
        else:
            self.text(lists, format_ids(ids))


def write(root: Path, machine: Machine) -> Path:
    """Write the tree of ``machine`` below ``root`` and return it."""
    to = _Writer(root, machine)
    cores = machine.cores_of()
    present = frozenset(cpu for *_, threads in cores for cpu in threads)
    online = present - machine.offline
    if not machine.masks:
        to.text(f"{CPU}/online", format_ids(online))
        to.text(f"{CPU}/present", format_ids(present))
    _write_cpus(to, cores, present)
    if machine.node_dir:
        _write_nodes(to)
    _write_kinds(to, cores)
    for index, gpu in enumerate(machine.gpus):
        _write_gpu(to, gpu.address or address(index), gpu, online)
    if machine.allowed is not None or machine.mems is not None:
        mems = format_ids(machine.node_cpus()) if machine.mems is None else machine.mems
        cpus = format_ids(online) if machine.allowed is None else machine.allowed
        to.text("proc/self/status", f"Name:\tpython\nCpus_allowed_list:\t{cpus}\nMems_allowed_list:\t{mems}")
    for path, text in machine.extra.items():
        to.text(path, text)
    return root


def _write_cpus(to: _Writer, cores: list[tuple[int, int, int, tuple[int, ...]]], present: frozenset[int]) -> None:
    machine = to.machine
    package: dict[int, set[int]] = {}
    cache: dict[int, set[int]] = {}
    for socket, _, group, threads in cores:
        package.setdefault(socket, set()).update(threads)
        cache.setdefault(group, set()).update(threads)
    for number, (socket, _, group, threads) in enumerate(cores):
        for cpu in threads:
            folder = f"{CPU}/cpu{cpu}"
            if cpu in machine.offline:
                to.text(f"{folder}/online", "0")
                continue
            siblings = frozenset(threads) - machine.offline
            to.ids(f"{folder}/topology/thread_siblings_list", f"{folder}/topology/thread_siblings", siblings)
            to.ids(
                f"{folder}/topology/core_siblings_list",
                f"{folder}/topology/core_siblings",
                frozenset(package[socket]) - machine.offline,
            )
            to.text(f"{folder}/topology/physical_package_id", str(socket))
            to.text(f"{folder}/topology/core_id", str(number))
            if machine.caches_written:
                shared = frozenset(cache[group]) - machine.offline
                for index, level, kind, ids in (
                    (0, 1, "Data", siblings),
                    (1, 1, "Instruction", siblings),
                    (2, 2, "Unified", siblings),
                    (3, 3, "Unified", shared),
                ):
                    _write_cache(to, f"{folder}/cache/index{index}", level, kind, ids)


def _write_cache(to: _Writer, folder: str, level: int, kind: str, ids: frozenset[int]) -> None:
    to.text(f"{folder}/level", str(level))
    to.text(f"{folder}/type", kind)
    to.ids(f"{folder}/shared_cpu_list", f"{folder}/shared_cpu_map", ids)


def _write_nodes(to: _Writer) -> None:
    machine = to.machine
    nodes = machine.node_cpus()
    if not machine.masks:
        to.text(f"{NODE}/online", format_ids(nodes))
        to.text(f"{NODE}/possible", format_ids(nodes))
    order = sorted(nodes)
    position = {machine.id_of(i): i for i in range(len(nodes))}
    for id in order:
        folder = f"{NODE}/node{id}"
        to.ids(f"{folder}/cpulist", f"{folder}/cpumap", nodes[id])
        near = [_distance(machine, position[id], position[other]) for other in order]
        to.text(f"{folder}/distance", " ".join(map(str, near)))
        kib = 0 if id in machine.no_memory else 64 * GIB // KIB
        to.text(f"{folder}/meminfo", f"Node {id} MemTotal:       {kib} kB\nNode {id} MemFree: 1 kB")


def _distance(machine: Machine, one: int, other: int) -> int:
    if one == other:
        return 10
    sockets = machine.sockets * machine.nodes
    if one >= sockets or other >= sockets:
        return 30 + abs(one - other)
    return 12 if one // machine.nodes == other // machine.nodes else 21


def _write_kinds(to: _Writer, cores: list[tuple[int, int, int, tuple[int, ...]]]) -> None:
    machine = to.machine
    if machine.big is None:
        return
    big = frozenset(
        cpu for number, (*_, threads) in enumerate(cores) for cpu in threads if number % machine.cores < machine.big
    )
    small = frozenset(cpu for *_, threads in cores for cpu in threads) - big
    if machine.kinds == "pmu":
        to.text("sys/devices/cpu_core/cpus", format_ids(big))
        to.text("sys/devices/cpu_atom/cpus", format_ids(small))
    else:
        for cpu in big | small:
            to.text(f"{CPU}/cpu{cpu}/cpu_capacity", "1024" if cpu in big else "446")


def _write_gpu(to: _Writer, at: str, gpu: Gpu, online: frozenset[int]) -> None:
    folder = f"{PCI}/{at}"
    to.text(f"{folder}/numa_node", str(gpu.node))
    to.text(f"{folder}/class", f"{gpu.kind:#08x}")
    to.text(f"{folder}/vendor", f"{gpu.vendor:#06x}")
    to.text(f"{folder}/device", f"{gpu.device:#06x}")
    local = gpu.local
    if local is None:
        local = format_ids(to.machine.node_cpus().get(gpu.node, online) if gpu.node >= 0 else online)
    to.text(f"{folder}/local_cpulist", local)
    if gpu.driver == "nvidia":
        to.text(f"proc/driver/nvidia/gpus/{at}/information", f"Model: \t\t NVIDIA H100\nBus Location: \t {at}")
