"""Topology.read on made-up trees, broken trees, this machine, and captured trees of real machines."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import tarfile
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankspawn._binding import PlacementError
from rankspawn._ids import parse_mask
from rankspawn._place.sysfs import TopologyError, Tree
from rankspawn._place.topology import Topology
from tests.support.plans import agree
from tests.support.sysfs_tree import CPU, GIB, NODE, Machine, write

CAPTURED = Path(__file__).resolve().parents[2] / "shared" / "topologies"
# Neither we nor lstopo read most of a tarball, and it takes long to unpack.
NEEDED = re.compile(r"^[^/]+/(?:sys/devices/(?:system/(?:cpu|node)|cpu_)|sys/fs/cgroup|proc|dev|cgroup)(?:/|[a-z]|$)")
NOISE = re.compile(r"/(?:cpufreq|cpuidle|power|thermal_throttle|microcode|hugepages|regs|hotplug|acpi_cppc)(?:/|$)")


def test_two_sockets_of_two_nodes(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(sockets=2, nodes=2, caches=2, cores=2, threads=2)))
    assert topology.cpus == topology.allowed_cpus == frozenset(range(32))
    assert [(node.id, sorted(node.cpus)) for node in topology.nodes][1] == (1, [4, 5, 6, 7, 20, 21, 22, 23])
    assert [node.memory for node in topology.nodes] == [64 * GIB] * 4
    assert [topology.nodes[1].distance(other) for other in range(4)] == [12, 10, 21, 21]
    assert [len(socket.cpus) for socket in topology.sockets] == [16, 16]
    assert [core.cpus for core in topology.cores] == [(i, i + 16) for i in range(16)]
    assert [cache.level for cache in topology.caches] == [3] * 8
    assert sorted(topology.caches[0].cpus) == [0, 1, 16, 17]
    assert topology.notes == ()


def test_masks_and_nul_bytes_say_the_same_as_lists(tmp_path: Path) -> None:
    lists = Machine(sockets=2, nodes=2, caches=2, cores=9, threads=2)
    masks = Machine(sockets=2, nodes=2, caches=2, cores=9, threads=2, masks=True, nul=True)
    one = Topology.read(write(tmp_path / "lists", lists))
    other = Topology.read(write(tmp_path / "masks", masks))
    for field in ("cpus", "nodes", "sockets", "cores", "caches", "allowed_cpus", "allowed_nodes"):
        assert getattr(one, field) == getattr(other, field)


def test_parse_mask() -> None:
    assert parse_mask("00000001,00000003") == {0, 1, 32}
    assert parse_mask("0000,00000000,000000ff") == set(range(8))
    assert parse_mask("0") == frozenset()
    for wrong in ("", "xyz", "1,,2", "1ffffffff,0", "-1"):
        with pytest.raises(ValueError):
            parse_mask(wrong)


def test_a_machine_with_gaps(tmp_path: Path) -> None:
    machine = Machine(
        sockets=2,
        cores=3,
        threads=2,
        memory_only=2,
        node_ids=(1, 4, 7, 9),
        cpu_stride=5,
        cpu_base=3,
        offline=frozenset({3, 33}),
        no_memory=frozenset({4}),
    )
    topology = Topology.read(write(tmp_path, machine))
    assert topology.offline == {3, 33}
    assert topology.cpus.isdisjoint(topology.offline)
    assert [(node.id, bool(node.cpus), bool(node.memory)) for node in topology.nodes] == [
        (1, True, True),
        (4, True, False),
        (7, False, True),
        (9, False, True),
    ]
    assert [node.id for node in topology.nodes_with_cpus()] == [1, 4]
    assert topology.node(5) is None
    # CPU 3 and 33 are threads 0 and 0 of cores 0 and 1 (stride 5, base 3: 6 cores, second threads from 33 on).
    assert topology.cores[-1].cpus[0] not in topology.offline


def test_one_node_is_assumed_and_said_without_a_node_folder(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(sockets=2, node_dir=False)))
    assert [(node.id, node.cpus) for node in topology.nodes] == [(0, topology.cpus)]
    assert topology.notes == (f"no {NODE}: assuming one node with all CPUs",)


@pytest.mark.parametrize("kinds", ["pmu", "capacity"])
def test_hybrid_kinds(kinds: str, tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(cores=6, big=2, kinds=kinds)))
    assert [core.kind for core in topology.cores] == ["performance"] * 2 + ["efficiency"] * 4


def test_capacities_that_are_all_alike_are_no_kinds(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(cores=6, big=6, kinds="capacity")))
    assert {core.kind for core in topology.cores} == {""}


def test_each_file_is_opened_at_most_once_and_few_are(tmp_path: Path) -> None:
    tree = Tree(write(tmp_path, Machine(sockets=2, caches=8, cores=8, threads=2)))
    topology = Topology.read(tree)
    assert len(tree.opened) == topology.files
    before = dict(tree.opened)
    assert tree.text(f"{CPU}/online") == "0-255"
    assert Topology.read(tree).cores == topology.cores
    assert tree.opened == before
    assert topology.files < 200  # 128 cores, one file each, are the most of it


def test_1024_cpus(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(sockets=4, nodes=4, cores=32, threads=2, masks=True)))
    assert len(topology.cpus) == 1024
    assert len(topology.cores) == 512


def test_frozen_hashable_and_picklable(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(sockets=2)))
    assert pickle.loads(pickle.dumps(topology)) == topology
    assert len({topology, Topology.read(tmp_path)}) == 1
    with pytest.raises(AttributeError):
        topology.cpus = frozenset()  # type: ignore[misc]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_this_machine() -> None:
    topology = Topology.read()
    assert topology.allowed_cpus == os.sched_getaffinity(0) & topology.cpus
    assert topology.allowed_nodes
    assert {cpu for core in topology.cores for cpu in core.cpus} == topology.cpus


def test_the_allowed_set_of_a_captured_process(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(sockets=2, allowed="2-5,9", mems="1")))
    assert topology.allowed_cpus == {2, 3, 4, 5}
    assert topology.allowed_nodes == {1}


CGROUPS = {
    "v2": {
        "proc/self/cgroup": "0::/job/step",
        "proc/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0",
        "sys/fs/cgroup/job/step/cpuset.cpus.effective": "1-2",
        "sys/fs/cgroup/job/step/cpuset.mems.effective": "0",
    },
    "v2, set in the parent group": {
        "proc/self/cgroup": "0::/job/step",
        "proc/self/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0",
        "sys/fs/cgroup/job/cpuset.cpus.effective": "1-2",
        "sys/fs/cgroup/job/cpuset.mems.effective": "0",
    },
    "v1": {
        "proc/self/cgroup": "4:memory:/other\n3:cpuset:/job\n0::/x",
        "proc/mounts": "cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0\ncgroup2 /sys/fs/cgroup/v2 cgroup2 rw 0 0",
        "sys/fs/cgroup/cpuset/job/cpuset.cpus": "1-2",
        "sys/fs/cgroup/cpuset/job/cpuset.mems": "0",
    },
    "v1 without prefix": {
        "proc/self/cpuset": "/job",
        "proc/mounts": "none /dev/cpuset cgroup rw,cpuset,noprefix 0 0",
        "dev/cpuset/job/cpus": "1-2",
        "dev/cpuset/job/mems": "0",
    },
}


@pytest.mark.parametrize("name", CGROUPS)
def test_the_cpuset_of_a_captured_process(name: str, tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(sockets=2, extra=CGROUPS[name])))
    assert topology.allowed_cpus == {1, 2}
    assert topology.allowed_nodes == {0}


BROKEN = {
    f"{CPU}/online": ("0-", r"cpu/online: expected a list like 0-3,8, got '0-'"),
    f"{CPU}/present": ("a-b", r"cpu/present: expected a list"),
    f"{CPU}/cpu1/topology/thread_siblings_list": (
        "",
        r"cpu1/topology/thread_siblings_list: expected 1 among its ids, got ''",
    ),
    f"{CPU}/cpu0/topology/core_siblings_list": ("7-3", r"core_siblings_list: expected a list like 0-3,8, got '7-3'"),
    f"{CPU}/cpu0/topology/physical_package_id": ("one", r"physical_package_id: expected a number, got 'one'"),
    f"{CPU}/cpu0/cache/index3/level": ("", r"index3/level: expected a number, got ''"),
    f"{CPU}/cpu0/cache/index3/shared_cpu_list": ("0,99999999", r"shared_cpu_list: expected a list"),
    f"{NODE}/online": ("0\x001", r"node/online: expected a list"),
    f"{NODE}/node0/cpulist": ("cpu0", r"node0/cpulist: expected a list like 0-3,8, got 'cpu0'"),
    "proc/self/status": (
        "Cpus_allowed_list:\tmany",
        r"Cpus_allowed_list in .*proc/self/status: expected a list, got 'many'",
    ),
}


@pytest.mark.parametrize("path", BROKEN)
def test_a_broken_file_is_named_with_its_text(path: str, tmp_path: Path) -> None:
    text, message = BROKEN[path]
    with pytest.raises(TopologyError, match=message):
        Topology.read(write(tmp_path, Machine(sockets=2, extra={path: text})))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, Machine())
    (tmp_path / CPU / "online").unlink()
    (tmp_path / CPU / "online").mkdir()
    with pytest.raises(TopologyError, match=r"cannot read .*cpu/online: Is a directory"):
        Topology.read(tmp_path)


def test_broken_distances_are_said_and_not_needed(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(sockets=2, extra={f"{NODE}/node1/distance": "10"})))
    assert "distance: expected 2 distances, got '10'" in topology.notes[0]
    assert topology.nodes[1].distance(0) == 255


def test_cpus_without_a_node_and_in_two_nodes_are_said(tmp_path: Path) -> None:
    extra = {f"{NODE}/node0/cpulist": "0-2", f"{NODE}/node1/cpulist": "2,4-7"}
    topology = Topology.read(write(tmp_path, Machine(sockets=2, extra=extra)))
    assert [sorted(node.cpus) for node in topology.nodes] == [[0, 1, 2], [4, 5, 6, 7]]
    assert any(note.startswith("CPUs 2 are in node 1 and in an earlier one") for note in topology.notes)
    assert any(note.startswith("CPUs 3 are online but in no node") for note in topology.notes)


def test_an_empty_folder_and_an_empty_mask_are_errors(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="no online CPU"):
        Topology.read(tmp_path)
    with pytest.raises(TopologyError, match="CPUs 9 are allowed, but only 0-3 are online"):
        Topology.read(write(tmp_path, Machine(allowed="9")))


# Captured trees of real machines.


def captured_files() -> list[str]:
    return sorted(file.name for file in CAPTURED.glob("*.tar.bz2")) if CAPTURED.is_dir() else []


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    if not captured_files():
        pytest.skip("no ../shared/topologies beside the repository")
    folder = tmp_path_factory.mktemp("captured")
    found = {}
    for name in captured_files():
        with tarfile.open(CAPTURED / name) as tar:
            members = [member for member in tar if NEEDED.search(member.name) and not NOISE.search(member.name)]
            tar.extractall(folder, members, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        found[name] = folder / members[0].name.split("/")[0]
    yield found
    shutil.rmtree(folder)


def test_every_captured_tree_is_read(captured: dict[str, Path]) -> None:
    for name, root in captured.items():
        topology = Topology.read(root)
        assert topology.allowed_cpus, name
        assert {cpu for core in topology.cores for cpu in core.cpus} == topology.cpus, name
        assert {cpu for socket in topology.sockets for cpu in socket.cpus} == topology.cpus, name


def test_plan_shows_what_run_does(captured: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for root in captured.values():
        for options in ("", "--numa-binding node --numa-binding-optional", "--memory-policy bind"):
            agree(root, 4, options, capsys)


# Where lstopo answers otherwise, and why ours is kept.
UNLIKE_LSTOPO = {
    "40intel64-4n10c+pci-conflicts.tar.bz2": {"Package", "Cache"},  # lstopo drops a package for the PCI conflict
    "64amd64-4s2n4ca2co.tar.bz2": {"Core"},  # Bulldozer: the kernel, and torch, call its modules cores with 2 threads
    "fakeheterocpunuma.tar.bz2": {"NUMANode"},  # lstopo drops the two nodes that claim the same CPUs
}


@pytest.mark.skipif(shutil.which("lstopo-no-graphics") is None, reason="hwloc is not installed")
def test_captured_trees_against_lstopo(captured: dict[str, Path]) -> None:
    for name, root in captured.items():
        ours, theirs = as_sets(Topology.read(root)), lstopo(root)
        for kind in ours.keys() - UNLIKE_LSTOPO.get(name, set()):
            assert ours[kind] == theirs[kind], (name, kind)


def as_sets(topology: Topology) -> dict[str, set[object]]:
    return {
        "NUMANode": {(node.id, node.memory, node.cpus or None) for node in topology.nodes},
        "Package": {socket.cpus for socket in topology.sockets},
        "Core": {frozenset(core.cpus) for core in topology.cores},
        "PU": {frozenset((cpu,)) for cpu in topology.cpus},
        "Cache": {(cache.level, cache.cpus) for cache in topology.caches},
    }


def lstopo(root: Path) -> dict[str, set[object]]:
    """hwloc's view of a tree, in the form of ``as_sets``; it gives nodes without CPUs those of a near node."""
    command = ["lstopo-no-graphics", "--if", "fsroot", "--input", root, "--disallowed", "--of", "xml", "-"]
    xml_text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, set[object]] = {kind: set() for kind in ("NUMANode", "Package", "Core", "PU", "Cache")}
    last: dict[int, tuple[int, frozenset[int]]] = {}
    for one in xml.etree.ElementTree.fromstring(xml_text).iter("object"):
        kind, words = one.get("type", ""), one.get("cpuset", "0x0").replace("0x", "").split(",")
        cpus = parse_mask(",".join(word or "0" for word in words))
        if kind == "NUMANode":
            id = int(one.get("os_index", ""))
            own = any((root / NODE / f"node{id}" / file).is_file() for file in ("cpumap", "cpulist"))
            memory_only = own and not Tree(root).first_ids(f"{NODE}/node{id}", ("cpulist", "cpumap"))
            found[kind].add((id, int(one.get("local_memory", "0")), None if memory_only else cpus))
        elif kind in found:
            found[kind].add(cpus)
        elif kind.endswith("Cache") and not kind.endswith("iCache"):
            for cpu in cpus:
                last[cpu] = max(last.get(cpu, (0, cpus)), (int(kind[1]), cpus), key=lambda pair: pair[0])
    found["Cache"] = set(last.values())
    return found
