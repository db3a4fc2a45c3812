"""The CPU time that cgroups leave to this process: the quotas of its own cgroup and of all cgroups above it."""

from __future__ import annotations

import os
from functools import cache

from .._cgroups import mounted_hierarchies, own_hierarchies
from .._frozen import Frozen


class Quota(Frozen):
    """A limit of CPU time, which all processes of a cgroup share.

    Attributes:
        cpus: The time of how many CPUs it allows: 1.5 is 150 ms in each 100 ms.
        path: The file that contains it.
    """

    cpus: float
    path: str

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU{'' if self.cpus == 1 else 's'} ({self.path})"

    def share(self, ranks: int) -> int:
        """Compute how many threads each of ``ranks`` can keep busy; at least 1."""
        return max(1, int(self.cpus / ranks + 1e-9))


def cpu_quota(root: str = "/") -> Quota | None:
    """Find the smallest quota of the cgroups that this process is in; None if there is none.

    In version 2 it is ``cpu.max``, in version 1 ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us`` (cgroups(7); the
    kernel's "CPU Controller" and "CFS Bandwidth Control"). A quota also limits all cgroups below it.

    Args:
        root: The folder that has the machine's proc/ in it.
    """
    proc, above = os.path.join(root, "proc"), root.rstrip("/")
    try:
        hierarchies = own_hierarchies(proc, _mounts(proc))
    except OSError:
        return None
    found = []
    for one in hierarchies:
        if one.has("cpu"):
            name = "cpu.cfs_quota_us" if one.controllers else "cpu.max"
            quotas = [_quota(above + folder, name) for folder in one.upwards()]
            found += [quota for quota in quotas if quota is not None]
    return min(found, key=lambda quota: quota.cpus, default=None)


_mounts = cache(mounted_hierarchies)  # one job calls it several times


def _quota(folder: str, name: str) -> Quota | None:
    try:
        words = _text(f"{folder}/{name}").split()
        if name != "cpu.max":
            words += _text(f"{folder}/cpu.cfs_period_us").split()
        quota, period = map(int, words)
    except (OSError, ValueError):  # the topmost cgroup has no such file; "max" means no limit
        return None
    return Quota(quota / period, f"{folder}/{name}") if quota > 0 and period > 0 else None


def _text(path: str) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        data = b""
        while piece := os.read(fd, 1 << 16):
            data += piece
        return os.fsdecode(data)
    finally:
        os.close(fd)
