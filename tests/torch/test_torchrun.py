"""``python -m rankspawn.torchrun`` beside torchrun itself: the same arguments, the same outcome."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

torchs = pytest.importorskip("torch.distributed.run", reason="torch is not installed")
OPTIONS = torchs.get_args_parser()._option_string_actions
LATER_OPTIONS = {"--duplicate-stdout-filters", "--virtual-local-rank", "--signals-to-handle", "--numa-binding"}
"""Options that torch 2.4 does not have."""

LAUNCHERS = {
    # As the console script does. With -m, the module would be __main__, and its log lines would look different.
    "torchrun": [sys.executable, "-c", "import sys; from torch.distributed.run import main; sys.exit(main())"],
    "ours": [sys.executable, "-m", "rankspawn.torchrun"],
}
SECONDS = 120
# Without what the interpreter or a launcher around the tests may have set.
ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
if not find_spec("torch.numa"):
    # Before 2.9 every job that names no rendezvous wants one and the same port; here two run at a time.
    ENVIRONMENT |= {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "localhost:0"}


@dataclass
class Outcome:
    """What one launcher did. Lines are sorted, because ranks write at any time. files: the lines, below --log-dir."""

    status: int
    stdout: list[str]
    stderr: list[str]
    files: dict[str, list[str]]
    folder: Path


def normalised(text: str, folder: Path) -> str:
    """``text`` without what differs between two runs of one launcher, nor the launcher's own frames."""
    text = text.replace(str(folder), "FOLDER")
    text = re.sub(r"^([A-Z])\d{4} \S+ \d+ (\S+):\d+\]", r"\1 \2]", text, flags=re.MULTILINE)
    text = re.sub(r"^Traceback .*\n(?: .*\n)+", "Traceback\n", text, flags=re.MULTILINE)
    text = re.sub(r"(\bpid:|\bPID|\b[Pp]rocess|\btime +:|\"timestamp\":) ?\"?[\d_:-]+\"?", r"\1 #", text)
    return re.sub(r"(torchelastic|none|[0-9a-f-]{36})_[a-z0-9_]{8}", "JOB", text)


def start(launcher: str, folder: Path, options: Sequence[str], script: str | None, env: dict[str, str]) -> Popen:
    folder.mkdir()
    if script is not None:
        (folder / "script.py").write_text(script)
    command = [*LAUNCHERS[launcher], *(option.replace("FOLDER", str(folder)) for option in options)]
    env = {name: value.replace("FOLDER", str(folder)) for name, value in env.items()}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**ENVIRONMENT, "LC_ALL": "C.UTF-8", "TMPDIR": str(folder), **env}, start_new_session=True,
        # Not the checkout: -m puts this folder on sys.path, and torch's log lines name its files relative to what is.
        cwd=folder,
    )  # fmt: skip


def finish(process: Popen, folder: Path) -> Outcome:
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    files = {
        normalised(str(path), folder): sorted(normalised(path.read_text(), folder).splitlines())
        for path in (folder / "logs").rglob("*")
        if path.is_file()
    }
    lines = (sorted(normalised(text, folder).splitlines()) for text in (out, err))
    return Outcome(process.returncode, *lines, files, folder)


Popen = subprocess.Popen[str]
Both = Callable[..., "tuple[Outcome, Outcome]"]


@pytest.fixture
def both(tmp_path: Path) -> Both:
    """Runs torchrun and ours at the same time, in a folder each; gives both outcomes."""

    def run(
        options: Sequence[str],
        script: str | None = None,
        env: dict[str, str] | None = None,
        then: Callable[[Popen, Path], object] = lambda process, folder: None,
    ) -> tuple[Outcome, Outcome]:
        if missing := LATER_OPTIONS.intersection(options) - OPTIONS.keys():
            pytest.skip(f"this torch has no {', '.join(missing)}")
        folders = [tmp_path / launcher for launcher in LAUNCHERS]
        started = [
            start(name, folder, options, script, env or {}) for name, folder in zip(LAUNCHERS, folders, strict=True)
        ]
        try:
            for process, folder in zip(started, folders, strict=True):
                then(process, folder)
        finally:
            theirs, ours = map(finish, started, folders)
        return theirs, ours

    return run


