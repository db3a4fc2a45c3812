"""Reads a sysfs root into a frozen ``Topology``: nodes, sockets, dies, cores, caches, and what may be used.

The kernel's Documentation/ABI/stable/sysfs-devices-node, Documentation/ABI/stable/sysfs-devices-system-cpu and
Documentation/admin-guide/cputopology.rst say what each file means. Trees from older kernels have masks instead of
lists, and some tools leave a NUL byte at the end of each file. Both can be read. Nothing here knows about ranks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator

from .._frozen import Frozen
from .._ids import format_ids
from .._public import public
from .allowed import allowed
from .sysfs import TopologyError, Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._binding import Binding
    from .._canvas import Svg
    from .visible import Device

_CPU = "sys/devices/system/cpu"
_NODE = "sys/devices/system/node"

_CPU_DIR = re.compile(r"cpu([0-9]+)")
_NODE_DIR = re.compile(r"node([0-9]+)")
_CACHE_DIR = re.compile(r"index([0-9]+)")
_MEMTOTAL = re.compile(r"MemTotal:\s+([0-9]+) kB")

# Several files hold the same fact: today's list comes first and the old mask last.
_THREADS = (
    "topology/thread_siblings_list",
    "topology/core_cpus_list",
    "topology/core_cpus",
    "topology/thread_siblings",
)
_PACKAGE = (
    "topology/package_cpus_list",
    "topology/core_siblings_list",
    "topology/package_cpus",
    "topology/core_siblings",
)
_DIE = ("topology/die_cpus_list", "topology/die_cpus")

_FULL_CAPACITY = 1024  # SCHED_CAPACITY_SCALE: cpu_capacity of the fastest CPU
_BIG = 0.9  # cores of one kind differ a little in their top clock (997 to 1024 on a GB10), kinds differ far more


class Node(Frozen):
    """A NUMA node.

    Attributes:
        id: The kernel's number.
        cpus: Its online CPUs; empty for a node that has only memory.
        memory: Bytes.
        distances: Pairs of a node id and the distance to that node.
    """

    id: int
    cpus: frozenset[int]
    memory: int
    distances: tuple[tuple[int, int], ...] = ()

    def distance(self, other: int) -> int:
        """Return the SLIT distance to a node (10 to itself); 255, "unreachable", if the file does not say it."""
        return dict(self.distances).get(other, 10 if other == self.id else 255)


class Socket(Frozen):
    """A physical package.

    Attributes:
        id: The kernel's number, which need not count from 0.
        cpus: Its online CPUs.
    """

    id: int
    cpus: frozenset[int]


class Die(Frozen):
    """A die of a package.

    Attributes:
        id: The kernel's number within the package.
        cpus: Its online CPUs.
    """

    id: int
    cpus: frozenset[int]


class Core(Frozen):
    """A physical core.

    Attributes:
        cpus: Its online hardware threads, ascending.
        kind: "performance" or "efficiency" on a hybrid machine, "" where all cores are alike.
    """

    cpus: tuple[int, ...]
    kind: str = ""


class Cache(Frozen):
    """A last-level data or unified cache.

    Attributes:
        level: 3 for an L3 cache.
        cpus: The online CPUs that share it.
    """

    level: int
    cpus: frozenset[int]


@public
class Topology(Frozen):
    """One machine, read once. All ids are the kernel's logical ones; every tuple is in ascending order.

    Attributes:
        root: The folder that has sys/ and proc/ in it.
        cpus: The online CPUs.
        offline: CPUs that are present but not online.
        allowed_cpus: CPUs that the calling process may use; in a captured tree, those of the process that captured it.
        allowed_nodes: NUMA nodes whose memory that process may use.
        nodes: The NUMA nodes.
        sockets: The physical packages.
        dies: The dies; empty if the kernel does not show them.
        cores: The physical cores.
        caches: The last-level caches.
        notes: What rankspawn had to assume, in words.
        files: How many files were opened, each once.
    """

    root: str
    cpus: frozenset[int]
    offline: frozenset[int]
    allowed_cpus: frozenset[int]
    allowed_nodes: frozenset[int]
    nodes: tuple[Node, ...]
    sockets: tuple[Socket, ...]
    dies: tuple[Die, ...]
    cores: tuple[Core, ...]
    caches: tuple[Cache, ...]
    notes: tuple[str, ...] = ()
    files: int = 0

    def svg(
        self,
        bindings: Iterable[Binding | None] = (),
        *,
        devices: Sequence[str | Device] | None = None,
        distances: bool = False,
    ) -> Svg:
        """Draw the machine: sockets, nodes, caches, cores and devices, with each rank's cores in its colour.

        Args:
            bindings: The ranks, as ``place`` gives them; none to draw the machine alone.
            devices: Its accelerators, as for ``place``; None looks for them.
            distances: Whether to draw the distances between the NUMA nodes.

        Returns:
            The text of an SVG file. A notebook shows this text, and the Topology itself, as a picture.
        """
        from .drawing import draw

        return draw(self, bindings, devices, distances)

    def _repr_svg_(self) -> str:
        return str(self.svg())

    @classmethod
    def read(cls, root: str | os.PathLike[str] | Tree = "/") -> Topology:
        """Read a machine.

        Args:
            root: The folder that has sys/ and proc/ in it. With "/", the allowed CPUs are those of the calling thread.

        Raises:
            TopologyError: A file cannot be read or understood. The message names the file and shows its text.
        """
        tree = root if isinstance(root, Tree) else Tree(root)
        before = len(tree.opened)
        notes: list[str] = []
        online, offline = _online(tree)
        nodes = _nodes(tree, online, notes)
        sockets = _sockets(tree, online, notes)
        cores = _cores(tree, online)
        allowed_cpus, allowed_nodes = allowed(tree, online, frozenset(node.id for node in nodes))
        return cls(
            root=tree.root,
            cpus=online,
            offline=offline,
            allowed_cpus=allowed_cpus,
            allowed_nodes=allowed_nodes,
            nodes=nodes,
            sockets=sockets,
            dies=_dies(tree, online),
            cores=cores,
            caches=_caches(tree, online),
            notes=tuple(notes),
            files=len(tree.opened) - before,
        )

    def node(self, id: int) -> Node | None:
        """Return the node with this id; None if the machine has none."""
        return next((node for node in self.nodes if node.id == id), None)

    def nodes_with_cpus(self) -> tuple[Node, ...]:
        """Return the nodes on which a process can run."""
        return tuple(node for node in self.nodes if node.cpus)


def nearest(node: Node, others: Iterable[Node]) -> int:
    """Return the id of the node in ``others`` nearest to ``node``; among equals, the lowest id."""
    return min(others, key=lambda other: (node.distance(other.id), other.id)).id


def _online(tree: Tree) -> tuple[frozenset[int], frozenset[int]]:
    online = tree.ids(f"{_CPU}/online")
    present = tree.ids(f"{_CPU}/present")
    if present is None or online is None:
        found = frozenset(int(m[1]) for name in tree.names(_CPU) if (m := _CPU_DIR.fullmatch(name)))
        present = found if present is None else present
        # Without the list, a CPU is online unless its own file says no. A CPU that cannot be unplugged has no file.
        if online is None:
            online = frozenset(cpu for cpu in found if tree.text(f"{_CPU}/cpu{cpu}/online") != "0")
            online = frozenset(cpu for cpu in online if tree.names(f"{_CPU}/cpu{cpu}/topology")) or online
    if not online:
        raise TopologyError(f"{tree.root}: no online CPU below {_CPU}; is this the folder that has sys/ in it?")
    return online, present - online


def _nodes(tree: Tree, online: frozenset[int], notes: list[str]) -> tuple[Node, ...]:
    ids = tree.ids(f"{_NODE}/online")
    if ids is None:
        ids = frozenset(int(m[1]) for name in tree.names(_NODE) if (m := _NODE_DIR.fullmatch(name)))
    if not ids:
        notes.append(f"no {_NODE}: assuming one node with all CPUs")
        return (Node(0, online, _memory(tree, "proc/meminfo")),)
    order = sorted(ids)
    nodes: list[Node] = []
    taken: frozenset[int] = frozenset()
    for id in order:
        folder = f"{_NODE}/node{id}"
        cpus = tree.first_ids(folder, ("cpulist", "cpumap"))
        if cpus is None:
            notes.append(f"node {id} is online but {folder} has no cpulist: ignoring this node")
            continue
        if cpus & taken:
            notes.append(f"CPUs {format_ids(cpus & taken)} are in node {id} and in an earlier one: keeping the earlier")
        row = _distances(tree, f"{folder}/distance", order, notes)
        nodes.append(Node(id, cpus & online - taken, _memory(tree, f"{folder}/meminfo"), row))
        taken |= cpus
    if not any(node.cpus for node in nodes):
        raise TopologyError(f"{tree.root}: no node below {_NODE} has an online CPU (online are {format_ids(online)})")
    stray = online.difference(*(node.cpus for node in nodes))
    if stray:
        notes.append(f"CPUs {format_ids(stray)} are online but in no node: ranks will not use them")
    return tuple(nodes)


def _distances(tree: Tree, path: str, ids: list[int], notes: list[str]) -> tuple[tuple[int, int], ...]:
    text = tree.text(path)
    if text is None:
        return ()
    row = text.split()
    if len(row) != len(ids) or not all(one.isdecimal() for one in row):
        notes.append(f"{path}: expected {len(ids)} distances, got {text[:60]!r}; distances are unknown")
        return ()
    return tuple(zip(ids, map(int, row), strict=True))


def _memory(tree: Tree, path: str) -> int:
    found = _MEMTOTAL.search(tree.text(path) or "")
    return int(found[1]) * 1024 if found else 0


def _covered(
    online: frozenset[int], group_of: Callable[[int], frozenset[int] | None]
) -> Iterator[tuple[int, frozenset[int]]]:
    """Yield pairs of a lowest CPU and its group; the groups cover ``online``. Only that CPU's file is read.

    A CPU without a file is a group of its own.
    """
    left = set(online)
    for cpu in sorted(online):
        if cpu in left:
            group = frozenset(((group_of(cpu) or frozenset()) & left) | {cpu})
            left -= group
            yield cpu, group


def _sockets(tree: Tree, online: frozenset[int], notes: list[str]) -> tuple[Socket, ...]:
    found: dict[int, frozenset[int]] = {}
    unnumbered = []
    left = set(online)
    for cpu in sorted(online):
        if cpu not in left:
            continue
        cpus = tree.first_ids(f"{_CPU}/cpu{cpu}", _PACKAGE, cpu)
        id = tree.number(f"{_CPU}/cpu{cpu}/topology/physical_package_id")
        if cpus is None and id is None:
            unnumbered.append(frozenset((cpu,)))
            left.discard(cpu)
            continue
        group = frozenset(((cpus or frozenset()) & left) | {cpu})
        left -= group
        if id is None or id < 0:
            unnumbered.append(group)
        else:
            found[id] = found.get(id, frozenset()) | group
    if unnumbered and not found and all(len(group) == 1 for group in unnumbered):
        notes.append("no CPU has a physical_package_id: assuming one socket")
        unnumbered = [online]
    for number, group in enumerate(unnumbered, start=max(found, default=-1) + 1):
        found[number] = group
    return tuple(Socket(id, found[id]) for id in sorted(found))


def _dies(tree: Tree, online: frozenset[int]) -> tuple[Die, ...]:
    """Read the dies; none if the kernel does not show them (before 5.3, and on some architectures)."""
    first = tree.first_ids(f"{_CPU}/cpu{min(online)}", _DIE, min(online))
    if first is None:
        return ()
    known = {min(online): first}
    groups = _covered(online, lambda cpu: known.get(cpu) or tree.first_ids(f"{_CPU}/cpu{cpu}", _DIE, cpu))
    return tuple(Die(tree.number(f"{_CPU}/cpu{cpu}/topology/die_id") or 0, cpus) for cpu, cpus in groups)


def _cores(tree: Tree, online: frozenset[int]) -> tuple[Core, ...]:
    names = _present(tree, f"{_CPU}/cpu{min(online)}", _THREADS)
    groups = list(_covered(online, lambda cpu: tree.first_ids(f"{_CPU}/cpu{cpu}", names, cpu)))
    kinds = _kinds(tree, online, [cpu for cpu, _ in groups])
    return tuple(Core(tuple(sorted(cpus)), kinds.get(cpu, "")) for cpu, cpus in groups)


def _present(tree: Tree, folder: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Put the ``names`` that this kernel has first, so that absent files are not tried for every CPU."""
    here = set(tree.names(f"{folder}/topology"))
    return tuple(sorted(names, key=lambda name: name.rpartition("/")[2] not in here))


