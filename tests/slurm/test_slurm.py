"""Under a real Slurm of two nodes on this machine: `make test-slurm`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankspawn._cli.step import Step, first_host
from tests.slurm.cluster import Cluster, cluster
from tests.support.processes import eventually

TIMEOUT = 30.0
BIND = [sys.executable, "-m", "rankspawn", "bind"]

# Each task prints a line: who it is, and its answer.
TASK = """
import json, os
from rankspawn._cli.step import Step, StepError
step = Step.read(os.environ)
def node():
    try:
        return vars(step.node())
    except StepError as error:
        return str(error)
os.write(1, (json.dumps([int(os.environ["SLURM_PROCID"]), os.environ["SLURMD_NODENAME"], {answer}]) + "\\n").encode())
"""
STEP = [sys.executable, "-c", TASK.replace("{answer}", "vars(step)")]
NODE = [sys.executable, "-c", TASK.replace("{answer}", "node()")]
PLACE = [
    sys.executable,
    "-c",
    TASK.replace("{answer}", "{'cpus': sorted(os.sched_getaffinity(0))}"),
]


# Slurm finds the processes of a step by a cgroup, or by looking for the children of its tasks.
@pytest.fixture(scope="session", params=["cgroup", "linuxproc"])
def any_slurm(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with cluster(cpus=2, hold_all=request.param == "cgroup") as mine:
        if request.param == "cgroup" and not mine.holds_all:
            pytest.skip("Slurm can make no cgroups here (it needs root, and a freezer of cgroup v1)")
        yield mine


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    with cluster(cpus=2) as mine:
        yield mine


# srun says so where the job of the test before has only just ended.
WAITED = re.compile(r"srun: job \d+ (queued and waiting for|has been allocated) resources\n")


def ran(slurm: Cluster, command: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**slurm.environ, **environ}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    done.stderr = WAITED.sub("", done.stderr)
    return done


def answers(slurm: Cluster, *command: str, **environ: str) -> dict[int, tuple[str, Any]]:
    """For each task, by number: the node that it ran on, and what it answered."""
    done = ran(slurm, [*command], **environ)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {rank: (node, answer) for rank, node, answer in lines}


# ---- what the environment says --------------------------------------------------------------------------------------


def test_a_step_on_two_nodes(slurm: Cluster) -> None:
    found = answers(slurm, "srun", "-N2", "--ntasks-per-node=1", *NODE)
    assert [node for node, _ in found.values()] == [slurm.nodes[rank] for rank in found]
    job = int(found[0][1]["run_id"].split(".")[0])
    assert {rank: answer for rank, (_, answer) in found.items()} == {
        rank: {
            "node_rank": rank,
            "nnodes": 2,
            "master_addr": slurm.nodes[0],
            "master_port": 29500 + 10 * job % 3001,
            "run_id": f"{job}.0",
        }
        for rank in (0, 1)
    }


def test_a_second_step_has_another_port(slurm: Cluster) -> None:
    # Both under one allocation, as steps of a batch script.
    script = 'srun -N2 "$@" && srun -N2 "$@"'
    done = ran(slurm, ["salloc", "-N2", "sh", "-c", script, "-", *NODE])
    ports = {(node["run_id"], node["master_port"]) for _, _, node in map(json.loads, done.stdout.splitlines())}
    (job,) = {run_id.split(".")[0] for run_id, _ in ports}
    assert ports == {(f"{job}.{step}", 29500 + (10 * int(job) + step) % 3001) for step in (0, 1)}


def test_a_step_of_a_part_of_a_job(slurm: Cluster) -> None:
    """The node is number 1 of the job, and number 0 of the step."""
    found = answers(slurm, "salloc", "-N2", "srun", "-N1", "-n1", "-w", slurm.nodes[1], *STEP)
    node, step = found[0]
    assert node == slurm.nodes[1]
    assert (step["node_rank"], step["nnodes"], step["master_addr"]) == (0, 1, slurm.nodes[1])


def test_the_first_task_need_not_run_on_the_first_node(slurm: Cluster) -> None:
    hosts = slurm.folder / "hosts"
    hosts.write_text(f"{slurm.nodes[1]}\n{slurm.nodes[0]}\n")
    found = answers(slurm, "srun", "-N2", "-n2", "--distribution=arbitrary", *NODE, SLURM_HOSTFILE=str(hosts))
    assert found[0][0] == slurm.nodes[1]
    # Whatever the order, there is one node 0, and it is the one that has the address.
    for host, node in found.values():
        assert (host == node["master_addr"]) == (node["node_rank"] == 0)
    assert sorted(node["node_rank"] for _, node in found.values()) == [0, 1]


def test_a_step_of_two_components_is_one_step(slurm: Cluster) -> None:
    a, b = (["-N1", "-w", node, *NODE] for node in slurm.nodes)
    found = answers(slurm, "srun", *a, ":", *b)
    nodes = [answer for _, (_, answer) in sorted(found.items())]
    assert [node["node_rank"] for node in nodes] == [0, 1]
    assert len({(node["nnodes"], node["master_addr"], node["master_port"], node["run_id"]) for node in nodes}) == 1
    assert nodes[0]["master_addr"] == slurm.nodes[0]


def test_tasks_are_counted_by_node(slurm: Cluster) -> None:
    found = answers(slurm, "srun", "-N2", "-n4", "--overcommit", "--distribution=plane=3", *STEP)
    local = {rank: (host, step["local_rank"], step["local_size"]) for rank, (host, step) in found.items()}
    sizes = {host: sum(host == other for other, _, _ in local.values()) for host in slurm.nodes}
    assert sorted(sizes.values()) == [1, 3]
    assert all(size == sizes[host] for host, _, size in local.values())
    assert sorted(number for _, number, _ in local.values()) == [0, 0, 1, 2]


def test_several_tasks_on_a_node_are_no_launchers(slurm: Cluster) -> None:
    found = answers(slurm, "srun", "-N2", "-n4", "--overcommit", "--ntasks-per-node=2", *NODE)
    assert len(found) == 4
    for _, answer in found.values():
        assert re.match("srun started 2 processes on this node.*srun --ntasks-per-node=1", answer)


def test_a_batch_script_is_no_step(slurm: Cluster) -> None:
    said = slurm.folder / "batch.out"
    script = f"#!/bin/sh\nexec {sys.executable} -c '{STEP[-1]}'\n"
    command = ["sbatch", "--wait", "-N2", f"--output={said}", f"--export=ALL,SLURMD_NODENAME={slurm.nodes[0]}"]
    done = subprocess.run(
        command, input=script, env=slurm.environ, capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    assert "Submitted" in done.stdout
    _, _, step = json.loads(said.read_text())
    assert Step(**step) == Step()


NAMES = st.text("abcn-.", min_size=1, max_size=4).filter(lambda name: name[0] not in "-.")
NUMBERS = st.integers(0, 300).flatmap(lambda n: st.sampled_from([f"{n}", f"{n:03}", f"{n:05}"]))


def spans(first: str, length: int) -> str:
    return f"{first}-{int(first) + length:0{len(first)}}"


RANGES = NUMBERS | st.builds(spans, NUMBERS, st.integers(0, 3))
BRACKETS = st.lists(RANGES, min_size=1, max_size=3).map(lambda ranges: f"[{','.join(ranges)}]")
HOSTS = st.builds(lambda name, parts: name + "".join(parts), NAMES, st.lists(BRACKETS | NAMES, max_size=3))


# Lists that Slurm itself refuses are not compared (some releases take no name behind a bracket that ends the list).
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hosts=st.lists(HOSTS, min_size=1, max_size=3).map(",".join))
def test_the_first_host_of_any_list(slurm: Cluster, hosts: str) -> None:
    done = ran(slurm, ["scontrol", "show", "hostnames", hosts])
    if "Invalid" not in done.stdout + done.stderr:
        assert first_host(hosts) == done.stdout.split("\n")[0]


# ---- masks ----------------------------------------------------------------------------------------------------------

CPUS = sorted(os.sched_getaffinity(0))
# A node has the CPUs 0 and 1 here. With --cpu-bind=none, Slurm gives no mask to a step that has both.
two_cpus = pytest.mark.skipif(CPUS[:2] != [0, 1], reason="needs CPUs 0 and 1")


def places(done: subprocess.CompletedProcess[str]) -> dict[int, list[int]]:
    """For each task, by number: its CPUs."""
    assert done.returncode == 0, done.stderr
    return {rank: place["cpus"] for rank, _, place in map(json.loads, done.stdout.splitlines())}


@two_cpus
def test_a_task_stays_within_the_mask_that_slurm_gave_it(slurm: Cluster) -> None:
    done = ran(slurm, ["srun", "-N1", "-n2", "--cpu-bind=map_cpu:1,0", *BIND, *PLACE])
    assert places(done) == {0: [1], 1: [0]}
    assert re.search("local rank 0: srun bound this rank to CPUs 1,.*`srun --cpu-bind=none`", done.stderr)
    assert "local rank 1" not in done.stderr, "one says it for all of a node"


@two_cpus
def test_what_slurm_gave_to_one_task_is_not_split_again(slurm: Cluster) -> None:
    done = ran(slurm, ["srun", "-N1", "-n2", *BIND, "--numa-binding=exclusive", "true"])
    assert done.returncode == 2
    assert re.search("exclusive: srun bound this rank to CPUs [01],", done.stderr)


@two_cpus
def test_what_slurm_gave_to_all_tasks_is_shared(slurm: Cluster) -> None:
    """A job that has a part of a node has a mask even with --cpu-bind=none."""
    done = ran(slurm, ["srun", "-N1", "-n2", "--overcommit", "--cpu-bind=none", *BIND, *PLACE])
    assert places(done) == {0: [0], 1: [0]}
    assert re.search("local rank 0: 2 ranks share CPUs 0: `srun --cpus-per-task=N` may give more", done.stderr)
    one = ran(slurm, ["srun", "-n1", "--cpu-bind=none", *BIND, "--numa-binding=exclusive", *PLACE])
    assert (places(one), one.stderr) == ({0: [0]}, "")


@two_cpus
def test_unbound_tasks_are_bound_by_their_numbers(slurm: Cluster) -> None:
    srun = ["srun", "-N2", "-n4", "--ntasks-per-node=2", "--cpu-bind=none"]
    done = ran(slurm, [*srun, *BIND, "--numa-binding=exclusive", *PLACE])
    found = places(done)
    assert done.stderr == ""
    assert found[0] == found[2] and found[1] == found[3] and not {*found[0]} & {*found[1]}
    by_hand = ran(slurm, [*srun, *BIND, "--cpus", "0:1", *PLACE])
    assert places(by_hand) == {0: [0], 1: [1], 2: [0], 3: [1]}


# ---- rankspawn run --------------------------------------------------------------------------------------------------

SRUN = ["srun", "-N2", "--ntasks-per-node=1", "--cpu-bind=none", "--overcommit", "--kill-on-bad-exit=1"]
RUN = [sys.executable, "-m", "rankspawn", "run"]


def in_ranks(code: str, *options: str) -> list[str]:
    return [*SRUN, *RUN, "--nproc-per-node", "2", *options, "--no-python", sys.executable, "-c", code]


def test_ranks_on_two_nodes(slurm: Cluster) -> None:
    # Few variables, because srun passes on what it reads, and may break a long line by another task's.
    names = (
        "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE"
        " MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID SLURMD_NODENAME SLURM_JOB_ID"
    )
    code = f"import json, os; os.write(1, (json.dumps([os.environ[i] for i in '{names}'.split()]) + '\\n').encode())"
    done = ran(slurm, in_ranks(code))
    # Slurm gives a task one CPU, and each launcher says that its two ranks share it.
    said = re.sub(r"rankspawn: 2 ranks share CPUs \d: `srun --cpus-per-task=N` may give more\n", "", done.stderr)
    assert (done.returncode, said) == (0, "")
    found = sorted(map(json.loads, done.stdout.splitlines()))
    job = found[0][-1]
    master = [slurm.nodes[0], f"{29500 + 10 * int(job) % 3001}", f"{job}.0"]
    assert found == [
        [f"{rank}", f"{rank % 2}", "4", "2", f"{rank // 2}", "2", *master, slurm.nodes[rank // 2], job]
        for rank in range(4)
    ]


def test_the_ranks_of_two_nodes_meet(slurm: Cluster) -> None:
    example = Path(__file__).parents[2] / "examples" / "ring_allreduce.py"
    done = ran(slurm, [*SRUN, *RUN, "--nproc-per-node", "2", str(example), "--elements", "1000"])
    assert done.returncode == 0, done.stderr
    assert "over 4 ranks" in done.stdout and "the sum is exact" in done.stdout


def test_a_failed_rank_ends_the_job_on_both_nodes(slurm: Cluster) -> None:
    code = "import os, sys, time\nif os.environ['RANK'] == '3': sys.exit(7)\ntime.sleep(120)"
    done = ran(slurm, in_ranks(code))
    assert done.returncode != 0, "srun's is the highest of its tasks': that of a signal, where the others were ended"
    assert "task 1: Exited with exit code 7" in done.stderr


def test_several_tasks_of_a_node_cannot_each_start_all_ranks(slurm: Cluster) -> None:
    done = ran(slurm, ["srun", "-n2", *RUN, "--nproc-per-node", "2", "--no-python", "true"])
    assert done.returncode == 2
    assert "srun started 2 processes on this node" in done.stderr and "srun --ntasks-per-node=1" in done.stderr


# ---- the end --------------------------------------------------------------------------------------------------------

MARK = "RANKSPAWN_TEST_MARK"

# A rank with a child, an orphan and, where Slurm can find it, a process that has left the session.
FAMILY = """
import os, subprocess, sys, time
subprocess.Popen(["sleep", "120"])
subprocess.run(["sh", "-c", "sleep 120 &"])
if sys.argv[1] == "leave":
    subprocess.run(["sh", "-c", "setsid sleep 120 &"])
