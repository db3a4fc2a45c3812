"""The four modes against torch.numa.binding, on made-up machines: the same CPU sets wherever torch gives any."""

from __future__ import annotations

import builtins
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankspawn._binding import PlacementError
from rankspawn._place.devices import as_devices
from rankspawn._place.plan import place, plan
from rankspawn._place.topology import Topology
from tests.support.sysfs_tree import Gpu, Machine, address, write
from tests.support.torch_numa import cpus_by_torch, seen_by_torch
from tests.test_placement import machines

binding = pytest.importorskip("torch.numa.binding", reason="torch 2.9 or newer is not installed")
MODES = ("node", "socket", "exclusive", "core-complex")
SPLIT = ("exclusive", "core-complex")
TorchPlan = Callable[[str, int], "set[int]"]


def gpus(*nodes: int) -> tuple[Gpu, ...]:
    return tuple(Gpu(node) for node in nodes)


# Machines on which torch gives a set for every mode and GPU.
MACHINES = {
    "one node": Machine(cores=8, threads=2, gpus=gpus(0, 0)),
    "one node that says -1": Machine(cores=8, gpus=gpus(-1, -1, -1)),
    "two sockets": Machine(sockets=2, cores=8, threads=2, gpus=gpus(0, 0, 0, 0, 1, 1, 1, 1)),
    "two sockets, GPUs in another order": Machine(sockets=2, cores=6, threads=2, gpus=gpus(1, 0, 1, 0, 0)),
    "NPS4": Machine(sockets=2, nodes=4, caches=2, cores=4, threads=2, gpus=gpus(3, 1, 1, 0, 7, 5, 5, 4)),
    "SNC2": Machine(sockets=2, nodes=2, cores=10, threads=2, gpus=gpus(0, 0, 1, 2, 3, 3)),
    "siblings adjacent": Machine(sockets=2, caches=2, cores=4, threads=2, siblings="adjacent", gpus=gpus(0, 0, 1)),
    "uneven split": Machine(cores=7, threads=2, gpus=gpus(0, 0, 0)),
    "as many GPUs as cores": Machine(cores=4, threads=2, gpus=gpus(0, 0, 0, 0)),
    "more GPUs than caches": Machine(caches=2, cores=4, gpus=gpus(0, 0, 0, 0, 0)),
    "no SMT": Machine(sockets=2, caches=4, cores=8, gpus=gpus(0, 0, 1, 1)),
    "SMT 8": Machine(sockets=2, cores=5, threads=8, siblings="adjacent", gpus=gpus(0, 0, 1, 1)),
    "offline CPUs": Machine(sockets=2, caches=2, cores=4, threads=2, offline=frozenset({0, 5, 17}), gpus=gpus(0, 0, 1)),
    "sparse ids": Machine(sockets=2, caches=2, cores=4, threads=2, cpu_stride=3, cpu_base=2, gpus=gpus(0, 0, 1)),
    "an inherited mask": Machine(
        sockets=2, caches=4, cores=4, threads=2, allowed="1-3,6-9,20-31,40", gpus=gpus(0, 0, 1)
    ),
    "half of each core": Machine(sockets=2, caches=4, cores=4, threads=2, allowed="0-31", gpus=gpus(0, 0)),
    "second threads first": Machine(caches=2, cores=4, threads=2, allowed="2,5,8,9,11,14", gpus=gpus(0, 0)),
    "16 nodes": Machine(sockets=4, nodes=4, cores=4, threads=2, gpus=gpus(*range(16))),
    "1,024 CPUs": Machine(sockets=4, nodes=4, caches=2, cores=16, threads=2, gpus=gpus(0, 0, 5, 5, 10, 15, 15, 15)),
    "a hybrid": Machine(cores=12, threads=1, big=4, gpus=gpus(0, 0)),
}


@pytest.fixture
def torch_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, tuple[str, ...], frozenset[int]], TorchPlan]:
    """Makes torch's functions see another machine's tree, its GPUs' addresses, and a mask of allowed CPUs."""

    def point_at(root: Path, addresses: tuple[str, ...], allowed: frozenset[int]) -> TorchPlan:
        system = SimpleNamespace(
            path=os.path,
            listdir=lambda path: os.listdir(f"{root}{path}"),
            sched_getaffinity=lambda pid: set(allowed),
        )
        monkeypatch.setattr(binding, "open", lambda path: builtins.open(f"{root}{path}"), raising=False)
        monkeypatch.setattr(binding, "os", system)
        monkeypatch.setattr(binding, "torch", seen_by_torch(addresses))
        return cpus_by_torch(binding)

    return point_at


