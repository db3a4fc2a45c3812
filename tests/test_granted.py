"""A binding that the kernel grants only in part, as for a CPU that is not there, on each way of starting."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rankspawn import Binding, BindingError, MemoryPolicy, Popen, SubprocessHandler, get_context, launch
from rankspawn._start.engine import EXTENSION_ERROR, bind_process, bind_thread
from tests.support.launchers import LAUNCHER, completed, environment_here

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
]

CPU = min(os.sched_getaffinity(0)) if sys.platform == "linux" else 0
NODE = 0
CPUS = Binding({CPU, 8000})  # with a CPU that no kernel has
NODES = Binding(None, MemoryPolicy("bind", {NODE, 1000}))
BOTH = Binding({CPU, 8000}, MemoryPolicy("interleave", {NODE, 1000}), required=False)


@pytest.fixture(scope="module", autouse=True)
def policies() -> None:
    try:
        Popen(["true"], binding=Binding(None, MemoryPolicy("bind", {NODE}))).wait()
    except BindingError as error:
        pytest.skip(str(error))  # the kernel has no NUMA, or the container forbids the call


def steps(refused: Any) -> list[tuple[str, int]]:
    return [(one.step, one.errno) for one in refused]


CUT = [("sched_setaffinity", errno.ERANGE), ("set_mempolicy", errno.ERANGE)]


@pytest.mark.parametrize(("binding", "step"), [(CPUS, "sched_setaffinity"), (NODES, "set_mempolicy")])
def test_a_required_binding_fails_the_start(binding: Binding, step: str, tmp_path: Path) -> None:
    trace = tmp_path / "started"
    with pytest.raises(BindingError, match=f"{step}: granted only in part .asked: ") as caught:
        Popen(["touch", str(trace)], binding=binding)
    assert (caught.value.step, caught.value.errno) == (step, errno.ERANGE)
    assert not trace.exists()  # the child has executed nothing
    with pytest.raises(BindingError, match=f"rank 1: {step}: granted only in part"):
        launch(["true"], 2, bindings=[None, binding])


def test_an_optional_binding_is_made_in_part_and_reported() -> None:
    with Popen(["sleep", "60"], binding=BOTH) as process:
        assert steps(process.binding_report.refused) == CUT
        effective = process.binding_report.effective
        process.kill()
    assert effective == Binding({CPU}, MemoryPolicy("interleave", {NODE}))


def test_a_whole_binding_is_granted() -> None:
    everything = Binding(os.sched_getaffinity(0), MemoryPolicy("bind", {NODE}))
    with Popen(["true"], binding=everything) as process:
        assert process.binding_report.refused == ()


def test_a_thread_and_a_running_process() -> None:
    told: list[Any] = []

    def bind() -> None:
        told.append(steps(bind_thread(BOTH)))
        for binding in (CPUS, NODES):
            try:
                bind_thread(binding)
            except BindingError as error:
                told.append(error.step)

    thread = threading.Thread(target=bind)
    thread.start()
    thread.join()
    assert told == [CUT, "sched_setaffinity", "set_mempolicy"]
    with Popen(["sleep", "60"]) as process:
        assert steps(bind_process(process.pid, CPUS.replace(required=False))) == CUT[:1]
        with pytest.raises(BindingError, match="granted only in part"):
            bind_process(process.pid, CPUS)
        process.kill()


class OwnStart(SubprocessHandler):
    """A handler that starts its process itself, in a thread that is bound."""

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
        return subprocess.Popen(args, env={**os.environ, **env})


@pytest.mark.parametrize("handler", [SubprocessHandler, OwnStart])
def test_a_handler(handler: type[SubprocessHandler], monkeypatch: pytest.MonkeyPatch) -> None:
    from rankspawn._torch import handler as _handler

    monkeypatch.setattr(_handler, "binding_for", lambda *_: CPUS)
    with pytest.raises(BindingError, match="granted only in part"):
        handler("true", (), {}, None, None, 0, None)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_context(method: str) -> None:
    code = f"""
from rankspawn import Binding, BindingError, MemoryPolicy, get_context
for binding in ({CPUS!r}, {NODES!r}):
    try:
        get_context({method!r}, [binding]).Process(target=print).start()
    except BindingError as error:
        print(error.step, error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{step} {code}" for step, code in CUT], done.stderr
    assert get_context(method).get_start_method() == method  # type: ignore[arg-type]


def test_the_standard_library_in_the_engines_place() -> None:
    code = f"""
from rankspawn import Binding, BindingError, MemoryPolicy, Popen
process = Popen(["sleep", "60"], binding={CPUS.replace(required=False)!r})
print(process.mechanism, [(one.step, one.errno) for one in process.binding_report.refused])
process.kill(); process.wait()
try:
    Popen(["true"], binding={CPUS!r})
except BindingError as error:
    print(error.step, error.errno)
try:
    Popen(["true"], binding={NODES!r})
except BindingError as error:
    print(error)
"""
    environment = environment_here(RANKSPAWN_MECHANISM="subprocess")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    first, second, third = done.stdout.splitlines()
    assert first == f"subprocess {CUT[:1]}"
    assert second == f"sched_setaffinity {errno.ERANGE}"
    assert "Operation not supported" in third and "it needs rankspawn's engine: RANKSPAWN_MECHANISM" in third


def test_run_says_in_one_line_what_was_refused(tmp_path: Path) -> None:
    """A seccomp filter or a cpuset refuses what the plan asks; here the plan asks for a CPU that is not there."""
    code = (
        "import sys; from rankspawn._cli import options; from rankspawn._cli.main import main\n"
        "from rankspawn import Binding, MemoryPolicy\n"
        "from rankspawn._place.plan import Placed\n"
        "from rankspawn._cli import settings\n"
        f"placed = [Placed({BOTH!r}), Placed({BOTH.replace(cpus={CPU})!r}), Placed({BOTH!r})]\n"
        "settings.placement = lambda *_: placed\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    report = tmp_path / "report.json"
    words = ["run", "--nproc-per-node", "3", "--cpus", "0", "--report", str(report), "--no-python", "true"]
    done = completed([sys.executable, "-c", code, *words])
    assert done.returncode == 0, done.stderr
    assert [line.partition(": the other")[0] for line in done.stderr.splitlines()] == [
        "rankspawn: ranks 0,2: the system refused sched_setaffinity: granted only in part",
        "rankspawn: ranks 0-2: the system refused set_mempolicy: granted only in part",
    ]
    ranks = json.loads(report.read_text())["attempts"][0]["ranks"]
    assert [len(rank["binding"]["refused"]) for rank in ranks] == [2, 1, 2]


def test_run_says_nothing_where_nothing_was_refused() -> None:
    done = completed([*LAUNCHER, "run", "--cpus", str(CPU), "--numa-binding-optional", "--no-python", "true"])
    assert (done.returncode, done.stderr) == (0, "")
