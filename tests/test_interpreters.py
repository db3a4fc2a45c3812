"""An interpreter without a GIL, in which importing us must not switch the GIL back on, and several interpreters in one
process. Each test's program runs in a fresh interpreter, because pytest's own modules affect both."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "rankspawn"
PATHS = sorted(path.relative_to(SOURCE).with_suffix("") for path in SOURCE.rglob("*.py"))
MODULES = [".".join(path.parts) for path in PATHS if not path.name.startswith("__")]
assert len(MODULES) > 40
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

SUB_INTERPRETER = """
def run(code):
    try:
        from concurrent import interpreters
    except ImportError:
        try:
            import _interpreters as legacy
        except ImportError:
            import _xxsubinterpreters as legacy
        # Before 3.12 no sub-interpreter has a GIL of its own, and an isolated one may not start processes.
        one = legacy.create() if sys.version_info >= (3, 12) else legacy.create(isolated=False)
        assert legacy.run_string(one, code) is None
        legacy.destroy(one)
    else:
        one = interpreters.create()
        one.exec(code)
        one.close()
"""


def python(program: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not FREE_THREADED, reason="this Python always has its GIL")
def test_imports_leave_the_gil_off() -> None:
    program = """
        import importlib, sys
        for name in sys.argv[1:]:
            importlib.import_module(f"rankspawn.{name}")
        assert "rankspawn._spawn" in sys.modules
        assert not sys._is_gil_enabled()
    """
    python(program, *(name for name in MODULES if name != "_torch.elastic"))  # which imports torch


@pytest.mark.parametrize("mechanism", ["clone", "posix_spawn"])
def test_threads_that_start_at_once(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread gets its own result while another changes the environment, and several threads watch one group."""
    monkeypatch.setenv("RANKSPAWN_MECHANISM", mechanism)
    program = """
        import os, sys, threading
        from concurrent.futures import ThreadPoolExecutor
        from rankspawn import Binding, Popen, launch

        cpus = sorted(os.sched_getaffinity(0))
        bindings = [Binding(cpus={cpu}) for cpu in cpus] if sys.argv[1] == "clone" else [None]
        together = threading.Barrier(9)
        done = threading.Event()

        def change():
            together.wait()
            turn = 0
            while not done.is_set():
                turn += 1
                for name in range(turn % 300):
                    os.environ[f"RANKSPAWN_TEST_{name}"] = "x" * (turn % 50)
                for name in range(turn % 300):
                    del os.environ[f"RANKSPAWN_TEST_{name}"]

        def start(number):
            together.wait()
            for turn in range(30):
                word, binding = f"{number}-{turn}", bindings[turn % len(bindings)]
                shown = "echo $0; grep Cpus_allowed_list /proc/self/status"
                with Popen(["sh", "-c", shown, word], stdout=-1, text=True, binding=binding) as process:
                    told = process.communicate()[0].split()
                assert process.returncode == 0 and process.mechanism == sys.argv[1]
                assert told[0] == word
                if binding is not None:
                    assert told[2] == str(*binding.cpus)

        def together_in_a_group(number):
            together.wait()
            for turn in range(5):
                with launch(["sh", "-c", "exit $RANK"], 3, keep_going=True) as group:
                    with ThreadPoolExecutor(3) as watchers:
                        waits = [watchers.submit(group.wait, 60) for _ in range(2)]
                        looks = watchers.submit(look, group)
                        assert [wait.result() for wait in waits] == [(0, 1, 2)] * 2
                        looks.result()

        def look(group):
            while group.running:
                told = group.poll()
                assert len(told) == 3 and all(code in (None, rank) for rank, code in enumerate(told))
                group.report()

        with ThreadPoolExecutor(9) as pool:
            changes = pool.submit(change)
            starts = [pool.submit(start, number) for number in range(6)]
            starts += [pool.submit(together_in_a_group, number) for number in range(2)]
            try:
                for one in starts:
                    one.result()
            finally:
                done.set()
            changes.result()
        print(sys._is_gil_enabled() if hasattr(sys, "_is_gil_enabled") else True)
    """
    assert python(program, mechanism) == f"{not FREE_THREADED}\n"


@pytest.mark.parametrize("loaded", ["", "import rankspawn; rankspawn.Popen(['true']).wait()"])
def test_sub_interpreter(loaded: str) -> None:
    """A sub-interpreter may have no engine. The standard library then starts the process, which is bound after its
    start, if at all."""
    code = textwrap.dedent("""
        from rankspawn import Binding, BindingError, MemoryPolicy, Popen, launch
        from rankspawn._start.engine import EXTENSION_ERROR

        with Popen(["true"]) as process:
            assert process.wait(60) == 0
        assert process.mechanism == ("clone" if EXTENSION_ERROR is None else "subprocess")
        with launch(["sh", "-c", "exit $RANK"], 2, keep_going=True) as group:
            assert group.wait(60) == (0, 1)
        if EXTENSION_ERROR is not None:
            try:
                Popen(["true"], binding=Binding(cpus=None, memory=MemoryPolicy("local")))
            except BindingError as error:
                assert error.step == "set_mempolicy"
            else:
                raise AssertionError("not refused")
            with Popen(["true"], binding=Binding(cpus={0}, required=False)) as process:
                assert process.wait(60) == 0
        print(EXTENSION_ERROR)
    """)
    program = f"import sys\n{loaded}\n{SUB_INTERPRETER}\nrun({code!r})\n{loaded}"
    told = python(program).strip()
    if sys.version_info >= (3, 12):
        assert "does not support loading in subinterpreters" in told
    elif loaded:
        assert "only be loaded into one interpreter" in told
    else:
        assert told == "None"  # the first interpreter that imports the engine has it
