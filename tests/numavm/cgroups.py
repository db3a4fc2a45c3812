"""Control groups of both kinds: made, entered and removed."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

V2 = Path("/sys/fs/cgroup")
V1 = Path("/run/cpuset")

# A cgroup that was removed, or a hierarchy that was unmounted, holds its controller for a moment longer; on a busy host
# the machine's kernel needs seconds for it.
PATIENCE_SECONDS = 120.0
_HELD = (errno.EBUSY, errno.ENOENT)


def patiently(attempt: Callable[[], object]) -> None:
    """Call ``attempt`` again and again for as long as the controller may be held."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            attempt()
        except OSError as error:
            if error.errno not in _HELD or time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            return


class Group:
    """A cgroup with these settings."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        folder.mkdir()
        for name, value in settings.items():
            self[name.replace("_", ".", 1)] = value

    def __setitem__(self, name: str, value: str) -> None:
        self.folder.joinpath(name).write_text(value)

    def __getitem__(self, name: str) -> str:
        return self.folder.joinpath(name).read_text().strip()

    @property
    def pids(self) -> list[int]:
        return [int(pid) for pid in self["cgroup.procs"].split()]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put this process, which has one thread, into the group for the block."""
        self["cgroup.procs"] = "0"
        try:
            yield
        finally:
            self.folder.parent.joinpath("cgroup.procs").write_text("0")

    def remove(self) -> None:
        """End whoever is in it, and remove it."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        patiently(self.folder.rmdir)

    @classmethod
    @contextmanager
    def of(cls, controller: str, name: str, **settings: str) -> Iterator[Group]:
        """A group of cgroup v2 with one controller."""
        children = V2 / "cgroup.subtree_control"
        patiently(lambda: children.write_text(f"+{controller}"))
        group = cls(V2 / name, **settings)
        try:
            yield group
        finally:
            group.remove()
            children.write_text(f"-{controller}")

    @classmethod
    @contextmanager
    def cpuset(cls, kind: str, cpus: str, mems: str) -> Iterator[Group]:
        """A cpuset of cgroup "v2" or "v1"."""
        if kind == "v2":
            with cls.of("cpuset", "few", cpuset_cpus=cpus, cpuset_mems=mems) as group:
                yield group
            return
        with mounted_v1():
            group = cls(V1 / "few", cpuset_cpus=cpus, cpuset_mems=mems)
            try:
                yield group
            finally:
                group.remove()


@contextmanager
def mounted_v1() -> Iterator[None]:
    """Mount the cpuset controller as cgroup v1, which is possible while no group of v2 uses it.

    Raises OSError (EINVAL) where the kernel is built without it, as Debian's is from 6.12 on.
    """
    V1.mkdir(exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)

    def mount() -> None:
        if libc.mount(b"none", os.fsencode(V1), b"cgroup", ctypes.c_ulong(0), b"cpuset") < 0:
            raise OSError(ctypes.get_errno(), "mount")

    def unmount() -> None:
        # A hierarchy outlives its last mount while one of its groups, though removed, is not freed.
        if cpusets() > 1:
            raise OSError(errno.EBUSY, "a removed cpuset is not freed")
        if libc.umount2(os.fsencode(V1), 0) < 0:
            raise OSError(ctypes.get_errno(), "umount")

    def given_back() -> None:
        if "cpuset" not in V2.joinpath("cgroup.controllers").read_text():
            raise OSError(errno.EBUSY, "cgroup v1 holds the cpuset controller")

    patiently(mount)
    try:
        yield
    finally:
        patiently(unmount)
        patiently(given_back)


def cpusets() -> int:
    """How many groups the hierarchy of the cpuset controller has, those included that were removed and not freed."""
    lines = Path("/proc/cgroups").read_text().splitlines()
    return next(int(count) for name, _, count, _ in map(str.split, lines[1:]) if name == "cpuset")


def group_of(pid: int | str) -> str:
    """The path of a process's group of cgroup v2."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
