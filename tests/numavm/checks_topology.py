"""Topology.read compared with QEMU's arguments, and with numactl and lscpu in the machine; the devices' nodes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rankspawn._binding import PlacementError
from rankspawn._place.devices import as_devices, find_devices, locate
from rankspawn._place.plan import place, plan
from rankspawn._place.topology import Topology
from tests.numavm import machine
from tests.numavm.cgroups import Group
from tests.numavm.conftest import nvidia_gpus
from tests.numavm.kernel_says import ids


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_nodes_sockets_dies_cores_and_caches_are_what_qemu_was_told() -> None:
    topology = Topology.read()
    assert {node.id: node.cpus for node in topology.nodes} == {**machine.CPUS, machine.MEMORY_ONLY: frozenset()}
    assert {socket.id: socket.cpus for socket in topology.sockets} == machine.SOCKET_CPUS
    for parts in (topology.dies, topology.cores, topology.caches):
        assert {frozenset(part.cpus) for part in parts} == {frozenset(cpus) for cpus in machine.DIES}
    assert {cache.level for cache in topology.caches} == {3}
    assert topology.allowed_cpus == topology.cpus == frozenset(range(machine.CPU_COUNT))
    assert topology.allowed_nodes == frozenset(machine.NODES)
    assert [tuple(distance for _, distance in node.distances) for node in topology.nodes] == list(machine.DISTANCES)
    assert topology.notes == ()


def test_nodes_are_those_of_numactl() -> None:
    text = output("numactl", "--hardware")
    for node in Topology.read().nodes:
        cpus = re.search(rf"^node {node.id} cpus:(.*)$", text, re.MULTILINE)
        size = re.search(rf"^node {node.id} size: (\d+) MB$", text, re.MULTILINE)
        distances = re.search(rf"^\s*{node.id}:\s+(.*)$", text, re.MULTILINE)
        assert cpus and size and distances, text
        assert node.cpus == frozenset(map(int, cpus[1].split()))
        assert node.memory // (1 << 20) == int(size[1])
        assert [distance for _, distance in node.distances] == list(map(int, distances[1].split()))


def test_cores_sockets_and_caches_are_those_of_lscpu() -> None:
    lines = output("lscpu", "--parse=CPU,CORE,SOCKET,NODE,CACHE").splitlines()
    # The caches' columns come last. They are separated by commas or, in later versions, by colons.
    rows = [line.replace(":", ",").split(",") for line in lines if not line.startswith("#")]
    topology = Topology.read()

    def grouped(column: Callable[[list[str]], str]) -> set[frozenset[int]]:
        groups: dict[str, set[int]] = {}
        for row in rows:
            groups.setdefault(column(row), set()).add(int(row[0]))
        return {frozenset(group) for group in groups.values()}

    assert grouped(lambda row: row[1]) == {frozenset(core.cpus) for core in topology.cores}
    assert grouped(lambda row: row[2]) == {socket.cpus for socket in topology.sockets}
    assert grouped(lambda row: row[3]) == {node.cpus for node in topology.nodes_with_cpus()}
    assert grouped(lambda row: row[-1]) == {cache.cpus for cache in topology.caches}


@contextmanager
def offline(*cpus: int) -> Iterator[None]:
    switches = [Path(f"/sys/devices/system/cpu/cpu{cpu}/online") for cpu in cpus]
    try:
        for switch in switches:
            switch.write_text("0")
        yield
    finally:
        for switch in switches:
            switch.write_text("1")


def test_offline_cpus_are_seen_and_never_planned() -> None:
    with offline(10, 15):
        topology = Topology.read()
        (rank,) = place(topology, "node", devices=[machine.device_of(3)])
        two = place(topology, "exclusive", devices=[machine.device_of(3)] * 2)
    assert topology.offline == {10, 15}
    assert {frozenset(core.cpus) for core in topology.cores} >= {frozenset({11}), frozenset({14})}
    assert rank.cpus == {11, 14}
    assert [rank.cpus for rank in two] == [{11}, {14}]


@pytest.mark.parametrize("address, node", machine.DEVICES.items())
def test_device_is_on_its_node(address: str, node: int) -> None:
    topology = Topology.read()
    (device,) = as_devices(topology, [address])
    assert device.node == node
    assert device.local_cpus == machine.CPUS.get(node, frozenset())
    assert locate(topology, device) == (node, ())


def test_device_without_a_node_is_an_error_that_names_it() -> None:
    with pytest.raises(PlacementError, match=f"{machine.HOMELESS_DEVICE}.*numa_node is -1"):
        place(Topology.read(), "node", devices=[machine.HOMELESS_DEVICE])
    (rank,) = plan(Topology.read(), "node", devices=[machine.HOMELESS_DEVICE], required=False)
    assert rank.binding.cpus is None and rank.notes


def test_gpus_are_found_in_the_order_of_addresses(gpus: None) -> None:
    found = find_devices(Topology.read(), {})
    assert {device.address: device.node for device in found} == machine.DEVICES
    assert [device.address for device in found] == list(machine.DEVICES)
    chosen = find_devices(Topology.read(), {"CUDA_VISIBLE_DEVICES": "2,0"})
    assert [device.node for device in chosen] == [1, 3]


@pytest.mark.parametrize("mode", ["node", "socket", "exclusive", "core-complex"])
def test_ranks_follow_their_gpus(mode: str, gpus: None) -> None:
    # The devices are on nodes 3, 0, 1, 1 and 4. The rank of the last one goes to the nearest node that has CPUs.
    nearest = machine.NEAREST_TO_MEMORY_ONLY
    ranks = plan(Topology.read(), mode)
    assert [rank.node for rank in ranks] == [3, 0, 1, 1, nearest]
    assert any("no CPUs" in note for note in ranks[4].notes)
    cpus = [rank.binding.cpus for rank in ranks]
    if mode == "socket":
        assert cpus == [machine.SOCKET_CPUS[socket] for socket in (1, 0, 0, 0, 1)]
    elif mode == "node":
        assert cpus == [machine.CPUS[node] for node in (3, 0, 1, 1, nearest)]
    elif mode == "exclusive":
        assert cpus == [machine.CPUS[3], machine.CPUS[0], {2, 3}, {6, 7}, machine.CPUS[nearest]]
    else:
        assert cpus == [{10, 11}, {0, 1}, {2, 3}, {6, 7}, {8, 9}]


@pytest.mark.parametrize("nprocs", [1, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("mode", ["node", "exclusive", "core-complex"])
def test_no_rank_is_ever_sent_to_the_node_without_cpus(mode: str, nprocs: int) -> None:
    for devices in ([], [machine.device_of(machine.MEMORY_ONLY)]):
        ranks = plan(Topology.read(), mode, nprocs=nprocs, devices=devices, memory_policy="bind", required=False)
        for rank in ranks:
            assert rank.node in machine.CPUS
            assert rank.binding.cpus is None or rank.binding.cpus <= machine.CPUS[rank.node]
            assert rank.binding.memory is not None and rank.binding.memory.nodes == {rank.node}


def test_a_cpuset_is_read_from_the_files_of_its_cgroup(cpuset: Callable[[str, str], Group], tmp_path: Path) -> None:
    """A captured tree without a status file: the affinity of the process that reads it says nothing of the machine."""
    for name in ("sys", "proc"):
        (tmp_path / name).mkdir()
    for name in ("sys/devices", "sys/fs", "proc/mounts", "run"):
        (tmp_path / name).symlink_to(f"/{name}")
    (tmp_path / "proc" / "self").mkdir()
    group = cpuset("4-9", "0,2")
    with group.entered():
        for name in ("cgroup", "cpuset"):
            (tmp_path / "proc" / "self" / name).write_text(Path("/proc/self", name).read_text())
        captured, live = Topology.read(tmp_path), Topology.read()
    for topology in (captured, live):
        assert topology.allowed_cpus == ids("4-9")
        assert topology.allowed_nodes == {0, 2}


def test_the_fixture_leaves_no_gpu(tmp_path: Path) -> None:
    with nvidia_gpus(machine.device_of(3)):
        assert len(find_devices(Topology.read(), {})) == 1
    assert find_devices(Topology.read(), {}) == ()
