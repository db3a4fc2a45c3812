"""Under real mpirun (Open MPI) and mpiexec (MPICH's Hydra): `make test-mpi`."""

from __future__ import annotations

import json
import os
import re
import shutil
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

from tests.support.processes import eventually

TIMEOUT = 60.0

# Debian's names of the two; `mpirun` may be either.
OPEN_MPI = ["mpirun.openmpi", "--oversubscribe"]
HYDRA = ["mpiexec.hydra"]
UNBOUND = {"Open MPI": [*OPEN_MPI, "--bind-to", "none"], "Hydra": HYDRA}

RANKSPAWN = [sys.executable, "-m", "rankspawn"]
BIND = [*RANKSPAWN, "bind"]

# Open MPI refuses to run as root unless these two variables are set.
ENVIRONMENT = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
MARK = "RANKSPAWN_TEST_MARK"

CPUS = sorted(os.sched_getaffinity(0))
two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")

# The line is short because mpirun passes on what it reads, and would break a long line by another rank's.
PLACE = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
names += ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
place = {name: os.environ[name] for name in names if name in os.environ}
os.write(1, (json.dumps({**place, "cpus": sorted(os.sched_getaffinity(0))}) + "\\n").encode())
"""
IN_PLACE = [sys.executable, "-c", PLACE]


@pytest.fixture(autouse=True, scope="session")
def installed() -> None:
    for program in (OPEN_MPI[0], HYDRA[0]):
        assert shutil.which(program), (
            f"{program} is not installed; on Debian or Ubuntu: apt-get install openmpi-bin mpich"
        )


def ran(command: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**ENVIRONMENT, **environ}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)


def places(command: list[str], rank: str) -> dict[int, dict[str, Any]]:
    """What each rank finds, by the number in the variable ``rank``. Asserts that stderr is empty."""
    done = ran(command)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return {int(place[rank]): place for place in map(json.loads, done.stdout.splitlines())}


# ---- bind -----------------------------------------------------------------------------------------------------------

RANK = {"Open MPI": "OMPI_COMM_WORLD_RANK", "Hydra": "PMI_RANK"}


@two_cpus
@pytest.mark.parametrize("launcher", UNBOUND)
def test_ranks_are_bound_by_their_numbers(launcher: str) -> None:
    lists = ":".join(str(CPUS[i % 2]) for i in range(4))
    found = places([*UNBOUND[launcher], "-np", "4", *BIND, "--cpus", lists, "--", *IN_PLACE], RANK[launcher])
    assert {rank: place["cpus"] for rank, place in found.items()} == {i: [CPUS[i % 2]] for i in range(4)}


@two_cpus
@pytest.mark.parametrize("launcher", UNBOUND)
def test_an_exclusive_split(launcher: str) -> None:
    found = places([*UNBOUND[launcher], "-np", "2", *BIND, "--numa-binding", "exclusive", *IN_PLACE], RANK[launcher])
    cpus = [set(place["cpus"]) for _, place in sorted(found.items())]
    assert cpus[0] and cpus[1] and not cpus[0] & cpus[1]
    for place in found.values():
        assert 1 <= int(place["OMP_NUM_THREADS"]) <= len(place["cpus"])


@two_cpus
def test_mpirun_s_own_binding_is_kept_and_said() -> None:
    """mpirun binds each of two ranks to a core, unless it is told otherwise."""
    done = ran([*OPEN_MPI, "-np", "2", "--bind-to", "core", *BIND, "--numa-binding", "node", "-v", *IN_PLACE])
    assert done.returncode == 0, done.stderr
    found = {int(one["OMPI_COMM_WORLD_RANK"]): one["cpus"] for one in map(json.loads, done.stdout.splitlines())}
    assert set(found[0]) | set(found[1]) < set(CPUS) or not set(found[0]) & set(found[1])
    said = re.search(r"local rank 0: mpirun bound this rank to CPUs ([\d,-]+),.*`mpirun --bind-to none`", done.stderr)
    assert said and f"local rank 0: cpus {said[1]}, memory inherited" in done.stderr
    refused = ran([*OPEN_MPI, "-np", "2", "--bind-to", "core", *BIND, "--numa-binding", "exclusive", "true"])
    assert refused.returncode == 2 and "exclusive: mpirun bound this rank to CPUs" in refused.stderr


def test_mpi_finds_itself_behind_bind() -> None:
    """The program runs in the process that Hydra started, and Hydra's descriptor (PMI_FD) is open in it."""
    code = (
        "import os; fd = int(os.environ['PMI_FD']); os.write(fd, b'cmd=init pmi_version=1 pmi_subversion=1\\n');"
        " os.write(1, os.read(fd, 100))"
    )
    done = ran([*HYDRA, "-np", "1", *BIND, sys.executable, "-c", code])
    assert done.stdout.startswith("cmd=response_to_init") and "rc=0" in done.stdout


