"""Where the pages of a bound child are: move_pages(2) tells the node of every page, from the first of the stack on."""

from __future__ import annotations

import errno
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rankspawn import Binding, BindingError, MemoryPolicy
from tests.numavm.conftest import Touched, bound
from tests.numavm.kernel_says import (
    in_thread,
    masks,
    nodes_from,
    policy_of,
    private_nodes,
    set_own_policy,
    stack_nodes,
)
from tests.numavm.machine import CPU_COUNT, CPUS, MEMORY_ONLY, NODES

Start = Callable[..., Touched]

# The kernel interleaves all pages that it allocates, page tables too, so the spread of the others is not quite even.
ODD_PAGES = 8
ABSENT = 7
WEIGHTS = Path("/sys/kernel/mm/mempolicy/weighted_interleave")


def all_nodes(child: Touched) -> Counter[int | None]:
    """How many pages of the child's stack, and of the memory that it has touched, are on each node."""
    touched = nodes_from(child.pid, child.address, child.pages)
    assert None not in touched
    return Counter([*stack_nodes(child.pid), *touched])


def assert_only_on(child: Touched, nodes: Iterable[int]) -> None:
    """Assert that every page of the child's own is on ``nodes``, by move_pages(2) and by numa_maps."""
    assert set(all_nodes(child)) <= set(nodes)
    assert set(+private_nodes(child.numa_maps)) <= set(nodes)


@pytest.mark.parametrize("node", NODES)
def test_bind(node: int, touched: Start) -> None:
    # The child runs on another node's CPUs: so it is the policy that puts the pages on the node, and not the CPU.
    elsewhere = CPUS[(node + 1) % len(CPUS)]
    child = touched(bound(elsewhere, "bind", {node}))
    assert_only_on(child, {node})
    assert policy_of(child.numa_maps) == f"bind:{node}"
    assert masks(child.pid)[0] == elsewhere
    assert child.process.binding_report.effective == bound(elsewhere, "bind", {node})
    assert child.process.binding_report.refused == ()


def test_bind_to_several_nodes(touched: Start) -> None:
    child = touched(bound(CPUS[2], "bind", {1, 3, 4}))
    assert_only_on(child, {1, 3, 4})
    assert policy_of(child.numa_maps) == "bind:1,3-4"


@pytest.mark.parametrize("node", [0, 3, MEMORY_ONLY])
def test_preferred(node: int, touched: Start) -> None:
    child = touched(bound(CPUS[1], "preferred", {node}))
    assert_only_on(child, {node})
    assert policy_of(child.numa_maps) == f"prefer:{node}"
    assert child.process.binding_report.effective == bound(CPUS[1], "preferred", {node})


@pytest.mark.parametrize("nodes, taken", [({0, 1, 3}, 1), ({2, 3}, 2), ({2, 4}, 2)])
def test_preferred_many_takes_the_nearest(nodes: set[int], taken: int, touched: Start) -> None:
    cpus = CPUS[1] if taken == 1 else CPUS[2]
    child = touched(bound(cpus, "preferred-many", nodes))
    assert_only_on(child, {taken})
    assert child.process.binding_report.effective == bound(cpus, "preferred-many", nodes)


@pytest.mark.parametrize("nodes", [{0, 1, 2, 3}, {1, 2}, {0, 3, 4}], ids=str)
def test_interleave_spreads_evenly(nodes: set[int], touched: Start) -> None:
    child = touched(bound(CPUS[0], "interleave", nodes), pages=120 * len(nodes))
    assert_only_on(child, nodes)
    spread = Counter(nodes_from(child.pid, child.address, child.pages))
    assert set(spread) == nodes
    assert max(spread.values()) - min(spread.values()) <= ODD_PAGES
    assert child.process.binding_report.effective == bound(CPUS[0], "interleave", nodes)


def test_weighted_interleave_spreads_by_weight_or_says_that_the_kernel_is_too_old(touched: Start) -> None:
    binding = bound(CPUS[0], "weighted-interleave", {1, 2, 4})
    if not WEIGHTS.exists():  # Linux 6.9
        with pytest.raises(BindingError, match="kernel is too old") as caught:
            touched(binding)
        assert (caught.value.step, caught.value.errno) == ("set_mempolicy", errno.EINVAL)
        return
    weights = {1: 5, 2: 2, 4: 1}
    for node, weight in weights.items():
        (WEIGHTS / f"node{node}").write_text(str(weight))
    try:
        child = touched(binding, pages=400)
    finally:
        for node in weights:
            (WEIGHTS / f"node{node}").write_text("0")  # back to the default
    assert_only_on(child, weights)
    spread = Counter(nodes_from(child.pid, child.address, child.pages))
    assert all(abs(spread[node] - 50 * weight) <= ODD_PAGES for node, weight in weights.items())
    assert child.process.binding_report.effective == binding


@pytest.mark.parametrize("mode", [None, "local", "default"])
@pytest.mark.parametrize("node", CPUS)
def test_pages_are_local_without_nodes(node: int, mode: str | None, touched: Start) -> None:
    child = touched(bound(CPUS[node], mode))
    assert_only_on(child, {node})
    assert policy_of(child.numa_maps) == (mode or "default")
    assert child.process.binding_report.effective == bound(CPUS[node], mode or "default")


@pytest.mark.parametrize("mode, policy, node", [(None, "bind:4", 4), ("default", "default", 3), ("local", "local", 3)])
def test_only_no_policy_at_all_leaves_the_launchers(mode: str | None, policy: str, node: int, touched: Start) -> None:
    def start() -> Touched:
        set_own_policy("bind", {MEMORY_ONLY})
        return touched(bound(CPUS[3], mode))

    child = in_thread(start)
    assert_only_on(child, {node})
    assert policy_of(child.numa_maps) == policy


