"""Cpusets of cgroup v2 and v1: a launcher in a cpuset, a child born in one, and CPUs and nodes outside of it."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rankspawn import (
    AffinityMode,
    Binding,
    BindingError,
    MemoryPolicy,
    NumaOptions,
    SubprocessHandler,
    launch,
)
from rankspawn._binding import PlacementError
from rankspawn._place.plan import place, plan
from rankspawn._place.topology import Topology
from rankspawn._start.engine import bind_thread
from tests.numavm import machine
from tests.numavm.cgroups import Group, group_of
from tests.numavm.checks_memory import assert_only_on
from tests.numavm.conftest import Touched, bound
from tests.numavm.kernel_says import ids, in_thread, masks, own_cpus

Start = Callable[..., Touched]
Cpuset = Callable[[str, str], Group]

# CPUs of both nodes of a socket, and the memory of node 2 and of the node without CPUs.
CPUS, MEMS = "8-12", "2,4"


def test_a_binding_within_the_cpuset(cpuset: Cpuset, touched: Start) -> None:
    with cpuset(CPUS, MEMS).entered():
        child = touched(bound({9, 10}, "bind", {4}))
        assert masks(child.pid) == (ids("9,10"), ids(MEMS))
        assert_only_on(child, {4})
        # Without a binding, the child inherits the launcher's.
        child = touched(None)
        assert masks(child.pid) == (ids(CPUS), ids(MEMS))
        assert_only_on(child, ids(MEMS))


@pytest.mark.parametrize("mode", ["bind", "preferred", "interleave"])
def test_a_node_outside_is_refused(mode: str, cpuset: Cpuset, touched: Start) -> None:
    with cpuset(CPUS, MEMS).entered(), pytest.raises(BindingError, match="outside this process's cpuset") as caught:
        touched(bound({8}, mode, {3}))
    assert (caught.value.step, caught.value.errno) == ("set_mempolicy", errno.EINVAL)


def test_a_cpu_outside_is_refused(cpuset: Cpuset, touched: Start) -> None:
    with cpuset(CPUS, MEMS).entered(), pytest.raises(BindingError, match="cpuset") as caught:
        touched(bound({0, 1}, "bind", {2}))
    assert (caught.value.step, caught.value.errno) == ("sched_setaffinity", errno.EINVAL)


def test_optional_steps_outside_are_reported(cpuset: Cpuset, touched: Start) -> None:
    with cpuset(CPUS, MEMS).entered():
        child = touched(bound({0}, "bind", {0}, required=False))
        report = child.process.binding_report
        assert [step.step for step in report.refused] == ["sched_setaffinity", "set_mempolicy"]
        assert report.effective == bound(ids(CPUS), "default")


def test_partly_outside_is_refused(cpuset: Cpuset, touched: Start) -> None:
    with cpuset(CPUS, MEMS).entered():
        with pytest.raises(BindingError, match="sched_setaffinity: granted only in part") as caught:
            touched(bound({7, 8}, "bind", {2}))
        assert (caught.value.step, caught.value.errno) == ("sched_setaffinity", errno.ERANGE)
        with pytest.raises(BindingError, match="set_mempolicy: granted only in part") as caught:
            touched(bound({8}, "bind", {2, 3}))
        assert (caught.value.step, caught.value.errno) == ("set_mempolicy", errno.ERANGE)


@pytest.mark.parametrize("mode", ["bind", "preferred-many", "interleave", "weighted-interleave"])
def test_partly_outside_is_cut_where_it_is_optional_and_the_report_says_so(
    mode: str, cpuset: Cpuset, touched: Start
) -> None:
    with cpuset(CPUS, MEMS).entered():
        child = touched(bound({7, 8}, mode, {2, 3}, required=False))
        report = child.process.binding_report
        if mode == "weighted-interleave" and report.refused[1].errno == errno.EINVAL:
            pytest.skip("this kernel has no weighted-interleave")
        assert [(one.step, one.errno) for one in report.refused] == [
            ("sched_setaffinity", errno.ERANGE),
            ("set_mempolicy", errno.ERANGE),
        ]
        assert report.effective == bound({8}, mode, {2})


def test_a_node_without_memory_is_refused_beside_others(touched: Start) -> None:
    with pytest.raises(BindingError, match="set_mempolicy: granted only in part"):
        touched(bound(None, "bind", {0, 900}))


CUT = Binding({7, 8}, MemoryPolicy("bind", {2, 3}))
TELL = (
    "import os; print(sorted(os.sched_getaffinity(0)), open('/proc/self/numa_maps').readline().split()[1], flush=True)"
)


def test_launch_refuses_what_is_cut(cpuset: Cpuset) -> None:
    with cpuset(CPUS, MEMS).entered():
        with pytest.raises(BindingError, match="rank 1: sched_setaffinity: granted only in part") as caught:
            launch(["true"], 3, bindings=[None, CUT, None])
        assert caught.value.rank == 1  # type: ignore[attr-defined]
        with launch(["true"], 2, bindings=[None, CUT.replace(required=False)]) as group:
            group.wait(60)
        ranks = group.report()["attempts"][0]["ranks"]
        assert [one["name"] for one in ranks[1]["binding"]["refused"]] == ["ERANGE", "ERANGE"]


def test_the_handler_refuses_what_is_cut(cpuset: Cpuset) -> None:
    with cpuset(CPUS, MEMS).entered():
        options = NumaOptions(AffinityMode.NODE, memory_policy=MemoryPolicy("bind", {2, 3}))
        with pytest.raises((BindingError, PlacementError)):
            SubprocessHandler("true", (), {}, None, None, 0, options)


CONTEXT = """
import sys
from rankspawn import Binding, BindingError, MemoryPolicy, get_context
for binding in (Binding({7, 8}), Binding(None, MemoryPolicy("bind", {2, 3}))):
    try:
        get_context(sys.argv[1], [binding]).Process(target=print).start()
    except BindingError as error:
        print(error.step, error.errno)
