"""Whatever a rank is wrapped in, ``rankspawn torchrun`` gives the program below it the death signal, and the grace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import PATIENCE, eventually, has_ended

pytest.importorskip("torch.distributed.run", reason="torch is not installed")

# Saves its work when it is told to end, which takes a moment.
PROGRAM = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    time.sleep(0.5)
    (folder / f"saved.{os.environ['RANK']}").touch()
    os._exit(0)
signal.signal(signal.SIGTERM, save)
(folder / f"ready.{os.environ['RANK']}").touch()
while True:  # a signal that comes just before a sleep does not end that sleep
    time.sleep(0.2)
"""
DEAF = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(pathlib.Path(sys.argv[1]) / f"ready.{os.environ['RANK']}").write_text(str(os.getpid()))
time.sleep(1000)
"""
WRAPPERS = {
    "program": '"$PYTHON" "$0" "$1"',
    "shell": '"$PYTHON" "$0" "$1"; exit $?',
    "timeout": 'timeout 1000 "$PYTHON" "$0" "$1"; exit $?',
}


def torchrun(folder: Path, script: str, *options: str, program: str = PROGRAM) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(program)
    script = script.replace('"$PYTHON"', f'"{sys.executable}" -I -S')
    command = [
        sys.executable,
        "-m",
        "rankspawn.torchrun",
        "--nproc-per-node",
        "2",
        "--shutdown-timeout",
        "20",
        *options,
    ]
    command += ["--no-python", "/bin/sh", "-c", script, str(folder / "program.py"), str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.parametrize("guard", [[], ["--no-guard"]])
def test_a_child_that_does_not_end_is_killed_when_the_grace_is_over(guard: list[str], tmp_path: Path) -> None:
    """Without the guard it stays, as under torchrun, but the launcher waits no longer for it."""
    launcher = torchrun(tmp_path, WRAPPERS["timeout"], "--shutdown-timeout", "1", *guard, program=DEAF)
    eventually(lambda: [path.read_text() != "" for path in tmp_path.glob("ready.*")] == [True, True])
    pids = [int(path.read_text()) for path in tmp_path.glob("ready.*")]
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(timeout=PATIENCE)
    left = [pid for pid in pids if not has_ended(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    told, _ = launcher.communicate(timeout=PATIENCE)
    assert left == (pids if guard else []), told


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("saved.*"))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("guard", [[], ["--no-guard"]])
def test_the_launcher_is_told_to_end(wrapper: str, guard: list[str], tmp_path: Path) -> None:
    launcher = torchrun(tmp_path, WRAPPERS[wrapper], *guard)
    eventually(lambda: len(list(tmp_path.glob("ready.*"))) == 2)
    launcher.send_signal(signal.SIGTERM)
    told, _ = launcher.communicate(timeout=PATIENCE)
    assert saved(tmp_path) == ["saved.0", "saved.1"], told


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_another_rank_fails(wrapper: str, tmp_path: Path) -> None:
    fails = '[ "$RANK" = 1 ] && while [ ! -e "$1/ready.0" ]; do sleep 0.05; done && exit 3; '
    launcher = torchrun(tmp_path, fails + WRAPPERS[wrapper])
    told, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 1
    assert saved(tmp_path) == ["saved.0"], told