def same(theirs: Outcome, ours: Outcome, status: int) -> None:
    assert theirs.status == status, theirs.stderr
    # The one message that differs: ours says which rank could not be started.
    ours.stderr = sorted(line.replace("[Errno 2] rank 0: ", "[Errno 2] ") for line in ours.stderr)
    assert ours.stderr == theirs.stderr
    assert (ours.status, ours.stdout) == (status, theirs.stdout)
    assert ours.files == theirs.files


OUT_AND_ERR = """
import os, sys
rank = os.environ["RANK"]
os.write(1, f"out {rank} {sys.argv[1:]}\\n".encode())
os.write(2, f"err {rank}\\n".encode())
"""
TWO = ["--nproc-per-node", "2"]
LOGS = [*TWO, "--log-dir", "FOLDER/logs"]


@pytest.mark.parametrize(
    "options",
    [
        [*TWO],
        [*LOGS, "--redirects", "0:1,1:2", "--standalone"],
        [*LOGS, "--redirects", "0:3", "--tee", "1:1", "--role", "trainer"],
        [*LOGS, "--local-ranks-filter", "1", "--tee", "3"],
        ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", "localhost:0"],
    ],
    ids=" ".join,
)
def test_output_and_logs(both: Both, options: list[str]) -> None:
    theirs, ours = both([*options, "FOLDER/script.py", "a b", "--nproc-per-node", "ü"], OUT_AND_ERR)
    same(theirs, ours, 0)
    assert any("out 0" in line for lines in (theirs.stdout, *theirs.files.values()) for line in lines)


def test_log_filters_and_prefixes(both: Both) -> None:
    options = [*LOGS, "--tee", "3", "--duplicate-stdout-filters", "out 1", "--duplicate-stderr-filters", "err"]
    env = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "<${role_name} ${rank}>"}
    theirs, ours = both([*options, "FOLDER/script.py"], OUT_AND_ERR, env)
    same(theirs, ours, 0)
    assert "<default 1>out 1 []" in theirs.stdout


