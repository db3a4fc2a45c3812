"""Which ranks stand still: what processes use and write, which wait for a person, and whether two looks are alike."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress

from .._procfs import read_stat
from .facts import Process, Thread
from .kernel import call_of, read, threads_of
from .take import Stacks

# The modules of debuggers in which a program waits for a person to type, at a terminal or at a socket.
_DEBUGGERS = re.compile(r"/(?:pdb|bdb)\.py$|/(?:debugpy|pydevd|_pydevd_bundle|ipdb|pudb|IPython)/")
_TERMINAL = re.compile(r"/dev/(?:pts/\d|tty|console)")
_MOST_DESCRIPTORS = 1024


def used(pids: Iterable[int], proc: str = "/proc") -> tuple[float, int]:
    """What processes, and the children that they waited for, have used so far.

    Args:
        pids: The processes; one that has ended counts as 0.
        proc: Where procfs is mounted.

    Returns:
        Seconds of CPU time, and the bytes that they have written to any file.
    """
    seconds, written = 0.0, 0
    for pid in pids:
        with suppress(OSError):
            stat = read_stat(f"{proc}/{pid}")
            seconds += stat.cpu_seconds + stat.waited_seconds
        for line in read(f"{proc}/{pid}/io").splitlines():
            if line.startswith("wchar:"):
                written += int(line.split()[1])
    return seconds, written


def attended(pid: int, proc: str = "/proc") -> str:
    """Why a process waits for a person, as text: it is stopped, traced, or reads from a terminal; else ""."""
    tracer = re.search(r"^TracerPid:\t(\d+)$", read(f"{proc}/{pid}/status"), re.MULTILINE)
    if tracer is not None and tracer[1] != "0":
        return f"process {tracer[1]} traces it"
    for thread in threads_of(pid, all_details=False, proc=proc):
        if thread.state in "Tt":
            return "it is stopped"
        for descriptor in _awaited(pid, thread.tid, proc):
            path = _target(f"{proc}/{pid}/fd/{descriptor}")
            if _TERMINAL.match(path):
                return f"it reads from {path}"
    return ""


def can_run(pid: int, proc: str = "/proc") -> bool:
    """Whether a thread of a process runs, or would if it got a CPU: a busy machine or a quota may keep it waiting."""
    return any(thread.state == "R" for thread in threads_of(pid, all_details=False, proc=proc))


def at_a_debugger(found: Stacks) -> bool:
    """Whether a thread is in a debugger's code."""
    threads = (thread for process in found.processes for thread in process.threads)
    return any(_DEBUGGERS.search(frame.file) for thread in threads for frame in thread.frames)


def unmoved(first: Stacks, second: Stacks) -> frozenset[int]:
    """The ranks of which every process is at the same place in both looks, by its first thread."""
    before, after = _by_rank(first), _by_rank(second)
    return frozenset(
        rank
        for rank, processes in after.items()
        if processes.keys() == before.get(rank, {}).keys()
        and all(_alike(before[rank][pid].threads[0], one.threads[0]) for pid, one in processes.items())
    )


def _by_rank(found: Stacks) -> Mapping[int, Mapping[int, Process]]:
    ranks: dict[int, dict[int, Process]] = {}
    for process in found.processes:
        if process.rank is not None:
            ranks.setdefault(process.rank, {})[process.pid] = process
    return ranks


def _alike(before: Thread, after: Thread) -> bool:
    if before.frames and after.frames:
        return before.frames == after.frames
    return (before.call, before.wchan) == (after.call, after.wchan)


def _awaited(pid: int, tid: int, proc: str) -> Iterable[int]:
    """The descriptors that a thread waits for in the system call that it is in."""
    name, values = call_of(f"{proc}/{pid}/task/{tid}")
    if name in ("read", "readv", "pread64"):
        return values[:1]
    if name in ("poll", "ppoll"):
        count = min(values[1], _MOST_DESCRIPTORS)
        return [one for one, _ in struct.iter_unpack("=ii", _memory(pid, values[0], 8 * count, proc))]
    if name in ("select", "pselect6"):
        bits = int.from_bytes(_memory(pid, values[1], min(values[0], _MOST_DESCRIPTORS) // 8 + 1, proc), "little")
        return [one for one in range(values[0]) if bits >> one & 1]
    if name.startswith("epoll_"):
        return [int(one) for one in re.findall(r"^tfd: *(\d+)", read(f"{proc}/{pid}/fdinfo/{values[0]}"), re.MULTILINE)]
    return ()


def _memory(pid: int, address: int, count: int, proc: str) -> bytes:
    """Bytes of a process's memory; empty if this user may not read them, or if there are fewer."""
    if not address or count <= 0:
        return b""
    try:
        fd = os.open(f"{proc}/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        found = os.pread(fd, count, address)
    except (OSError, OverflowError):
        return b""
    finally:
        os.close(fd)
    return found if len(found) == count else b""


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
