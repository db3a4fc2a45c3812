"""Control groups of both kinds: made, entered and removed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

V2 = Path("/sys/fs/cgroup")
V1 = Path("/run/cpuset")

# A group that was removed, or a hierarchy that was unmounted, holds its controller for a moment longer.
PATIENCE_SECONDS = 20.0


def patiently(attempt: Callable[[], object]) -> None:
    """Try until it works, or for so long that it never will."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            attempt()
        except (OSError, subprocess.CalledProcessError):
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            return


class Group:
    """A cgroup with these settings. As a context it is removed at the end; it must be empty by then."""

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
        """This process, which has one thread, in the group."""
        self["cgroup.procs"] = "0"
        try:
            yield
        finally:
            self.folder.parent.joinpath("cgroup.procs").write_text("0")

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
            group.folder.rmdir()
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
                group.folder.rmdir()


@contextmanager
def mounted_v1() -> Iterator[None]:
    """The cpuset controller as cgroup v1, which it can be when no group of v2 uses it."""
    V1.mkdir(exist_ok=True)
    command = ["mount", "-t", "cgroup", "-o", "cpuset", "none", str(V1)]
    patiently(lambda: subprocess.run(command, check=True, stderr=subprocess.PIPE))
    try:
        yield
    finally:
        subprocess.run(["umount", str(V1)], check=True)


def group_of(pid: int | str) -> str:
    """The path of a process's group of cgroup v2."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
