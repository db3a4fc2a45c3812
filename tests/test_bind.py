"""``rankspawn bind``, as launchers run it: a process that binds itself and then executes the program."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import rankspawn
from tests.test_imports import SLOW

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")

BIND = [sys.executable, "-m", "rankspawn", "bind"]
TIMEOUT = 60.0

CPUS = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")

# The variables that launchers set, and those that `bind` sets.
THEIRS = re.compile("(OMPI|PMI|PMIX|PALS|MPI|SLURM|TORCHELASTIC|GROUP|OMP|KMP|GOMP)_|(LOCAL_)?(RANK|WORLD_SIZE)$")

# The program prints how it was started.
PROGRAM = """
import json, os, signal, sys
maps = "/proc/self/numa_maps"
print(json.dumps({
    "arguments": sys.argv[1:],
    "pid": os.getpid(),
    "cpus": sorted(os.sched_getaffinity(0)),
    "memory": open(maps).readline().split()[1] if os.path.exists(maps) else None,
    "environment": dict(os.environ),
}))
"""
PLACE = [sys.executable, "-c", PROGRAM]


def launchers(local_rank: int, local_size: int) -> dict[str, dict[str, str]]:
    """The variables by which each launcher tells these two numbers."""
    r, n = str(local_rank), str(local_size)
    return {
        "Open MPI": {
            "OMPI_COMM_WORLD_RANK": r,
            "OMPI_COMM_WORLD_SIZE": n,
            "OMPI_COMM_WORLD_LOCAL_RANK": r,
            "OMPI_COMM_WORLD_LOCAL_SIZE": n,
        },
        "Hydra": {"PMI_RANK": r, "PMI_SIZE": n, "MPI_LOCALRANKID": r, "MPI_LOCALNRANKS": n},
        "PALS": {"PALS_RANKID": r, "PALS_LOCAL_RANKID": r, "PALS_LOCAL_SIZE": n},
        "PMI": {"PMI_RANK": r, "PMI_SIZE": n, "PMI_LOCAL_RANK": r, "PMI_LOCAL_SIZE": n},
        "Slurm": {
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": r,
            "SLURM_LOCALID": r,
            "SLURM_NODEID": "0",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_NUM_TASKS": n,
            "SLURM_STEP_TASKS_PER_NODE": n,
            "SLURM_STEP_NODELIST": "gpu1",
        },
        "torchrun": {"RANK": r, "LOCAL_RANK": r, "LOCAL_WORLD_SIZE": n, "TORCHELASTIC_RUN_ID": "none"},
    }


def environment(told: dict[str, str]) -> dict[str, str]:
    """This process's environment, as if a launcher had started it with the variables ``told``."""
    return {**{name: value for name, value in os.environ.items() if not THEIRS.match(name)}, **told}


RANK_1_OF_2 = environment(launchers(1, 2)["Open MPI"])


def ran(command: Sequence[str], env: dict[str, str] = RANK_1_OF_2, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT, **options)


def found(command: Sequence[str], env: dict[str, str] = RANK_1_OF_2, said: str = "") -> dict[str, Any]:
    """What the program finds. Asserts that the pattern ``said`` matches all that `bind` says."""
    done = ran(command, env)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(said, done.stderr.strip(), re.DOTALL), done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def from_a_bound_launcher(cpus: Sequence[int], told: dict[str, str], command: Sequence[str]) -> list[str]:
    """``command`` with the variables ``told``, started by a process that has no such variables and is bound to
    ``cpus``."""
    code = (
        f"import os, subprocess, sys; os.sched_setaffinity(0, {list(cpus)})\n"
        f"sys.exit(subprocess.run(sys.argv[1:], env={{**os.environ, **{told}}}).returncode)"
    )
    return [sys.executable, "-c", code, *command]


def bound_to(cpus: Sequence[int], command: Sequence[str]) -> list[str]:
    """``command``, in a process that a launcher has already bound to ``cpus``."""
    code = f"import os, sys; os.sched_setaffinity(0, {list(cpus)}); os.execvp(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", code, *command]


# ---- what the program finds -----------------------------------------------------------------------------------------


@two_cpus
@pytest.mark.parametrize("launcher", launchers(0, 1))
def test_a_rank_of_each_launcher_is_where_it_belongs(launcher: str) -> None:
    for local_rank, cpu in enumerate(CPUS[:2]):
        env = environment(launchers(local_rank, 2)[launcher])
        place = found([*BIND, "--cpus", f"{CPUS[0]}:{CPUS[1]}", "--", *PLACE], env)
        assert place["cpus"] == [cpu]


