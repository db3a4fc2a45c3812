"""The command, the handler, cgroups at birth, and signals to process groups."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from rankspawn import AffinityMode, MemoryPolicy, NumaOptions, Popen, SubprocessHandler, launch
from rankspawn._binding import PlacementError
from rankspawn._cli.options import AUTO_BINDS
from rankspawn._ids import parse_ids
from tests.numavm import machine
from tests.numavm.cgroups import Group, group_of
from tests.numavm.conftest import Touched, bound
from tests.numavm.kernel_says import in_thread, masks_in, policy_of, private_nodes

Start = Callable[..., Touched]

# The shell executes cat in its own process, so that the files are those of the rank's process.
TELL = "echo threads $OMP_NUM_THREADS; exec cat /proc/self/status /proc/self/numa_maps"


class Told:
    """What a rank wrote about itself."""

    def __init__(self, log: Path) -> None:
        text = log.read_text()
        self.threads = text.partition("\n")[0].partition(" ")[2]
        self.cpus, self.mems = masks_in(text)
        maps = "\n".join(line for line in text.splitlines() if " kernelpagesize_kB=" in line)
        self.policy = policy_of(maps)
        self.nodes = set(+private_nodes(maps))


def run_ranks(folder: Path, count: int, *options: str, **variables: str) -> tuple[list[Told], str]:
    """Run `rankspawn run` with these options; what each rank told, and the launcher's stderr."""
    command = [sys.executable, "-m", "rankspawn", "run", "--nproc-per-node", str(count), "--log-dir", str(folder)]
    command += [*options, "--no-python", "/bin/sh", "-c", TELL]
    said = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    run = folder / "latest"
    return [Told(run / "attempt_0" / str(rank) / "stdout.log") for rank in range(count)], said.stderr


def test_run_binds_to_the_nodes_by_default(tmp_path: Path) -> None:
    ranks, said = run_ranks(tmp_path, 4)
    assert [(told.cpus, told.policy, told.threads) for told in ranks] == [
        (machine.CPUS[i], "default", "2") for i in range(4)
    ]
    assert said.splitlines()[0] == f"rankspawn: {AUTO_BINDS}"


