"""Cpusets of cgroup v2 and v1: a launcher in a cpuset, a child born in one, and CPUs and nodes outside of it."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from rankspawn import BindingError
from rankspawn._binding import PlacementError
from rankspawn._place.plan import place, plan
from rankspawn._place.topology import Topology
from tests.numavm import machine
from tests.numavm.cgroups import Group, group_of
from tests.numavm.checks_memory import assert_only_on
from tests.numavm.conftest import Touched, bound
from tests.numavm.kernel_says import ids, masks, own_cpus

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


def test_partly_outside_is_cut_and_the_report_tells(cpuset: Cpuset, touched: Start) -> None:
    with cpuset(CPUS, MEMS).entered():
        child = touched(bound({7, 8}, "bind", {2, 3}))
        assert child.process.binding_report.effective == bound({8}, "bind", {2})
        assert_only_on(child, {2})


def test_plans_stay_inside(cpuset: Cpuset, touched: Start) -> None:
    with cpuset(CPUS, MEMS).entered():
        topology = Topology.read()
        assert (topology.allowed_cpus, topology.allowed_nodes) == (ids(CPUS), ids(MEMS))
        # In the cpuset node 2 has CPUs 8, 9 and 12; node 3 has CPUs 10 and 11, and its memory may not be used.
        ranks = plan(topology, "node", devices=[machine.device_of(3), machine.device_of(machine.MEMORY_ONLY)])
        assert [rank.binding.cpus for rank in ranks] == [{10, 11}, {8, 9, 12}]
        assert [rank.cpus for rank in place(topology, "exclusive", nprocs=3)] == [{8, 9}, {12}, {10, 11}]
        (rank,) = place(topology, "socket", devices=[machine.device_of(3)], memory="preferred-many")
        assert rank == bound(ids(CPUS), "preferred-many", {2})
        child = touched(rank)
        assert child.process.binding_report.effective == rank
        with pytest.raises(PlacementError, match="node 0 has no usable CPU"):
            place(topology, "node", devices=[machine.device_of(0)])
        with pytest.raises(PlacementError, match="node 3 is not allowed"):
            place(topology, "node", devices=[machine.device_of(3)], memory="bind")


def test_plans_stay_inside_the_inherited_mask(touched: Start) -> None:
    mask = machine.CPUS[0] | {2, 6}
    with own_cpus(mask):
        ranks = place(Topology.read(), "exclusive", nprocs=3, memory="bind")
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