def test_the_default_is_auto() -> None:
    """With one node, it leaves the rank unbound."""
    said = r"rankspawn: local rank 1: cpus (inherited|[\d,-]+), memory inherited"
    place = found([*BIND, "-v", *PLACE], said=said)
    assert place["cpus"] and set(place["cpus"]) <= set(CPUS)


def test_a_memory_policy() -> None:
    done = ran([*BIND, "--numa-binding", "node", "--memory-policy", "bind", "--verbose", "--", *PLACE])
    if done.returncode and "set_mempolicy: " in done.stderr:
        pytest.skip(done.stderr.strip())  # the kernel has no NUMA, or the container forbids the call
    assert re.match("bind:[0-9,-]+$", json.loads(done.stdout)["memory"])
    assert re.fullmatch(r"rankspawn: local rank 1: cpus [\d,-]+, memory bind:[\d,-]+\n", done.stderr)


@two_cpus
def test_threads() -> None:
    """`bind` sets OMP_NUM_THREADS as `run` does, unless it is set; it adds, changes and removes no other variable."""
    command = [*BIND, "--numa-binding", "exclusive", *PLACE]
    # In a C locale an interpreter sets LC_CTYPE (PEP 538).
    env = RANK_1_OF_2 | {"LC_ALL": "C.UTF-8"}
    place = found(command, env)
    threads = place["environment"].pop("OMP_NUM_THREADS")
    assert 1 <= int(threads) <= len(place["cpus"]) < len(CPUS)
    assert place["environment"] == env
    assert found(command, env | {"OMP_NUM_THREADS": "3"})["environment"]["OMP_NUM_THREADS"] == "3"


def test_what_shrinks_masks_is_said_once_a_node() -> None:
    warning = "rankspawn: local rank 0: OMP_PROC_BIND=true makes.*"
    found([*BIND, *PLACE], environment(launchers(0, 2)["PMI"]) | {"OMP_PROC_BIND": "true"}, warning)
    found([*BIND, *PLACE], environment(launchers(1, 2)["PMI"]) | {"OMP_PROC_BIND": "true"})


def test_options_win_over_the_environment() -> None:
    last = [*BIND, "--local-rank", "2", "--nproc-per-node", "3", "--cpus", f"{CPUS[0]}:{CPUS[0]}:{CPUS[-1]}", *PLACE]
    for env in (environment({}), RANK_1_OF_2, environment({"LOCAL_RANK": "0"})):
        assert found(last, env)["cpus"] == [CPUS[-1]]


def test_the_rest_of_the_line_is_the_program_s() -> None:
    for words in (["--", "-v"], ["-v", "--", "--local-rank", "7"], ["", "a b", "--"]):
        assert found([*BIND, "--", *PLACE, *words])["arguments"] == words
        assert found([*BIND, *PLACE, *words])["arguments"] == words


def test_it_is_the_same_process_with_its_descriptors() -> None:
    """The program keeps the pid that the launcher knows, and the descriptor by which Hydra talks to it (PMI_FD)."""
    read, write = os.pipe()
    try:
        command = [*BIND, sys.executable, "-c", f"import os; os.write({write}, str(os.getpid()).encode())"]
        with subprocess.Popen(command, env=RANK_1_OF_2, pass_fds=[write]) as process:
            os.close(write)
            write = -1
            assert os.read(read, 100) == str(process.pid).encode()
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)


def test_what_comes_before_each_rank_is_light() -> None:
    # -I -S: the imports of the site's own files are not ours. With importtime the interpreter prints what it imports.
    code = "import sys; sys.path.append(sys.argv.pop(1)); from rankspawn._cli.main import main; main()"
    python = [sys.executable, "-I", "-S", "-X", "importtime", "-c", code, str(Path(rankspawn.__file__).parents[1])]
    done = ran([*python, "bind", "--memory-policy", "local", "--numa-binding-optional", "true"])
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"argparse", "rankspawn._cli.bind"} <= imported
    assert SLOW.isdisjoint(imported)


def test_signals_are_as_they_were() -> None:
    """The interpreter ignores two signals that the program does not; what a user ignores (nohup) stays ignored."""
    plain = ["cat", "/proc/self/status"]
    status = [*BIND, *plain]

    def masks(command: list[str]) -> dict[str, int]:
        lines = re.findall(r"^Sig(Ign|Blk|Cgt):\s*(\w+)$", ran(command).stdout, re.M)
        found = {name: int(mask, 16) for name, mask in lines}
        # make starts programs by glibc's posix_spawn, in which glibc's own two signals are ignored.
        return {**found, "Ign": found["Ign"] & ~(3 << 31)}

    assert masks(status) == masks(plain)
    code = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execvp(sys.argv[1], sys.argv[1:])"
    assert masks([sys.executable, "-c", code, *status])["Ign"] == 1 << signal.SIGHUP - 1


