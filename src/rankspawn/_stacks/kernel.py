"""What the kernel says about a process in any language, by proc(5). No look stops the process."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress

from .._procfs import read_stat
from .facts import Thread

MOST_THREADS = 64
"""The most threads of a process to ask the kernel about; torch and BLAS make hundreds that all sleep."""

_MOST_BYTES = 1 << 16

# The calls in which ranks wait, of the table that new architectures share (asm-generic/unistd.h), and of x86-64's own.
_CALLS_OF_ALL = {
    22: "epoll_pwait", 29: "ioctl", 32: "flock", 63: "read", 64: "write", 65: "readv", 66: "writev", 67: "pread64",
    68: "pwrite64", 72: "pselect6", 73: "ppoll", 82: "fsync", 95: "waitid", 98: "futex", 101: "nanosleep",
    115: "clock_nanosleep", 133: "rt_sigsuspend", 137: "rt_sigtimedwait", 202: "accept", 203: "connect", 206: "sendto",
    207: "recvfrom", 211: "sendmsg", 212: "recvmsg", 242: "accept4", 260: "wait4", 441: "epoll_pwait2",
    449: "futex_waitv",
}  # fmt: skip
_CALLS_OF_X86_64 = {
    0: "read", 1: "write", 7: "poll", 16: "ioctl", 17: "pread64", 18: "pwrite64", 19: "readv", 20: "writev",
    23: "select", 34: "pause", 35: "nanosleep", 42: "connect", 43: "accept", 44: "sendto", 45: "recvfrom",
    46: "sendmsg", 47: "recvmsg", 61: "wait4", 73: "flock", 74: "fsync", 128: "rt_sigtimedwait", 130: "rt_sigsuspend",
    202: "futex", 230: "clock_nanosleep", 232: "epoll_wait", 247: "waitid", 270: "pselect6", 271: "ppoll",
    281: "epoll_pwait", 288: "accept4", 441: "epoll_pwait2", 449: "futex_waitv",
}  # fmt: skip
_CALLS = {"x86_64": _CALLS_OF_X86_64, "aarch64": _CALLS_OF_ALL, "riscv64": _CALLS_OF_ALL}.get(platform.machine(), {})

# An interpreter's path, and that of its library.
_PYTHON = re.compile(r"/(?:lib)?python3\.(\d+)(?:t|d|td)?(?:\.so[.\d]*)?(?: \(deleted\))?$")


def processes_below(roots: Iterable[int], proc: str = "/proc") -> dict[int, list[int]]:
    """The processes of each root: the root, its descendants, and the members of its session.

    Args:
        roots: Pids; a root that has ended gets an empty list, or the processes that it left in its session.
        proc: Where procfs is mounted.
    """
    found: dict[int, list[int]] = {root: [] for root in roots}
    owner = {root: root for root in found}
    parents: dict[int, tuple[int, int]] = {}
    try:
        names = os.listdir(proc)
    except OSError:
        return found
    for pid in sorted(int(name) for name in names if name.isdecimal()):
        with suppress(OSError):  # it has ended meanwhile
            stat = read_stat(f"{proc}/{pid}")
            if stat.state not in "ZX":
                parents[pid] = stat.parent, stat.session
    for pid in parents:
        line, one = [], pid
        while one not in owner and one in parents:
            line.append(one)
            one = parents[one][0]
            if one in line:
                break  # pids were reused while they were read
        whose = owner.get(one) or owner.get(parents[pid][1])
        if whose is not None:
            owner.update(dict.fromkeys(line, whose))
    for pid, root in owner.items():
        if pid in parents:
            found[root].append(pid)
    for root, pids in found.items():
        pids.sort(key=lambda pid, root=root: (pid != root, pid))  # type: ignore[misc]
    return found


def threads_of(pid: int, *, all_details: bool, proc: str = "/proc") -> tuple[Thread, ...]:
    """The threads of a process, the first one first; empty if the process has ended.

    Args:
        pid: The process.
        all_details: Whether to ask where each thread sleeps, or only where the first one does.
        proc: Where procfs is mounted.
    """
    try:
        tids = sorted(map(int, os.listdir(f"{proc}/{pid}/task")), key=lambda tid: (tid != pid, tid))
    except OSError:
        return ()
    found = []
    for tid in tids[:MOST_THREADS]:
        folder = f"{proc}/{pid}/task/{tid}"
        try:
            stat = read_stat(folder)
        except OSError:  # it has ended meanwhile
            continue
        if stat.state in "ZX" or not (all_details or tid == pid):
            found.append(Thread(tid, stat.name, stat.state))
            continue
        where = read(f"{folder}/wchan").strip()
        stack = [line.split("] ", 1)[-1].partition("+")[0] for line in read(f"{folder}/stack").splitlines()]
        found.append(
            Thread(tid, stat.name, stat.state, "" if where == "0" else where, call_of(folder)[0], tuple(stack))
        )
    return tuple(found)


def state_of(pid: int, proc: str = "/proc") -> str:
    """The letter of a process's state; "" if it has gone."""
    try:
        return read_stat(f"{proc}/{pid}").state
    except OSError:
        return ""


