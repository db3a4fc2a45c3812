"""Finds where the cgroups of this process are mounted (cgroups(7); proc(5), mountinfo). It changes nothing."""

from __future__ import annotations

import os

from ._frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Hierarchy(Frozen):
    """A hierarchy of cgroups that is mounted and has this process in it.

    Attributes:
        controllers: The options of a version 1 mount, which name its controllers; empty for version 2.
        point: Where it is mounted.
        inside: The path of the process's cgroup below that. None if it is not below the mounted cgroup, as when another
            cgroup namespace has mounted it.
    """

    controllers: tuple[str, ...]
    point: str
    inside: str | None

    def has(self, controller: str) -> bool:
        """Whether it may have files of this controller: in version 2, or in the version 1 hierarchy with it."""
        return not self.controllers or controller in self.controllers

    def upwards(self) -> Iterator[str]:
        """The cgroup's directory and those above it, up to the mount point; only the latter if ``inside`` is None."""
        parts = list(filter(None, (self.inside or "").split("/")))
        for count in range(len(parts), -1, -1):
            yield "/".join([self.point.rstrip("/"), *parts[:count]])


def own_hierarchies(proc: str = "/proc", mounts: Iterable[Hierarchy] | None = None) -> list[Hierarchy]:
    """Find the hierarchies, in the order in which they were mounted.

    Args:
        proc: Where procfs is mounted.
        mounts: What mounted_hierarchies() returned before; None reads it now.

    Raises:
        OSError: procfs cannot be read.
    """
    lines = [line.split(":", 2) for line in _lines(f"{proc}/self/cgroup")]
    paths = {name: line[2] for line in lines if len(line) == 3 for name in line[1].split(",")}
    found = []
    for one in mounted_hierarchies(proc) if mounts is None else mounts:
        path = next((paths[name] for name in one.controllers or ("",) if name in paths), None)
        if path is not None:
            found.append(Hierarchy(one.controllers, one.point, _below(path, one.inside or "/")))
    return found


def mounted_hierarchies(proc: str = "/proc") -> tuple[Hierarchy, ...]:
    """Find all mounted hierarchies. ``inside`` is the cgroup that is mounted there; a container sees only its own.

    Raises:
        OSError: procfs cannot be read.
    """
    found = []
    for line in _lines(f"{proc}/self/mountinfo"):
        fields, _, about = line.partition(" - ")
        kind, *_, options = about.split() or ("", "")
        if kind in ("cgroup", "cgroup2"):
            root, point = map(_unescaped, fields.split()[3:5])
            found.append(Hierarchy(tuple(options.split(",")) if kind == "cgroup" else (), point, root))
    return tuple(found)


def _below(path: str, root: str) -> str | None:
    root = root.rstrip("/")
    inside = path[len(root) :].strip("/") if f"{path}/".startswith(f"{root}/") else ".."
    return None if ".." in inside.split("/") else inside


def _lines(path: str) -> list[str]:
    with open(path, "rb", buffering=0) as file:
        return os.fsdecode(file.readall()).splitlines()


def _unescaped(field: str) -> str:
    r"""A path of mountinfo, in which a space is written "\040"."""
    parts = field.split("\\")
    return parts[0] + "".join(chr(int(part[:3], 8)) + part[3:] for part in parts[1:])
