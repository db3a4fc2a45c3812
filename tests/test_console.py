"""What the launcher says stops nothing that it does: stderr is full, stopped, or read again later."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rankspawn._output import console
from tests.support.launchers import LAUNCHER, TIMEOUT, after, in_ranks
from tests.support.processes import eventually, has_ended

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fills pipes by Linux's means")


class Pipe:
    """A pipe that is full. reader, writer: its descriptors. text: what was in it that is not the filling."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(self.writer, False)
        for size in (4096, 1):
            try:
                while True:
                    os.write(self.writer, b"\0" * size)
            except BlockingIOError:
                pass
        os.set_blocking(self.writer, True)

    def rest(self) -> str:
        """Everything that comes until no process has the other end open."""
        os.close(self.writer)
        self.writer = -1
        with open(self.reader, "rb", closefd=False) as reader:
            return reader.read().replace(b"\0", b"").decode()

    def close(self) -> None:
        for fd in (self.reader, self.writer):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def full() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


@contextmanager
def running(command: list[str], stderr: int, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A launcher that is killed at the end of the block if it still runs."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, **options) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


# ---- a launcher whose stderr is full ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--tee"], ["--log-dir", "logs"]], ids=str)
def test_all_ranks_run_and_the_status_is_theirs(options: list[str], full: Pipe, tmp_path: Path) -> None:
    code = "import os\nopen('ran' + os.environ['RANK'], 'w').close()\nraise SystemExit(3)\n"
    done = subprocess.run(
        in_ranks(code, "--nproc-per-node", "2", "--keep-going", *options), stderr=full.writer, cwd=tmp_path,
        timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 3
    assert {path.name for path in tmp_path.glob("ran*")} == {"ran0", "ran1"}


def test_restarts(full: Pipe, tmp_path: Path) -> None:
    code = "import os\nopen('ran' + os.environ['TORCHELASTIC_RESTART_COUNT'], 'w').close()\nraise SystemExit(5)\n"
    done = subprocess.run(in_ranks(code, "--max-restarts", "3"), stderr=full.writer, cwd=tmp_path, timeout=TIMEOUT)
    assert done.returncode == 5
    assert len(list(tmp_path.glob("ran*"))) == 4


STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.write(1, (str(os.getpid()) + "\\n").encode())
time.sleep(600)
"""


def test_a_sibling_that_ignores_sigterm_is_killed_after_its_grace(full: Pipe) -> None:
    code = f"import os\nif os.environ['RANK'] == '0': raise SystemExit(3)\n{STUBBORN}"
    with running(in_ranks(code, "--nproc-per-node", "2", "--grace", "0.2"), full.writer) as launcher:
        assert launcher.wait(TIMEOUT) == 3


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["SIGTERM", "Ctrl-C twice"])
def test_signals_are_acted_on(signals: list[signal.Signals], full: Pipe) -> None:
    options = ["--nproc-per-node", "2", "--grace", "0.2" if len(signals) == 1 else "600"]
    with running(in_ranks(STUBBORN, *options), full.writer) as launcher:
        assert launcher.stdout is not None
        ranks = [int(launcher.stdout.readline()) for _ in range(2)]
        for sig in signals:
            launcher.send_signal(sig)
            # One at a time: two that come at once are one.
            eventually(lambda sig=sig: not pending(launcher.pid, sig))
        assert launcher.wait(TIMEOUT) in (128 + signals[0], -signals[0])
        assert all(has_ended(pid) for pid in ranks)


def pending(pid: int, sig: int) -> bool:
    """Whether the process has a signal that it has not acted on: the kernel's view, SigPnd and ShdPnd of proc(5)."""
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return any(int(mask, 16) >> (sig - 1) & 1 for mask in masks)


def test_who_reads_again_reads_all_lines_in_their_order(full: Pipe, tmp_path: Path) -> None:
    report, logs = tmp_path / "report.json", tmp_path / "logs"
    options = ["--max-restarts", "1", "--log-dir", str(logs), "--report", str(report)]
    with running(in_ranks("raise SystemExit(3)", *options), full.writer) as launcher:
        eventually(lambda: report.exists() and report.read_text().count('"status": 3') == 2)
        told = full.rest()
        assert launcher.wait(TIMEOUT) == 3
    lines = [re.sub(r"\d{2,}|/\S+", "...", line) for line in told.splitlines() if line.startswith("rankspawn")]
    ended = "rankspawn: rank 0 (pid ...) exited with status 3"
    failed = "rankspawn: rank 0 has failed"
    assert lines[0] == "rankspawn: logs in ..."
    assert [line for line in lines if line in (ended, failed, "rankspawn: restart 1 of 1")] in (
        [ended, "rankspawn: restart 1 of 1", ended],  # whether the other is said depends on who is seen to end first
        [failed, ended, "rankspawn: restart 1 of 1", failed, ended],
    )


def test_a_rank_that_fills_the_pipe_again_and_again(full: Pipe) -> None:
    # poll(2) says that there is room, and the rank takes it first: no write of ours may be in the way then.
    code = "import os\nwhile True: os.write(2, b'\\0' * 4096)\n"
    with running(in_ranks(code, "--nproc-per-node", "4"), full.writer) as launcher:
        for _ in range(200):
            os.read(full.reader, 4096)
        launcher.terminate()
        assert launcher.wait(TIMEOUT) in (128 + signal.SIGTERM, -signal.SIGTERM)


def test_a_traceback(full: Pipe) -> None:
    code = (
        "import sys\nimport rankspawn._cli.attempts as attempts\n"
        "def fail(*_): raise RuntimeError('not foreseen')\n"
        "attempts.run_attempts = fail\n"
        "from rankspawn._cli.main import main\n"
        "sys.exit(main(['run', '--no-python', 'true']))\n"
    )
    with running([sys.executable, "-c", code], full.writer) as launcher:
        assert launcher.wait(TIMEOUT) == 1
    with running([sys.executable, "-c", code], subprocess.STDOUT) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.read().endswith("RuntimeError: not foreseen\n")


def test_an_error_of_the_command(full: Pipe) -> None:
    done = subprocess.run([*LAUNCHER, "run", "--no-python", "/no/such"], stderr=full.writer, timeout=TIMEOUT)
    assert done.returncode == 127


def test_bind_becomes_its_program(full: Pipe) -> None:
    command = [*LAUNCHER, "bind", "--local-rank", "0", "--nproc-per-node", "1", "-v", "--cpus", "0", "echo", "here"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full.writer, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout) == (0, "here\n")


def test_a_stderr_with_o_nonblock_loses_nothing(full: Pipe, tmp_path: Path) -> None:
    code = "import os\nopen('ran' + os.environ['TORCHELASTIC_RESTART_COUNT'], 'w').close()\nraise SystemExit(3)\n"
    os.set_blocking(full.writer, False)
    with running(in_ranks(code, "--max-restarts", "1"), full.writer, cwd=tmp_path) as launcher:
        eventually((tmp_path / "ran1").exists)
        told = full.rest()
        assert launcher.wait(TIMEOUT) == 3
    assert told.count("exited with status 3") == 2 and "restart 1 of 1" in told


# ---- a terminal that is stopped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--log-dir", "logs"]], ids=["plain", "log-dir"])
def test_ctrl_s(options: list[str], tmp_path: Path) -> None:
    ours, terminal = pty.openpty()
    try:
        termios.tcflow(terminal, termios.TCOOFF)  # what the terminal does at Ctrl-S
        code = "import os\nif os.environ['RANK'] == '0': raise SystemExit(3)\n"
        code += STUBBORN
        command = in_ranks(code, "--nproc-per-node", "2", "--grace", "0.2", *options)
        with running(command, terminal, cwd=tmp_path) as launcher:
            assert launcher.wait(TIMEOUT) == 3
    finally:
        termios.tcflow(terminal, termios.TCOON)
        os.close(terminal)
        os.close(ours)


# ---- the writer ------------------------------------------------------------------------------------------------------


def test_a_line_that_somebody_reads_is_written_before_say_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_MOMENT", TIMEOUT)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    try:
        for number in range(100):
            console.write_bytes(writer, b"%d\n" % number)
            assert os.read(reader, 100) == b"%d\n" % number
        assert not console.is_stuck()
    finally:
        os.close(reader)
        os.close(writer)


def test_of_very_many_lines_the_number_is_said(full: Pipe) -> None:
    code = (
        "import os, sys\nfrom rankspawn._output import console\n"
        "for number in range(1000): console.say(f'line {number}')\n"
        "assert console.is_stuck()\n"
        "os.write(1, b'said\\n')\n"
        "sys.stdin.read()\n"
    )
    with running([sys.executable, "-c", code], full.writer, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "said\n"
        process.stdin.close()
        lines = full.rest().splitlines()
        assert process.wait(TIMEOUT) == 0
    assert lines == [
        *(f"rankspawn: line {number}" for number in range(256)),
        "rankspawn: 744 messages are left out here",
    ]


def test_the_end_waits_for_a_slow_reader_as_long_as_he_reads(full: Pipe) -> None:
    code = "from rankspawn._output import console\nfor number in range(200): console.say('x' * 1000)\n"
    with running([sys.executable, "-c", code], full.writer) as process:
        os.close(full.writer)
        full.writer, text = -1, b""
        while piece := os.read(full.reader, 4096):
            text += piece
        assert process.wait(TIMEOUT) == 0
    assert text.replace(b"\0", b"") == (b"rankspawn: " + b"x" * 1000 + b"\n") * 200


def test_a_background_job_may_write_where_the_terminal_forbids_it() -> None:
    """stty tostop: SIGTTOU would stop the launcher, and with it the supervision of its ranks."""
    code = """
import os, signal, subprocess, sys, termios
pid, terminal = __import__("pty").fork()
if pid == 0:
    attributes = termios.tcgetattr(0)
    attributes[3] |= termios.TOSTOP
    termios.tcsetattr(0, termios.TCSANOW, attributes)
    job = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, process_group=0) if sys.version_info >= (3, 11) \\
        else subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, preexec_fn=os.setpgrp)
    os._exit(job.wait())
text = b""
try:
    while piece := os.read(terminal, 1000):
        text += piece
except OSError:
    pass
sys.stdout.write(text.decode())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    command = [sys.executable, "-c", code, *in_ranks("raise SystemExit(3)")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert done.returncode == 3
    assert "exited with status 3" in done.stdout


def test_a_closed_stderr_is_nothing_to_wait_for() -> None:
    done = subprocess.run(after("os.close(2)", in_ranks("raise SystemExit(3)", "--max-restarts", "1")), timeout=TIMEOUT)
    assert done.returncode == 3
