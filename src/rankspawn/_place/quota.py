"""The CPU time that cgroups leave to this process: the quotas of its own cgroup and of those above it."""

from __future__ import annotations

import os
from functools import cache

from .._frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class Quota(Frozen):
    """A limit of CPU time, which all processes of a cgroup share.

    Attributes:
        cpus: How many CPUs' time it gives: 1.5 is 150 ms in 100 ms.
        path: The file that has it.
    """

    cpus: float
    path: str

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU{'' if self.cpus == 1 else 's'} ({self.path})"

    def share(self, ranks: int) -> int:
        """Compute how many threads each of ``ranks`` can keep busy; at least 1."""
        return max(1, int(self.cpus / ranks + 1e-9))


def cpu_quota(root: str = "/") -> Quota | None:
    """Find the least quota of the cgroups that this process is in; None where there is none.

    In version 2 it is ``cpu.max``, in version 1 ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us`` (cgroups(7); the
    kernel's "CPU Controller" and "CFS Bandwidth Control"). A quota above counts for all that is below.

    Args:
        root: The folder that has the machine's proc/ in it.
    """
    try:
        paths, mounts = _cgroups(_text(os.path.join(root, "proc/self/cgroup"))), _mounts(root)
    except OSError:
        return None
    found = []
    for controller, top, point in mounts:
        if controller in paths:
            name = "cpu.cfs_quota_us" if controller else "cpu.max"
            quotas = [_quota(folder, name) for folder in _upwards(top, root.rstrip("/") + point, paths[controller])]
            found += [quota for quota in quotas if quota is not None]
    return min(found, key=lambda quota: quota.cpus, default=None)


@cache
def _mounts(root: str) -> tuple[tuple[str, str, str], ...]:
    """Find the hierarchies that may have quotas: the controller, the cgroup that is mounted, and where (proc(5))."""
    found = []
    for line in _text(os.path.join(root, "proc/self/mountinfo")).splitlines():
        fields, _, about = line.partition(" - cgroup")
        is_cpu = about.startswith(" ") and "cpu" in about.split()[-1].split(",")
        if is_cpu or about.startswith("2 "):
            top, point = map(_unescaped, fields.split()[3:5])
            found.append(("cpu" if is_cpu else "", top, point))
    return tuple(found)


def _cgroups(text: str) -> dict[str, str]:
    """Read /proc/self/cgroup: the path by controller; "" stands for version 2."""
    lines = [line.split(":", 2) for line in text.splitlines()]
    return {controller: line[2] for line in lines if len(line) == 3 for controller in line[1].split(",")}


def _upwards(top: str, point: str, path: str) -> Iterator[str]:
    """The folder of a cgroup, and those above it up to the mount point.

    Args:
        top: The path of the cgroup that is mounted, as a container sees it.
        point: Where.
        path: The path of the process's cgroup. One that is not below ``top`` is seen from another namespace: what is
            mounted is all that can be known then.
    """
    top = top.rstrip("/")
    parts = path[len(top) :].strip("/").split("/") if f"{path}/".startswith(f"{top}/") else []
    parts = [] if ".." in parts else list(filter(None, parts))
    for count in range(len(parts), -1, -1):
        yield "/".join([point.rstrip("/"), *parts[:count]])


def _quota(folder: str, name: str) -> Quota | None:
    try:
        words = _text(f"{folder}/{name}").split()
        if name != "cpu.max":
            words += _text(f"{folder}/cpu.cfs_period_us").split()
        quota, period = map(int, words)
    except (OSError, ValueError):  # no such file in the topmost cgroup; "max" is no limit
        return None
    return Quota(quota / period, f"{folder}/{name}") if quota > 0 and period > 0 else None


def _unescaped(field: str) -> str:
    r"""A path of mountinfo, in which a space is written "\040" (proc(5))."""
    parts = field.split("\\")
    return parts[0] + "".join(chr(int(part[:3], 8)) + part[3:] for part in parts[1:])


def _text(path: str) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        data = b""
        while piece := os.read(fd, 1 << 16):
            data += piece
        return os.fsdecode(data)
    finally:
        os.close(fd)