"""


# Checks that start Python several times, which takes seconds each, run in one kind of cgroup.
once = pytest.mark.parametrize("kind", ["v2"], indirect=True)


@once
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_context_refuses_what_is_cut(method: str, cpuset: Cpuset) -> None:
    with cpuset(CPUS, MEMS).entered():
        done = subprocess.run([sys.executable, "-c", CONTEXT, method], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"sched_setaffinity {errno.ERANGE}", f"set_mempolicy {errno.ERANGE}"], (
        done.stderr
    )


def test_a_bound_thread_refuses_what_is_cut(cpuset: Cpuset) -> None:
    """It is what `bind` and torch's own handlers do."""

    def bind(binding: Binding) -> object:
        try:
            return [str(one) for one in bind_thread(binding)]
        except BindingError as error:
            return error.step

    with cpuset(CPUS, MEMS).entered():
        assert in_thread(lambda: bind(CUT)) == "sched_setaffinity"
        steps = ["sched_setaffinity: granted only in part", "set_mempolicy: granted only in part"]
        assert in_thread(lambda: bind(CUT.replace(required=False))) == steps


@once
def test_run_and_bind_say_what_was_refused(cpuset: Cpuset, tmp_path: Path) -> None:
    """The kernel refuses a policy after the plan was made: the cpuset of the ranks is another one."""
    group = cpuset(CPUS, MEMS)
    report = tmp_path / "report.json"
    code = (
        "import os, sys; from rankspawn._cli import attempts; from rankspawn._cli.main import main\n"
        "launch = attempts.launch\n"
        "def late(*args, **options):\n"
        f"    open({str(group.folder / 'cgroup.procs')!r}, 'w').write('0')\n"
        "    return launch(*args, **options)\n"
        "attempts.launch = late\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    options = ["--nproc-per-node", "2", "--cpus", "7-8", "--mems", "2-3", "--report", str(report)]
    command = [sys.executable, "-c", code, "run", *options]
    program = ["--no-python", sys.executable, "-S", "-c", TELL]
    done = subprocess.run([*command, *program], capture_output=True, text=True)
    assert done.returncode == 1 and "rank 0: sched_setaffinity: granted only in part" in done.stderr
    done = subprocess.run([*command, "--numa-binding-optional", *program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[8] bind:2"] * 2
    assert [line.partition(": the other")[0] for line in done.stderr.splitlines()] == [
        "rankspawn: ranks 0-1: the system refused sched_setaffinity: granted only in part",
        "rankspawn: ranks 0-1: the system refused set_mempolicy: granted only in part",
    ]
    binding = json.loads(report.read_text())["attempts"][0]["ranks"][0]["binding"]
    assert [one["text"] for one in binding["refused"]] == ["granted only in part"] * 2

    code = code.replace("_cli import attempts", "_start import engine as attempts").replace("launch", "bind_thread")
    command = [sys.executable, "-c", code, "bind", "--local-rank", "0", *options[:-2], "--numa-binding-optional", "-v"]
    done = subprocess.run([*command, *program[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[8] bind:2\n"
    assert done.stderr.splitlines()[-1] == "rankspawn: local rank 0: cpus 8, memory bind:2"


def test_plans_stay_inside(cpuset: Cpuset, touched: Start) -> None:
    with cpuset(CPUS, MEMS).entered():
        topology = Topology.read()
        assert (topology.allowed_cpus, topology.allowed_nodes) == (ids(CPUS), ids(MEMS))
        # In the cpuset node 2 has CPUs 8, 9 and 12; node 3 has CPUs 10 and 11, and its memory may not be used.
        ranks = plan(topology, "node", devices=[machine.device_of(3), machine.device_of(machine.MEMORY_ONLY)])
        assert [rank.binding.cpus for rank in ranks] == [{10, 11}, {8, 9, 12}]
        assert [rank.cpus for rank in place(topology, "exclusive", nprocs=3)] == [{8, 9}, {12}, {10, 11}]
        (rank,) = place(topology, "socket", devices=[machine.device_of(3)], memory_policy="preferred-many")
        assert rank == bound(ids(CPUS), "preferred-many", {2})
        child = touched(rank)
        assert child.process.binding_report.effective == rank
        with pytest.raises(PlacementError, match="node 0 has no usable CPU"):
            place(topology, "node", devices=[machine.device_of(0)])
        with pytest.raises(PlacementError, match="node 3 is not allowed"):
            place(topology, "node", devices=[machine.device_of(3)], memory_policy="bind")


def test_plans_stay_inside_the_inherited_mask(touched: Start) -> None:
    mask = machine.CPUS[0] | {2, 6}
    with own_cpus(mask):
        ranks = place(Topology.read(), "exclusive", nprocs=3, memory_policy="bind")
        # Cores 0-1, 4-5, and the half cores 2 and 6.
        assert [rank.cpus for rank in ranks] == [{0, 1}, {4, 5}, {2, 6}]
        for rank in ranks:
            assert touched(rank).process.binding_report.effective == rank
    with pytest.raises(PlacementError, match="node 3 has no usable CPU"):
        place(Topology.read(), "node", devices=[machine.device_of(3)], allowed_cpus=mask)


def test_a_child_is_born_in_a_cpuset_and_bound_within(touched: Start) -> None:
    """The launcher is outside of the cpuset, and may use more than its child."""
    with Group.cpuset("v2", CPUS, MEMS) as group:
        child = touched(bound({8, 11}, "bind", {4}), cgroup=group.folder)
        assert group_of(child.pid) == "/few"
        assert masks(child.pid) == (ids("8,11"), ids(MEMS))
        assert_only_on(child, {4})
        plain = touched(cgroup=group.folder)
        assert masks(plain.pid) == (ids(CPUS), ids(MEMS))
        assert_only_on(plain, ids(MEMS))
        with pytest.raises(BindingError, match="set_mempolicy"):
            touched(bound({8}, "bind", {0}), cgroup=group.folder)
        with pytest.raises(BindingError, match="sched_setaffinity"):
            touched(bound({0}, "bind", {2}), cgroup=group.folder)
        assert sorted(group.pids) == sorted([child.pid, plain.pid])
