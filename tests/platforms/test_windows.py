"""The package on Windows' own CPython, under Wine: plain subprocess, and CPU affinity by psutil after the start.

The interpreter is python.org's embeddable one, from a package of PyPI (the Makefile puts it into
build/platforms/windows). Wine is no Windows: the tests show that the code works without POSIX, and nothing of Windows'
kernel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.platforms.building import HERE, ROOT, tool

PACKAGES = ROOT / "build" / "platforms" / "windows"
CHECKS = ("imports", "popen", "binding", "handler", "group", "tree")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def python() -> Iterator[Run]:
    """A function that runs the Windows Python, on a drive from which it cannot see this machine's file system."""
    wine, server = tool("wine64"), tool("wineserver")
    with tempfile.TemporaryDirectory(prefix="rankspawn-wine-") as prefix:
        env = {
            "PATH": os.environ["PATH"],
            "HOME": prefix,  # Wine adds entries to the menus of the desktop in HOME
            "WINEPREFIX": prefix,
            "WINEDEBUG": "-all",
            "WINEDLLOVERRIDES": "winedbg.exe,mscoree,mshtml=",
        }
        drive = Path(prefix, "drive_c")

        def run(*args: str) -> subprocess.CompletedProcess[str]:
            command = [wine, "C:\\python\\python.exe", *args]
            return subprocess.run(
                command,
                cwd=drive / "work",
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
                check=False,
            )

        try:
            # The server and what wineboot starts run on, and would keep a pipe open.
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run([server, "-p"], env=env, check=True, **quiet)
            subprocess.run([wine, "wineboot", "-i"], env=env, check=True, timeout=120, **quiet)
            # _wmi.pyd is left out: with it, platform.platform() asks Wine 8 for something that Wine 8 does not have.
            shutil.copytree(PACKAGES / "python", drive / "python", ignore=shutil.ignore_patterns("_wmi.pyd"))
            (drive / "python" / "python313._pth").write_text("python313.zip\n.\nC:\\packages\nC:\\source\n")
            shutil.copytree(PACKAGES / "packages", drive / "packages")
            # The engine of this machine is left out; it is built into the same folder.
            shutil.copytree(ROOT / "src", drive / "source", ignore=shutil.ignore_patterns("*.so", "*.egg-info"))
            (drive / "work").mkdir()
            shutil.copy(HERE / "windows_checks.py", drive / "work")
            Path(prefix, "dosdevices", "z:").unlink()
            yield run
        finally:
            subprocess.run([server, "-k"], env=env, check=False)
            subprocess.run([server, "-w"], env=env, check=False)


@pytest.mark.parametrize("check", CHECKS)
def test_check(python: Run, check: str) -> None:
    done = python("windows_checks.py", check)
    print(done.stdout)
    assert done.returncode == 0 and done.stdout.endswith(f"passed {check}\n"), done.stdout


RANK = "import os, psutil; print(os.environ['RANK'], os.environ['WORLD_SIZE'], psutil.Process().cpu_affinity())"


def command(python: Run, *words: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "rankspawn", *words)


def test_run(python: Run) -> None:
    done = command(python, "run", "--nproc-per-node", "2", "--no-python", "python.exe", "-c", RANK)
    assert done.returncode == 0, done.stdout
    assert "0 2 [" in done.stdout and "1 2 [" in done.stdout
    assert "rankspawn has no engine here: ranks may outlive this launcher" in done.stdout


def test_run_of_a_rank_that_fails(python: Run) -> None:
    code = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit('gone'); time.sleep(60)"
    options = ["--nproc-per-node", "2", "--log-dir", "logs", "--tee", "--report", "report.json"]
    done = command(python, "run", *options, "--no-python", "python.exe", "-c", code)
    assert done.returncode == 1, done.stdout
    assert "[rank 1]:gone" in done.stdout
    assert "exited with status 1" in done.stdout


@pytest.mark.parametrize("words", [["topology"], ["plan", "--nproc-per-node", "2"]])
def test_what_needs_sysfs_says_so(python: Run, words: list[str]) -> None:
    done = command(python, *words)
    assert done.returncode == 1, done.stdout
    assert "no online CPU below sys/devices/system/cpu" in done.stdout
    assert "Traceback" not in done.stdout


def test_doctor(python: Run) -> None:
    done = command(python, "doctor")
    assert done.returncode == 1, done.stdout
    assert "plain subprocess starts processes" in done.stdout
    assert "Traceback" not in done.stdout
