"""What a launch must know about a machine with one node, read in microseconds without a Topology."""

from __future__ import annotations

import os
from functools import cache

from .._binding import PlacementError
from .._ids import parse_ids
from .quota import cpu_quota

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence, Set

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_NODES = ("sys/devices/system/node/has_cpu", "sys/devices/system/node/online")
_CPU = "sys/devices/system/cpu"
_SIBLINGS = ("thread_siblings_list", "core_cpus_list", "core_cpus", "thread_siblings")


def has_one_node(root: str = "/") -> bool:
    """Whether at most one node has CPUs, so that no rank can be bound to a node of its own."""
    for path in _NODES:
        try:
            return len(parse_ids(_text(root + path))) < 2
        except ValueError:
            return False  # Topology.read() will say what is wrong
        except OSError:
            continue
    return True


def homes(cpus_of_ranks: Sequence[Set[int] | None], root: str = "/") -> list[int | None]:
    """Find the node of each rank's CPUs; None if they are None, or on several nodes, or on no known node."""
    nodes: dict[int, frozenset[int]] = {}
    if not has_one_node(root):
        try:
            for node in parse_ids(_text(root + _NODES[1])):
                nodes[node] = parse_ids(_text(f"{root}sys/devices/system/node/node{node}/cpulist"))
        except (OSError, ValueError):
            nodes = {}
    found = []
    for cpus in cpus_of_ranks:
        on = [node for node, its_own in nodes.items() if cpus and cpus & its_own]
        found.append(on[0] if len(on) == 1 else None)
    return found


def unbound_threads(nprocs: int) -> int:
    """Compute OMP_NUM_THREADS of ``nprocs`` ranks that inherit this thread's CPUs, as ``threads_of_ranks`` does."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, (os.cpu_count() or 1) // nprocs)
    cpus = frozenset(os.sched_getaffinity(0))
    try:
        cores = core_count(cpus)
    except PlacementError:  # the kernel does not show the cores, or no descriptor is free
        cores = len(cpus)
    threads = max(1, cores // nprocs)
    # A quota could not make one thread fewer, and looking for one takes as long as starting a rank.
    quota = cpu_quota() if threads > 1 else None
    return threads if quota is None else min(threads, quota.share(nprocs))


def sets_threads(value: str | bytes | None) -> bool:
    """Whether OpenMP accepts a value of OMP_NUM_THREADS: a positive number, or a list with one for each level."""
    words = os.fsdecode(value or "").split(",")
    return all(word.strip().isascii() and word.strip().isdecimal() and int(word) > 0 for word in words)


def threads_note(value: str | bytes | None) -> str:
    """Say that OpenMP ignores a value of OMP_NUM_THREADS; "" if it does not, or there is no value."""
    if value is None or sets_threads(value):
        return ""
    return f"OMP_NUM_THREADS={os.fsdecode(value)!r} is not a number of threads: ignoring it"


def hidden_devices(environ: Mapping[str, str], root: str = "/") -> tuple[str, ...]:
    """Say which accelerators the variables hide, for a caller that looks at no device; see ``hiding_notes``."""
    from .visible import VARIABLES

    if not any(name in environ for name in VARIABLES):
        return ()
    from .devices import hiding_notes

    return hiding_notes(environ, root)


@cache
def core_count(cpus: frozenset[int], root: str = "/") -> int:
    """Count the physical cores of ``cpus``.

    Raises:
        TopologyError: The kernel's files cannot be read.
    """
    try:
        if _text(f"{root}{_CPU}/smt/active").strip() == "0":
            return len(cpus)
    except OSError:
        pass  # before Linux 4.19, and on other systems
    from .sysfs import Tree

    tree = Tree(root)
    left, cores = set(cpus), 0
    while left:
        cpu = left.pop()
        left -= tree.first_ids(f"{_CPU}/cpu{cpu}/topology", _SIBLINGS, cpu) or frozenset()
        cores += 1
    return cores


def _text(path: str) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 4096).decode("ascii", "replace")
    finally:
        os.close(fd)
