"""A sysfs root read into a frozen ``Topology``: nodes, sockets, dies, cores, caches, and what may be used.

What each file means is said in the kernel's Documentation/ABI/stable/sysfs-devices-node,
Documentation/ABI/stable/sysfs-devices-system-cpu and Documentation/admin-guide/cputopology.rst. Captured
trees of older kernels have masks where today's have lists, and some tools leave a NUL byte at the end of
each file: both are read. Nothing here knows of ranks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator

from .._frozen import Frozen
from .._ids import format_ids, parse_ids
from .._public import public
from .sysfs import TopologyError, Tree

_CPU = "sys/devices/system/cpu"
_NODE = "sys/devices/system/node"
_SELF = "proc/self"

_CPU_DIR = re.compile(r"cpu([0-9]+)")
_NODE_DIR = re.compile(r"node([0-9]+)")
_CACHE_DIR = re.compile(r"index([0-9]+)")
_MEMTOTAL = re.compile(r"MemTotal:\s+([0-9]+) kB")

# Where several names hold the same fact, today's list comes first and the old mask last.
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

_FULL_CAPACITY = 1024  # SCHED_CAPACITY_SCALE: what the kernel gives its fastest CPU in cpu_capacity
_BIG = 0.9  # cores of one kind differ a little by their top clock (997 to 1024 on a GB10), kinds by far more


class Node(Frozen):
    """A NUMA node. cpus: its online CPUs, none for a node of memory only. memory: bytes. distances: to each node id."""

    id: int
    cpus: frozenset[int]
    memory: int
    distances: tuple[tuple[int, int], ...] = ()

    def distance(self, other: int) -> int:
        """The SLIT distance (10 is the node itself); 255, "unreachable", where the file does not say."""
        return dict(self.distances).get(other, 10 if other == self.id else 255)


class Socket(Frozen):
    """A physical package; ``id`` is the kernel's, which need not count from 0."""

    id: int
    cpus: frozenset[int]


class Die(Frozen):
    """A die of a package."""

    id: int
    cpus: frozenset[int]


class Core(Frozen):
    """A physical core. cpus: its online hardware threads, ascending. kind: "performance" or "efficiency" on a
    hybrid machine, "" where all cores are alike."""

    cpus: tuple[int, ...]
    kind: str = ""


class Cache(Frozen):
    """A last-level data or unified cache, as its CPUs see it."""

    level: int
    cpus: frozenset[int]


@public
class Topology(Frozen):
    """One machine, read once. All ids are the kernel's logical ones; every tuple is in ascending order.

    root: the folder that has sys/ and proc/ in it. cpus: online. offline: present but not online.
    allowed_cpus, allowed_nodes: what the calling (or, in a captured tree, the capturing) process may use.
    nodes, sockets, dies, cores, caches: of caches the last level; of dies none where the kernel does not tell them.
    notes: what had to be assumed, in words. files: how many files were opened, each once.
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

    @classmethod
    def read(cls, root: str | os.PathLike[str] | Tree = "/") -> Topology:
        """Read the machine below ``root``; with "/", the affinity of the calling thread is the allowed set.

        Raises TopologyError, with the file and its text, where a file cannot be read or understood.
        """
        tree = root if isinstance(root, Tree) else Tree(root)
        before = len(tree.opened)
        notes: list[str] = []
        online, offline = _online(tree)
        nodes = _nodes(tree, online, notes)
        sockets = _sockets(tree, online, notes)
        cores = _cores(tree, online)
        allowed_cpus, allowed_nodes = _allowed(tree, online, nodes)
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
        """The node with this id; None where the machine has none."""
        return next((node for node in self.nodes if node.id == id), None)

    def nodes_with_cpus(self) -> tuple[Node, ...]:
        """The nodes on which a process can run."""
        return tuple(node for node in self.nodes if node.cpus)


def _online(tree: Tree) -> tuple[frozenset[int], frozenset[int]]:
    online = tree.ids(f"{_CPU}/online")
    present = tree.ids(f"{_CPU}/present")
    if present is None or online is None:
        found = frozenset(int(m[1]) for name in tree.names(_CPU) if (m := _CPU_DIR.fullmatch(name)))
        present = found if present is None else present
        # Without the list, a CPU is online unless its own file says no; CPU 0 has none where it cannot be unplugged.
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
        notes.append(f"no {_NODE}: one node with all CPUs is assumed")
        return (Node(0, online, _memory(tree, "proc/meminfo")),)
    order = sorted(ids)
    nodes: list[Node] = []
    taken: frozenset[int] = frozenset()
    for id in order:
        folder = f"{_NODE}/node{id}"
        cpus = tree.first_ids(folder, ("cpulist", "cpumap"))
        if cpus is None:
            notes.append(f"node {id} is online but {folder} has no cpulist: it is left out")
            continue
        if cpus & taken:
            notes.append(f"CPUs {format_ids(cpus & taken)} are in node {id} and in one before: the first one counts")
        row = _distances(tree, f"{folder}/distance", order, notes)
        nodes.append(Node(id, cpus & online - taken, _memory(tree, f"{folder}/meminfo"), row))
        taken |= cpus
    if not any(node.cpus for node in nodes):
        raise TopologyError(f"{tree.root}: no node below {_NODE} has an online CPU (online are {format_ids(online)})")
    stray = online.difference(*(node.cpus for node in nodes))
    if stray:
        notes.append(f"CPUs {format_ids(stray)} are online but in no node: no rank is put there")
    return tuple(nodes)


def _distances(tree: Tree, path: str, ids: list[int], notes: list[str]) -> tuple[tuple[int, int], ...]:
    text = tree.text(path)
    if text is None:
        return ()
    row = text.split()
    if len(row) != len(ids) or not all(one.isdecimal() for one in row):
        notes.append(f"{path} has not one distance for each of {len(ids)} nodes: {text[:60]!r}; distances are unknown")
        return ()
    return tuple(zip(ids, map(int, row), strict=True))


def _memory(tree: Tree, path: str) -> int:
    found = _MEMTOTAL.search(tree.text(path) or "")
    return int(found[1]) * 1024 if found else 0


def _covered(
    online: frozenset[int], group_of: Callable[[int], frozenset[int] | None]
) -> Iterator[tuple[int, frozenset[int]]]:
    """Disjoint groups that cover ``online``, each with its lowest CPU; only that CPU's file is read.

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
        notes.append("no CPU says its package: one socket is assumed")
        unnumbered = [online]
    for number, group in enumerate(unnumbered, start=max(found, default=-1) + 1):
        found[number] = group
    return tuple(Socket(id, found[id]) for id in sorted(found))


