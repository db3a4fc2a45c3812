"""What the kernel says of a process: its masks, and the node of each of its pages.

This module uses system calls and files of /proc and nothing of the package, because the checks compare the two.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TypeVar

Answer = TypeVar("Answer")

# The virtual machine is always x86-64 (run.py).
_NR_SET_MEMPOLICY = 238
_NR_MOVE_PAGES = 279
_MPOL = {"default": 0, "bind": 2, "interleave": 3}

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> None:
    if _libc.syscall(ctypes.c_long(number), *arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def ids(text: str) -> frozenset[int]:
    """The ids of a kernel list such as "0-1,4-5"."""
    runs = [part.partition("-") for part in text.strip().split(",") if part]
    return frozenset(i for first, _, last in runs for i in range(int(first), int(last or first) + 1))


def masks(pid: int | str = "self") -> tuple[frozenset[int], frozenset[int]]:
    """The allowed CPUs and the allowed memory nodes, from /proc/PID/status."""
    return masks_in(Path(f"/proc/{pid}/status").read_text())


def masks_in(status: str) -> tuple[frozenset[int], frozenset[int]]:
    """The same, from the text of such a file."""
    found = dict(re.findall(r"^(Cpus|Mems)_allowed_list:\s*(\S*)$", status, re.MULTILINE))
    return ids(found["Cpus"]), ids(found["Mems"])


def page_nodes(pid: int, addresses: Sequence[int]) -> list[int | None]:
    """The node of each page, by move_pages(2); None for a page that was never touched."""
    count = len(addresses)
    status = (ctypes.c_int * count)()
    pages = (ctypes.c_void_p * count)(*addresses)
    none = ctypes.c_void_p(None)
    _call(_NR_MOVE_PAGES, ctypes.c_int(pid), ctypes.c_ulong(count), pages, none, status, ctypes.c_int(0))
    return [node if node >= 0 else None for node in status]


def nodes_from(pid: int, address: int, pages: int) -> list[int | None]:
    """The nodes of ``pages`` pages from ``address`` on."""
    return page_nodes(pid, range(address, address + pages * mmap.PAGESIZE, mmap.PAGESIZE))


def frames(pid: int, address: int, pages: int) -> tuple[int, ...]:
    """The numbers of the frames of physical memory that hold ``pages`` pages from ``address`` on, by pagemap
    (the kernel's Documentation/admin-guide/mm/pagemap.rst). It tells them to root only."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        entries = struct.unpack(f"{pages}Q", os.pread(file.fileno(), 8 * pages, address // mmap.PAGESIZE * 8))
    assert all(entry >> 63 for entry in entries), "a page is not in memory"
    return tuple(entry & ((1 << 55) - 1) for entry in entries)


def stack_nodes(pid: int) -> list[int]:
    """The nodes of the stack's pages, in the order in which the pages are made. The first is the highest: execve(2)
    fills it with the arguments before the program runs."""
    found = re.search(r"^([0-9a-f]+)-([0-9a-f]+) .*\[stack\]$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE)
    assert found, f"process {pid} has no stack"
    low, high = int(found[1], 16), int(found[2], 16)
    nodes = page_nodes(pid, range(high - mmap.PAGESIZE, low - 1, -mmap.PAGESIZE))
    assert nodes[0] is not None
    return [node for node in nodes if node is not None]


@dataclass(frozen=True)
class Mapping:
    """A line of numa_maps. policy: as the kernel writes it. nodes: the number of pages by node. private: how many pages
    are the process's own; the others are a file's, and lie where the page cache put them."""

    policy: str
    name: str
    nodes: Counter[int]
    private: int


def mappings(numa_maps: str) -> Iterator[Mapping]:
    """The lines of a numa_maps file that have pages (proc(5))."""
    for line in numa_maps.splitlines():
        # A policy's name may hold a blank: "prefer (many):1-2".
        found = re.match(r"[0-9a-f]+ (prefer \(many\):\S*|weighted interleave:\S*|\S+)(.*)", line)
        assert found, line
        nodes = Counter({int(node): int(pages) for node, pages in re.findall(r" N(\d+)=(\d+)", found[2])})
        if nodes:
            private = re.search(r" anon=(\d+)", found[2])
            name = re.search(r" (heap|stack|file=\S+)", found[2])
            yield Mapping(found[1], name[1] if name else "", nodes, int(private[1]) if private else 0)


def policy_of(numa_maps: str) -> str:
    """The process's policy as the kernel writes it for each mapping that has no policy of its own."""
    (policy,) = {mapping.policy for mapping in mappings(numa_maps)}
    return policy


def private_nodes(numa_maps: str) -> Counter[int]:
    """How many of the process's own pages are on each node, as far as numa_maps tells. In a mapping that mixes them
    with a file's pages, only those count that cannot be the file's."""
    total: Counter[int] = Counter()
    for mapping in mappings(numa_maps):
        others = mapping.nodes.total() - mapping.private
        total += Counter({node: pages - others for node, pages in mapping.nodes.items()})
    return total


def set_own_policy(mode: str, nodes: Iterable[int] = ()) -> None:
    """set_mempolicy(2) for the calling thread."""
    mask = ctypes.c_ulong(sum(1 << node for node in nodes))
    _call(_NR_SET_MEMPOLICY, ctypes.c_int(_MPOL[mode]), ctypes.byref(mask), ctypes.c_ulong(64))


def in_thread(function: Callable[[], Answer]) -> Answer:
    """Run ``function`` in a thread of its own and return its answer. A policy, mask or filter that it sets ends with
    the thread."""
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(function())
        except BaseException as error:  # Raised again below.
            errors.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    # A joined thread leaves /proc a moment later. The next check must not find it there, and miss it afterwards.
    while thread.native_id and os.path.exists(f"/proc/self/task/{thread.native_id}"):
        time.sleep(0.001)
    if errors:
        raise errors[0]
    return answers[0]


@contextmanager
def own_cpus(cpus: Iterable[int]) -> Iterator[None]:
    """Restrict the calling thread to these CPUs, as if the launcher had inherited such a mask."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