def _kinds(tree: Tree, online: frozenset[int], firsts: list[int]) -> dict[int, str]:
    """Find the kind of each core, by its lowest CPU; empty if all are alike.

    Intel's hybrids name the kinds in the PMU folders cpu_core and cpu_atom; others give capacities. The kernel scales
    capacities so that the fastest CPU has 1024. If the first and the last CPU have 1024, all are of one kind, and the
    other CPUs' files need not be read.
    """
    big, small = tree.ids("sys/devices/cpu_core/cpus"), tree.ids("sys/devices/cpu_atom/cpus")
    if big and small:
        return {cpu: "performance" if cpu in big else "efficiency" for cpu in firsts}
    ends = [tree.number(f"{_CPU}/cpu{cpu}/cpu_capacity") for cpu in {firsts[0], firsts[-1]}]
    if None in ends or all(end == _FULL_CAPACITY for end in ends):
        return {}
    done = dict(zip((firsts[0], firsts[-1]), ends, strict=False))
    capacities = {c: done[c] if c in done else tree.number(f"{_CPU}/cpu{c}/cpu_capacity") or 0 for c in firsts}
    top = max(one or 0 for one in capacities.values())
    return {cpu: "performance" if (one or 0) >= _BIG * top else "efficiency" for cpu, one in capacities.items()}


def _caches(tree: Tree, online: frozenset[int]) -> tuple[Cache, ...]:
    """Read the caches of the highest level that each CPU has, without instruction caches.

    The kernel numbers a CPU's caches from the core outwards. For the first CPU, all are read. For each other CPU, they
    are read from the outside, until one has the first CPU's level.
    """
    levels: dict[int, int] = {}
    deepest = 0

    def last_level(cpu: int) -> frozenset[int] | None:
        nonlocal deepest
        folder = f"{_CPU}/cpu{cpu}/cache"
        best, level = "", 0
        indices = [int(m[1]) for name in tree.names(folder) if (m := _CACHE_DIR.fullmatch(name))]
        for index in sorted(indices, reverse=True):
            one = tree.number(f"{folder}/index{index}/level") or 0
            if one >= level and one and tree.text(f"{folder}/index{index}/type") in ("Unified", "Data"):
                best, level = f"{folder}/index{index}", one
                if level == deepest:
                    break
        levels[cpu] = level
        deepest = deepest or level
        return tree.first_ids(best, ("shared_cpu_list", "shared_cpu_map"), cpu) if best else None

    return tuple(Cache(levels[cpu], cpus) for cpu, cpus in _covered(online, last_level) if levels[cpu])