@pytest.mark.parametrize("options", [("--nproc-per-node", "1"), ("--nproc-per-node", "4", "--numa-binding", "none")])
def test_run_leaves_ranks_unbound(options: tuple[str, ...], tmp_path: Path) -> None:
    ranks, said = run_ranks(tmp_path, int(options[1]), *options[2:])
    assert {told.cpus for told in ranks} == {frozenset(range(machine.CPU_COUNT))}
    assert {told.threads for told in ranks} == {str(8 // len(ranks))}
    assert "binding" not in said


@pytest.mark.parametrize(
    "nprocs, options",
    [
        *((count, "") for count in (1, 3, 4, 6)),
        *((count, "--numa-binding node --memory-policy bind") for count in (1, 6)),
        *((count, "--reserve-cores 1") for count in (3, 4)),
        (3, "--numa-binding none"),
    ],
)
def test_plan_shows_what_run_and_launch_do(nprocs: int, options: str, tmp_path: Path) -> None:
    rankspawn = [sys.executable, "-m", "rankspawn"]
    words = ["--nproc-per-node", str(nprocs), *options.split()]
    plan = json.loads(subprocess.run([*rankspawn, "plan", "--json", *words], stdout=subprocess.PIPE, check=True).stdout)
    ranks, _ = run_ranks(tmp_path / "run", nprocs, *options.split())
    everything = set(range(machine.CPU_COUNT))
    wanted = [
        (set(parse_ids(one["cpus"])) if one["cpus"] else everything, str(one["omp_num_threads"]))
        for one in plan["ranks"]
    ]
    assert [(set(told.cpus), told.threads) for told in ranks] == wanted
    if not options:
        with launch(["/bin/sh", "-c", TELL], nprocs, log_dir=tmp_path / "launch") as group:
            group.wait(60)
        logs = [Told(tmp_path / "launch" / "attempt_0" / str(rank) / "stdout.log") for rank in range(nprocs)]
        assert [(set(told.cpus), told.threads) for told in logs] == wanted


def test_auto_follows_the_gpus_where_they_are_on_all_nodes(tmp_path: Path, gpus: None) -> None:
    """The machine's GPUs are on nodes 0, 1 and 3, and on the one that is nearest to node 2."""
    ranks, said = run_ranks(tmp_path, 5)
    assert [told.cpus for told in ranks] == [
        machine.CPUS[node] for node in (3, 0, 1, 1, machine.NEAREST_TO_MEMORY_ONLY)
    ]
    assert AUTO_BINDS in said


def test_auto_leaves_no_node_idle(tmp_path: Path, gpus: None) -> None:
    ranks, said = run_ranks(tmp_path, 4, CUDA_VISIBLE_DEVICES="0,1")
    assert {told.cpus for told in ranks} == {frozenset(range(machine.CPU_COUNT))}
    assert "binding" not in said


def test_run_node_gives_each_rank_its_node(tmp_path: Path) -> None:
    ranks, _ = run_ranks(tmp_path, 4, "--numa-binding", "node", "--memory-policy", "bind")
    for rank, told in enumerate(ranks):
        assert told.cpus == machine.CPUS[rank]
        assert (told.policy, told.nodes) == (f"bind:{rank}", {rank})
        assert told.threads == "2"  # cores


def test_run_exclusive_gives_each_rank_its_cores(tmp_path: Path) -> None:
    ranks, _ = run_ranks(tmp_path, 8, "--numa-binding", "exclusive")
    # Ranks are placed by node, and within a node by core.
    dies = sorted(machine.DIES, key=lambda cpus: (machine.DIES[cpus], cpus))
    assert [tuple(sorted(told.cpus)) for told in ranks] == dies
    for told, cpus in zip(ranks, dies, strict=True):
        assert (told.policy, told.nodes, told.threads) == ("default", {machine.DIES[cpus]}, "1")


def test_run_socket_gives_each_rank_its_socket(tmp_path: Path) -> None:
    ranks, _ = run_ranks(tmp_path, 4, "--numa-binding", "socket", "--memory-policy", "interleave")
    assert [told.cpus for told in ranks] == [machine.SOCKET_CPUS[socket] for socket in (0, 0, 1, 1)]
    assert [told.policy for told in ranks] == ["interleave:0-1", "interleave:0-1", "interleave:2-3", "interleave:2-3"]
    for told, nodes in zip(ranks, ({0, 1}, {0, 1}, {2, 3}, {2, 3}), strict=True):
        assert told.nodes <= nodes


def test_run_follows_the_visible_gpus(tmp_path: Path, gpus: None) -> None:
    options = ("--numa-binding", "node", "--memory-policy", "preferred")
    ranks, said = run_ranks(tmp_path, 4, *options, CUDA_VISIBLE_DEVICES="4,2,1,0")
    nodes = [machine.NEAREST_TO_MEMORY_ONLY, 1, 0, 3]
    assert [told.cpus for told in ranks] == [machine.CPUS[node] for node in nodes]
    assert [told.policy for told in ranks] == [f"prefer:{node}" for node in nodes]
    assert "which has no CPUs" in said


def test_run_stays_in_the_inherited_mask(tmp_path: Path) -> None:
    mask = {0, 1, 8, 9, 12}
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, mask)
    try:
        ranks, _ = run_ranks(tmp_path, 3, "--numa-binding", "exclusive")
    finally:
        os.sched_setaffinity(0, before)
    assert [told.cpus for told in ranks] == [{0, 1}, {8, 9}, {12}]


# ---- the handler --------------------------------------------------------------------------------------------------


def handle(rank: int, folder: Path, options: NumaOptions) -> Told:
    log = folder / str(rank)
    handler = SubprocessHandler("/bin/sh", ("-c", TELL), {}, str(log), None, rank, options)
    assert handler.proc.wait(60) == 0
    handler.close()
    return Told(log)


def test_handler_follows_the_gpus(tmp_path: Path, gpus: None) -> None:
    options = NumaOptions(AffinityMode.NODE, memory_policy="bind")
    for rank, node in enumerate([3, 0, 1, 1, machine.NEAREST_TO_MEMORY_ONLY]):
        told = handle(rank, tmp_path, options)
        assert (told.cpus, told.policy, told.nodes) == (machine.CPUS[node], f"bind:{node}", {node})


def test_handler_splits_a_node_over_all_its_gpus(tmp_path: Path, gpus: None) -> None:
    options = NumaOptions(AffinityMode.EXCLUSIVE)
    assert [handle(rank, tmp_path, options).cpus for rank in (2, 3)] == [{2, 3}, {6, 7}]


@pytest.mark.parametrize("fall_back", [False, True])
def test_handler_with_a_policy_that_is_refused(
    fall_back: bool, tmp_path: Path, gpus: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the handler may fall back, only the memory policy is left out, and the CPUs are bound."""
    options = NumaOptions(AffinityMode.NODE, fall_back, MemoryPolicy("bind", frozenset({7})))
    if not fall_back:
        with pytest.raises(PlacementError, match="nodes 7 are absent"):
            handle(0, tmp_path, options)
        return
    told = handle(0, tmp_path, options)
    assert (told.cpus, told.policy) == (machine.CPUS[3], "default")
    assert "nodes 7 are absent" in caplog.text


# ---- cgroups at birth ---------------------------------------------------------------------------------------------


def without_clone3() -> None:
    """Make clone3 fail with ENOSYS for the calling thread and its children, as on older kernels and in containers."""
    load, jump_if_equal, give_back = 0x20, 0x15, 0x06  # BPF: A = number; if (A == K) skip; return K
    allow, fail, number_of_clone3 = 0x7FFF0000, 0x00050000 | errno.ENOSYS, 435
    steps = [
        (load, 0, 0, 0),
        (jump_if_equal, 0, 1, number_of_clone3),
        (give_back, 0, 0, fail),
        (give_back, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    set_seccomp, mode_filter = 22, 2
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(set_seccomp, ctypes.c_ulong(mode_filter), program) == 0, os.strerror(ctypes.get_errno())


def test_a_child_is_born_in_its_cgroup(touched: Start) -> None:
    """clone3 charges the new process to the cgroup that it is born in, and a full cgroup refuses it. A process that is
    moved into a full cgroup is counted and never refused (the kernel's Documentation/admin-guide/cgroup-v2.rst, "PID").
    So a refusal shows that the child is born in the cgroup."""
    with Group.of("pids", "jobs") as group:
        child = touched(bound(machine.CPUS[2], "bind", {3}), cgroup=group.folder)
        assert group_of(child.pid) == "/jobs"
        assert group.pids == [child.pid]
        group["pids.max"] = "1"
        with pytest.raises(BlockingIOError):
            touched(cgroup=group.folder)


def test_without_clone3_a_child_moves_into_its_cgroup_before_it_runs(touched: Start) -> None:
    with Group.of("pids", "jobs", pids_max="0") as group:

        def start() -> Touched:
            without_clone3()
            return touched(bound(machine.CPUS[2], "bind", {3}), cgroup=group.folder)

        child = in_thread(start)
        assert group_of(child.pid) == "/jobs"
        assert child.process.binding_report.effective == bound(machine.CPUS[2], "bind", {3})


def test_a_cgroup_that_takes_nobody_is_an_error(touched: Start) -> None:
    """A cgroup that gives its controllers to its children has no processes (cgroup-v2.rst, "No Internal Process")."""
    with Group.of("memory", "jobs") as group:
        inner = Group(group.folder / "inner")
        group["cgroup.subtree_control"] = "+memory"
        try:
            with pytest.raises(OSError, match="cgroup") as caught:
                touched(cgroup=group.folder)
        finally:
            group["cgroup.subtree_control"] = "-memory"
            inner.folder.rmdir()
        assert caught.value.errno == errno.EBUSY


# ---- signals to groups --------------------------------------------------------------------------------------------


KERNEL = tuple(map(int, os.uname().release.split(".")[:2]))
ADDRESSES_GROUPS = (6, 9)
"""The first kernel that signals a process group by a pidfd of its leader, even when the leader was waited for."""


def leader_with_a_child(leader: str) -> tuple[Popen, int]:
    """A session leader that has started a sleeping process and then runs the shell code ``leader``; the sleeper's
    pid."""
    command = ["/bin/sh", "-c", f"sleep 1000 & echo $!; {leader}"]
    process = Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    sleeper = int(process.stdout.readline())
    process.stdout.close()
    return process, sleeper


def remaining(pids: Iterable[int], seconds: float = 10) -> list[int]:
    """Those that are still there after ``seconds``. The machine's init reaps orphans."""
    until = time.monotonic() + seconds
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return left


def kill_all(pids: Iterable[int]) -> None:
    """Kill those that are still there, so that a failed check leaves none to the next one."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not remaining(pids)


def test_a_group_is_signalled_with_its_leader() -> None:
    process, sleeper = leader_with_a_child("wait")
    process.send_signal_group(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    assert not remaining([sleeper])


def test_a_group_is_signalled_when_its_leader_has_ended_and_was_not_waited_for() -> None:
    process, sleeper = leader_with_a_child("exit 3")
    assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.send_signal_group(signal.SIGTERM)
    assert not remaining([sleeper])
    assert process.wait(30) == 3


def test_a_group_whose_leader_was_waited_for_is_signalled_or_the_kernel_is_named() -> None:
    process, sleeper = leader_with_a_child("exit 3")
    assert process.wait(30) == 3
    try:
        if KERNEL >= ADDRESSES_GROUPS:
            process.send_signal_group(signal.SIGTERM)
            assert not remaining([sleeper])
        else:
            with pytest.raises(ProcessLookupError, match=r"Linux 6\.9"):
                process.send_signal_group(signal.SIGTERM)
            assert Path(f"/proc/{sleeper}").exists()
    finally:
        kill_all([sleeper])


@pytest.mark.parametrize("status", [0, 3])
def test_run_leaves_nothing_that_its_ranks_started(status: int, tmp_path: Path) -> None:
    """This holds also where the kernel cannot signal a group whose leader was waited for."""
    # mv gives a file its name when it is whole: a rank that fails ends the other, which may have just opened its file.
    rank = f"cd {tmp_path}; sleep 1000 & echo $! > new.$RANK; mv new.$RANK $RANK; exit {status}"
    command = [sys.executable, "-m", "rankspawn", "run", "--nproc-per-node", "2", "--no-python", "/bin/sh", "-c", rank]
    # Into a file, because run() would read a pipe until the last of the processes has ended.
    with open(tmp_path / "said", "wb") as said:
        assert subprocess.run(command, stdout=said, stderr=said, check=False, timeout=120).returncode == status
    sleepers = [int(path.read_text()) for path in tmp_path.glob("[01]")]
    left = remaining(sleepers)
    kill_all(left)
    assert sleepers
    assert left == []
