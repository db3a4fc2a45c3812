"""Plans: the rules one by one on small machines, and what holds of every plan on machines that hypothesis makes up."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rankspawn._binding import AffinityMode, MemoryPolicy, PlacementError
from rankspawn._ids import format_ids
from rankspawn._place.lists import plan_lists
from rankspawn._place.openmp import omp_num_threads, openmp_warnings
from rankspawn._place.plan import place, plan
from rankspawn._place.topology import Topology
from rankspawn._place.visible import Device
from tests.support.sysfs_tree import Gpu, Machine, address, write

MODES = tuple(mode.value for mode in AffinityMode)


def read(machine: Machine) -> Topology:
    """The topology of a machine, written to files and read from them."""
    with tempfile.TemporaryDirectory() as folder:
        return Topology.read(write(Path(folder), machine))


def lists(bindings: object) -> list[str]:
    return [format_ids(binding.cpus) for binding in bindings]  # type: ignore[attr-defined]


def on(*nodes: int) -> tuple[Device, ...]:
    return tuple(Device(address(i), node) for i, node in enumerate(nodes))


def test_launched_ranks_and_not_visible_devices_share_a_node() -> None:
    topology = read(Machine(sockets=2, cores=4))
    devices = on(0, 0, 0, 0, 1, 1, 1, 1)
    assert lists(place(topology, "exclusive", nprocs=2, devices=devices)) == ["0-1", "2-3"]
    assert lists(place(topology, "exclusive", gpu_index=1, devices=devices)) == ["1"]


def test_more_ranks_than_devices_begin_again() -> None:
    topology = read(Machine(sockets=2, cores=4))
    whole = place(topology, "exclusive", nprocs=4, devices=on(1, 0))
    assert lists(whole) == ["4-5", "0-1", "6-7", "2-3"]
    # The same where a caller asks for each rank by itself, as torch does; torch's own function raises there.
    for index in range(4):
        assert place(topology, "exclusive", gpu_index=index, nprocs=4, devices=on(1, 0)) == (whole[index],)
    with pytest.raises(PlacementError, match="gpu_index 4: only 2 devices are visible"):
        place(topology, "exclusive", gpu_index=4, nprocs=4, devices=on(1, 0))


def test_without_devices_ranks_go_in_blocks_over_the_nodes_that_have_cpus() -> None:
    topology = read(Machine(sockets=2, nodes=2, cores=2, memory_only=2))
    assert lists(place(topology, "node", nprocs=2, devices=())) == ["0-1", "4-5"]
    assert lists(place(topology, "node", nprocs=4, devices=())) == ["0-1", "2-3", "4-5", "6-7"]
    assert lists(place(topology, "exclusive", nprocs=8, devices=())) == [str(i) for i in range(8)]


def test_blocks_are_in_proportion_to_the_usable_cores() -> None:
    topology = read(Machine(sockets=2, cores=4, allowed="0-3,7"))
    assert lists(place(topology, "exclusive", nprocs=5, devices=())) == ["0", "1", "2", "3", "7"]


def test_gpu_index_on_a_machine_without_devices() -> None:
    topology = read(Machine(sockets=2, cores=4))
    assert lists(place(topology, "node", gpu_index=1, devices=())) == ["4-7"]
    assert lists(place(topology, "exclusive", gpu_index=3, nprocs=4, devices=())) == ["6-7"]
    with pytest.raises(PlacementError, match="gpu_index 2: no accelerator was found, and 2 ranks are placed here"):
        place(topology, "node", gpu_index=2, devices=())


def test_reserved_cores_and_threads_per_core() -> None:
    topology = read(Machine(sockets=2, cores=4, threads=2))
    assert lists(place(topology, "node", nprocs=2, devices=on(0, 1), reserve_cores=3)) == ["2-3,10-11", "5-7,13-15"]
    assert lists(place(topology, "exclusive", nprocs=2, devices=on(0, 0), threads_per_core=1)) == ["0-1", "2-3"]
    for wrong in (8, -1):
        with pytest.raises(PlacementError, match=rf"reserve_cores {wrong}: must be from 0 to 7"):
            place(topology, "node", nprocs=1, reserve_cores=wrong)
    with pytest.raises(PlacementError, match="threads_per_core: expected a positive integer, got 0"):
        place(topology, "node", nprocs=1, threads_per_core=0)


def test_allowed_cpus_take_the_place_of_the_topologys() -> None:
    topology = read(Machine(sockets=2, cores=4, allowed="0"))
    assert lists(place(topology, "node", nprocs=2, devices=on(0, 1), allowed_cpus=range(2, 99))) == ["2-3", "4-7"]
    with pytest.raises(PlacementError, match="no CPU is left: allowed are none"):
        place(topology, "node", nprocs=1, allowed_cpus=(99,))


def test_a_device_on_a_node_without_cpus_goes_to_the_nearest() -> None:
    # Rows of distances are read from the device's node: node 2 is nearer to node 1.
    extra = {"sys/devices/system/node/node2/distance": "40 30 10"}
    topology = read(Machine(sockets=2, cores=4, memory_only=1, extra=extra))
    (rank,) = plan(topology, "node", nprocs=1, devices=on(2))
    assert (rank.node, lists([rank.binding])) == (1, ["4-7"])
    assert rank.notes == ("device 0000:10:00.0 is on node 2, which has no CPUs: using the nearest node that has, 1",)
    with pytest.warns(RuntimeWarning, match="which has no CPUs"):
        place(topology, "node", nprocs=1, devices=on(2))


def test_an_unknown_node_is_an_error_or_no_binding() -> None:
    topology = read(Machine(sockets=2, cores=4))
    with pytest.raises(
        PlacementError, match=r"rank 1: device 0000:11:00\.0: its NUMA node is unknown: numa_node is -1"
    ):
        place(topology, "node", nprocs=2, devices=on(0, -1))
    ranks = plan(topology, "exclusive", nprocs=3, devices=on(0, -1, 0), required=False)
    assert [rank.binding.cpus for rank in ranks] == [{0, 1}, None, {2, 3}]
    assert not any(rank.binding.required for rank in ranks)
    assert ranks[1].notes[0].startswith("rank 1 is left unbound: device 0000:11:00.0: its NUMA node is unknown")
    assert lists(place(read(Machine(cores=4)), "node", nprocs=1, devices=on(-1))) == ["0-3"]


def test_a_cpuset_without_the_devices_node() -> None:
    topology = read(Machine(sockets=2, cores=4, allowed="0-3"))
    message = r"rank 0: node 1 has no usable CPU: it has 4-7, ranks may use 0-3 \(device 0000:10:00\.0\)"
    with pytest.raises(PlacementError, match=message):
        place(topology, "node", nprocs=1, devices=on(1))
    (rank,) = plan(topology, "node", nprocs=1, devices=on(1), memory_policy="preferred", required=False)
    # The plan gives up CPUs and memory separately: the rank may still use the node's memory.
    assert (rank.binding.cpus, str(rank.binding.memory)) == (None, "preferred:1")


def test_more_ranks_than_cores_share_them_by_threads_and_say_so() -> None:
    topology = read(Machine(cores=2, threads=2))
    ranks = plan(topology, "exclusive", nprocs=3, devices=on(0))
    assert lists(rank.binding for rank in ranks) == ["0,2", "1", "3"]
    assert ranks[0].notes == ("3 ranks share the 2 cores of node 0, by hardware threads",)
    message = r"rank 0: exclusive: 5 ranks on node 0, which has 2 usable cores \(CPUs 0-3\)"
    with pytest.raises(PlacementError, match=message):
        place(topology, "exclusive", nprocs=5, devices=on(0))
    with pytest.raises(PlacementError, match=r"exclusive: 3 ranks on node 0, which has 2 usable cores \(CPUs 0-1\)"):
        place(topology, "exclusive", nprocs=3, devices=on(0), threads_per_core=1)
    ranks = plan(topology, "exclusive", nprocs=5, devices=(), required=False)
    assert {rank.binding.cpus for rank in ranks} == {None}


def test_a_mask_of_one_cpu() -> None:
    topology = read(Machine(sockets=2, cores=4, allowed="5"))
    for mode in MODES:
        assert lists(place(topology, mode, nprocs=1, devices=())) == ["5"]
    assert lists(place(topology, "node", nprocs=8, devices=())) == ["5"] * 8
    with pytest.raises(PlacementError, match="exclusive: 2 ranks on node 1, which has 1 usable cores"):
        place(topology, "exclusive", nprocs=2, devices=())


def test_wrong_arguments_are_named() -> None:
    topology = read(Machine())
    for arguments, message in (
        (
            {"numa": "numa", "nprocs": 1},
            "numa: expected one of node, socket, exclusive, core-complex, got 'numa'",
        ),
        ({"numa": "node", "nprocs": 0}, "nprocs: expected a positive integer, got 0"),
        ({"numa": "node", "gpu_index": -1}, "gpu_index: expected a non-negative integer, got -1"),
        ({"numa": "node", "gpu_index": 2, "devices": on(0, 0)}, "gpu_index 2: only 2 devices are visible"),
        ({"numa": "node"}, "there are no accelerators to count: give the number of ranks"),
        (
            {"numa": "node", "nprocs": 1, "memory_policy": "strict"},
            "memory_policy: expected one of default, local, bind",
        ),
        ({"numa": "node", "nprocs": 1, "devices": ("gpu0",)}, "device 'gpu0' is not a PCI address"),
        ({"numa": "node", "nprocs": 1, "devices": ("af:00.0",)}, r"device 0000:af:00\.0: there is no "),
    ):
        with pytest.raises(PlacementError, match=message):
            place(topology, **arguments)  # type: ignore[arg-type]


def test_torchs_own_mode_is_taken() -> None:
    class Theirs:
        value = "exclusive"

    assert lists(place(read(Machine()), Theirs(), nprocs=2)) == ["0-1", "2-3"]  # type: ignore[arg-type]


MEMORY = {
    "default": "default",
    "local": "local",
    "bind": "bind:2-3",
    "preferred": "preferred:3",
    "preferred-many": "preferred-many:2-3",
    "interleave": "interleave:2-3",
    "weighted-interleave": "weighted-interleave:2-3",
}


@pytest.mark.parametrize("mode", MEMORY)
def test_memory_modes_over_the_nodes_of_a_rank(mode: str) -> None:
    topology = read(Machine(sockets=2, nodes=2, memory_only=1))
    (binding,) = place(topology, "socket", nprocs=1, devices=on(3), memory_policy=mode)  # type: ignore[arg-type]
    assert str(binding.memory) == MEMORY[mode]


def test_memory_beside_the_rules() -> None:
    topology = read(Machine(sockets=2, nodes=2, cores=2, memory_only=1, no_memory=frozenset({1}), mems="0-2,4"))
    (rank,) = plan(topology, "node", nprocs=1, devices=on(1), memory_policy="bind")
    assert str(rank.binding.memory) == "bind:0"
    assert rank.notes == ("node 1 has no memory: using the nearest node that has, 0",)
    (whole,) = place(
        topology, "node", nprocs=1, devices=on(1), memory_policy=MemoryPolicy("interleave", frozenset({0, 4}))
    )
    assert str(whole.memory) == "interleave:0,4"
    for memory, message in (
        ("bind", r"memory policy bind: node 3 is not allowed \(allowed: 0-2,4\)"),
        (MemoryPolicy("bind", frozenset({3, 9})), r"memory policy bind:3,9: nodes 3,9 are absent or not allowed"),
    ):
        with pytest.raises(PlacementError, match=message):
            place(topology, "node", nprocs=1, devices=on(3), memory_policy=memory)  # type: ignore[arg-type]
        (rank,) = plan(topology, "node", nprocs=1, devices=on(3), memory_policy=memory, required=False)  # type: ignore[arg-type]
        assert (rank.binding.cpus, rank.binding.memory) == ({6, 7}, None)
        assert rank.notes[0].startswith("memory is left to the inherited policy")


def test_no_rank_is_sent_to_the_memory_of_a_device() -> None:
    # Node 0 has CPUs and no memory, as in a machine of HBM only; node 1 is the GPU's own memory, node 2 is not.
    extra = {"sys/devices/system/node/node0/distance": "10 20 40"}
    topology = read(Machine(memory_only=2, no_memory=frozenset({0}), extra=extra))
    (rank,) = plan(topology, "node", nprocs=1, devices=on(1), memory_policy="bind")
    assert (rank.node, str(rank.binding.memory)) == (0, "bind:2")


def test_omp_num_threads() -> None:
    topology = read(Machine(cores=4, threads=2))
    assert omp_num_threads(topology, [range(8), ()]) == (4, 1)
    assert omp_num_threads(topology, [(0, 4), (1, 2, 3)]) == (1, 3)
    assert omp_num_threads(topology, [range(8)] * 4) == (1, 1, 1, 1)
    assert omp_num_threads(topology, [(0, 1, 2)] * 3) == (1, 1, 1)
    assert [rank.omp_threads for rank in plan(topology, "node", nprocs=2, devices=())] == [2, 2]


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, False),
        ({"OMP_PROC_BIND": "false", "OMP_PLACES": "cores"}, False),
        ({"OMP_PROC_BIND": "close"}, True),
        ({"OMP_PLACES": "cores"}, True),
        ({"KMP_AFFINITY": "none,verbose"}, False),
        ({"KMP_AFFINITY": "granularity=fine,compact,1,0"}, True),
        ({"GOMP_CPU_AFFINITY": "0-3"}, True),
        ({"GOMP_CPU_AFFINITY": " "}, False),
    ],
)
def test_variables_that_shrink_the_mask(environ: dict[str, str], said: bool) -> None:
    warnings = openmp_warnings(environ)
    assert bool(warnings) is said
    for warning in warnings:
        assert any(warning.startswith(f"{name}={value}") for name, value in environ.items())


def test_lists_by_hand() -> None:
    topology = read(Machine(sockets=2, cores=4))
    ranks = plan_lists(topology, 2, cpus="0-1:4-7", mems="0:1")
    assert [str(rank.binding) for rank in ranks] == ["cpus 0-1, memory bind:0", "cpus 4-7, memory bind:1"]
    assert [(rank.node, rank.omp_threads) for rank in ranks] == [(0, 2), (1, 4)]
    assert lists(rank.binding for rank in plan_lists(topology, 3, cpus="2")) == ["2"] * 3
    assert plan_lists(topology, 1, mems="0-1", memory_policy="interleave")[0].binding.cpus is None
    for arguments, message in (
        ({"cpus": "0:1:2"}, "--cpus '0:1:2' has 3 lists for 2 ranks"),
        ({"cpus": "0:1-"}, "--cpus '0:1-', rank 1: not a list of ids"),
        ({"cpus": "0:"}, "--cpus '0:', rank 1: the list is empty"),
        ({"cpus": "0:9"}, r"--cpus '0:9', rank 1: 9 may not be used \(allowed: 0-7\)"),
        ({"mems": "0:2"}, r"--mems '0:2', rank 1: 2 may not be used \(allowed: 0-1\)"),
        (
            {"mems": "0-1", "memory_policy": "preferred"},
            "--mems '0-1', rank 0: memory policy 'preferred' takes one node",
        ),
    ):
        with pytest.raises(PlacementError, match=message):
            plan_lists(topology, 2, **arguments)  # type: ignore[arg-type]


# What holds of every plan.


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    sockets, nodes = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 2), (2, 4), (4, 4)]))
    memory_only = draw(st.integers(0, 2))
    count = sockets * nodes + memory_only
    ids = draw(st.one_of(st.just(()), st.sets(st.integers(0, 40), min_size=count, max_size=count).map(sorted)))
    shape = {
        "sockets": sockets,
        "nodes": nodes,
        "caches": draw(st.integers(1, 2)),
        "cores": draw(st.integers(1, 3)),
        "threads": draw(st.integers(1, 2)),
        "siblings": draw(st.sampled_from(["split", "adjacent"])),
        "memory_only": memory_only,
        "node_ids": tuple(ids),
        "cpu_stride": draw(st.sampled_from([1, 1, 3])),
        "cpu_base": draw(st.sampled_from([0, 0, 7])),
        "masks": draw(st.booleans()),
        "nul": draw(st.booleans()),
    }
    bare = Machine(**shape)
    cpus = sorted(cpu for *_, threads in bare.cores_of() for cpu in threads)
    offline = frozenset(draw(st.one_of(st.just([]), st.lists(st.sampled_from(cpus), max_size=4))))
    left = [cpu for cpu in cpus if cpu not in offline]
    assume(left)
    allowed = draw(st.one_of(st.none(), st.sets(st.sampled_from(left), min_size=1).map(format_ids)))
    nodes_of_gpus = draw(st.lists(st.sampled_from([bare.id_of(i) for i in range(count)]), max_size=6))
    return Machine(**shape, offline=offline, allowed=allowed, gpus=tuple(Gpu(node) for node in nodes_of_gpus))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    machine=machines(),
    nprocs=st.integers(1, 12),
    mode=st.sampled_from(MODES),
    reserve=st.integers(0, 2),
    threads=st.sampled_from([None, None, 1]),
    required=st.booleans(),
    memory=st.sampled_from([None, "bind", "preferred", "interleave"]),
)
def test_what_holds_of_every_plan(machine, nprocs, mode, reserve, threads, required, memory) -> None:
    topology = read(machine)
    try:
        ranks = plan(
            topology,
            mode,
            nprocs=nprocs,
            devices=on(*(gpu.node for gpu in machine.gpus)),
            reserve_cores=reserve,
            threads_per_core=threads,
            memory_policy=memory,
            required=required,
        )
    except PlacementError as error:
        # Only too few cores, or a device whose node has no usable CPU, is an error.
        words = ["reserve_cores"] if reserve else []
        words += ["exclusive: "] if required and mode == "exclusive" else []
        words += ["has no usable CPU"] if required and machine.gpus else []
        assert any(word in str(error) for word in words)
        return
    assert len(ranks) == nprocs
    masks = [rank.binding.cpus for rank in ranks if rank.binding.cpus is not None]
    for rank in ranks:
        if rank.binding.cpus is None:
            said = "is left unbound" if rank.binding.memory is None else "keeps the CPUs that it inherits"
            assert not required and any(said in note for note in rank.notes), rank
    for rank in ranks:
        cpus, policy = rank.binding.cpus, rank.binding.memory
        assert cpus is None or (cpus and cpus <= topology.allowed_cpus)
        assert rank.omp_threads >= 1
        assert policy is None or (policy.nodes and policy.nodes <= topology.allowed_nodes)
    if mode == "exclusive":
        assert sum(map(len, masks)) == len(frozenset().union(*masks)), "the masks overlap"
        if not reserve and threads is None and len(masks) == nprocs:
            uses_every_core(topology, ranks)


def uses_every_core(topology: Topology, ranks) -> None:
    """Together, the ranks on a node have all of its allowed CPUs."""
    for node in topology.nodes:
        mine = [rank.binding.cpus for rank in ranks if rank.node == node.id]
        assert not mine or frozenset().union(*mine) == node.cpus & topology.allowed_cpus


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(machine=machines(), mode=st.sampled_from(MODES))
def test_one_rank_by_gpu_index_is_that_rank_of_the_whole_plan(machine, mode) -> None:
    assume(machine.gpus)
    topology = read(machine)
    devices = on(*(gpu.node for gpu in machine.gpus))
    whole = plan(topology, mode, devices=devices, required=False)
    for index, rank in enumerate(whole):
        (one,) = plan(topology, mode, gpu_index=index, devices=devices, required=False)
        assert one.binding == rank.binding


@pytest.fixture(scope="module")
def whole_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    machine = Machine(
        sockets=2, nodes=2, caches=2, cores=2, threads=2, memory_only=1, gpus=(Gpu(0), Gpu(3)), allowed="0-15"
    )
    return write(tmp_path_factory.mktemp("tree"), machine)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    text=st.one_of(
        st.sampled_from(["", "0", "-1", "9", "0-", "7-3", "0-9999999", "ff", ",", "\0", "1\n2", "0-1,0-1", "é", "- 1"]),
        st.text(alphabet="0123456789-, xabf\n\0:", max_size=12),
    ),
    mode=st.sampled_from(MODES),
)
def test_a_broken_file_gives_a_plan_or_a_clear_error(whole_tree, data, text, mode) -> None:
    files = sorted(file for file in whole_tree.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files), label="file")
    whole = file.read_bytes()
    file.write_text(text)
    try:
        ranks = plan(Topology.read(whole_tree), mode, nprocs=2, memory_policy="bind")
    except PlacementError as error:
        assert len(str(error)) > 20
    else:
        assert all(rank.binding.cpus for rank in ranks)
    finally:
        file.write_bytes(whole)