# ---- what was inherited ---------------------------------------------------------------------------------------------

KEPT = "mpirun bound this rank to CPUs {}, so rankspawn keeps it there; `mpirun --bind-to none` lets"


@two_cpus
@pytest.mark.parametrize("script", [False, True], ids=["directly", "through a script"])
def test_a_launcher_s_mask_is_kept_and_said(script: bool) -> None:
    command = ["sh", "-c", '"$@"; exit $?', "-", *BIND, *PLACE] if script else [*BIND, *PLACE]
    for local_rank, cpu in enumerate(CPUS[:2]):
        told = launchers(local_rank, 2)["Open MPI"]
        said = f"rankspawn: local rank 0: {KEPT.format(cpu)}.*" if local_rank == 0 else ""
        place = found(bound_to([cpu], command), environment(told), said)
        assert place["cpus"] == [cpu]
        assert place["environment"]["OMP_NUM_THREADS"] == "1"


@two_cpus
def test_what_one_rank_was_given_is_not_split_among_all() -> None:
    command = bound_to(CPUS[1:], [*BIND, "--numa-binding", "exclusive"])
    done = ran([*command, *PLACE])
    assert (done.returncode, done.stdout) == (2, "")
    assert "rankspawn: exclusive: mpirun bound this rank to CPUs" in done.stderr
    place = found([*command, "--numa-binding-optional", *PLACE])
    assert place["cpus"] == CPUS[1:]
    assert int(place["environment"]["OMP_NUM_THREADS"]) == len(CPUS[1:])


@two_cpus
def test_a_mask_that_all_ranks_share_is_split() -> None:
    """As with `taskset -c 0-1 mpirun`: the launcher itself may use no other CPUs."""
    places = []
    for local_rank in (0, 1):
        told = launchers(local_rank, 2)["Open MPI"]
        command = from_a_bound_launcher(CPUS[:2], told, [*BIND, "--numa-binding", "exclusive", *PLACE])
        places.append(found(command, environment({}))["cpus"])
    assert sorted(places) == [[CPUS[0]], [CPUS[1]]]


@two_cpus
def test_a_mask_that_is_left_alone_is_as_it_was() -> None:
    nodes = ["--mems", "0", "--numa-binding-optional"]
    assert json.loads(ran(bound_to(CPUS[:1], [*BIND, *nodes, *PLACE])).stdout)["cpus"] == CPUS[:1]


@two_cpus
def test_what_a_cpuset_withholds_is_not_the_launcher_s_doing() -> None:
    """The launcher is outside of the cpuset, as Slurm's daemon is outside of a job's; the ranks inside share all of
    it."""
    cpuset = Path(f"/sys/fs/cgroup/cpuset/rankspawn-test-{os.getpid()}")
    try:
        cpuset.mkdir()
    except OSError as error:
        pytest.skip(f"no cpuset of cgroup v1 can be made here: {error}")
    try:
        for name, value in (("cpus", str(CPUS[0])), ("mems", Path(cpuset.parent, "cpuset.mems").read_text())):
            (cpuset / f"cpuset.{name}").write_text(value)
        code = f"import os, sys; open('{cpuset}/tasks', 'w').write('0'); os.execvp(sys.argv[1], sys.argv[1:])"
        # `bind` refuses "exclusive" where it finds that the launcher itself has bound the rank.
        alone = environment(launchers(0, 1)["Open MPI"])
        command = [sys.executable, "-c", code, *BIND, "--numa-binding", "exclusive", *PLACE]
        assert found(command, alone)["cpus"] == CPUS[:1]
    finally:
        cpuset.rmdir()


@two_cpus
def test_too_few_cpus_for_all_is_said() -> None:
    told = launchers(0, 2)["Open MPI"]
    said = f"rankspawn: local rank 0: 2 ranks share CPUs {CPUS[0]}: `mpirun --bind-to none` may give more"
    command = from_a_bound_launcher(CPUS[:1], told, [*BIND, *PLACE])
    assert found(command, environment({}), said)["cpus"] == CPUS[:1]