def test_a_policy_without_cpus_leaves_the_mask(touched: Start) -> None:
    child = touched(bound(None, "bind", {3}))
    assert_only_on(child, {3})
    assert masks(child.pid) == (frozenset(range(CPU_COUNT)), frozenset(NODES))


@pytest.mark.parametrize("cpus", [{0}, {5, 10}, CPUS[1], set(range(CPU_COUNT))], ids=str)
def test_the_mask_is_what_was_asked(cpus: set[int], touched: Start) -> None:
    child = touched(bound(cpus))
    assert masks(child.pid)[0] == cpus
    effective = child.process.binding_report.effective
    assert effective is not None and effective.cpus == cpus


def test_arguments_of_many_pages_are_on_the_node(touched: Start) -> None:
    """execve(2) copies the arguments to the new stack before the program runs: they are the earliest of its pages."""
    child = touched(bound(CPUS[0], "bind", {2}), env={"LONG": "x" * 100_000})
    assert len(stack_nodes(child.pid)) > 24
    assert_only_on(child, {2})


@pytest.mark.parametrize("more", [{"start_new_session": True}, {"user": 65534, "group": 65534}, {"close_fds": False}])
def test_with_other_arguments(more: dict[str, object], touched: Start) -> None:
    child = touched(bound(CPUS[0], "bind", {3}), **more)
    assert_only_on(child, {3})
    assert masks(child.pid)[0] == CPUS[0]


def test_a_whole_python_is_on_its_node(touched: Start) -> None:
    """It has huge pages, as far as the kernel gives them. It prints 0 where touch prints an address."""
    code = "import sys; memory = bytearray(8 << 20); print(0, flush=True); sys.stdin.read()"
    child = touched(bound(CPUS[1], "bind", {2}), command=[sys.executable, "-Sc", code])
    nodes = +private_nodes(child.numa_maps)
    assert set(nodes) == {2}
    assert nodes[2] > 2048
    assert set(stack_nodes(child.pid)) == {2}


def test_many_at_once_each_on_its_own(touched: Start) -> None:
    bindings = [bound(CPUS[i % 4], "bind", {(i + 1) % 5}) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        children = list(pool.map(touched, bindings))
    for child, binding in zip(children, bindings, strict=True):
        assert child.process.binding_report.effective == binding
        assert binding.memory is not None
        assert_only_on(child, binding.memory.nodes)


def test_the_launcher_keeps_its_own(touched: Start) -> None:
    before = masks(), policy_of(Path("/proc/self/numa_maps").read_text())
    touched(bound({3}, "bind", {4}))
    assert (masks(), policy_of(Path("/proc/self/numa_maps").read_text())) == before


# ---- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bind", "preferred", "preferred-many", "interleave"])
@pytest.mark.parametrize("node", [ABSENT, 63, 64, 1023, 2000])
def test_an_absent_node_is_refused(mode: str, node: int, touched: Start) -> None:
    with pytest.raises(BindingError, match="set_mempolicy") as caught:
        touched(bound(CPUS[0], mode, {node}))
    error = caught.value
    assert (error.step, error.errno) == ("set_mempolicy", errno.EINVAL)
    assert f"{mode}:{node}" in str(error) and "absent" in str(error)


@pytest.mark.parametrize("cpu", [CPU_COUNT, 63, 64, 5000])
def test_an_absent_cpu_is_refused(cpu: int, touched: Start) -> None:
    with pytest.raises(BindingError, match="sched_setaffinity") as caught:
        touched(bound({cpu}, "bind", {0}))
    assert (caught.value.step, caught.value.errno) == ("sched_setaffinity", errno.EINVAL)


def test_what_is_absent_beside_what_is_there_is_refused(touched: Start) -> None:
    """The kernel drops it without a word."""
    with pytest.raises(BindingError, match="sched_setaffinity: granted only in part"):
        touched(bound({0, 1, 200}))
    with pytest.raises(BindingError, match="set_mempolicy: granted only in part"):
        touched(bound(None, "bind", {2, ABSENT}))
    child = touched(bound({0, 1, 200}, "bind", {2, ABSENT}, required=False))
    report = child.process.binding_report
    assert [step.errno for step in report.refused] == [errno.ERANGE] * 2
    assert report.effective == bound({0, 1}, "bind", {2})
    assert_only_on(child, {2})


def test_optional_steps_are_refused_each_on_its_own(touched: Start) -> None:
    cases = [
        (bound({200}, "bind", {ABSENT}, required=False), ["sched_setaffinity", "set_mempolicy"]),
        (bound({200}, "bind", {3}, required=False), ["sched_setaffinity"]),
        (bound(CPUS[3], "bind", {ABSENT}, required=False), ["set_mempolicy"]),
        (bound(CPUS[3], "bind", {3}, required=False), []),
    ]
    everything = frozenset(range(CPU_COUNT))
    for binding, refused in cases:
        child = touched(binding)
        report = child.process.binding_report
        assert [(step.step, step.errno) for step in report.refused] == [(step, errno.EINVAL) for step in refused]
        assert report.requested == binding
        effective = report.effective
        assert effective == Binding(
            everything if "sched_setaffinity" in refused else CPUS[3],
            MemoryPolicy("default") if "set_mempolicy" in refused else binding.memory,
        )
        assert masks(child.pid)[0] == effective.cpus
        assert_only_on(child, NODES if len(refused) == 2 else {3})