@pytest.mark.parametrize("name", MACHINES)
def test_the_same_sets_as_torch(name: str, tmp_path: Path, torch_on) -> None:
    machine = MACHINES[name]
    topology = Topology.read(write(tmp_path, machine))
    addresses = tuple(address(i) for i in range(len(machine.gpus)))
    torch_plan = torch_on(tmp_path, addresses, topology.allowed_cpus)
    for mode in MODES:
        theirs = [torch_plan(mode, i) for i in range(len(addresses))]
        ours = [place(topology, mode, gpu_index=i, devices=addresses)[0].cpus for i in range(len(addresses))]
        assert ours == theirs, mode
        # The sets are the same for one rank for each GPU, where we find the GPUs ourselves.
        assert [rank.cpus for rank in place(topology, mode, nprocs=len(addresses))] == theirs, mode


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(machine=machines(), nodes=st.lists(st.integers(-1, 6), min_size=1, max_size=6))
def test_the_same_sets_wherever_torch_gives_any(machine: Machine, nodes: list[int], torch_on) -> None:
    machine = replace(machine, masks=False, gpus=tuple(Gpu(node) for node in nodes))
    addresses = tuple(address(i) for i in range(len(nodes)))
    with tempfile.TemporaryDirectory() as folder:
        topology = Topology.read(write(Path(folder), machine))
        torch_plan = torch_on(Path(folder), addresses, topology.allowed_cpus)
        devices = as_devices(topology, addresses)
        # We place devices on other nodes (absent, without CPUs, unknown) elsewhere, and they count in the splits there.
        plain = {node.id for node in topology.nodes_with_cpus()}
        plain |= {-1} if plain == {0} else set()
        for mode in MODES:
            for index, node in enumerate(nodes):
                try:
                    theirs = torch_plan(mode, index)
                except (RuntimeError, ValueError, ZeroDivisionError):
                    continue
                # torch refuses an empty set afterwards.
                if theirs and node in plain and (mode not in SPLIT or plain.issuperset(nodes)):
                    (rank,) = plan(topology, mode, gpu_index=index, devices=devices)
                    assert rank.binding.cpus == theirs, (mode, index)


DIFFERENCES = {
    # Where torch raises, and ours has an answer: (machine, mode, error of torch, ours for GPU 0).
    "socket, a node without CPUs": (Machine(memory_only=1, gpus=gpus(0)), "socket", ValueError, {0, 1, 2, 3}),
    "socket, a node that is not allowed": (
        Machine(sockets=2, allowed="0-3", gpus=gpus(0)),
        "socket",
        ValueError,
        {0, 1, 2, 3},
    ),
    "socket, the GPU's own node is not allowed": (
        Machine(nodes=2, allowed="5-7", gpus=gpus(0)),
        "socket",
        ValueError,
        {5, 6, 7},
    ),
    "core-complex, no cache files": (
        Machine(caches_written=False, gpus=gpus(0)),
        "core-complex",
        FileNotFoundError,
        {0, 1, 2, 3},
    ),
    "exclusive, more GPUs than cores": (
        Machine(cores=2, threads=2, gpus=gpus(0, 0, 0)),
        "exclusive",
        RuntimeError,
        {0, 2},
    ),
    "a GPU on a node without CPUs": (Machine(memory_only=1, gpus=gpus(1)), "node", None, {0, 1, 2, 3}),
    "one node whose id is not 0": (Machine(node_ids=(3,), gpus=gpus(-1)), "node", RuntimeError, {0, 1, 2, 3}),
    "-1 on two nodes, with a local_cpulist": (
        Machine(sockets=2, gpus=(Gpu(-1, local="4-7"),)),
        "node",
        {0, 1, 2, 3},
        {4, 5, 6, 7},
    ),
    "masks only": (Machine(masks=True, gpus=gpus(0)), "exclusive", RuntimeError, {0, 1, 2, 3}),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # A plan warns of assumptions: see test_placement.py.
@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_set_where_torch_has_none_or_a_wrong_one(name: str, tmp_path: Path, torch_on) -> None:
    machine, mode, theirs, ours = DIFFERENCES[name]
    topology = Topology.read(write(tmp_path, machine))
    addresses = tuple(address(i) for i in range(len(machine.gpus)))
    torch_plan = torch_on(tmp_path, addresses, topology.allowed_cpus)
    assert place(topology, mode, gpu_index=0, devices=addresses)[0].cpus == ours
    if isinstance(theirs, type):
        with pytest.raises(theirs):
            torch_plan(mode, 0)
    else:
        assert torch_plan(mode, 0) == (theirs or set())


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_node_is_said_and_not_node_0(mode: str, tmp_path: Path, torch_on) -> None:
    machine = Machine(sockets=2, gpus=gpus(-1, -1))
    topology = Topology.read(write(tmp_path, machine))
    torch_plan = torch_on(tmp_path, (address(0), address(1)), topology.allowed_cpus)
    assert torch_plan("node", 0) == torch_plan("node", 1) == {0, 1, 2, 3}
    with pytest.raises(PlacementError, match=r"0000:10:00\.0: its NUMA node is unknown"):
        place(topology, mode, gpu_index=0, devices=(address(0), address(1)))