FAIL_TOGETHER = """
import os, sys, time
from pathlib import Path
folder, rank = Path(__file__).parent, os.environ["RANK"]
(folder / f"up-{rank}").touch()
while len(list(folder.glob("up-*"))) < 2:
    time.sleep(0.001)
sys.exit(3 + int(rank))
"""
RECORDED = """
import os
from torch.distributed.elastic.multiprocessing.errors import record

@record
def main():
    if os.environ["RANK"] == "1":
        raise ValueError("of rank 1")
    import time
    time.sleep(600)

main()
"""
FAILURES = {
    "status": "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(600)",
    "signal": "import os, time; os.kill(os.getpid(), 9) if os.environ['RANK'] == '0' else time.sleep(600)",
    "stubborn": "import os, signal, sys, time; signal.signal(15, 1)\n"
    "sys.exit(1) if os.environ['RANK'] == '0' else time.sleep(600)",
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_rank(both: Both, name: str) -> None:
    theirs, ours = both([*TWO, "FOLDER/script.py"], FAILURES[name], {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"})
    same(theirs, ours, 1)
    assert any("FAILED" in line for line in theirs.stderr)


def test_ranks_that_fail_together(both: Both) -> None:
    """Each is reported with its own status, and not as one that the agent ended."""
    theirs, ours = both([*TWO, "--monitor-interval", "1", "FOLDER/script.py"], FAIL_TOGETHER)
    same(theirs, ours, 1)
    assert {line.strip() for line in theirs.stderr} >= {"exitcode  : 3 (pid: #)", "exitcode  : 4 (pid: #)"}


def test_error_files(both: Both) -> None:
    theirs, ours = both([*LOGS, "FOLDER/script.py"], RECORDED, {"TORCHELASTIC_ERROR_FILE": "FOLDER/agent-error.json"})
    same(theirs, ours, 1)
    assert any("ValueError: of rank 1" in line for line in theirs.stderr)
    assert any(name.endswith("attempt_0/1/error.json") for name in theirs.files)
    told = [json.loads((outcome.folder / "agent-error.json").read_text()) for outcome in (theirs, ours)]
    assert told[0]["message"]["message"] == told[1]["message"]["message"] == "ValueError: of rank 1"


def test_restarts(both: Both) -> None:
    script = OUT_AND_ERR + "\nsys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] != '2')"
    theirs, ours = both([*LOGS, "--max-restarts", "2", "--redirects", "3", "FOLDER/script.py"], script)
    same(theirs, ours, 0)
    assert any(name.endswith("attempt_2/1/stdout.log") for name in theirs.files)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        # One rank, because the agent may or may not end the later one of two before it fails by itself.
        (["--nproc-per-node", "1", "FOLDER/missing.py"], 1),
        (["--no-python", "FOLDER/missing"], 1),
        (["--no-python", "sh", "-c", "echo $RANK; exit 0"], 0),
        (["-m", "json.tool", "--help"], 0),
        (["--run-path", "FOLDER/script.py", "a"], 0),
        (["--virtual-local-rank", "--no-python", "sh", "-c", "echo $RANK $LOCAL_RANK $CUDA_VISIBLE_DEVICES"], 0),
        (["--nproc-per-node", "none of these", "FOLDER/script.py"], 1),
        (["--redirects", "9", "FOLDER/script.py"], 1),
    ],
    ids=str,
)
def test_what_is_run(both: Both, arguments: list[str], status: int) -> None:
    theirs, ours = both([*TWO, *arguments], OUT_AND_ERR)
    same(theirs, ours, status)


@pytest.mark.parametrize("arguments", [[], ["--unknown"], ["--numa-binding", "nowhere", "x.py"]], ids=str)
def test_usage_errors(both: Both, arguments: list[str]) -> None:
    theirs, ours = both(arguments)
    assert (theirs.status, ours.status) == (2, 2)
    said = [line.rpartition("error: ")[2] for outcome in (theirs, ours) for line in outcome.stderr if "error: " in line]
    assert len(said) == 2
    assert said[0] == said[1]
    assert any(line.startswith("usage: python -m rankspawn.torchrun ") for line in ours.stderr)


def test_the_command() -> None:
    command = [sys.executable, "-m", "rankspawn", "torchrun", "--nproc-per-node", "2", "--no-python", "sh", "-c"]
    done = subprocess.run([*command, "echo $RANK"], capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["0", "1"]), done.stderr


ABOUT_ITSELF = """
import json, os, sys
from pathlib import Path
state = {line.split(":")[0]: line.split(":")[1].strip() for line in open("/proc/self/status")}
about = {
    "environment": dict(os.environ),
    "descriptors": sorted(os.listdir("/proc/self/fd")),
    "signals": [state[name] for name in ("SigBlk", "SigIgn")],
    "leads session": os.getsid(0) == os.getpid(),
    "nice": os.nice(0),
    "arguments": sys.argv,
    "interpreter": sys.orig_argv,
}
Path(__file__).with_name("said-" + os.environ["RANK"]).write_text(json.dumps(about))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_same_ranks(both: Both) -> None:
    for outcome in both([*TWO, "FOLDER/script.py"], ABOUT_ITSELF):
        assert outcome.status == 0, outcome.stderr
    said: dict[str, list[dict[str, object]]] = {}
    for launcher in LAUNCHERS:
        folder = outcome.folder.with_name(launcher)
        texts = [(folder / f"said-{rank}").read_text() for rank in (0, 1)]
        said[launcher] = [json.loads(normalised(text, folder)) for text in texts]
        for about in said[launcher]:
            environment = about["environment"]
            assert isinstance(environment, dict)
            # c10d gives each job a port and a name of its own.
            del environment["MASTER_PORT"], environment["TORCHELASTIC_RUN_ID"]
    assert said["ours"] == said["torchrun"]


WAITS = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(__file__).parent, os.environ["RANK"]
def got(number, frame):
    (folder / f"got-{rank}").write_text(signal.Signals(number).name)
    sys.exit(0)
for number in (1, 2, 3, 10, 15):
    signal.signal(number, got)
(folder / f"pid-{rank}.new").write_text(str(os.getpid()))
os.rename(folder / f"pid-{rank}.new", folder / f"pid-{rank}")
time.sleep(600)
"""


def pids(folder: Path, ranks: int = 2) -> list[int]:
    """The pids of ranks that run WAITS, once all of them have begun to wait."""
    until = time.monotonic() + SECONDS
    while len(found := list(folder.glob("pid-[0-9]"))) < ranks:
        assert time.monotonic() < until, "the ranks did not start"
        time.sleep(0.01)
    return [int(path.read_text()) for path in found]


def gone(pid: int, seconds: float = 10) -> bool:
    """Wait for the end of the process; whether it has ended, or was reaped."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_the_agent(both: Both, name: str) -> None:
    def kill(process: Popen, folder: Path) -> None:
        pids(folder)
        process.send_signal(signal.Signals[name])

    signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    theirs, ours = both([*TWO, *signals, "FOLDER/script.py"], WAITS, then=kill)
    same(theirs, ours, 1)
    assert any(f"SignalException: Process # got signal: {int(signal.Signals[name])}" in line for line in theirs.stderr)
    for outcome in (theirs, ours):
        assert [(outcome.folder / f"got-{rank}").read_text() for rank in (0, 1)] == [name, name]
        assert all(map(gone, pids(outcome.folder)))


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_ranks_die_with_the_agent(both: Both) -> None:
    """torchrun's ranks live on, which is the one difference here."""

    def kill(process: Popen, folder: Path) -> None:
        pids(folder)
        process.kill()

    alive = {}

    def look(process: Popen, folder: Path) -> None:
        kill(process, folder)
        alive[folder.name] = [not gone(pid, 2) for pid in pids(folder)]
        for pid in pids(folder):  # they hold the pipes that the outcome is read from
            if not gone(pid, 0.1):
                os.kill(pid, signal.SIGKILL)

    theirs, ours = both([*TWO, "FOLDER/script.py"], WAITS, then=look)
    assert (theirs.status, ours.status) == (-signal.SIGKILL, -signal.SIGKILL)
    assert alive == {"torchrun": [True, True], "ours": [False, False]}


STAYS = """
import os, pathlib, signal, sys, time
rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
ready = pathlib.Path(__file__).parent / f"ready-{attempt}"
if rank == "0":
    while not ready.exists():
        time.sleep(0.01)
    sys.exit(3)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
ready.touch()
signal.sigwait([signal.SIGTERM])
ready.with_name(f"ending-{attempt}").touch()
time.sleep(20)
ready.with_name(f"ended-{attempt}").touch()
"""


def test_shutdown_timeout_holds_when_a_rank_has_failed(tmp_path: Path) -> None:
    """torch gives the other ranks 30 seconds then, in each attempt; a rank that needs 20 does not live so long here."""
    if "--shutdown-timeout" not in OPTIONS:
        pytest.skip("this torch has no --shutdown-timeout")
    folder = tmp_path / "ours"
    options = ["--shutdown-timeout", "1", "--max-restarts", "1", *TWO, "FOLDER/script.py"]
    done = finish(start("ours", folder, options, STAYS, {}), folder)
    assert done.status == 1
    assert sorted(path.name for path in folder.glob("end*")) == ["ending-0", "ending-1"]


LEAVES = """
import os, pathlib, subprocess, sys
rank = os.environ["RANK"]
folder = pathlib.Path(__file__).parent
# In a process group of its own, and without the pipes that the launcher's output is read from.
left = subprocess.Popen(["sleep", "1000"], process_group=0, stdin=-3, stdout=-3, stderr=-3)
(folder / f"pid-{rank}").write_text(str(left.pid))
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux" or sys.version_info < (3, 11), reason="the guard; process_group")
@pytest.mark.parametrize("status", [0, 3])
def test_what_ranks_leave_behind_ends_with_the_job(both: Both, status: int) -> None:
    """torchrun leaves it, which is the one difference here."""
    theirs, ours = both([*TWO, "FOLDER/script.py", str(status)], LEAVES)
    alive = {outcome.folder.name: [not gone(pid, 0.5) for pid in pids(outcome.folder)] for outcome in (theirs, ours)}
    for pid in pids(theirs.folder):
        os.kill(pid, signal.SIGKILL)
    assert alive == {"torchrun": [True, True], "ours": [False, False]}
    assert (theirs.status, ours.status) == (status and 1, status and 1)


@pytest.mark.skipif(sys.platform != "linux" or sys.version_info < (3, 11), reason="the guard; process_group")
def test_no_guard_leaves_what_ranks_leave_behind(tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    done = finish(start("ours", folder, ["--no-guard", *TWO, "FOLDER/script.py", "0"], LEAVES, {}), folder)
    left = pids(folder)
    alive = [not gone(pid, 0.5) for pid in left]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert (done.status, alive) == (0, [True, True])


@pytest.mark.parametrize("first", LAUNCHERS)
def test_two_agents_of_one_job_one_of_them_torchs(tmp_path: Path, first: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (second,) = LAUNCHERS.keys() - {first}
    options = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-id", "pair", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", f"127.0.0.1:{port}", "FOLDER/script.py"]  # fmt: skip
    started = [start(name, tmp_path / name, options, OUT_AND_ERR, {}) for name in (first, second)]
    outcomes = [finish(process, tmp_path / name) for process, name in zip(started, (first, second), strict=True)]
    assert [outcome.status for outcome in outcomes] == [0, 0], [outcome.stderr for outcome in outcomes]
    said = sorted(line for outcome in outcomes for line in outcome.stdout)
    assert said == [f"out {rank} []" for rank in range(4)]


@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_data_parallel_training(tmp_path: Path) -> None:
    digits = Path(__file__).parents[2] / "examples" / "ddp_digits.py"
    options = [*TWO, "--numa-binding", "node", str(digits)]
    ours = finish(start("ours", tmp_path / "ours", options, None, {}), tmp_path / "ours")
    assert ours.status == 0, ours.stderr
    assert "parameters     identical on every rank" in ours.stdout


# ---- what torchrun cannot do here -----------------------------------------------------------------------------------

MASK = """
import os, sys
from pathlib import Path
cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
os.write(1, f"{os.environ['LOCAL_RANK']} {cpus}\\n".encode())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="CPU affinity")
@pytest.mark.parametrize(
    "options",
    [[], ["--run-path"], ["--run-path", "--start-method", "forkserver"], ["--run-path", "--start-method", "fork"]],
    ids=" ".join,
)
def test_binding_without_numactl(tmp_path: Path, options: list[str]) -> None:
    """On two CPUs, ranks get one each, and no numactl is looked for."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "numactl").write_text(f"#!/bin/sh\ntouch {tmp_path}/numactl-was-called\nexec '$@'\n")
    (programs / "numactl").chmod(0o755)
    env = {"PATH": f"{programs}:{ENVIRONMENT['PATH']}"}
    options = [*TWO, "--numa-binding", "exclusive", *options, "FOLDER/script.py"]
    ours = finish(start("ours", tmp_path / "ours", options, MASK, env), tmp_path / "ours")
    assert ours.status == 0, ours.stderr
    masks = [set(line.partition(" ")[2].split(",")) for line in ours.stdout]
    assert len(masks) == 2
    assert masks[0].isdisjoint(masks[1])
    assert not (tmp_path / "numactl-was-called").exists()


WITHOUT_CUDA = """
import sys, torch
torch.cuda.is_available = lambda: sys.exit("torch asks for CUDA in the launcher")
from rankspawn.torchrun import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not find_spec("torch.numa"), reason="torch before 2.9 asks for no CUDA")
def test_a_named_binding_initializes_no_cuda() -> None:
    """torch asks CUDA only where no binding is named, in order to choose a default one."""
    options = ["--no-python", "true"]
    for binding, status in (["--numa-binding", "node"], 0), ([], 1):
        command = [sys.executable, "-c", WITHOUT_CUDA, *binding, *options]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == status, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="memory policies")
def test_memory_policy(tmp_path: Path) -> None:
    options = ["--numa-binding", "node", "--memory-policy", "bind", "--no-python", "head", "-1", "/proc/self/numa_maps"]
    ours = finish(start("ours", tmp_path / "ours", options, None, {}), tmp_path / "ours")
    if any("set_mempolicy" in line for line in ours.stderr):
        pytest.skip("memory policies are refused here")
    assert ours.status == 0, ours.stderr
    assert " bind:" in ours.stdout[0]


def test_memory_policy_needs_a_binding(tmp_path: Path) -> None:
    ours = finish(start("ours", tmp_path / "ours", ["--memory-policy", "bind", "x.py"], None, {}), tmp_path / "ours")
    assert ours.status == 2
    assert any(line.endswith("error: --memory-policy needs --numa-binding") for line in ours.stderr)
