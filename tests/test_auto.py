"""Mode auto, the default of all commands and of ``launch``; and ``plan ARGS`` shows what ``run ARGS`` does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rankspawn import PlacementError, launch
from rankspawn._cli.options import AUTO_BINDS, PlacementOptions
from rankspawn._cli.run import add_run_options
from rankspawn._cli.settings import place_ranks
from rankspawn._group import launch as _launch
from rankspawn._place.auto import idle_note, plan_auto
from rankspawn._place.glance import core_count, has_one_node, unbound_threads
from rankspawn._place.openmp import omp_num_threads
from rankspawn._place.plan import place
from rankspawn._place.topology import Topology
from tests.support.launchers import LAUNCHER, completed
from tests.support.plans import agree, parsed, would_run
from tests.support.sysfs_tree import CPU, NODE, Gpu, Machine, write

FOUR = Machine(sockets=2, nodes=2, cores=4, threads=2)
EIGHT = Machine(sockets=2, nodes=4, cores=16)


def gpus(*nodes: int) -> tuple[Gpu, ...]:
    return tuple(Gpu(node) for node in nodes)


def machine(of: Machine, **changes: Any) -> Machine:
    from dataclasses import replace

    return replace(of, **changes)


MACHINES = {
    "one node": Machine(cores=8, threads=2),
    "one node with GPUs": Machine(cores=8, threads=2, gpus=gpus(0, 0, 0, 0)),
    "one node with memory beside it": Machine(cores=4, memory_only=2, gpus=gpus(0)),
    "no node folder": Machine(cores=4, node_dir=False),
    "two sockets": Machine(sockets=2, cores=4),
    "four nodes": FOUR,
    "four nodes, a GPU on each": machine(FOUR, gpus=gpus(0, 1, 2, 3)),
    "four nodes, all GPUs on one": machine(FOUR, gpus=gpus(2, 2, 2, 2)),
    "four nodes, GPUs on two": machine(FOUR, gpus=gpus(0, 0, 2, 2)),
    "four nodes, a GPU of an unknown node": machine(FOUR, gpus=gpus(0, 1, 2, -1)),
    "four nodes, of which two may be used": machine(FOUR, allowed="0-7,16-23", mems="0-1"),
    "four nodes, of which one may be used": machine(FOUR, allowed="4-7"),
    "four nodes, the memory of one may be used": machine(FOUR, mems="0"),
    "four nodes, one of them without memory": machine(FOUR, no_memory=frozenset({1})),
    "four nodes, one of them offline": machine(FOUR, offline=frozenset({0, 1, 2, 3, 16, 17, 18, 19})),
    "eight nodes, sparse ids": Machine(sockets=2, nodes=4, cores=2, node_ids=(0, 1, 4, 5, 6, 7, 8, 9), cpu_stride=2),
    "hybrid": Machine(cores=12, big=4),
}

OPTIONS = [
    "",
    "--numa-binding auto",
    "--numa-binding none",
    "--numa-binding node",
    "--numa-binding socket --memory-policy bind",
    "--numa-binding exclusive --numa-binding-optional",
    "--numa-binding exclusive --reserve-cores 3 --threads-per-core 1",
    "--numa-binding core-complex --devices none",
    "--memory-policy interleave",
    "--memory-policy bind --numa-binding-optional",
    "--reserve-cores 2",
    "--threads-per-core 1",
    "--devices none",
    "--devices none --memory-policy preferred",
    "--devices 0000:99:00.0",
    "--cpus 0-1 --mems 0",
    "--cpus 4",
    "--numa-binding none --reserve-cores 1",
    "--numa-binding node --cpus 0",
    "--reserve-cores 1000",
]


@pytest.mark.parametrize("name", MACHINES)
def test_plan_shows_what_run_does(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path, MACHINES[name])
    for nprocs in (1, 2, 4, 9):
        for options in OPTIONS:
            agree(root, nprocs, options, capsys)


def nodes_of(topology: Topology, nprocs: int | None, **options: Any) -> list[int] | None:
    """The node whose CPUs each rank has by mode auto; None where all are unbound."""
    ranks = plan_auto(topology, nprocs=nprocs, **options)
    assert not any(rank.binding.required for rank in ranks)
    if all(rank.binding.cpus is None for rank in ranks):
        return None
    by_cpus = {node.cpus & topology.allowed_cpus: node.id for node in topology.nodes}
    return [by_cpus[rank.binding.cpus] for rank in ranks if rank.binding.cpus is not None]


@pytest.mark.parametrize(
    ("name", "nprocs", "nodes"),
    [
        ("one node", 4, None),
        ("one node with memory beside it", 2, None),
        ("no node folder", 2, None),
        ("two sockets", 1, None),
        ("two sockets", 2, [0, 1]),
        ("two sockets", 3, [0, 0, 1]),
        ("four nodes", 2, None),
        ("four nodes", 4, [0, 1, 2, 3]),
        ("four nodes, a GPU on each", 3, None),
        ("four nodes, a GPU on each", None, [0, 1, 2, 3]),
        ("four nodes, a GPU on each", 5, [0, 1, 2, 3, 0]),
        ("four nodes, all GPUs on one", 4, None),
        ("four nodes, GPUs on two", 8, None),
        ("four nodes, of which two may be used", 2, [0, 1]),
        ("four nodes, of which one may be used", 4, None),
        ("four nodes, one of them offline", 3, [1, 2, 3]),
        ("eight nodes, sparse ids", 8, [0, 1, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_auto(name: str, nprocs: int | None, nodes: list[int] | None, tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, MACHINES[name]))
    assert nodes_of(topology, nprocs) == nodes


def test_a_gpu_of_an_unknown_node_leaves_all_unbound_with_the_reason(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, MACHINES["four nodes, a GPU of an unknown node"]))
    ranks = plan_auto(topology)
    assert {rank.binding.cpus for rank in ranks} == {None}
    assert all(rank.notes[0].startswith("auto binds no rank to a node: device 0000:13:00.0") for rank in ranks)


def test_options_that_hold_without_a_binding_to_nodes(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, machine(FOUR, gpus=gpus(2, 2))))
    ranks = plan_auto(topology, reserve_cores=1, threads_per_core=1, memory_policy="interleave")
    assert {rank.binding.cpus for rank in ranks} == {frozenset(range(1, 16))}
    assert {str(rank.binding.memory) for rank in ranks} == {"interleave:0-3"}


def test_a_variable_that_cannot_be_understood_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rankspawn._place import devices

    root = write(tmp_path, MACHINES["four nodes, a GPU on each"])
    monkeypatch.setattr(devices, "is_live", lambda root: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,0")
    bindings, _ = place_ranks(PlacementOptions.read(parsed(add_run_options, ["x.py"])), 4, str(root))
    assert bindings == (None,) * 4
    assert "auto binds no rank to a node: CUDA_VISIBLE_DEVICES='0,0'" in capsys.readouterr().err
    with pytest.raises(PlacementError, match="0,0"):
        place(Topology.read(root), "node")


def test_a_machine_that_cannot_be_read_fails_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / CPU).mkdir(parents=True)
    (tmp_path / CPU / "online").write_text("nonsense\n")
    options = PlacementOptions.read(parsed(add_run_options, ["x.py"]))
    assert place_ranks(options, 2, str(tmp_path))[0] == (None, None)
    assert "ranks are left unbound: " in capsys.readouterr().err
    with pytest.raises(PlacementError, match="nonsense"):
        place_ranks(options.replace(reserve_cores=1), 2, str(tmp_path))


def test_a_binding_by_auto_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path, MACHINES["two sockets"])
    assert would_run(root, 4, "", capsys)[1] == [AUTO_BINDS]
    assert would_run(root, 1, "", capsys)[1] == []
    assert would_run(root, 4, "--numa-binding none", capsys)[1] == []
    assert would_run(root, 4, "--numa-binding node", capsys)[1] == []


@pytest.mark.parametrize(
    ("of", "nprocs", "options", "note"),
    [
        (EIGHT, 4, {"numa": "node", "devices": ["0000:10:00.0", "0000:11:00.0"]}, "64 cores unused: nodes 2-3, 6-7"),
        (FOUR, 1, {"numa": "node"}, "12 cores unused: nodes 1-3"),
        (FOUR, 4, {"numa": "node"}, ""),
        (FOUR, 4, {"numa": "node", "reserve_cores": 2}, "2 cores unused: CPUs 0, 4, 16, 20"),
        (FOUR, 4, {"numa": "exclusive", "threads_per_core": 1}, ""),
        (Machine(cores=2), 1, {"numa": "exclusive", "reserve_cores": 1}, "1 core unused: CPU 0"),
    ],
)
def test_what_stays_idle(of: Machine, nprocs: int, options: dict[str, Any], note: str, tmp_path: Path) -> None:
    from rankspawn._place.plan import plan

    on = (0, 1, 4, 5) if of is EIGHT else ()
    topology = Topology.read(write(tmp_path, machine(of, gpus=gpus(*on))))
    if on:
        options = {"numa": "node", "devices": [f"0000:{0x10 + i:02x}:00.0" for i in range(4)]}
    assert idle_note(topology, plan(topology, nprocs=nprocs, **options)) == note


# ---- the running machine --------------------------------------------------------------------------------------------

here = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
VARIABLE = "import os; os.write(1, f\"{os.environ.get('OMP_NUM_THREADS')}\\n\".encode())"  # in one write


@here
@pytest.mark.parametrize("options", ["", "--numa-binding none", "--numa-binding node", "--reserve-cores 0 --mems 0"])
def test_plan_run_bind_and_launch_do_the_same_here(options: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = ["--nproc-per-node", "2", *options.split()]
    plan = completed([*LAUNCHER, "plan", "--json", *words])
    ranks = json.loads(plan.stdout)["ranks"]
    threads = [str(rank["omp_num_threads"]) for rank in ranks]
    report = tmp_path / "report.json"
    program = ["--report", str(report), "--no-python", sys.executable, "-S", "-c", VARIABLE]
    run = completed([*LAUNCHER, "run", *words, *program])
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.split()) == sorted(threads)
    asked = [rank["binding"]["asked"] for rank in json.loads(report.read_text())["attempts"][0]["ranks"]]
    assert [one is None for one in asked] == [rank["cpus"] is rank["memory"] is None for rank in ranks]
    bind = completed([*LAUNCHER, "bind", "--local-rank", "1", *words, sys.executable, "-S", "-c", VARIABLE])
    assert bind.stdout.split() == [threads[1]], bind.stderr
    if "mems" not in options:
        mode = options.partition("--numa-binding ")[2] or "auto"
        with launch([sys.executable, "-S", "-c", VARIABLE], 2, numa=mode, log_dir=tmp_path) as group:
            group.wait(60)
        written = [(tmp_path / "attempt_0" / str(i) / "stdout.log").read_text().strip() for i in range(2)]
        assert written == threads


@here
def test_a_glance_says_what_the_topology_says() -> None:
    topology = Topology.read()
    assert has_one_node() == (len(topology.nodes_with_cpus()) == 1)
    for nprocs in (1, 2, 3, 64):
        masks = [topology.allowed_cpus] * nprocs
        assert unbound_threads(nprocs) == omp_num_threads(topology, masks)[0]


@pytest.mark.parametrize("name", MACHINES)
def test_a_glance_at_other_machines(name: str, tmp_path: Path) -> None:
    root = write(tmp_path, MACHINES[name])
    topology = Topology.read(root)
    assert core_count(topology.allowed_cpus, f"{root}/") == len(
        [core for core in topology.cores if not topology.allowed_cpus.isdisjoint(core.cpus)]
    )
    if (root / NODE).exists():
        (root / NODE / "has_cpu").write_text(",".join(str(node.id) for node in topology.nodes_with_cpus()))
    assert has_one_node(f"{root}/") == (len(topology.nodes_with_cpus()) == 1)
    (root / CPU / "smt").mkdir(exist_ok=True)
    (root / CPU / "smt" / "active").write_text("0\n")
    core_count.cache_clear()
    assert core_count(topology.allowed_cpus, f"{root}/") == len(topology.allowed_cpus)
    core_count.cache_clear()


def test_launch_reads_no_topology_where_there_is_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankspawn._place import glance

    def fail(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(glance, "has_one_node", lambda: True)
    monkeypatch.setattr(Topology, "read", fail)
    bindings, threads = _launch._place("auto", 3)
    assert bindings == [None] * 3 and len(set(threads)) == 1
    assert _launch._place(None, 3)[0] == _launch._place("none", 3)[0] == [None] * 3
    monkeypatch.setattr(glance, "has_one_node", lambda: False)
    with pytest.raises(AssertionError, match="read"):
        _launch._place("auto", 3)


def test_launch_binds_by_auto(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rankspawn._place import glance

    topology = Topology.read(write(tmp_path, MACHINES["two sockets"]))
    monkeypatch.setattr(glance, "has_one_node", lambda: False)
    monkeypatch.setattr(Topology, "read", lambda: topology)
    bindings, threads = _launch._place("auto", 4)
    assert [binding and sorted(binding.cpus or ()) for binding in bindings] == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    assert threads == [2] * 4
    assert _launch._place("auto", 1, memory_policy="bind")[0][0].memory is not None  # type: ignore[union-attr]


def test_a_rank_with_a_memory_policy_is_not_called_unbound(tmp_path: Path) -> None:
    from rankspawn._place.plan import plan

    topology = Topology.read(write(tmp_path, machine(FOUR, gpus=gpus(0, -1))))
    for memory, words in ((None, "is left unbound"), ("local", "keeps the CPUs that it inherits")):
        rank = plan(topology, "node", memory_policy=memory, required=False)[1]  # type: ignore[arg-type]
        assert rank.notes[-1].startswith(f"rank 1 {words}: device 0000:11:00.0: its NUMA node is unknown")
    auto = plan_auto(topology, memory_policy="bind")
    assert all("unbound" not in note for rank in auto for note in rank.notes)
