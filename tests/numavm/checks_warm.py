"""A warm start on several nodes: each node has a template of its own, and what ranks share with it is on their node."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

from rankspawn import Binding, Template, get_context, launch
from tests.numavm.conftest import bound
from tests.numavm.kernel_says import frames, masks, nodes_from, policy_of, private_nodes
from tests.numavm.machine import CPUS, MEMORY_ONLY

PAGES = 512
PER_NODE = 2
RANKS = PER_NODE * len(CPUS)
NODE_OF_RANK = [rank // PER_NODE for rank in range(RANKS)]

# A module that is preloaded, and has memory, as the modules of torch have. The ranks only read it.
HELD = f"""
import ctypes, mmap

def touch():
    memory = mmap.mmap(-1, {PAGES} * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range({PAGES}):
        memory[page * mmap.PAGESIZE] = 1
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))

held, address = touch()
"""
# A rank touches as much again, and stays until it is ended. The file has its name when it is whole.
SCRIPT = """
import json, os, signal, sys
preloaded = "held" in sys.modules
import held
own, address = held.touch()
name = os.environ["RANK"]
with open(f"new.{name}", "w") as file:
    json.dump([preloaded, held.address, address], file)
os.rename(f"new.{name}", f"{name}.json")
signal.pause()
"""


@dataclass(frozen=True)
class Rank:
    """A rank that stands, as the kernel sees it. preloaded: whether it began with the module imported. held, own: the
    nodes of the module's pages, and of those that the rank has touched itself. held_frames: where the module's pages
    are in the machine's memory; the same in two processes are shared by them. born: what a cold start gives, too."""

    preloaded: bool
    held: set[int | None]
    own: set[int | None]
    held_frames: tuple[int, ...]
    own_frames: tuple[int, ...]
    born: tuple[Any, ...]


def look(pid: int, path: Path) -> Rank:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until, f"{path} is not written"
        time.sleep(0.05)
    preloaded, held, own = json.loads(path.read_text())
    numa_maps = Path(f"/proc/{pid}/numa_maps").read_text()
    return Rank(
        preloaded,
        set(nodes_from(pid, held, PAGES)),
        set(nodes_from(pid, own, PAGES)),
        frames(pid, held, PAGES),
        frames(pid, own, PAGES),
        (masks(pid), policy_of(numa_maps), set(+private_nodes(numa_maps))),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the module and the script are."""
    (tmp_path / "held.py").write_text(HELD)
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


@contextmanager
def standing(folder: Path, nprocs: int, **options: Any) -> Iterator[list[Rank]]:
    """Ranks that have touched their memory, and stay until the block ends. A warm start that turns cold is an error."""
    for path in folder.glob("*.json"):
        path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with launch([sys.executable, "-S", str(folder / "script.py")], nprocs, cwd=folder, **options) as group:
            yield [look(pid, folder / f"{rank}.json") for rank, pid in enumerate(group.pids())]


@pytest.mark.parametrize("policy, launches", [(None, 2), ("bind", 1)])
def test_ranks_share_the_memory_of_their_nodes_template(policy: Any, launches: int, folder: Path) -> None:
    options = {"numa": "node", "memory_policy": policy}
    with standing(folder, len(CPUS), **options) as ranks:
        cold = [rank.born for rank in ranks]
        assert not any(rank.preloaded for rank in ranks)
    with Template(["held"], required=True) as template:
        # Between two launches the template may put its memory into huge pages.
        for launch_number in range(1, launches + 1):
            with standing(folder, RANKS, warm=template, **options) as ranks:
                assert all(rank.preloaded for rank in ranks)
                assert [rank.born for rank in ranks] == [cold[node] for node in NODE_OF_RANK]
                for rank, node in zip(ranks, NODE_OF_RANK, strict=True):
                    assert (rank.held, rank.own) == ({node}, {node})
                    assert rank.born == (
                        (CPUS[node], masks()[1]),
                        "default" if policy is None else f"bind:{node}",
                        {node},
                    )
                # The ranks of a node have the same memory for what the template has imported, and nobody else has it.
                used = Counter(frame for rank in ranks for frame in rank.held_frames)
                assert len(used) == PAGES * len(CPUS)
                assert set(used.values()) == {PER_NODE}
                assert len({frame for rank in ranks for frame in rank.own_frames} - set(used)) == PAGES * RANKS
                told = template.report()
                assert [one["ranks"] for one in told] == [PER_NODE * launch_number] * len(CPUS)
                for node, one in enumerate(told):
                    numa_maps = Path(f"/proc/{one['pid']}/numa_maps").read_text()
                    assert masks(one["pid"])[0] == CPUS[node]
                    assert policy_of(numa_maps) == ("default" if policy is None else f"bind:{node}")
                    assert set(+private_nodes(numa_maps)) == {node}


def test_a_templates_memory_is_where_its_ranks_policy_says(folder: Path) -> None:
    """The ranks have the same CPUs and different policies, so that it is not the CPU that puts the pages there."""
    nodes = [MEMORY_ONLY, 1, MEMORY_ONLY, 1]
    bindings: list[Binding | None] = [bound(CPUS[2], "bind", {node}) for node in nodes]
    with (
        Template(["held"], required=True) as template,
        standing(folder, len(nodes), bindings=bindings, warm=template) as ranks,
    ):
        for rank, node in zip(ranks, nodes, strict=True):
            assert (rank.held, rank.own, rank.born[0][0], rank.born[2]) == ({node}, {node}, CPUS[2], {node})
        assert [one["ranks"] for one in template.report()] == [2, 2]
        assert set(ranks[0].held_frames) == set(ranks[2].held_frames)
        assert set(ranks[0].held_frames).isdisjoint(ranks[1].held_frames)


@pytest.fixture
def tracker_of_multiprocessing() -> Iterator[None]:
    """Processes of multiprocessing share one, which it keeps until it ends."""
    resource_tracker.ensure_running()
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


def own_nodes() -> tuple[bool, frozenset[int], set[int]]:
    """Whether a process was forked with its preload, its CPUs, and the nodes of its pages."""
    numa_maps = Path("/proc/self/numa_maps").read_text()
    return "wave" in sys.modules, masks()[0], set(+private_nodes(numa_maps))


def test_processes_of_a_pool_are_on_their_nodes(tracker_of_multiprocessing: None) -> None:
    context: Any = get_context("warm", [bound(CPUS[3], "bind", {3})], preload=["wave"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            assert pool.submit(own_nodes).result(120) == (True, CPUS[3], {3})
    context.template().close()