def _dies(tree: Tree, online: frozenset[int]) -> tuple[Die, ...]:
    """The dies; none where the kernel does not tell them (before 5.3, and on architectures without)."""
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
    """``names``, those that this kernel has first, so that the absent ones are not tried for every CPU."""
    here = set(tree.names(f"{folder}/topology"))
    return tuple(sorted(names, key=lambda name: name.rpartition("/")[2] not in here))


def _kinds(tree: Tree, online: frozenset[int], firsts: list[int]) -> dict[int, str]:
    """The kind of each core, by its lowest CPU; nothing where all are alike.

    Intel's hybrids name them in the PMU folders cpu_core and cpu_atom; others give capacities. The kernel scales
    capacities so that the fastest CPU has 1024, so that the first and the last at 1024 mean a machine of one kind,
    and not every CPU's file needs to be read.
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
    """The caches of the highest level that each CPU has, instruction caches aside.

    The kernel numbers a CPU's caches from the core outwards. All are read for the first CPU; for another one the
    first from the outside that has that CPU's level is its last, and saves reading the rest.
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


def _allowed(tree: Tree, online: frozenset[int], nodes: Iterable[Node]) -> tuple[frozenset[int], frozenset[int]]:
    """What the process may use: the affinity of this thread, or what a captured tree says of the process in it."""
    status = tree.text(f"{_SELF}/status") or ""
    cpus, mems = (_status_ids(tree, status, name) for name in ("Cpus_allowed_list", "Mems_allowed_list"))
    if os.path.realpath(tree.root) == "/" and hasattr(os, "sched_getaffinity"):
        cpus = frozenset(os.sched_getaffinity(0))
    if cpus is None or mems is None:
        set_cpus, set_mems = _cpuset(tree)
        cpus = set_cpus if cpus is None else cpus
        mems = set_mems if mems is None else mems
    ids = frozenset(node.id for node in nodes)
    allowed = online if cpus is None else cpus & online
    if not allowed:
        raise TopologyError(f"{tree.root}: CPUs {format_ids(cpus or ())} are allowed, but {format_ids(online)} online")
    return allowed, ids if mems is None else mems & ids


def _status_ids(tree: Tree, status: str, name: str) -> frozenset[int] | None:
    found = re.search(rf"^{name}:\s*(\S+)", status, re.MULTILINE)
    if found is None:
        return None
    try:
        return parse_ids(found[1])
    except ValueError:
        raise TopologyError(f"{name} in {tree.root}/{_SELF}/status should be a list: {found[1][:60]!r}") from None


def _cpuset(tree: Tree) -> tuple[frozenset[int] | None, frozenset[int] | None]:
    """CPUs and nodes of the cpuset that the captured process was in; cgroup v1 under any of its names, else v2.

    A group without a file of its own (v2 without the controller) has those of its nearest ancestor (cgroups(7)).
    """
    for mount, prefix, path in _cpuset_mounts(tree):
        while True:
            folder = f"{mount}{path}".strip("/")
            for end in (".effective", ""):
                cpus, mems = tree.ids(f"{folder}/{prefix}cpus{end}"), tree.ids(f"{folder}/{prefix}mems{end}")
                if cpus:
                    return cpus, mems or None
            if path in ("", "/"):
                break
            path = path.rpartition("/")[0]
    return None, None


def _cpuset_mounts(tree: Tree) -> Iterator[tuple[str, str, str]]:
    """Mount point, prefix of the file names ("cpuset." or none) and group, where a cpuset may be; v1 first."""
    groups = [line.split(":", 2) for line in (tree.text(f"{_SELF}/cgroup") or "").splitlines()]
    paths = {name: line[2] for line in groups if len(line) == 3 for name in line[1].split(",")}
    mounts = [line.split() for line in (tree.text("proc/mounts") or tree.text(f"{_SELF}/mounts") or "").splitlines()]
    old = tree.text(f"{_SELF}/cpuset")
    for words in mounts:
        kind, options = (words[2], words[3].split(",")) if len(words) > 3 else ("", [])
        if kind == "cpuset" or (kind == "cgroup" and "cpuset" in options):
            prefix = "" if kind == "cpuset" or "noprefix" in options else "cpuset."
            yield words[1], prefix, paths.get("cpuset", old or "/")
    for words in mounts:
        if len(words) > 3 and words[2] == "cgroup2":
            yield words[1], "cpuset.", paths.get("", old or "/")
