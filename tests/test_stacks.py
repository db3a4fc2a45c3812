"""What ranks do, seen from outside: by a group, before it ends them, and by ``rankspawn dump`` and SIGQUIT."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rankspawn import RankGroup, RanksFailedError, launch
from rankspawn._stacks import kernel, spy, unwinder
from rankspawn._stacks.take import take
from tests.support.launchers import LAUNCHER, SLEEP, completed, in_ranks, launched
from tests.support.processes import eventually, frozen_by_v1, state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="procfs")

CAN_READ = unwinder.can_read(sys.version_info[1]) or spy.find() is not None
needs_python_stacks = pytest.mark.skipif(not CAN_READ, reason="neither Python 3.14 nor py-spy is here")

# Two ranks that each wait for the other's message: what most hangs are.
DEADLOCK = """
import os
from pathlib import Path

def receive(pipe):
    return open(pipe).read()

def exchange(rank):
    pipes = [Path(__file__).with_name(f"to_{one}") for one in (0, 1)]
    message = receive(pipes[rank])
    pipes[1 - rank].write_text("hello")

exchange(int(os.environ["LOCAL_RANK"]))
"""
RECEIVES = "in receive, deadlock.py:6"
DEEP_SLEEP = "import time\ndef deep():\n    time.sleep(300)\ndeep()\n"


def written(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@contextmanager
def deadlocked(folder: Path) -> Iterator[RankGroup]:
    """Two ranks that wait for each other, and will for ever."""
    for number in (0, 1):
        os.mkfifo(folder / f"to_{number}")
    script = written(folder, "deadlock.py", DEADLOCK)
    with launch([sys.executable, script], 2, log_dir=folder / "logs") as group:
        eventually(lambda: all(waits(pid) for pid in group.pids()))
        yield group
        group.kill()


def waits(pid: int) -> bool:
    """Whether a process waits for the other end of a pipe."""
    return "fifo" in kernel.read(f"/proc/{pid}/wchan") or "wait_for_partner" in kernel.read(f"/proc/{pid}/wchan")


@needs_python_stacks
def test_a_deadlock_is_seen(tmp_path: Path) -> None:
    with deadlocked(tmp_path) as group:
        found = group.dump()
        assert found.folded == f"2 ranks (0-1): {RECEIVES}"
        for process, pid in zip(found.processes, group.pids(), strict=True):
            assert process.pid == pid and process.by in ("py-spy", f"Python 3.{sys.version_info[1]}")
            assert [frame.function for frame in process.threads[0].frames][:2] == ["receive", "exchange"]
        assert found.notes == () and group.running == (0, 1)
        assert str(found) in (tmp_path / "logs" / "attempt_0" / "stacks.txt").read_text()
        assert group.stacks == [found]
        (look,) = group.report()["attempts"][0]["stacks"]
        assert (look["because"], look["folded"]) == ("asked for", found.folded)
        assert look["processes"][0]["threads"][0]["frames"][0]["function"] == "receive"
        json.dumps(look)


@needs_python_stacks
def test_what_a_rank_has_started_is_seen_too(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys\n"
        "for session in (False, True):\n"
        f"    subprocess.Popen([sys.executable, '-c', {DEEP_SLEEP!r}], start_new_session=session)\n"
        "os.wait()\n"
    )
    script = written(tmp_path, "loads.py", code)
    with launch([sys.executable, script], 1) as group:
        eventually(lambda: str(group.dump()).count("deep (") == 2)
        found = group.dump()
        assert found.folded == "rank 0: in <module>, loads.py:4"
        assert [process.rank for process in found.processes] == [0, 0, 0]
        for process in found.processes[1:]:
            os.kill(process.pid, signal.SIGKILL)


@needs_python_stacks
def test_a_wrapper_is_seen_through(tmp_path: Path) -> None:
    script = written(tmp_path, "sleeps.py", DEEP_SLEEP)
    with launch(["/bin/sh", "-c", f"{sys.executable} {script}; true"], 1) as group:
        eventually(lambda: group.dump().folded == "rank 0: in deep, sleeps.py:3")


def test_of_other_programs_it_is_what_the_kernel_says() -> None:
    with launch(["sleep", "300"], 2) as group:
        eventually(lambda: re.match(r"2 ranks \(0-1\): sleeping in clock_nanosleep", group.dump().folded))
        (thread,) = group.dump().processes[0].threads
        assert thread.tid == group.pids()[0] and thread.name == "sleep" and thread.state == "S"
        assert thread.frames == ()
        if os.geteuid() == 0 and Path("/proc/self/stack").exists():
            assert any("nanosleep" in function for function in thread.kernel)


def test_who_has_ended_is_not_seen() -> None:
    with launch(["/bin/true"], 1) as group:
        group.wait(60)
        found = group.dump()
        assert (found.processes, found.folded, found.notes) == ((), "", ())


# ---- before ranks are ended -----------------------------------------------------------------------------------------

FAILS = "import os, sys\nif os.environ['RANK'] == '1': sys.stdin.readline() or sys.exit('bad batch')\n" + DEEP_SLEEP


@needs_python_stacks
def test_a_failure_says_what_the_others_did(tmp_path: Path) -> None:
    script = written(tmp_path, "fails.py", FAILS)
    place = "in deep, fails.py:5"
    waits = f"if test $RANK = 1; then while ! test -e {tmp_path}/now; do sleep 0.01; done; fi; "
    rank = f"{waits} exec {sys.executable} {script} </dev/null"
    with launch(["/bin/sh", "-c", rank], 3, stacks=True, log_dir=tmp_path / "logs") as group:
        eventually(lambda: f"2 ranks (0,2): {place}" in group.dump().folded)
        (tmp_path / "now").touch()
        with pytest.raises(RanksFailedError) as raised:
            group.wait(60, check=True)
    assert raised.value.failures[0].others == f"2 ranks (0,2): {place}"
    assert f"\n  what the others did then: 2 ranks (0,2): {place}\n" in str(raised.value)
    assert group.stacks_at_failure is group.stacks[-1] and group.stacks[-1].because == "rank 1 has failed"
    assert "(rank 1 has failed)" in (tmp_path / "logs" / "attempt_0" / "stacks.txt").read_text()


def test_nobody_looks_unless_told_to() -> None:
    with launch(["/bin/sh", "-c", "test $RANK = 0 || exit 3; exec sleep 300"], 2) as group:
        group.wait(60)
    assert group.stacks == [] and "what the others did" not in str(group.failures()[0])


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_was_asked_to_end_is_no_reason_to_look(sig: int) -> None:
    with launch(["sleep", "300"], 2, stacks=True) as group:
        os.kill(group.pids()[1], sig)
        group.wait(60)
    assert group.stacks == []


DEAF = "trap '' TERM; echo ready; while :; do sleep 300; done"


def test_what_outlives_its_grace_is_looked_at_before_it_is_killed(tmp_path: Path) -> None:
    with launch(["/bin/sh", "-c", DEAF], 2, stacks=True, log_dir=tmp_path) as group:
        logs = [tmp_path / "attempt_0" / str(rank) / "stdout.log" for rank in (0, 1)]
        eventually(lambda: all(log.exists() and log.read_text() for log in logs))
        group.terminate(0.2)
        assert [look.because for look in group.stacks] == ["before SIGKILL"]
        assert group.stacks[0].folded.startswith("2 ranks (0-1): ")
        assert group.returncodes == {0: -9, 1: -9}


def test_no_grace_leaves_no_time_for_a_look() -> None:
    with launch(["/bin/sh", "-c", DEAF], 1, stacks=True) as group:
        group.terminate(0)
        assert group.stacks == []


def test_a_time_that_is_over_is_a_reason_to_look() -> None:
    with pytest.raises(TimeoutError), launch(["sleep", "300"], 2, stacks=True) as group:
        group.wait(0.2)
    assert [look.because for look in group.stacks] == ["after a TimeoutError"]


# ---- where it is hard -----------------------------------------------------------------------------------------------


@needs_python_stacks
def test_a_stopped_rank_stays_stopped(tmp_path: Path) -> None:
    with launch([sys.executable, written(tmp_path, "sleeps.py", DEEP_SLEEP)], 1) as group:
        eventually(lambda: "in deep" in group.dump().folded)
        os.kill(group.pids()[0], signal.SIGSTOP)
        eventually(lambda: state(group.pids()[0]) == "T")
        assert group.dump().folded == "rank 0: in deep, sleeps.py:3"
        assert state(group.pids()[0]) == "T"


def test_a_rank_in_uninterruptible_sleep_delays_nobody() -> None:
    with launch(["sleep", "300"], 2) as group:
        with frozen_by_v1(group.pids()[1]):
            found = group.dump(seconds=20.0)
            assert re.search(r"rank 1: in uninterruptible sleep", found.folded)
            assert re.search(r"rank 0: sleeping", found.folded)
            os.kill(group.pids()[1], signal.SIGKILL)


@needs_python_stacks
def test_a_python_rank_in_uninterruptible_sleep_is_read_as_it_is(tmp_path: Path) -> None:
    with launch([sys.executable, written(tmp_path, "sleeps.py", DEEP_SLEEP)], 1) as group:
        eventually(lambda: "in deep" in group.dump().folded)
        with frozen_by_v1(group.pids()[0]):
            found = group.dump(seconds=20.0)
            assert found.folded == "rank 0: in deep, sleeps.py:3"
            assert found.processes[0].threads[0].state == "D"
            os.kill(group.pids()[0], signal.SIGKILL)


@needs_python_stacks
def test_ranks_that_run_are_seen_and_run_on(tmp_path: Path) -> None:
    code = "def spin():\n    while True:\n        pass\nspin()\n"
    with launch([sys.executable, written(tmp_path, "spins.py", code)], 2) as group:
        eventually(lambda: re.fullmatch(r"2 ranks \(0-1\): in spin, spins.py:[23]", group.dump(10.0).folded))
        assert [state(pid) for pid in group.pids()] == ["R", "R"]


@pytest.mark.skipif(spy.find() is None, reason="py-spy is not here")
def test_the_time_is_limited(tmp_path: Path) -> None:
    """py-spy is ended in the middle of its look, and leaves nobody stopped."""
    process = subprocess.Popen([sys.executable, written(tmp_path, "spins.py", "while True: pass\n")])
    try:
        (thread,) = kernel.threads_of(process.pid, all_details=False)
        about = take({process.pid: 0}, "asked for", 0.0)
        if not unwinder.can_read(sys.version_info[1]):
            assert about.notes == ("no time was left to look at 1 of 1 Python processes",)
        assert about.processes[0].threads[0].tid == thread.tid
        for moment in range(10):
            assert len([*spy.dump_all(str(spy.find()), about.processes, time.monotonic() + moment / 500)]) <= 1
        eventually(lambda: state(process.pid) == "R")
    finally:
        process.kill()
        process.wait()


def test_where_nothing_reads_python_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with launch([sys.executable, written(tmp_path, "sleeps.py", DEEP_SLEEP)], 1) as group:
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setenv("PATH", str(tmp_path))
        if unwinder.can_read(sys.version_info[1]):
            eventually(lambda: group.dump().folded == "rank 0: in deep, sleeps.py:3")
            assert group.stacks[-1].notes == ()
        else:
            found = group.dump()
            assert found.notes == (f"Python stacks could not be read: {spy.INSTALL}",)
            assert re.match("rank 0: (sleeping|running)", found.folded)


@needs_python_stacks
@pytest.mark.skipif(shutil.which("setpriv") is None or os.geteuid() != 0, reason="needs root and setpriv")
def test_a_refusal_is_said_once_and_what_to_do(tmp_path: Path) -> None:
    script = written(tmp_path, "sleeps.py", "import ctypes\nctypes.CDLL(None).prctl(4, 0)\n" + DEEP_SLEEP)
    with launch([sys.executable, script], 2) as group:
        eventually(lambda: "2 ranks (0-1): in deep" in group.dump().folded)
        without = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]
        seen = completed([*without, *LAUNCHER, "dump", str(os.getpid()), "--folded"])
    assert seen.returncode == 0
    assert seen.stderr.count("rankspawn: Python stacks could not be read: the kernel refuses it (") == 1
    assert "SYS_PTRACE" in seen.stderr
    assert "in deep" not in seen.stdout


def other_pythons() -> list[str]:
    names = [f"python3.{minor}" for minor in range(8, 16) if minor != sys.version_info[1]]
    found = [*filter(None, map(shutil.which, names)), *map(str, Path.home().glob(".pyenv/versions/3.*/bin/python3"))]
    return [path for path in found if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]


@pytest.mark.skipif(spy.find() is None, reason="py-spy is not here")
def test_ranks_of_other_versions(tmp_path: Path) -> None:
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python is here")
    script = written(tmp_path, "sleeps.py", DEEP_SLEEP)
    with launch(lambda rank: [pythons[rank], script], len(pythons)) as group:
        eventually(lambda: group.dump(20.0).folded.endswith(": in deep, sleeps.py:3"))
        assert {process.by for process in group.stacks[-1].processes} == {"py-spy"}


@needs_python_stacks
def test_64_ranks_at_once(tmp_path: Path) -> None:
    script = written(tmp_path, "sleeps.py", DEEP_SLEEP)
    with launch([sys.executable, "-I", "-S", script], 64) as group:
        eventually(lambda: group.dump(30.0).folded == "64 ranks (0-63): in deep, sleeps.py:3")


# ---- the command ----------------------------------------------------------------------------------------------------


@needs_python_stacks
def test_dump_of_a_launcher(tmp_path: Path) -> None:
    with deadlocked(tmp_path):
        done = completed([*LAUNCHER, "dump", str(os.getpid()), "--folded"])
        assert (done.stdout, done.stderr, done.returncode) == (f"2 ranks (0-1): {RECEIVES}\n", "", 0)
        found = json.loads(completed([*LAUNCHER, "dump", str(os.getpid()), "--json"]).stdout)
        assert [process["rank"] for process in found["processes"]] == [0, 1]
        text = completed([*LAUNCHER, "dump", str(os.getpid())]).stdout
        assert re.search(
            r"^rank 1, process \d+: .*deadlock.py\n  thread \d+ .*\n    receive \(.*deadlock.py:6\)$", text, re.M
        )


def test_dump_of_a_job_by_its_name() -> None:
    name = f"job-{os.getpid()}"
    ranks = {"TORCHELASTIC_RUN_ID": name, "RANK": "5", "LOCAL_RANK": "1"}
    with subprocess.Popen(["sh", "-c", "sleep 300; true"], env={**os.environ, **ranks}, start_new_session=True) as rank:
        eventually(lambda: completed([*LAUNCHER, "dump", name, "--folded"]).stdout.startswith("rank 5: sleeping"))
        os.killpg(rank.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["no-such-job", str(2**22 + 1)])
def test_dump_of_nothing_is_an_error(name: str) -> None:
    done = completed([*LAUNCHER, "dump", name])
    assert done.returncode == 1
    assert done.stderr.startswith(f"rankspawn: {name}: ") and "TORCHELASTIC_RUN_ID" in done.stderr


def test_dump_of_a_process_that_is_no_launcher() -> None:
    with subprocess.Popen(["sleep", "300"]) as process:
        done = completed([*LAUNCHER, "dump", str(process.pid), "--folded"])
        process.kill()
    assert done.stdout.startswith(f"process {process.pid}: ")


def test_sigquit_shows_the_ranks_and_the_job_goes_on() -> None:
    code = SLEEP.replace("time.sleep(120)", "sys.stdin.readline()")
    with launched(in_ranks(code, "--stdin", "all", "--nproc-per-node", "2"), stdin=subprocess.PIPE) as job:
        job.hear(2)
        job.process.send_signal(signal.SIGQUIT)
        assert re.match(r"rankspawn: SIGQUIT: (2 ranks \(0-1\)|rank [01]): ", job.stderr.readline())
        assert job.process.stdin is not None
        job.process.stdin.close()
        assert job.end() == 0


@pytest.mark.parametrize("option", [[], ["--no-stacks"]])
def test_run_looks_before_it_ends_ranks(option: list[str], tmp_path: Path) -> None:
    ranks = ["--no-python", "sh", "-c", "test $RANK = 0 || exit 3; exec sleep 300"]
    done = completed(
        [*LAUNCHER, "run", "--nproc-per-node", "2", *option, "--report", str(tmp_path / "report.json"), *ranks]
    )
    assert done.returncode == 3
    assert ("  what the others did then: rank 0: " in done.stderr) == (not option)
    (attempt,) = json.loads((tmp_path / "report.json").read_text())["attempts"]
    assert [look["because"] for look in attempt["stacks"]] == ([] if option else ["rank 1 has failed"])
