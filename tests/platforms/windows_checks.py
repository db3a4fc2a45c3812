"""What a Windows Python can do with the package: one function for each check. test_windows.py runs them there.

python windows_checks.py CHECK
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

import rankspawn
from rankspawn import Binding, BindingError, MemoryPolicy, Popen, SubprocessHandler, launch

SLEEP = "import time; time.sleep(60)"
# context.py imports methods.py on POSIX alone; elastic.py needs torch.
NOT_FOR_WINDOWS = {"rankspawn._multiprocessing.methods", "rankspawn._torch.deaths", "rankspawn._torch.elastic"}


def raised(kind: type[BaseException], *args: object, **kwargs: object) -> str:
    """The text of the exception that the start raises."""
    try:
        Popen(*args, **kwargs)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def imports() -> None:
    assert os.name == "nt" and sys.platform == "win32"
    modules = list(pkgutil.walk_packages(rankspawn.__path__, "rankspawn."))
    assert len(modules) > 40
    for module in modules:
        try:
            importlib.import_module(module.name)
        except (ImportError, AttributeError):
            assert module.name in NOT_FOR_WINDOWS or module.name.startswith("rankspawn._warm."), module.name


def popen() -> None:
    with Popen([sys.executable, "-c", "print(6 * 7)"], stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate(timeout=60)[0] == "42\n"
        assert (process.mechanism, process.pidfd, process.returncode) == ("subprocess", None, 0)
    log = Path("log.txt")
    with Popen([sys.executable, "-c", "print('said')"], stdout=log, stderr=log, stdin=subprocess.DEVNULL) as process:
        assert process.wait(60) == 0
    assert log.read_text() == "said\n"
    raised(FileNotFoundError, ["no-such-program"])


def binding() -> None:
    with Popen([sys.executable, "-c", SLEEP], binding=Binding({1})) as process:
        assert psutil.Process(process.pid).cpu_affinity() == [1]
        assert not process.binding_report.refused and process.binding_report.late
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            process.kill()
        assert process.wait(60) == 1
    command = [sys.executable, "-c", ""]
    assert "set_mempolicy" in raised(BindingError, command, binding=Binding(None, MemoryPolicy("bind", {0})))
    assert "sched_setaffinity" in raised(BindingError, command, binding=Binding({4000}))
    assert "engine" in raised(OSError, command, die_with_parent=True)
    with Popen(command, binding=Binding({0}, MemoryPolicy("bind", {0}), required=False)) as process:
        assert [step.step for step in process.binding_report.refused] == ["set_mempolicy"]


def handler() -> None:
    log = Path("handler.txt")
    command = ("-c", f"print('a rank', flush=True); {SLEEP}")
    one = SubprocessHandler(sys.executable, command, dict(os.environ), str(log), None, 0)
    until = time.monotonic() + 60
    while not log.read_text().endswith("\n") and time.monotonic() < until:
        time.sleep(0.05)
    one.close(15)  # CTRL_C_EVENT, the default, needs a console
    assert one.proc.wait(60) == 1  # TerminateProcess, as the standard library calls it
    one.close(15)
    assert log.read_text() == "a rank\n"


def group() -> None:
    with launch([sys.executable, "-c", "import os; print(os.environ['RANK'])"], 3) as ranks:
        assert ranks.wait(timeout=60) == (0, 0, 0)
    began = time.monotonic()
    with launch(
        [sys.executable, "-c", f"import os, sys; os.environ['RANK'] == '1' and sys.exit(5); {SLEEP}"], 2
    ) as ranks:
        assert ranks.wait(timeout=60)[1] == 5
    assert time.monotonic() - began < 50


def alive_below(ending: str) -> int:
    """Launch a rank that starts a process and then runs the code ``ending``, and close the group; the process's pid."""
    code = f"import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).pid, flush=True)"
    folder = Path(ending.partition("(")[0])
    with launch([sys.executable, "-c", f"{code}; {ending}"], 1, log_dir=folder) as ranks:
        until = time.monotonic() + 60
        while not (said := [path for path in folder.rglob("stdout.log") if path.read_text().endswith("\n")]):
            assert time.monotonic() < until
            time.sleep(0.05)
        child = int(said[0].read_text())
        assert psutil.pid_exists(child)
        if ending == "sys.exit()":
            assert ranks.wait(timeout=60) == (0,)
    assert not psutil.pid_exists(ranks.pids()[0])
    return child


def tree() -> None:
    """A process that a rank has started ends with the group, whether the rank still runs or has ended before."""
    for ending in ("time.sleep(60)", "sys.exit()"):
        child, until = alive_below(ending), time.monotonic() + 30
        while psutil.pid_exists(child):
            assert time.monotonic() < until, ending
            time.sleep(0.05)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("passed", sys.argv[1])
