"""What a launch must know of a machine with one node, read in microseconds and without a Topology."""

from __future__ import annotations

import os
from functools import cache

from .sysfs import TopologyError, Tree

_NODES = ("sys/devices/system/node/has_cpu", "sys/devices/system/node/online")
_CPU = "sys/devices/system/cpu"
_SIBLINGS = ("thread_siblings_list", "core_cpus_list", "core_cpus", "thread_siblings")


def has_one_node(root: str = "/") -> bool:
    """Whether at most one node has CPUs, so that no rank can be bound to a node of its own.

    Raises:
        TopologyError: The kernel's list of nodes cannot be read.
    """
    tree = Tree(root)
    nodes = next((ids for path in _NODES if (ids := tree.ids(path)) is not None), frozenset())
    return len(nodes) < 2


def unbound_threads(nprocs: int) -> int:
    """Compute OMP_NUM_THREADS of ``nprocs`` ranks that inherit this thread's CPUs, as ``omp_num_threads`` does."""
    if hasattr(os, "sched_getaffinity"):
        cores = core_count(frozenset(os.sched_getaffinity(0)))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // nprocs)


@cache
def core_count(cpus: frozenset[int], root: str = "/") -> int:
    """Count the physical cores that ``cpus`` are on; the CPUs themselves where the kernel does not say the cores."""
    tree = Tree(root)
    if tree.text(f"{_CPU}/smt/active") == "0":
        return len(cpus)
    left, cores = set(cpus), 0
    try:
        while left:
            cpu = left.pop()
            left -= tree.first_ids(f"{_CPU}/cpu{cpu}/topology", _SIBLINGS, cpu) or frozenset()
            cores += 1
    except TopologyError:
        return len(cpus)
    return cores
