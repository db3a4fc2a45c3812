"""What ``rankspawn run`` makes of each signal: handed on, an order to end, or none of its business."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rankspawn._cli.signals import parse_signals
from tests.support.launchers import LAUNCHER, SAY, SLEEP, after, completed, in_ranks, launched, with_grace
from tests.support.processes import eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks for Linux's signals")

# A rank that saves a checkpoint when a signal says so, and a helper of it, with default actions.
CHECKPOINT = SAY + (
    "import subprocess\n"
    "def save(number, frame): say('saved')\n"
    "signal.signal(signal.SIGUSR1, save)\n"
    "signal.signal(signal.SIGUSR2, save)\n"
    "helper = subprocess.Popen(['sleep', '120'])\n"
    "say('ready')\n"
    "sys.stdin.readline()\n"
    "say(helper.poll())\n"
)

# A rank that ends with status 0 when it gets SIGTERM, after a word. It sleeps again and again, because a signal that
# comes just before a sleep does not end that sleep.
OBEDIENT = SAY + (
    "def end(number, frame):\n"
    "    say(signal.Signals(number).name)\n"
    "    sys.exit(0)\n"
    "for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1): signal.signal(number, end)\n"
    "say('ready')\n"
    "while True: time.sleep(0.2)\n"
)

DEAF = SAY + (
    "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
    "say('ready')\n"
    "time.sleep(120)\n"
)


# ---- handed on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_what_is_the_programs_is_handed_to_the_ranks_alone(name: str) -> None:
    command = with_grace(0.1, in_ranks(CHECKPOINT, "--stdin", "all", "--nproc-per-node", "2"))
    with launched(command, stdin=subprocess.PIPE) as job:
        job.hear(2)
        for _ in range(2):
            job.process.send_signal(signal.Signals[name])
            assert job.hear(2) == {0: "saved", 1: "saved"}
        time.sleep(0.3)  # no clock has started
        assert job.process.stdin is not None
        job.process.stdin.write("\n\n")
        job.process.stdin.close()
        assert job.hear(2) == {0: None, 1: None}, "the helpers, whose action is the default, live"
        assert job.end() == 0
        assert job.stderr.read() == ""


def test_a_rank_that_does_not_handle_it_dies_of_it_as_it_would_by_itself() -> None:
    with launched(in_ranks(SLEEP)) as job:
        job.hear(1)
        job.process.send_signal(signal.SIGUSR1)
        assert job.end() == 128 + signal.SIGUSR1
        assert re.search(r"rank 0 \(pid \d+\) was killed by SIGUSR1", job.stderr.read())


@pytest.mark.parametrize("option", ["--signals-to-handle", "--signals_to_handle"])
def test_signals_to_handle_end_the_ranks_as_under_torchrun(option: str) -> None:
    with launched(in_ranks(OBEDIENT, "--nproc-per-node", "2", option, "SIGTERM,SIGUSR1")) as job:
        job.hear(2)
        job.process.send_signal(signal.SIGUSR1)
        assert job.hear(2) == {0: "SIGUSR1", 1: "SIGUSR1"}
        assert job.end() == -signal.SIGUSR1
        assert job.stderr.read() == "rankspawn: SIGUSR1: ending the ranks\n"


def test_signals_to_handle_are_names() -> None:
    assert parse_signals("SIGTERM, usr1,SIGHUP,") == {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
    for wrong in ("SIGKILL", "SIGSEGV", "SIGCHLD", "SIGSTOP", "SIGNAL", "10", "SIG_DFL"):
        with pytest.raises(ValueError, match=wrong):
            parse_signals(wrong)
    done = completed(in_ranks("pass", "--signals-to-handle", "SIGTERM,SIGFOO"))
    assert done.returncode == 2
    assert done.stderr.endswith("--signals-to-handle/--signals_to_handle: this system has no signal SIGFOO\n")


# ---- orders to end --------------------------------------------------------------------------------------------------

DEADLY = ["SIGHUP", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGXCPU", "SIGIO", "SIGPWR", "SIGSTKFLT", "SIGABRT"]


@pytest.mark.parametrize("number", [*(signal.Signals[name] for name in DEADLY), 36, int(signal.SIGRTMAX)])
def test_any_other_deadly_signal_ends_the_ranks_and_then_the_launcher(number: int, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = in_ranks(OBEDIENT, "--nproc-per-node", "2", "--report", str(report))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with launched(command, env=environment) as job:
        job.hear(2)
        assert list(tmp_path.glob("rankspawn-*"))
        job.process.send_signal(number)
        told = "SIGHUP" if number == signal.SIGHUP else "SIGTERM"
        assert job.hear(2) == {0: told, 1: told}
        assert job.end() == -number
        assert re.fullmatch(r"rankspawn: SIG[A-Z0-9+]+: ending the ranks\n", job.stderr.read())
    ranks = json.loads(report.read_text())["attempts"][0]["ranks"]
    assert [rank["exit"]["returncode"] for rank in ranks] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGALRM"])
def test_a_launcher_that_is_started_with_signals_blocked_can_be_ended(name: str) -> None:
    number = signal.Signals[name]
    blocked = "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())"
    with launched(after(blocked, in_ranks(OBEDIENT))) as job:
        job.hear(1)
        job.process.send_signal(number)
        assert job.end() == (128 + number if name == "SIGTERM" else -number)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGALRM"])
def test_what_was_ignored_from_the_start_stays_ignored(name: str) -> None:
    command = after(f"signal.signal(signal.{name}, signal.SIG_IGN)", in_ranks(CHECKPOINT))
    with launched(command, stdin=subprocess.PIPE) as job:
        job.hear(1)
        job.process.send_signal(signal.Signals[name])
        assert job.process.stdin is not None
        job.process.stdin.close()
        assert job.hear(1) == {0: None}
        assert job.end() == 0


# ---- who is to blame ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_ranks_that_outlive_the_grace_are_said_to_have_been_killed(name: str) -> None:
    number = signal.Signals[name]
    with launched(with_grace(0.5, in_ranks(DEAF, "--nproc-per-node", "2", "--no-stacks"))) as job:
        job.hear(2)
        job.process.send_signal(number)
        assert job.end() == 128 + number
        assert job.stderr.read() == (
            f"rankspawn: {name}: ending the ranks\n"
            "rankspawn: the grace period is over: killing ranks 0-1\n"
            "rankspawn: interrupted; 2 ranks had to be killed after 0.5 s: 0-1\n"
        )


def test_a_second_ctrl_c_blames_no_rank() -> None:
    with launched(in_ranks(DEAF, "--nproc-per-node", "3", "--no-stacks")) as job:
        job.hear(3)
        job.process.send_signal(signal.SIGINT)
        assert job.stderr.readline() == "rankspawn: SIGINT: ending the ranks\n"
        job.process.send_signal(signal.SIGINT)
        assert job.end() == 128 + signal.SIGINT
        assert re.fullmatch(
            r"rankspawn: killing the ranks\nrankspawn: interrupted; 3 ranks had to be killed after [\d.]+ s: 0-2\n",
            job.stderr.read(),
        )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("nprocs", [1, 3])
def test_a_signal_that_all_processes_of_a_job_get_is_no_failure_of_a_rank(name: str, nprocs: int) -> None:
    """As Slurm sends it: the ranks first, here, and the launcher a moment later."""
    number = signal.Signals[name]
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n" + SLEEP
    command = in_ranks(code, "--nproc-per-node", str(nprocs), "--max-restarts", "1")
    with launched(command) as job:
        for pid in job.hear(nprocs).values():
            os.kill(pid, number)
        time.sleep(0.01)
        job.process.send_signal(number)
        assert job.end() == (-number if name == "SIGHUP" else 128 + number)
        assert job.stderr.read() == f"rankspawn: {name}: ending the ranks\n"


def test_a_rank_that_somebody_ends_alone_is_a_failure() -> None:
    with launched(in_ranks(SLEEP, "--nproc-per-node", "2")) as job:
        os.kill(job.hear(2)[1], signal.SIGTERM)
        assert job.end() == 128 + signal.SIGTERM
        told = job.stderr.read()
        assert "rankspawn: rank 1 has failed: ending the others\n" in told
        assert re.search(r"rank 1 \(pid \d+\) was killed by SIGTERM", told)


# ---- options --------------------------------------------------------------------------------------------------------


def test_shutdown_timeout_is_the_grace() -> None:
    with launched(in_ranks(DEAF, "--shutdown-timeout", "0.2")) as job:
        job.hear(1)
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 128 + signal.SIGTERM
        assert "had to be killed after 0.2 s: 0\n" in job.stderr.read()


def test_signal_to_rank_leaves_its_helper_until_the_rank_has_ended() -> None:
    code = SAY + (
        "import subprocess\n"
        "helper = subprocess.Popen(['sh', '-c', 'read line; echo batch'], stdin=-1, stdout=-1)\n"
        "def end(number, frame):\n"
        "    say(helper.communicate(b'next\\n')[0].decode())\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "say('ready')\n"
        "time.sleep(120)\n"
    )
    with launched(in_ranks(code, "--signal-to", "rank")) as job:
        job.hear(1)
        job.process.send_signal(signal.SIGTERM)
        assert job.hear(1) == {0: "batch\n"}
        assert job.end() == 128 + signal.SIGTERM


@pytest.mark.parametrize(("options", "guards"), [([], 1), (["--guard"], 1), (["--no-guard"], 0)])
def test_the_guard_is_on_unless_it_is_refused(options: list[str], guards: int) -> None:
    with launched(in_ranks(SLEEP, *options)) as job:
        rank = job.hear(1)[0]
        assert len({child.pid for child in psutil.Process(job.process.pid).children()} - {rank}) == guards
        job.process.send_signal(signal.SIGTERM)
        job.end()


def test_a_killed_launcher_leaves_no_temporary_folder(tmp_path: Path) -> None:
    with launched(in_ranks(SLEEP), env={**os.environ, "TMPDIR": str(tmp_path)}) as job:
        job.hear(1)
        assert list(tmp_path.glob("rankspawn-*"))
        job.process.kill()
        job.end()
        eventually(lambda: not list(tmp_path.iterdir()))


# ---- the commands that people put in front --------------------------------------------------------------------------


def test_under_timeout() -> None:
    with launched(["timeout", "-s", "TERM", "2", *in_ranks(OBEDIENT, "--nproc-per-node", "2")]) as job:
        job.hear(2)
        assert job.hear(2) == {0: "SIGTERM", 1: "SIGTERM"}
        assert job.end() == 124
        assert job.stderr.read() == "rankspawn: SIGTERM: ending the ranks\n"


def test_under_nohup() -> None:
    with launched(["nohup", *in_ranks(OBEDIENT)], stdin=subprocess.DEVNULL) as job:
        job.hear(1)
        job.process.send_signal(signal.SIGHUP)
        job.process.send_signal(signal.SIGTERM)
        assert job.hear(1) == {0: "SIGTERM"}
        assert job.end() == 128 + signal.SIGTERM


def test_under_setsid() -> None:
    with launched(["setsid", *in_ranks(OBEDIENT)]) as job:  # it executes the launcher in its own place
        job.hear(1)
        assert os.getsid(job.process.pid) == job.process.pid
        job.process.send_signal(signal.SIGHUP)
        assert job.hear(1) == {0: "SIGHUP"}
        assert job.end() == -signal.SIGHUP


# ---- reports --------------------------------------------------------------------------------------------------------


def test_a_short_rank_has_its_binding_in_the_report(tmp_path: Path) -> None:
    """Whether it is read in time is the scheduler's affair; that it is looked for before all else is ours."""
    report = tmp_path / "report.json"
    command = [*LAUNCHER, "run", "--nproc-per-node", "2", "--report", str(report), "--no-python", "sleep", "0.2"]
    assert completed(command).returncode == 0
    for rank in json.loads(report.read_text())["attempts"][0]["ranks"]:
        assert rank["binding"]["effective"] is not None
