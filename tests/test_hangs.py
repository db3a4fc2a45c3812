"""A whole job that stands still is noticed (``--hang-timeout``), and nothing else is taken for one."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankspawn import RankGroup, RanksFailedError, launch
from rankspawn._group.hangs import HangAsked, HangWatch
from rankspawn._stacks import spy, unwinder
from rankspawn._stacks.take import Stacks
from tests.support.launchers import LAUNCHER, completed, in_ranks, launched, with_grace
from tests.support.processes import eventually, state

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="procfs")

CAN_READ = unwinder.can_read(sys.version_info[1]) or spy.find() is not None
SECONDS = 0.4
QUIET = r"hang: for \d+ s no rank has written a line or used CPU time"

# Each of two ranks holds the lock of one file, and waits for that of the other.
DEADLOCK = """
import fcntl, os, sys, time
from pathlib import Path

def lock(number):
    file = open(Path(__file__).with_name(f"lock_{number}"), "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file

rank = int(os.environ["LOCAL_RANK"])
own = lock(rank)
Path(__file__).with_name(f"has_{rank}").touch()
while not Path(__file__).with_name(f"has_{1 - rank}").exists():
    time.sleep(0.01)
print("step 1", flush=True)
other = lock(1 - rank)
"""


def deadlock(folder: Path) -> list[str]:
    script = folder / "deadlock.py"
    script.write_text(DEADLOCK)
    return [sys.executable, str(script)]


def told_by(group: RankGroup) -> list[str]:
    """The hangs that a group says from now on."""
    told: list[str] = []
    group.tell_hang = told.append  # type: ignore[method-assign, assignment]
    return told


def wait_until(group: RankGroup, what: Callable[[], object]) -> None:
    """Do what a program does that waits, until ``what`` returns something true."""
    until = time.monotonic() + 60
    while not what():
        assert group.advance(0.02) and time.monotonic() < until


def is_quiet(group: RankGroup, seconds: float = 5 * SECONDS) -> bool:
    """Whether nobody is told of a hang for so long."""
    told, until = told_by(group), time.monotonic() + seconds
    while time.monotonic() < until:
        group.advance(0.02)
    return not told and not group.stacks


def test_a_deadlock_is_reported_once(tmp_path: Path) -> None:
    with launch(deadlock(tmp_path), 2, hang_timeout=SECONDS, log_dir=tmp_path / "logs") as group:
        told = told_by(group)
        wait_until(group, lambda: told)
        assert re.fullmatch(rf"{QUIET}, ranks 0-1 stood still: 2 ranks \(0-1\): .+; the ranks run on", told[0]), told
        first, second = group.stacks
        assert first.because == "first look at a hang" and told[0].startswith(f"{second.because}: {second.folded}; ")
        written = (tmp_path / "logs" / "attempt_0" / "stacks.txt").read_text()
        assert str(first) in written and str(second) in written
        looks = group.report()["attempts"][0]["stacks"]
        assert [look["because"] for look in looks] == [first.because, second.because]
        until = time.monotonic() + 4 * SECONDS
        while time.monotonic() < until:
            assert group.advance(0.02)
        assert len(told) == 1 and group.running == (0, 1) and group.hung == ()
        group.kill()


@pytest.mark.skipif(not CAN_READ, reason="neither Python 3.14 nor py-spy is here")
def test_the_place_of_a_hang_is_said(tmp_path: Path) -> None:
    with launch(deadlock(tmp_path), 2, hang_timeout=SECONDS, log_dir=tmp_path / "logs") as group:
        told = told_by(group)
        wait_until(group, lambda: told)
        assert ": 2 ranks (0-1): in lock, deadlock.py:7; " in told[0]
        group.kill()


def test_it_is_logged_where_nobody_else_is_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.WARNING, "rankspawn"):
        with launch(deadlock(tmp_path), 2, hang_timeout=SECONDS) as group:
            wait_until(group, lambda: caplog.records)
            group.kill()
    assert re.match(QUIET, caplog.records[0].getMessage())


def test_a_hang_is_said_again_when_something_has_moved(tmp_path: Path) -> None:
    code = f"while :; do test -e {tmp_path}/go && rm {tmp_path}/go && echo moved; read x < {tmp_path}/pipe; done"
    os.mkfifo(tmp_path / "pipe")
    with launch(["sh", "-c", code], 1, hang_timeout=SECONDS, log_dir=tmp_path / "logs") as group:
        told = told_by(group)
        wait_until(group, lambda: told)
        (tmp_path / "go").touch()
        (tmp_path / "pipe").write_text("x\n")
        wait_until(group, lambda: len(told) == 2)
        group.kill()


def test_one_that_has_ended_well_is_said() -> None:
    with launch(["sh", "-c", "test $RANK = 1 || exec sleep 300"], 3, hang_timeout=SECONDS) as group:
        told = told_by(group)
        wait_until(group, lambda: told)
        assert re.match(rf"{QUIET}, rank 1 ended with status 0, ranks 0,2 stood still: 2 ranks \(0,2\): sleep", told[0])
        group.kill()


# ---- what is no hang ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logs", [True, False])
def test_a_line_now_and_then(logs: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "test $RANK = 1 && exec sleep 300; while :; do echo epoch; sleep 0.1; done"
    where: dict[str, Any] = {"log_dir": tmp_path} if logs else {}
    with launch(["sh", "-c", code], 2, hang_timeout=SECONDS, **where) as group:
        assert is_quiet(group)
        group.kill()


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-S", "-c", "while True: pass"],
        ["sh", "-c", f"{sys.executable} -S -c 'while True: pass'; true"],
        ["sh", "-c", f"setsid {sys.executable} -S -c 'while True: pass' & wait"],
    ],
    ids=["the rank", "what it has started", "in a session of its own"],
)
def test_cpu_time(command: list[str]) -> None:
    with launch(lambda rank: command if rank else ["sleep", "300"], 2, hang_timeout=SECONDS) as group:
        quiet = is_quiet(group)
        from rankspawn._stacks.kernel import processes_below

        below = processes_below(group.pids())
        group.kill()
        for pid in (pid for pids in below.values() for pid in pids if pid not in group.pids()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        assert quiet


def test_a_stopped_rank() -> None:
    with launch(["sleep", "300"], 2, hang_timeout=SECONDS) as group:
        os.kill(group.pids()[1], signal.SIGSTOP)
        eventually(lambda: state(group.pids()[1]) == "T")
        assert is_quiet(group)
        told = told_by(group)
        os.kill(group.pids()[1], signal.SIGCONT)
        wait_until(group, lambda: told)
        group.kill()


def test_a_rank_that_a_debugger_holds() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    seize = 0x4206
    with launch(["sleep", "300"], 2, hang_timeout=SECONDS) as group:
        pid = group.pids()[0]
        if libc.ptrace(seize, pid, None, None) != 0:
            pytest.skip(f"ptrace is refused: {os.strerror(ctypes.get_errno())}")
        assert is_quiet(group)
        group.kill()


READS = {
    "read": "import os\nos.read(0, 1)",
    "poll": "import select\np = select.poll()\np.register(0, 1)\np.poll()",
    "select": "import select\nselect.select([0], [], [])",
    "epoll": "import select\np = select.epoll()\np.register(0, 1)\np.poll()",
    "pdb": "import pdb\npdb.set_trace()\npass",
}


@pytest.mark.parametrize("how", READS)
def test_a_rank_that_reads_from_a_terminal(how: str) -> None:
    main, terminal = pty.openpty()
    try:
        code = f"import os\nif os.environ['RANK'] == '1':\n  import time\n  time.sleep(300)\n{READS[how]}\n"
        options = ["--hang-timeout", str(SECONDS), "--on-hang", "end", "--nproc-per-node", "2"]
        with launched(in_ranks(code, *options), stdin=terminal) as job:
            ready, _, _ = select.select([job.stderr], [], [], 6 * SECONDS)
            assert not ready, job.stderr.readline()
            job.process.send_signal(signal.SIGTERM)
            job.end()
            assert "hang" not in job.stderr.read()
    finally:
        os.close(main)
        os.close(terminal)


def test_a_launcher_that_was_suspended_itself() -> None:
    with launch(["sleep", "300"], 1, hang_timeout=4.0) as group:
        told = told_by(group)
        wait_until(group, lambda: group._hang_watch is not None and group._hang_watch._quiet > 0)
        time.sleep(4.5)  # nobody waits
        group.advance(0)
        assert told == [] and group.stacks == []
        group.kill()


# ---- what is done ---------------------------------------------------------------------------------------------------


def test_end(tmp_path: Path) -> None:
    with launch(
        deadlock(tmp_path), 2, hang_timeout=SECONDS, on_hang="end", max_restarts=3, log_dir=tmp_path / "logs"
    ) as group:
        told_by(group)
        with pytest.raises(RanksFailedError) as caught:
            group.wait(60, check=True)
        assert group.hung == (0, 1) and group.first_failure == 0 and group.job.restart_count == 0
        assert re.search(rf"^  why: {QUIET}, ranks 0-1 stood still$", str(caught.value), re.MULTILINE)
        assert "  what the others did then: 2 ranks (0-1): " in str(caught.value)
        exits = [rank["exit"] for rank in group.report()["attempts"][0]["ranks"]]
        assert all(one is not None and re.match(QUIET, one["why"]) for one in exits)


def test_end_is_a_failure_whatever_the_ranks_make_of_it() -> None:
    code = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nsignal.pause()"
    with launch([sys.executable, "-c", code], 2, hang_timeout=SECONDS, on_hang="end") as group:
        told_by(group)
        assert group.wait(60) == (0, 0)
        with pytest.raises(
            RanksFailedError, match=r"rank [01] \(pid \d+\) exited with status 0\n(  .*\n)*  why: hang: "
        ):
            group.check()


def test_restart_counts_as_one() -> None:
    code = "test $TORCHELASTIC_RESTART_COUNT = 1 || exec sleep 300"
    with launch(["sh", "-c", code], 2, hang_timeout=SECONDS, on_hang="restart", max_restarts=1) as group:
        told = told_by(group)
        assert group.wait(60, check=True) == (0, 0)
        assert group.job.restart_count == 1 and len(told) == 1 and group.hung == ()
        assert len(group.report()["attempts"]) == 2


def test_restart_ends_with_the_restarts() -> None:
    with launch(["sleep", "300"], 1, hang_timeout=SECONDS, on_hang="restart", max_restarts=1) as group:
        told = told_by(group)
        assert group.wait(60) == (-15,)
        assert group.job.restart_count == 1 and len(told) == 2 and group.hung == (0,)


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_ends_what_hangs(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--hang-timeout", str(SECONDS), "--on-hang=end", "--max-restarts", "2", "--report", str(report)]
    done = completed([*LAUNCHER, "run", "--nproc-per-node", "2", *options, deadlock(tmp_path)[1]])
    assert done.returncode == 143
    said = done.stderr.splitlines()[0]
    assert re.fullmatch(rf"rankspawn: {QUIET}, ranks 0-1 stood still: .*; ending the ranks", said), done.stderr
    assert re.search(rf"^  why: {QUIET}, ranks 0-1 stood still$", done.stderr, re.MULTILINE), done.stderr
    assert "restart" not in done.stderr and "has failed" not in done.stderr
    (attempt,) = json.loads(report.read_text())["attempts"]
    assert [re.sub(":.*", "", look["because"]) for look in attempt["stacks"]] == ["first look at a hang", "hang"]


def test_the_commands_status_is_never_0() -> None:
    code = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nsignal.pause()"
    assert completed(in_ranks(code, "--hang-timeout", str(SECONDS), "--on-hang", "end")).returncode == 1


def test_the_command_restarts_what_hangs() -> None:
    code = "import os, time\nif os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': time.sleep(300)\n"
    options = ["--nproc-per-node", "2", "--max-restarts", "1", "--hang-timeout", str(SECONDS), "--on-hang", "restart"]
    done = completed(in_ranks(code, *options))
    assert done.returncode == 0
    assert "; ending the ranks, to start them again\n" in done.stderr
    assert "rankspawn: restart 1 of 1\n" in done.stderr


def test_the_command_reports_and_the_job_goes_on() -> None:
    code = "import os, sys\nsys.stdin.read()"
    with launched(with_grace(1, in_ranks(code, "--hang-timeout", str(SECONDS))), stdin=-1) as job:
        line = job.stderr.readline()
        assert re.match(rf"rankspawn: {QUIET}, rank 0 stood still: rank 0: ", line), line
        assert line.endswith("; the ranks run on\n")
        assert job.process.stdin is not None
        job.process.stdin.close()
        assert job.end() == 0


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hang_timeout": 0}, "hang_timeout: expected a number of seconds above 0, got 0"),
        ({"hang_timeout": float("inf")}, "hang_timeout: expected a number of seconds above 0, got inf"),
        ({"hang_timeout": 1, "on_hang": "kill"}, "on_hang: expected 'report', 'end' or 'restart', got 'kill'"),
        ({"on_hang": "end"}, "on_hang='end' needs hang_timeout"),
        ({"hang_timeout": 1, "on_hang": "restart"}, "on_hang='restart' needs max_restarts"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        launch(["true"], 1, **given)


def test_seconds_are_a_number() -> None:
    with pytest.raises(TypeError, match=r"^hang_timeout: expected a number of seconds, got '5'$"):
        launch(["true"], 1, hang_timeout="5")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hang-timeout", "0"], "argument --hang-timeout/--hang_timeout: expected a number of seconds above 0"),
        (["--on-hang", "end"], "--on-hang end needs --hang-timeout SECONDS"),
        (["--hang-timeout", "5", "--on-hang", "restart"], "--on-hang restart needs --max-restarts N"),
    ],
)
def test_the_command_refuses_it_too(options: list[str], message: str) -> None:
    done = completed([*LAUNCHER, "run", *options, "--no-python", "true"])
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("letter", ["S", "R"])
def test_a_rank_that_waits_for_a_cpu_does_not_stand_still(letter: str, tmp_path: Path) -> None:
    """A procfs in which one process uses no CPU time, asleep or ready to run."""
    about = f"7 (rank) {letter} {os.getpid()} " + " ".join(["0"] * 48)
    for folder in (tmp_path / "7", tmp_path / "7" / "task" / "7"):
        folder.mkdir(parents=True)
        (folder / "stat").write_text(about)
    watch = HangWatch(HangAsked(0.01, "report"), None, str(tmp_path))
    taken: list[Stacks] = []

    def take() -> Stacks:
        taken.append(Stacks(0.0, "a test", 0.0, ()))
        return taken[-1]

    for _ in range(20):
        watch.look({0: 7}, take)
        time.sleep(0.003)
    assert bool(taken) == (letter == "S")
