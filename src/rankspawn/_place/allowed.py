"""The CPUs and nodes that a process may use, by its affinity and its cpuset, also in a captured tree."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from .._ids import format_ids, parse_ids
from .sysfs import TopologyError, Tree

_SELF = "proc/self"


def allowed(tree: Tree, online: frozenset[int], nodes: frozenset[int]) -> tuple[frozenset[int], frozenset[int]]:
    """Find what the process may use: the affinity of this thread; in a captured tree, that of the captured process.

    Args:
        tree: The machine.
        online: The machine's online CPUs.
        nodes: The ids of the machine's online nodes.

    Returns:
        The CPUs and the nodes.

    Raises:
        TopologyError: A file cannot be understood, or no online CPU is allowed.
    """
    status = tree.text(f"{_SELF}/status") or ""
    cpus, mems = (_status_ids(tree, status, name) for name in ("Cpus_allowed_list", "Mems_allowed_list"))
    if os.path.realpath(tree.root) == "/" and hasattr(os, "sched_getaffinity"):
        cpus = frozenset(os.sched_getaffinity(0))
    if cpus is None or mems is None:
        set_cpus, set_mems = _cpuset(tree)
        cpus = set_cpus if cpus is None else cpus
        mems = set_mems if mems is None else mems
    usable = online if cpus is None else cpus & online
    if not usable:
        raise TopologyError(
            f"{tree.root}: CPUs {format_ids(cpus or ())} are allowed, but only {format_ids(online)} are online"
        )
    return usable, nodes if mems is None else mems & nodes


def _status_ids(tree: Tree, status: str, name: str) -> frozenset[int] | None:
    found = re.search(rf"^{name}:\s*(\S+)", status, re.MULTILINE)
    if found is None:
        return None
    try:
        return parse_ids(found[1])
    except ValueError:
        raise TopologyError(f"{name} in {tree.root}/{_SELF}/status: expected a list, got {found[1][:60]!r}") from None


def _cpuset(tree: Tree) -> tuple[frozenset[int] | None, frozenset[int] | None]:
    """Find the CPUs and nodes of the captured process's cpuset; cgroup v1 under any of its names, else v2.

    A group without a file of its own (v2 without the controller) inherits from its nearest ancestor (cgroups(7)).
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
    """Yield the places of a possible cpuset, v1 first: mount point, prefix of the files ("cpuset." or ""), group."""
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