def parent_of(pid: int, proc: str = "/proc") -> int:
    """The parent of a process; 0 if it has gone."""
    try:
        return read_stat(f"{proc}/{pid}").parent
    except OSError:
        return 0


def command_of(pid: int, proc: str = "/proc") -> str:
    """The command line of a process; its name in brackets if it has none."""
    words = read(f"{proc}/{pid}/cmdline").rstrip("\0").replace("\0", " ")
    return words or f"[{read(f'{proc}/{pid}/comm').strip() or pid}]"


def environment_of(pid: int, proc: str = "/proc") -> Mapping[str, str]:
    """The variables that a process was started with; empty if this user may not read them."""
    pairs = (pair.partition("=") for pair in read(f"{proc}/{pid}/environ", 1 << 20).split("\0"))
    return {name: value for name, _, value in pairs if name}


def python_of(pid: int, proc: str = "/proc") -> int | None:
    """The minor version of the Python 3 that a process runs; None if it runs none, or has ended.

    Raises:
        PermissionError: This process may not look into that one.
    """
    try:
        found = _PYTHON.search(os.readlink(f"{proc}/{pid}/exe"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    for line in () if found else read(f"{proc}/{pid}/maps", 1 << 22).splitlines():
        if found := _PYTHON.search(line):
            break
    return int(found[1]) if found else None


def why_refused(proc: str = "/proc") -> str:
    """Why this process may not look into another one, and what to do (ptrace(2), "Ptrace access mode checking")."""
    scope = read(os.path.join(proc, "sys", "kernel", "yama", "ptrace_scope")).strip()
    if scope and scope != "0":
        return (
            f"kernel.yama.ptrace_scope is {scope}: sysctl -w kernel.yama.ptrace_scope=0, or give the launcher"
            " CAP_SYS_PTRACE"
        )
    return "in a container, add --cap-add SYS_PTRACE; another user's process needs CAP_SYS_PTRACE"


def read(path: str, most: int = _MOST_BYTES) -> str:
    """The text of a file of procfs; "" if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        parts = []
        while most > 0 and (part := os.read(fd, min(most, _MOST_BYTES))):
            parts.append(part)
            most -= len(part)
    except OSError:  # it has ended meanwhile, or we may not
        return ""
    finally:
        os.close(fd)
    return b"".join(parts).decode(errors="backslashreplace")


def call_of(folder: str) -> tuple[str, tuple[int, ...]]:
    """The system call that a thread is in, and its arguments; "" if it is in none, or if this user may not ask.

    Args:
        folder: The thread's folder in procfs.
    """
    number, *words = read(f"{folder}/syscall").split() or [""]
    if not number.isdecimal():  # "running", "-1" outside of a call, or nothing, where we may not ask
        return "", ()
    return _CALLS.get(int(number), f"system call {number}"), tuple(int(word, 16) for word in words[:6])
