"""The package on an AArch64 kernel, in the machine of test_aarch64.py: node 0 has CPUs 0-1, node 1 CPUs 2-3, node 2
none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, "/package")

from rankspawn import Binding, MemoryPolicy, Popen, Topology, launch, place

NODES = [frozenset({0, 1}), frozenset({2, 3}), frozenset()]
# The Python of the ranks, which imports as little as possible.
PYTHON = [sys.executable, "-S", "-E", "-c"]


def popen() -> None:
    memory = MemoryPolicy("bind", {2})
    binding = Binding({3}, memory)
    command = [*PYTHON, "print('here', flush=True); input()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with Popen(command, binding=binding, die_with_parent=True, cgroup="/sys/fs/cgroup", **pipes) as child:
        assert child.mechanism == "clone" and child.pidfd is not None
        assert os.sched_getaffinity(child.pid) == {3}
        assert not child.binding_report.refused
        # The line is awaited because execve(2) wakes the parent a moment before it gives the child its new memory.
        assert child.stdout.readline() == b"here\n"
        maps = open(f"/proc/{child.pid}/numa_maps").read()
        assert "bind:2" in maps and "N2=" in maps, maps
        child.communicate(b"\n", timeout=100)
        assert child.returncode == 0


def group() -> None:
    code = "import os; print(os.environ['RANK'], sorted(os.sched_getaffinity(0)))"
    with launch([*PYTHON, code], 4, numa="exclusive", guard=True, log_dir="/tmp/logs") as ranks:
        assert ranks.wait(timeout=100) == (0, 0, 0, 0)
        assert {rank.mechanism for rank in ranks.ranks} == {"clone"}
    said = sorted(open(os.path.join(at, "stdout.log")).read() for at, _, names in os.walk("/tmp/logs") if names)
    assert said == ["0 [0]\n", "1 [1]\n", "2 [2]\n", "3 [3]\n"], said


def guard() -> None:
    """The launcher is killed; what its rank has started, in a process group of its own, ends."""
    reading, writing = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        code = "import os, time; os.fork() or (os.setpgid(0, 0), os.write(1, b'.')); time.sleep(1000)"
        os.dup2(writing, 1)
        with launch([*PYTHON, code], 1, guard=True):
            time.sleep(1000)
    os.close(writing)
    assert os.read(reading, 1) == b"."
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert os.read(reading, 1) == b"", "the pipe ends when nobody is left who has it open"
    os.close(reading)


topology = Topology.read()
assert [node.cpus for node in topology.nodes] == NODES
assert [binding.cpus for binding in place(topology, "node", nprocs=2)] == NODES[:2]
popen()
group()
guard()
print("python_checks: passed", flush=True)
