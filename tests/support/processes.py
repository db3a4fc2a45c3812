"""What the tests of sessions, cgroups and the guard share: the state of other processes, and cgroups to use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# The longest that a test waits for something that must happen, on a busy machine.
PATIENCE = 30.0


def eventually(what: Callable[[], object]) -> None:
    """Wait until ``what`` returns something true."""
    until = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.002)


def state(pid: int) -> str:
    """The letter of the process's state in proc(5); "" when the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def has_ended(pid: int) -> bool:
    return state(pid) in ("", "Z", "X")


def writable_cgroups(kind: str, controller: str = "") -> list[Path]:
    """The mounts of this kind ("cgroup", "cgroup2") with this controller in which we may make cgroups."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    found = [Path(mount) for _, mount, its, options, *_ in mounts if its == kind and controller in options]
    return [path for path in found if os.access(path, os.W_OK)]


@contextmanager
def frozen_by_v1(pid: int) -> Iterator[None]:
    """Hold the process in the freezer of cgroup v1, where even SIGKILL does not end it.

    The process must have been killed when the block ends. Skips the test where there is no such freezer.
    """
    roots = writable_cgroups("cgroup", "freezer")
    folder = roots[0] / f"rankspawn-tests-{os.getpid()}" if roots else Path("/none")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no freezer of cgroup v1 can be made here")
    try:
        (folder / "cgroup.procs").write_text(str(pid))
        (folder / "freezer.state").write_text("FROZEN")
        eventually(lambda: (folder / "freezer.state").read_text() == "FROZEN\n")
        yield
    finally:
        (folder / "freezer.state").write_text("THAWED")
        eventually(lambda: not (folder / "cgroup.procs").read_text())
        folder.rmdir()


@contextmanager
def new_cgroup() -> Iterator[Path]:
    """A new cgroup v2, as if it were delegated to us; the end of the block kills what is left in it, and removes it.

    Skips the test where none can be made.
    """
    roots = writable_cgroups("cgroup2")
    if not roots:
        pytest.skip("no cgroup v2 is mounted that we may write to")
    folder = roots[0] / f"rankspawn-tests-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup v2 can be made here: {error}")
    yield folder
    if (folder / "cgroup.kill").exists():
        (folder / "cgroup.kill").write_text("1")
    eventually(lambda: "populated 0" in (folder / "cgroup.events").read_text())
    for path, _, _ in os.walk(folder, topdown=False):
        os.rmdir(path)