def test_a_program_that_is_not_there() -> None:
    done = ran([*OPEN_MPI, "-np", "1", *BIND, "no-such-program"])
    assert done.returncode == 127
    assert "rankspawn: no-such-program: No such file or directory" in done.stderr


# ---- run ------------------------------------------------------------------------------------------------------------

RUN = [*RANKSPAWN, "run", "--nproc-per-node", "2"]

# It replaces ssh: [-x] HOST COMMAND ... runs the launcher's daemon on this machine. Each daemon has its own folder for
# temporary files, because otherwise two daemons of Open MPI overwrite each other's shared files, and one of them ends
# with SIGSEGV.
REMOTE_SHELL = """#!/bin/sh
[ "$1" = -x ] && shift
TMPDIR="$0-$1"
mkdir -p "$TMPDIR" && export TMPDIR
shift
exec sh -c "$*"
"""


def one_a_node(launcher: str) -> list[str]:
    return [*OPEN_MPI, "--map-by", "ppr:1:node", "--bind-to", "none"] if launcher == "Open MPI" else [*HYDRA, "-n", "1"]


@pytest.fixture(params=["Open MPI", "Hydra"])
def on_two_nodes(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A launcher with one process on each of two nodes; the nodes are two of its daemons on this machine."""
    shell = tmp_path / "ssh"
    shell.write_text(REMOTE_SHELL)
    shell.chmod(0o755)
    if request.param == "Open MPI":
        nodes = ["--mca", "plm_rsh_agent", str(shell), "--host", "first:1,second:1"]
        return [OPEN_MPI[0], *nodes, "--map-by", "ppr:1:node", "--bind-to", "none"]
    return [*HYDRA, "-launcher", "ssh", "-launcher-exec", str(shell), "-hosts", "first,second", "-ppn", "1", "-n", "2"]


@pytest.mark.parametrize("launcher", UNBOUND)
def test_ranks_on_one_node(launcher: str) -> None:
    found = places([*one_a_node(launcher), *RUN, "--no-python", *IN_PLACE], "RANK")
    for rank, place in found.items():
        told = {"LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        assert {**place, **told} == place
    assert found.keys() == {0, 1}


def test_ranks_on_two_nodes(on_two_nodes: list[str]) -> None:
    found = places([*on_two_nodes, *RUN, "--master-addr", "127.0.0.1", "--no-python", *IN_PLACE], "RANK")
    for rank, place in found.items():
        told = {"LOCAL_RANK": f"{rank % 2}", "WORLD_SIZE": "4", "GROUP_RANK": f"{rank // 2}"}
        assert {**place, **told} == place
    assert found.keys() == {0, 1, 2, 3}
    (port,) = {place["MASTER_PORT"] for place in found.values()}
    assert 29500 <= int(port) <= 32500


def test_the_ranks_of_two_nodes_meet(on_two_nodes: list[str]) -> None:
    example = Path(__file__).parents[2] / "examples" / "ring_allreduce.py"
    done = ran([*on_two_nodes, *RUN, "--master-addr", "127.0.0.1", str(example), "--elements", "1000"])
    assert done.returncode == 0, done.stderr
    assert "over 4 ranks" in done.stdout and "the sum is exact" in done.stdout


def test_where_rank_0_is_has_to_be_said(on_two_nodes: list[str]) -> None:
    done = ran([*on_two_nodes, *RUN, "--no-python", "true"])
    assert done.returncode == 2
    assert re.search("rankspawn: mpi(run|exec) started this on 2 nodes.*pass --master-addr HOST", done.stderr)


# Hydra ends the job when a signal has ended a process, and not when a process exits with a status.
@pytest.mark.parametrize("on_two_nodes", ["Open MPI"], indirect=True)
def test_a_failed_rank_ends_the_job_on_both_nodes(on_two_nodes: list[str]) -> None:
    code = "import os, sys, time; os.environ['RANK'] == '3' and sys.exit(7); time.sleep(120)"
    done = ran([*on_two_nodes, *RUN, "--master-addr", "127.0.0.1", "--no-python", sys.executable, "-c", code])
    assert done.returncode != 0
    assert "rank 3 " in done.stderr or "rank 1 " in done.stderr


@pytest.mark.parametrize("launcher", UNBOUND)
def test_several_processes_of_a_node_cannot_each_start_all_ranks(launcher: str) -> None:
    done = ran([*UNBOUND[launcher], "-np", "2", *RUN, "--no-python", "true"])
    assert done.returncode == 2
    assert re.search(r"started 2 processes on this node.*(--map-by ppr:1:node|-ppn 1)", done.stderr)


def test_a_bind_inside_run_inside_mpirun_is_a_rank_of_run() -> None:
    done = ran([*one_a_node("Open MPI"), *RUN, "--no-python", *BIND, "-v", "true"])
    assert done.returncode == 0
    assert "local rank 0: cpus" in done.stderr and "local rank 1: cpus" in done.stderr


# ---- the end --------------------------------------------------------------------------------------------------------

FAMILY = """
import os, subprocess, time
subprocess.Popen(["sleep", "120"])
subprocess.run(["sh", "-c", "sleep 120 &"])
os.write(1, b"here\\n")
time.sleep(120)
"""
IN_RUN = [*RUN, "--no-python", sys.executable, "-c", FAMILY]
# `bind` becomes the rank in the launcher's own process, so the launcher has to end the rank's children.
IN_BIND = [*BIND, sys.executable, "-c", "import os, time; os.write(1, b'here\\n'); time.sleep(120)"]


def marked(mark: str) -> dict[int, str]:
    """The processes that have the mark in their environment, and their command lines."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found[process.pid] = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended, is a zombie, or another user's
            continue
    return found


@contextmanager
def job(command: list[str], ranks: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A launcher whose ranks have all said that they are here, and the mark that all its processes carry. No process
    with the mark may be left after the block."""
    mark = uuid.uuid4().hex
    with subprocess.Popen(
        command, env={**ENVIRONMENT, MARK: mark}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        watchdog = threading.Timer(TIMEOUT, process.kill)
        watchdog.start()
        try:
            here = [process.stdout.readline() for _ in range(ranks)]
            assert here == [b"here\n"] * ranks, process.stderr.read()
            yield process, mark
            deadline = time.monotonic() + 15
            while (left := marked(mark)) and time.monotonic() < deadline:
                process.poll()
                time.sleep(0.05)
            assert left == {}
        finally:
            for pid in marked(mark):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            watchdog.cancel()
            watchdog.join()


LAUNCHED = {
    f"{what} under {launcher}": [*start, *command]
    for launcher in UNBOUND
    for what, start, command in (
        ("run", one_a_node(launcher), IN_RUN),
        ("bind", [*UNBOUND[launcher], "-np", "2"], IN_BIND),
    )
}


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT], ids=lambda sig: sig.name)
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_signal_to_the_launcher_leaves_nothing(name: str, sig: signal.Signals) -> None:
    with job(LAUNCHED[name], 2) as (process, mark):
        # A process that is still in execve(2) shows an empty environment.
        eventually(lambda: len(marked(mark)) >= (8 if "run" in name else 3))
        process.send_signal(sig)


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_killed_rank_ends_all(name: str) -> None:
    """The launcher ends the others, as after MPI_Abort."""
    with job(LAUNCHED[name], 2) as (process, mark):
        ranks = [pid for pid, line in marked(mark).items() if line.startswith(f"{sys.executable} -c")]
        assert len(ranks) == 2
        os.kill(ranks[0], signal.SIGKILL)
        process.communicate(timeout=TIMEOUT)
        assert process.returncode != 0


def test_a_killed_rankspawn_run_leaves_nothing() -> None:
    """mpirun kills what does not end in time. The ranks die with their launcher, and the guard ends what the ranks have
    started."""
    guarded = [*RUN, "--guard", *IN_RUN[len(RUN) :]]
    with job([*one_a_node("Open MPI"), *guarded], 2) as (_, mark):
        (launcher,) = (
            pid for pid, line in marked(mark).items() if line.startswith(f"{sys.executable} -m rankspawn run")
        )
        os.kill(launcher, signal.SIGKILL)
