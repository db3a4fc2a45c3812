"""A fixture for all tests: it asserts that each test ends with what it began with."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# How long threads and processes may take to go: a joined thread, for example, leaves /proc a moment later.
GRACE_SECONDS = 2.0

# These tests read the source, and an installed wheel (make test-wheel, cibuildwheel) has no source beside it.
if not Path(__file__).parent.with_name("csrc").is_dir():
    collect_ignore = ["test_child_object.py", "test_habits.py", "test_imports.py", "test_readme.py"]

# A shell without job control starts background commands with these ignored, and programs under test would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGQUIT"):
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)

_NR_GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}.get(platform.machine())


def _open_fds() -> dict[str, str]:
    """What each open descriptor refers to. listdir's own descriptor is closed by the time its name is looked up."""
    fds = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
    return fds


def _children() -> dict[str, str]:
    """The command lines of the children of all our threads, zombies included, by pid."""
    if Path("/proc/self/task", str(threading.get_native_id()), "children").exists():
        pids = []
        for path in Path("/proc/self/task").glob("*/children"):
            try:
                pids += path.read_text().split()
            except OSError:
                continue  # the thread has ended
    else:  # a kernel built without CONFIG_PROC_CHILDREN
        import psutil

        pids = [str(child.pid) for child in psutil.Process().children()]
    children = {}
    for pid in pids:
        try:
            children[pid] = Path("/proc", pid, "cmdline").read_text().replace("\0", " ").strip() or "(a zombie)"
        except OSError:
            continue
    return children


def _native_threads() -> dict[str, str]:
    threads = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except OSError:
            continue
        threads[task.name] = name
    return threads


def _status() -> dict[str, str]:
    """What the kernel says of this thread: its signal mask, the signals ignored and caught, and the umask."""
    lines = (line.partition(":") for line in Path("/proc/thread-self/status").read_text().splitlines())
    status = {name: value.strip() for name, _, value in lines}
    # Signals 32 and 33 are libc's own: libc catches them as soon as there is a second thread.
    ours = ~(1 << 31 | 1 << 32)
    found = {name: f"{int(status[name], 16) & ours:016x}" for name in ("SigBlk", "SigIgn", "SigCgt")}
    return {**found, "Umask": status.get("Umask", "unknown")}


def _memory_policy() -> str:
    if _NR_GET_MEMPOLICY is None:
        return "unknown"
    mode, mask = ctypes.c_int(-1), (ctypes.c_ulong * 16)()  # 1024 nodes: no kernel is built for more
    maxnode = ctypes.c_ulong(ctypes.sizeof(mask) * 8)
    libc = ctypes.CDLL(None, use_errno=True)
    answer = libc.syscall(_NR_GET_MEMPOLICY, ctypes.byref(mode), mask, maxnode, None, ctypes.c_ulong(0))
    return f"get_mempolicy = {answer}, mode {mode.value}, nodes {bytes(mask).rstrip(bytes(1)).hex() or 'none'}"


def _environment() -> dict[str, str]:
    # pytest keeps the test's current phase in PYTEST_CURRENT_TEST.
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def _snapshot() -> dict[str, object]:
    """What must be the same after a test as before it, by name."""
    now: dict[str, object] = {
        "threads": {str(thread.ident): thread.name for thread in threading.enumerate()},
        "environment": _environment(),
        "working directory": os.getcwd(),
        "signal handlers": {str(sig): repr(signal.getsignal(sig)) for sig in signal.valid_signals()},
    }
    if sys.platform.startswith("linux"):
        now.update(
            {
                "open fds": _open_fds(),
                "children": _children(),
                "native threads": _native_threads(),
                "signals and umask": _status(),
                "CPU affinity": sorted(os.sched_getaffinity(0)),
                "memory policy": _memory_policy(),
            }
        )
    return now


def _snapshot_since(before: dict[str, object]) -> dict[str, object]:
    """What _snapshot() says now; ``before`` loses the native threads that have gone, because a library may end its own
    threads at any time (torch does)."""
    now = _snapshot()
    was, are = before.get("native threads"), now.get("native threads")
    if isinstance(was, dict) and isinstance(are, dict):
        before["native threads"] = {task: name for task, name in was.items() if task in are}
    return now


def _difference(before: object, after: object) -> str:
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return f"was {before}, is {after}"
    lines = [f"gone: {key} {before[key]}" for key in before.keys() - after.keys()]
    lines += [f"left: {key} {after[key]}" for key in after.keys() - before.keys()]
    lines += [
        f"was {key} {before[key]}, is {after[key]}" for key in before.keys() & after.keys() if before[key] != after[key]
    ]
    return "; ".join(sorted(lines))


def _kill_leftover_children(before: dict[str, object], after: dict[str, object]) -> None:
    """Kill the children that a failed test left, so that they neither slow the rest of the run nor outlive it."""
    known, now = before.get("children"), after.get("children")
    if isinstance(known, dict) and isinstance(now, dict):
        for pid in now.keys() - known.keys():
            try:
                os.kill(int(pid), signal.SIGKILL)
                os.waitpid(int(pid), 0)
            except (ProcessLookupError, ChildProcessError):
                continue


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fails a test that leaves a descriptor, child, thread, signal setting, binding or variable behind.

    It is set up before a test's other fixtures and ends after them. Where the tested library keeps something for the
    life of the process (a thread pool), the tests' folder has a conftest.py with another fixture of this name.
    """
    before = _snapshot()
    yield
    deadline = time.monotonic() + GRACE_SECONDS
    after = _snapshot_since(before)
    while after != before and time.monotonic() < deadline:
        # pytest.raises keeps a traceback, and the traceback holds the test's objects in a cycle.
        gc.collect()
        time.sleep(0.01)
        after = _snapshot_since(before)
    if after != before:
        _kill_leftover_children(before, after)
        changed = [
            f"{name}: {_difference(before[name], after[name])}" for name in before if before[name] != after[name]
        ]
        pytest.fail("the test did not leave things as it found them\n  " + "\n  ".join(changed), pytrace=False)