@two_cpus
def test_a_place_outside_the_mask_is_an_error_with_its_reason() -> None:
    done = ran(bound_to(CPUS[:1], [*BIND, "--cpus", f"{CPUS[0]}:{CPUS[1]}", *PLACE]))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{CPUS[1]} may not be used" in done.stderr and KEPT.format(CPUS[0]) in done.stderr


# ---- what cannot be -------------------------------------------------------------------------------------------------


def test_a_program_that_is_not_there() -> None:
    for program in ("/no/such/program", "no-such-program"):
        done = ran([*BIND, program])
        assert (done.returncode, done.stdout) == (127, "")
        assert done.stderr == f"rankspawn: {program}: No such file or directory\n"


def test_a_program_that_cannot_be_executed(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    for program in (str(tmp_path / "plain"), str(tmp_path)):
        done = ran([*BIND, program])
        assert (done.returncode, done.stderr) == (126, f"rankspawn: {program}: Permission denied\n")


@pytest.mark.parametrize(
    ("told", "words", "message"),
    [
        (
            {},
            [],
            "cannot tell the local rank: no launcher variable (LOCAL_RANK, SLURM_LOCALID, ...) is set; pass",
        ),
        ({"PMIX_RANK": "3"}, [], "cannot tell the local rank: a PMIx launcher sets no variable for it; pass"),
        ({"LOCAL_RANK": "0"}, [], "cannot tell how many ranks this node has: pass --nproc-per-node"),
        ({}, ["--local-rank", "0"], "cannot tell how many ranks this node has: pass --nproc-per-node"),
        (
            {},
            ["--local-rank", "2", "--nproc-per-node", "2"],
            "local rank 2 does not exist: this node has 2 ranks, counted from 0",
        ),
        (
            {},
            ["--local-rank", "0", "--nproc-per-node", "0"],
            "local rank 0 does not exist: this node has 0 ranks, counted from 0",
        ),
        ({"LOCAL_RANK": "x"}, [], "LOCAL_RANK='x': expected a non-negative integer"),
        (
            {**launchers(1, 2)["PMI"], "LOCAL_RANK": "0"},
            [],
            "LOCAL_RANK=0 contradicts PMI_LOCAL_RANK=1: pass --local-rank",
        ),
        (launchers(1, 2)["PMI"], ["--cpus", "0:0:0"], "--cpus '0:0:0' has 3 lists for 2 ranks"),
        (launchers(1, 2)["PMI"], ["--devices", "gpu0"], "--devices 'gpu0': 'gpu0' is not a PCI address"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rank_without_a_place(told: dict[str, str], words: list[str], message: str) -> None:
    done = ran([*BIND, *words, *PLACE], environment(told))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"rankspawn: {message}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "PROGRAM is missing"),
        (["--"], "PROGRAM is missing"),
        (["--local-rank", "-1", "true"], "--local-rank"),
        (["--local-rank", "one", "true"], "expected a non-negative integer, got 'one'"),
        (["--no-such-option", "true"], "--no-such-option"),
    ],
)
def test_wrong_usage(words: list[str], message: str) -> None:
    done = ran([*BIND, *words])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: rankspawn bind ") and message in done.stderr.splitlines()[-1]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (Debian, Ubuntu: apt-get install strace)")
def test_a_refused_step(tmp_path: Path) -> None:
    log = tmp_path / "log"
    fault = ["-e", "trace=set_mempolicy", "-e", "inject=set_mempolicy:error=EPERM"]
    command = ["strace", "-o", str(log), *fault, *BIND, "--numa-binding", "node", "--memory-policy", "bind"]
    done = ran([*command, *PLACE])
    if "ptrace" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert "MPOL_BIND" in log.read_text() and "(INJECTED)" in log.read_text()
    assert (done.returncode, done.stdout) == (1, "")
    assert "set_mempolicy: Operation not permitted (asked: bind:" in done.stderr
    optional = ran([*command, "--numa-binding-optional", *PLACE])
    assert optional.returncode == 0, optional.stderr
    assert not json.loads(optional.stdout)["memory"].startswith("bind")
    refused = "rankspawn: local rank 1: the system refused set_mempolicy: Operation not permitted\n"
    assert optional.stderr == refused
    verbose = ran([*command, "--numa-binding-optional", "-v", *PLACE]).stderr
    assert re.fullmatch(re.escape(refused) + r"rankspawn: local rank 1: cpus [\d,-]+, memory inherited\n", verbose)
    by_auto = ran([*command[:-4], "--memory-policy", "bind", *PLACE])
    assert (by_auto.returncode, by_auto.stderr) == (0, refused)