os.write(1, b"here\\n")
time.sleep(120)
"""

ALONE = "import os, time; os.write(1, b'here\\n'); time.sleep(120)"


def marked(mark: str) -> dict[int, str]:
    """The processes that have the mark in their environment, and their command lines."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found[process.pid] = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended, or a zombie; another user's
            continue
    return found


@contextmanager
def job(slurm: Cluster, command: list[str], ranks: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A srun whose ranks all run by now, and the mark that its processes carry."""
    mark = uuid.uuid4().hex
    environ = {**slurm.environ, MARK: mark}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as srun:
        assert srun.stdout is not None and srun.stderr is not None
        watchdog = threading.Timer(TIMEOUT, srun.kill)
        watchdog.start()
        try:
            here = [srun.stdout.readline() for _ in range(ranks)]
            assert here == [b"here\n"] * ranks, srun.stderr.read()
            yield srun, mark
            if srun.returncode is None:
                srun.communicate()
            left = gone(mark)
            assert left == {}
        finally:
            watchdog.cancel()
            watchdog.join()
            for pid in marked(mark):  # srun too
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def gone(mark: str) -> dict[int, str]:
    """The marked processes that are left when all had time to end: Slurm waits 2 s (KillWait) before it kills."""
    deadline = time.monotonic() + 10
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def job_id(slurm: Cluster) -> str:
    (found,) = slurm.asked("squeue", "-h", "-o", "%i").split()
    return found


def test_a_cancelled_job_leaves_nothing(any_slurm: Cluster) -> None:
    leave = "leave" if any_slurm.holds_all else "stay"
    with job(any_slurm, [*in_ranks(FAMILY), leave], 4) as (_, mark):
        # A process that is still in execve(2) shows an empty environment.
        eventually(lambda: len(marked(mark)) >= 2 + 4 * 3)
        any_slurm.asked("scancel", job_id(any_slurm))


def test_a_cancelled_job_whose_ranks_ignore_signals_leaves_nothing(any_slurm: Cluster) -> None:
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)" + FAMILY
    # After KillWait (2 s here) Slurm kills what it finds, also the launcher. So the launcher must have killed what
    # Slurm does not find by then.
    options = [] if any_slurm.holds_all else ["--grace", "0.5"]
    with job(any_slurm, [*in_ranks(deaf, *options), "stay"], 4):
        any_slurm.asked("scancel", job_id(any_slurm))


# Saves a checkpoint at each notice, and ends well after it.
SAVES = """
import os, signal, subprocess, sys, time
from pathlib import Path
def save(*_):
    Path(sys.argv[1], os.environ["RANK"]).write_text("saved")
    told.append(1)
told = []
signal.signal(signal.SIGUSR1, save)
os.write(1, b"here\\n")
deadline = time.monotonic() + 100
while not told and time.monotonic() < deadline:
    time.sleep(0.05)
time.sleep(0.5)
"""


def test_each_rank_saves_a_checkpoint_when_scancel_sends_a_notice(slurm: Cluster, tmp_path: Path) -> None:
    with job(slurm, [*in_ranks(SAVES), str(tmp_path)], 4) as (srun, _):
        slurm.asked("scancel", "--signal=USR1", job_id(slurm))
        _, said = srun.communicate()
        assert srun.returncode == 0, said
        assert b"guard" not in said, "Slurm signals all processes of the step, the guards too"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("0123", "saved")


def test_a_cancelled_job_is_not_blamed_on_a_rank(any_slurm: Cluster) -> None:
    """Slurm signals all processes of a step, and ranks often die before their launcher has read its own signal."""
    with job(any_slurm, in_ranks(ALONE), 4) as (srun, _):
        any_slurm.asked("scancel", job_id(any_slurm))
        _, said = srun.communicate()
    assert b"SIGTERM: ending the ranks" in said
    assert re.search(rb"rankspawn: rank \d+ (has failed|was killed|failed)", said) is None, said


def launchers(mark: str) -> list[int]:
    return [pid for pid, line in marked(mark).items() if " -m rankspawn run " in line and not line.startswith("srun")]


@pytest.mark.parametrize("which", ["one", "all"])
def test_killed_launchers_leave_nothing(any_slurm: Cluster, which: str) -> None:
    # Where Slurm would not find the ranks' children, the guard does.
    options, leave = ([], "leave") if any_slurm.holds_all else (["--guard"], "stay")
    with job(any_slurm, [*in_ranks(FAMILY, *options), leave], 4) as (_, mark):
        found = launchers(mark)
        assert len(found) == 2
        for pid in found[: 1 if which == "one" else 2]:
            os.kill(pid, signal.SIGKILL)


def test_a_killed_srun_leaves_nothing(any_slurm: Cluster) -> None:
    """Slurm then kills all that it finds; without a cgroup it finds guards, too, but not what ranks left behind."""
    family = FAMILY if any_slurm.holds_all else ALONE
    with job(any_slurm, [*in_ranks(family), "leave"], 4) as (srun, _):
        cancelled = job_id(any_slurm)
        srun.kill()
        any_slurm.asked("scancel", cancelled)


def test_a_cancelled_rank_of_bind_leaves_nothing(any_slurm: Cluster) -> None:
    """The rank is Slurm's own task, as if it had been started without us."""
    code = [sys.executable, "-c", FAMILY if any_slurm.holds_all else ALONE, "leave"]
    with job(any_slurm, ["srun", "-N2", "-n4", "--overcommit", *BIND, *code], 4):
        any_slurm.asked("scancel", job_id(any_slurm))


def test_the_status_of_a_program_is_srun_s(slurm: Cluster) -> None:
    assert ran(slurm, ["srun", "-n1", *BIND, "sh", "-c", "exit 7"]).returncode == 7
    done = ran(slurm, ["srun", "-n1", *BIND, "no-such-program"])
    assert done.returncode == 127
    assert "rankspawn: no-such-program: No such file or directory" in done.stderr


# ---- the notice before the time limit -------------------------------------------------------------------------------

CHECKPOINT = """
import json, os, signal, sys, time
saved = []
def save(number, frame):
    saved.append(number)
signal.signal(signal.SIGUSR1, save)
print("here", flush=True)
end = time.monotonic() + 50
while not saved and time.monotonic() < end:
    time.sleep(0.05)
time.sleep(1)  # a job that has saved goes on
open(os.path.join(sys.argv[1], os.environ["RANK"]), "w").write(str(len(saved) > 0))
"""


def test_each_rank_saves_a_checkpoint_at_slurms_notice(slurm: Cluster, tmp_path: Path) -> None:
    """As --signal=USR1@60 has it: the notice comes to the processes of the step, and the job goes on."""
    # Slurm looks at time limits every 30 seconds: a limit of 1 minute, and a notice that is due at once.
    command = in_ranks(CHECKPOINT)
    at = command.index("-N2") + 1
    command[at:at] = ["--time=1", "--signal=USR1@59"]
    done = subprocess.run([*command, str(tmp_path)], env=slurm.environ, capture_output=True, text=True, timeout=90)
    told = WAITED.sub("", done.stderr)
    assert (done.returncode, "has failed" in told, "guard" in told) == (0, False, False), told
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {str(rank): "True" for rank in range(4)}
