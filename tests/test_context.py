"""Contexts: tests that run on multiprocessing's own and on ours, then tests of what only ours do."""

from __future__ import annotations

import concurrent.futures
import errno
import functools
import gc
import json
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from multiprocessing import (
    connection,
    forkserver,
    popen_fork,
    popen_forkserver,
    popen_spawn_posix,
    resource_tracker,
    shared_memory,
    spawn,
)
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest

import rankspawn
from rankspawn import Binding, BindingError, MemoryPolicy, get_context
from rankspawn._multiprocessing.context import Context
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.in_process import (
    add,
    double,
    double_and_stay,
    echo,
    fail,
    fill,
    initialize,
    initialized,
    leave_a_grandchild,
    mask,
    send,
    wait_for,
)
from tests.support.state import in_child

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="binding is Linux's")

METHODS = ["spawn", "forkserver"]
SOURCE = Path(rankspawn.__file__).parents[1]
PATIENCE = 60.0

# Ids that no machine has, and that Binding accepts.
NO_CPU, NO_NODE = 60_000, 1_000

CPUS = sorted(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else [0]
needs_two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="one CPU: every binding is the same")
needs_the_engine = pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension")


@pytest.fixture(scope="module", autouse=True)
def servers_of_multiprocessing() -> Iterator[None]:
    """multiprocessing starts its servers once and keeps them. Here they run before the first test and after the last,
    so that no test seems to leave one behind."""
    resource_tracker.ensure_running()
    forkserver.ensure_running()
    multiprocessing.RawValue("i")  # makes multiprocessing's heap
    tracker, server = resource_tracker._resource_tracker, forkserver._forkserver  # type: ignore[attr-defined]
    for pid in (tracker._pid, server._forkserver_pid):
        while not Path("/proc", str(pid), "cmdline").read_text():  # empty in the middle of execve(2)
            time.sleep(0.01)
    yield
    server._stop()
    tracker._stop()


@pytest.fixture(params=[f"{whose} {method}" for method in METHODS for whose in ("stock", "our")])
def context(request: pytest.FixtureRequest) -> Any:
    """A context of multiprocessing's, or one of ours that binds to the inherited CPUs."""
    whose, method = request.param.split()
    return multiprocessing.get_context(method) if whose == "stock" else get_context(method, [Binding(set(CPUS))])


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def script(folder: Path, text: str) -> str:
    path = folder / "program.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def run(*arguments: str, **kwargs: Any) -> Any:
    """Run a Python program in its own interpreter; the JSON that it wrote to its stdout."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), **kwargs.pop("env", {})}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=PATIENCE, **kwargs
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def answer_of(ctx: Any, function: Callable[[], object]) -> Any:
    """What ``function`` returns in a process of the context."""
    ours, childs = ctx.Pipe()
    with ours, childs:
        process = ctx.Process(target=send, args=(childs, function))
        process.start()
        answer = ours.recv()
        process.join()
    assert process.exitcode == 0
    return answer


class Waiting:
    """A process that runs until it is told to end, and its pipe."""

    def __init__(self, ctx: Any, **kwargs: Any) -> None:
        self.ours, childs = ctx.Pipe()
        self.process = ctx.Process(target=wait_for, args=(childs,), **kwargs)
        with childs:
            try:
                self.process.start()
            except BaseException:
                self.ours.close()
                raise
        self.pid = self.ours.recv()

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.process.join()


# ---- what multiprocessing can do ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "status"), [(int, 0), (functools.partial(sys.exit, 3), 3), (fail, 1)], ids=["end", "exit", "exception"]
)
def test_exit_code(context: Any, function: Any, status: int) -> None:
    process = context.Process(target=function)
    assert process.exitcode is None and not process.is_alive()
    process.start()
    process.join()
    assert process.exitcode == status and not process.is_alive()


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_signals(context: Any, how: str) -> None:
    with Waiting(context) as waiting:
        assert waiting.process.is_alive() and waiting.process.pid == waiting.pid
        getattr(waiting.process, how)()
        waiting.process.join()
        assert waiting.process.exitcode == -(signal.SIGTERM if how == "terminate" else signal.SIGKILL)
        getattr(waiting.process, how)()  # the process has gone: this does nothing


def test_sentinel(context: Any) -> None:
    with Waiting(context) as waiting:
        sentinel = waiting.process.sentinel
        assert isinstance(sentinel, int) and not connection.wait([sentinel], 0)
        waiting.ours.send("end")
        assert connection.wait([sentinel], PATIENCE) == [sentinel]
        poller = select.poll()
        poller.register(sentinel, select.POLLIN)
        assert poller.poll(0)
        waiting.process.join(PATIENCE)
        assert waiting.process.exitcode == 0


def test_join_with_a_timeout(context: Any) -> None:
    with Waiting(context) as waiting:
        for timeout in (0, 0.01):
            waiting.process.join(timeout)
            assert waiting.process.exitcode is None and waiting.process.is_alive()
        waiting.ours.send("end")
        waiting.process.join(PATIENCE)
        assert waiting.process.exitcode == 0


def test_close(context: Any) -> None:
    with Waiting(context) as waiting:
        with pytest.raises(ValueError, match="still running"):
            waiting.process.close()
        waiting.ours.send("end")
        waiting.process.join()
        waiting.process.close()
        with pytest.raises(ValueError, match="closed"):
            waiting.process.start()
        waiting.process = context.Process(target=int)  # the end of the block joins it
        waiting.process.start()


@pytest.mark.parametrize("ctx", [multiprocessing.get_context("spawn"), get_context("spawn")], ids=["stock", "our"])
def test_many_wait_at_once(ctx: Any) -> None:
    """Not with "forkserver": of several threads that read the status from its pipe, one reads the end of the file and
    takes 255 for the status."""
    with Waiting(ctx) as waiting:
        threads = [threading.Thread(target=waiting.process.join, args=(PATIENCE,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        waiting.ours.send("end")
        for thread in threads:
            thread.join()
        assert waiting.process.exitcode == 0


def test_queues(context: Any) -> None:
    inbox, outbox = context.Queue(), context.SimpleQueue()
    process = context.Process(target=echo, args=(inbox, outbox))
    process.start()
    large = bytes(1 << 18)  # larger than a pipe's buffer
    for item in (1, "two", large, None):
        inbox.put(item)
    assert [outbox.get() for _ in range(3)] == [1, "two", large]
    process.join()
    assert process.exitcode == 0
    inbox.close()
    inbox.join_thread()
    outbox.close()


def test_large_arguments(context: Any) -> None:
    large = bytes(1 << 20)
    assert answer_of(context, functools.partial(len, large)) == len(large)


def test_synchronized_value(context: Any) -> None:
    value = context.Value("i", 0)
    processes = [context.Process(target=add, args=(value, 100)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert value.value == 300


def test_shared_memory(context: Any) -> None:
    memory = shared_memory.SharedMemory(create=True, size=16)
    try:
        process = context.Process(target=fill, args=(memory.name,))
        process.start()
        process.join()
        assert bytes(memory.buf[:5]) == b"ranks"
    finally:
        memory.close()
        memory.unlink()


def test_pool(context: Any) -> None:
    pool = context.Pool(2, initializer=initialize, maxtasksperchild=2)
    with pool:
        assert pool.map(double, range(6), chunksize=1) == list(range(0, 12, 2))
        assert set(pool.map(initialized, range(4))) == {"yes"}
        with pytest.raises(ValueError, match="on purpose"):
            pool.apply(fail)
        pool.close()
        pool.join()


def test_executor(context: Any) -> None:
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        assert list(executor.map(double, range(8))) == list(range(0, 16, 2))
        with pytest.raises(ValueError, match="on purpose"):
            executor.submit(fail).result()


def test_executor_notices_a_death(context: Any) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        with pytest.raises(concurrent.futures.process.BrokenProcessPool):
            executor.submit(os._exit, 1).result(PATIENCE)


def test_manager(context: Any) -> None:
    with context.Manager() as manager:
        shared = manager.dict()
        process = context.Process(target=shared.__setitem__, args=("rank", 3))
        process.start()
        process.join()
        assert shared.copy() == {"rank": 3}
        del shared


def test_a_class_of_the_programs(context: Any, tmp_path: Path) -> None:
    assert run(
        script(
            tmp_path,
            f"""
            import json, multiprocessing, sys, rankspawn
            context = {"rankspawn" if isinstance(context, Context) else "multiprocessing"}.get_context(sys.argv[1])

            class Worker(context.Process):
                def __init__(self, number, pipe):
                    super().__init__(name="worker")
                    self.number, self.pipe = number, pipe

                def run(self):
                    self.pipe.send((self.number, type(self).__name__, multiprocessing.current_process().name))

            if __name__ == "__main__":
                ours, childs = context.Pipe()
                worker = Worker(7, childs)
                assert isinstance(worker, context.Process)
                worker.start()
                print(json.dumps(ours.recv()))
                worker.join()
            """,
        ),
        context.get_start_method(),
    ) == [7, "Worker", "worker"]


def test_what_cannot_be_pickled(context: Any) -> None:
    process = context.Process(target=lambda: None)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        process.start()
    assert process.pid is None and multiprocessing.active_children() == []


def test_the_end_of_the_parent(context: Any, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    program = script(
        tmp_path,
        f"""
        import multiprocessing, os, pathlib, signal, sys, rankspawn

        def outlive():
            multiprocessing.parent_process().join({PATIENCE})
            pathlib.Path(sys.argv[2]).write_text(str(os.getppid()))

        if __name__ == "__main__":
            whose = {"rankspawn" if isinstance(context, Context) else "multiprocessing"}
            whose.get_context(sys.argv[1]).Process(target=outlive).start()
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    subprocess.run([sys.executable, program, context.get_start_method(), str(ended)], env=environment, timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while not ended.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended.exists()


def test_a_fork_knows_no_exit_code(context: Any) -> None:
    """A fork of the parent is not the parent of the process: it cannot know how the process ended, and does not
    guess."""

    def look() -> tuple[object, list[str]]:
        unraisable: list[str] = []
        sys.unraisablehook = lambda what: unraisable.append(str(what.exc_value))
        found = process.exitcode
        multiprocessing.process._children.clear()  # type: ignore[attr-defined]
        waiting.__dict__.clear()
        gc.collect()
        return found, unraisable

    with Waiting(context) as waiting:
        process = waiting.process
        if context.get_start_method() == "spawn":
            assert in_child(look) == (None, [])


def test_the_parents_settings_stay(context: Any) -> None:
    before = (mask(), spawn.get_executable(), multiprocessing.get_start_method(allow_none=True))
    assert answer_of(context, mask) == CPUS
    assert (mask(), spawn.get_executable(), multiprocessing.get_start_method(allow_none=True)) == before
    # In the child, as in any other, the start method is the program's default.
    default = multiprocessing.get_context().get_start_method()
    assert answer_of(context, multiprocessing.get_start_method) == default


# ---- bound ----------------------------------------------------------------------------------------------------------


def test_each_process_has_its_place(method: str) -> None:
    places = [Binding({CPUS[0]}), Binding({CPUS[-1]}), None]
    ctx = get_context(method, places)
    with Waiting(ctx) as first, Waiting(ctx) as second, Waiting(ctx) as third, Waiting(ctx) as fourth:
        reports = [one.process.binding_report for one in (first, second, third, fourth)]
        assert [report.requested for report in reports] == [places[0], places[1], None, places[0]]
        found = [report.effective.cpus for report in reports]
        assert found == [{CPUS[0]}, {CPUS[-1]}, set(CPUS), {CPUS[0]}]
        assert [report.pid for report in reports] == [one.pid for one in (first, second, third, fourth)]
        assert all(report.refused == () for report in reports)


def test_the_order_is_of_the_starts(method: str) -> None:
    """Places are given in the order of the starts, even when each process ends before the next one starts."""
    places = [Binding(set(CPUS)), Binding({CPUS[0]}), Binding({CPUS[-1]})]
    ctx = get_context(method, places)
    found = []
    for _ in range(6):
        with Waiting(ctx) as waiting:
            found.append(waiting.process.binding_report.requested)
    assert found == places * 2


def test_a_replacement_takes_the_place(method: str) -> None:
    places = [Binding({CPUS[0]}), Binding({CPUS[-1]}), Binding(set(CPUS))]
    ctx = get_context(method, places)
    with Waiting(ctx), Waiting(ctx) as second, Waiting(ctx):
        second.process.kill()
        # The process has ended, and nobody has waited for it.
        assert connection.wait([second.process.sentinel], PATIENCE)
        if method == "spawn":
            os.waitid(os.P_PID, second.pid, os.WEXITED | os.WNOWAIT)
        for _ in range(2):
            with Waiting(ctx) as replacement:
                assert replacement.process.binding_report.requested == places[1]
        with Waiting(ctx), Waiting(ctx) as further:
            assert further.process.binding_report.requested == places[0]


@needs_two_cpus
def test_workers_of_a_pool_stay_on_their_places(method: str) -> None:
    ctx = get_context(method, [Binding({cpu}) for cpu in CPUS[:2]])
    with ctx.Pool(2, maxtasksperchild=1) as pool:
        found = pool.map(double_and_stay, range(8), chunksize=1)
        pool.close()
        pool.join()
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=ctx) as executor:
        found += list(executor.map(double_and_stay, range(8)))
    assert {tuple(cpus) for _, cpus in found} == {(cpu,) for cpu in CPUS[:2]}


def test_a_function_chooses(method: str) -> None:
    table = {"learner": Binding({CPUS[-1]}), "actor": Binding({CPUS[0]})}
    ctx = get_context(method, lambda process: table.get(process.name))
    for name, wanted in (("actor", {CPUS[0]}), ("learner", {CPUS[-1]}), ("other", set(CPUS))):
        with Waiting(ctx, name=name) as waiting:
            assert waiting.process.binding_report.effective.cpus == wanted
    with pytest.raises(TypeError, match=r"expected a Binding or None, got \{0\}"):
        get_context(method, lambda process: {0}).Process(target=int).start()  # type: ignore[arg-type, return-value]


def test_many_threads_start(method: str) -> None:
    places = [Binding(set(CPUS)), Binding({CPUS[0]}), Binding({CPUS[-1]}), Binding(None)]
    ctx = get_context(method, places)
    started: list[Waiting] = []
    threads = [threading.Thread(target=lambda: started.append(Waiting(ctx))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    requested = [one.process.binding_report.requested for one in started]
    for one in started:
        one.__exit__()
    assert [requested.count(place) for place in places] == [2, 2, 2, 2]


def test_a_refused_binding(method: str) -> None:
    """The fixture leaves_nothing_behind asserts that nothing is left of the start."""
    ctx = get_context(method, [Binding({NO_CPU}), Binding(set(CPUS))])
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    children = Path(f"/proc/{server}/task/{server}/children")
    kept = []
    for _ in range(2):  # a process that did not start frees its place, so the next one gets the same
        process = ctx.Process(target=int)
        with pytest.raises(BindingError, match=f"asked: cpus {NO_CPU}") as caught:
            process.start()
        # The file needs CONFIG_PROC_CHILDREN. To ask every process for its parent would take longer than a process
        # takes to end.
        assert not (children.exists() and children.read_text())
        assert (caught.value.step, caught.value.errno) == ("sched_setaffinity", errno.EINVAL)
        kept.append(caught.value)  # keeps all that its traceback refers to
        assert process.pid is None and process.exitcode is None and process.binding_report is None
        assert multiprocessing.active_children() == []


@needs_the_engine
def test_a_refused_policy(method: str) -> None:
    nowhere = MemoryPolicy("bind", {NO_NODE})
    with pytest.raises(BindingError, match="set_mempolicy"):
        get_context(method, [Binding(set(CPUS), nowhere)]).Process(target=int).start()
    with Waiting(get_context(method, [Binding({NO_CPU}, nowhere, required=False)])) as waiting:
        report = waiting.process.binding_report
        assert [step.step for step in report.refused] == ["sched_setaffinity", "set_mempolicy"]
        assert report.effective.cpus == set(CPUS)


@needs_the_engine
def test_memory_policy(method: str) -> None:
    ctx = get_context(method, [Binding(None, MemoryPolicy("bind", {0}), required=False)])
    with Waiting(ctx) as waiting:
        report = waiting.process.binding_report
        if report.refused or report.effective.memory is None:
            pytest.skip(f"no memory policies here: {report.refused}")
        assert str(report.effective.memory) == "bind:0"


def test_a_manager_takes_no_place(method: str) -> None:
    ctx = get_context(method, [Binding({CPUS[0]}), Binding({CPUS[-1]})])
    with ctx.Manager() as manager:
        assert mask() == sorted(os.sched_getaffinity(manager._process.pid))  # type: ignore[attr-defined]
        with Waiting(ctx) as waiting:
            assert waiting.process.binding_report.effective.cpus == {CPUS[0]}


LOOK = """
import os, pathlib

def threads():
    "The CPUs that the threads of this process may use, each set once."
    found = set()
    for task in pathlib.Path("/proc/self/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        found.update(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list:"))
    return sorted(found)

def policy():
    shown = pathlib.Path("/proc/self/numa_maps")
    return shown.read_text().split()[1] if shown.exists() else ""
"""

BORN = """
import builtins, json, look, multiprocessing, rankspawn, sys

IMPORTED = look.threads(), look.policy()

def report(pipe, libraries):
    for name in libraries:
        __import__(name)
    if "numpy" in libraries:
        import numpy
        numpy.ones((512, 512)) @ numpy.ones((512, 512))  # its threads are made for the first large product
    pipe.send((getattr(builtins, "born", None), IMPORTED, (look.threads(), look.policy())))

if __name__ == "__main__":
    method, cpus, libraries = json.loads(sys.argv[1])
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(libraries)
    wanted = rankspawn.MemoryPolicy("bind", {0})
    context = rankspawn.get_context(method, [rankspawn.Binding({cpu}, wanted, False) for cpu in cpus])
    ours, childs = context.Pipe()
    found, refused, processes = [], [], []
    for _ in cpus:
        process = context.Process(target=report, args=(childs, libraries))
        process.start()
        processes.append(process)
        found.append(ours.recv())
        refused += map(str, process.binding_report.refused)
    for process in processes:
        process.join()
    print(json.dumps([found, refused]))
"""


def looks_of(folder: Path, method: str, libraries: list[str]) -> Iterator[tuple[int, list[Any]]]:
    """Start a process bound to each of two CPUs; its threads' CPUs and its policy in site, when its main module is
    imported, and at its end."""
    (folder / "look.py").write_text(LOOK)
    (folder / "sitecustomize.py").write_text("import builtins, look; builtins.born = look.threads(), look.policy()\n")
    path = os.pathsep.join([str(folder), str(SOURCE)])
    found, refused = run(script(folder, BORN), json.dumps([method, CPUS[:2], libraries]), env={"PYTHONPATH": path})
    for looks in found:
        for look in looks:
            if refused or not look[1]:
                look[1] = "bind:0"  # a container refuses policies, or the kernel has none
    return zip(CPUS, found, strict=False)


@needs_the_engine
@needs_two_cpus
def test_born_bound(tmp_path: Path) -> None:
    """It is bound as early as a test can look: in site, before anything of the program is imported."""
    for cpu, looks in looks_of(tmp_path, "spawn", []):
        assert looks == [[[str(cpu)], "bind:0"]] * 3


@needs_two_cpus
def test_bound_before_the_main_module(tmp_path: Path) -> None:
    for cpu, (_, imported, last) in looks_of(tmp_path, "forkserver", []):
        assert imported == last == [[str(cpu)], "bind:0"]


@needs_two_cpus
def test_every_thread_is_bound(method: str, tmp_path: Path) -> None:
    """BLAS makes its threads at import or at the first product; it does so in the child even when the server has
    imported it."""
    if find_spec("numpy") is None:  # not imported here, because its threads would stay
        pytest.skip("numpy, whose BLAS makes threads, is not installed")
    for cpu, looks in looks_of(tmp_path, method, ["numpy"]):
        assert looks[2] == [[str(cpu)], "bind:0"]


SERVER_ELSEWHERE = """
import json, multiprocessing, os, rankspawn, sys
from multiprocessing import forkserver

def report(pipe):
    pipe.send(sorted(os.sched_getaffinity(0)))

if __name__ == "__main__":
    first, second = json.loads(sys.argv[1])
    # Some launchers bind themselves around each start (pytorch#160006): the server starts within the first of them.
    os.sched_setaffinity(0, {first})
    forkserver.ensure_running()
    os.sched_setaffinity(0, {second})
    found = []
    stock = multiprocessing.get_context("forkserver")
    for context in (stock, rankspawn.get_context("forkserver", [rankspawn.Binding({second})])):
        ours, childs = context.Pipe()
        process = context.Process(target=report, args=(childs,))
        process.start()
        found.append(ours.recv())
        process.join()
    print(json.dumps(found))
"""


@needs_two_cpus
def test_a_server_that_was_started_elsewhere(tmp_path: Path) -> None:
    """With the stock context every process has the mask of whoever started the server (pytorch#166026)."""
    found = run(script(tmp_path, SERVER_ELSEWHERE), json.dumps(CPUS[:2]))
    assert found == [[CPUS[0]], [CPUS[1]]]


HIDDEN = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import rankspawn

def report(pipe):
    pipe.send(sorted(os.sched_getaffinity(0)))

if __name__ == "__main__":
    context = rankspawn.get_context(sys.argv[2], [rankspawn.Binding({int(sys.argv[3])})])
    ours, childs = context.Pipe()
    process = context.Process(target=report, args=(childs,))
    process.start()
    print(json.dumps(ours.recv()))
    process.join()
"""


def test_a_path_that_only_the_program_knows(method: str, tmp_path: Path) -> None:
    """Before Python 3.14 the fork server does not have the program's sys.path, and yet it must import the module that
    binds its forks."""
    program = script(tmp_path, HIDDEN)
    assert run("-I", program, str(SOURCE), method, str(CPUS[-1]), env={"PYTHONPATH": ""}) == [CPUS[-1]]


@pytest.mark.parametrize("mechanism", ["clone", "posix_spawn", "subprocess"])
def test_mechanisms(mechanism: str, method: str, tmp_path: Path) -> None:
    program = script(tmp_path, HIDDEN)
    environment = {"RANKSPAWN_MECHANISM": mechanism}
    assert run(program, str(SOURCE), method, str(CPUS[-1]), env=environment) == [CPUS[-1]]


NO_ENGINE = """
import errno, json, os, rankspawn, sys
from multiprocessing import connection

def wait(pipe):
    pipe.recv()

if __name__ == "__main__":
    context = rankspawn.get_context(sys.argv[1], [rankspawn.Binding({int(sys.argv[2])})])
    ours, childs = context.Pipe()
    process = context.Process(target=wait, args=(childs,))
    process.start()
    found = [sorted(process.binding_report.effective.cpus), len(connection.wait([process.sentinel], 0))]
    process.kill()
    found.append(len(connection.wait([process.sentinel], 60)))
    process.join()
    found.append(process.exitcode)
    policy = rankspawn.Binding(None, rankspawn.MemoryPolicy("local"))
    try:
        rankspawn.get_context(sys.argv[1], [policy]).Process(target=print).start()
    except rankspawn.BindingError as error:
        found += [error.step, error.errno == errno.ENOTSUP]
    print(json.dumps(found))
"""


def test_without_the_engine(method: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['rankspawn._spawn'] = None\n")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCE)])}
    found = run(script(tmp_path, NO_ENGINE), method, str(CPUS[-1]), env=path)
    assert found == [[CPUS[-1]], 0, 1, -signal.SIGKILL, "set_mempolicy", True]


# ---- beginnings and ends that are ours alone ------------------------------------------------------------------------


@needs_the_engine
def test_a_grandchild_does_not_hide_the_end() -> None:
    """The stock sentinel is a pipe. A grandchild that outlives the process holds the pipe's other end, so the end of
    the process is not seen."""
    found = {}
    for whose, ctx in (("stock", multiprocessing.get_context("spawn")), ("our", get_context("spawn"))):
        ours, childs = ctx.Pipe()
        with ours, childs:
            process = ctx.Process(target=leave_a_grandchild, args=(childs,))
            process.start()
            grandchild = ours.recv()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # waits for the process's end
        found[whose] = bool(connection.wait([process.sentinel], 0.1)), process.join(0.1), process.exitcode
        os.kill(grandchild, signal.SIGKILL)
        process.join()
    assert found == {"stock": (False, None, 0), "our": (True, None, 0)}


def test_descriptors_of_a_process() -> None:
    """A running process needs as many descriptors as with the stock context: its sentinel, and the pipe to it."""
    found = []
    for ctx in (multiprocessing.get_context("spawn"), get_context("spawn", [Binding(set(CPUS))])):
        before = len(os.listdir("/proc/self/fd"))
        with Waiting(ctx):
            found.append(len(os.listdir("/proc/self/fd")) - before)
    assert found == [3, 3]  # the third is the test's own pipe


@needs_the_engine
def test_signals_go_by_pidfd(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to a pid can reach a stranger: a fork of the server is not our child, so its pid may be reused."""

    def by_number(pid: int, sig: int) -> None:
        raise AssertionError("a signal was sent by number")

    with Waiting(get_context(method, [Binding(set(CPUS))])) as waiting:
        monkeypatch.setattr(popen_fork.os, "kill", by_number)  # type: ignore[attr-defined]
        waiting.process.terminate()
        connection.wait([waiting.process.sentinel], PATIENCE)
        waiting.process.kill()
        monkeypatch.undo()
        waiting.process.join()
        assert waiting.process.exitcode == -signal.SIGTERM


def test_what_the_interpreter_inherits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in place of the interpreter writes down how it is started: as with the stock context."""
    found = []
    for ctx in (multiprocessing.get_context("spawn"), get_context("spawn", [Binding(set(CPUS))])):
        written = tmp_path / "inherited"
        # /proc/self is grep here: the shell may block signals while it waits.
        look = (
            "grep -E 'Sig(Blk|Ign)|Umask|Groups|list' /proc/self/status; ls /proc/$$/fd | wc -l; env; pwd;"
            " ps -o sid,pgid $$"
        )
        program = tmp_path / "interpreter"
        program.write_text(f'#!/bin/sh\n({look}) > {written}\nexec {sys.executable} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setattr(spawn, "_python_exe", os.fsencode(program))
        assert answer_of(ctx, mask) == CPUS
        found.append(written.read_text().splitlines())
    assert found[0] == found[1]
    assert any(line.startswith("SigIgn") and line.split()[1] != "0" * 16 for line in found[0])


def test_no_executable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "_python_exe", b"/nonexistent/python")
    with pytest.raises(FileNotFoundError, match="/nonexistent/python"):
        get_context("spawn").Process(target=int).start()


def test_an_interpreter_that_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "_python_exe", b"/bin/false")
    process = get_context("spawn").Process(target=len, args=(bytes(1 << 20),))
    with pytest.raises(BrokenPipeError):
        process.start()
    assert process.exitcode is None and process.pid is None


ENDS_EARLY = """
import json, os, sys, rankspawn
from multiprocessing import forkserver, set_forkserver_preload

if __name__ == "__main__":
    set_forkserver_preload(["ends_early"])
    context = rankspawn.get_context("forkserver", [rankspawn.Binding(os.sched_getaffinity(0))])
    found, held, connect = [], [], forkserver.connect_to_new_process

    def held_by_another(fds):
        "As if another thread had forked while the pipe was open: that fork holds the pipe, too."
        if sys.argv[1] == "held":
            held.extend(map(os.dup, fds))
        return connect(fds)

    forkserver.connect_to_new_process = held_by_another
    for _ in range(3):
        try:
            context.Process(target=print).start()
        except EOFError as error:
            text = str(error)
        found.append([text, len(os.listdir("/proc/self/fd")) - len(held)])
    print(json.dumps(found))
"""


@pytest.mark.parametrize("whose", ["alone", "held"])
def test_a_fork_that_ends_before_it_is_bound(whose: str, tmp_path: Path) -> None:
    (tmp_path / "ends_early.py").write_text("import os; os.register_at_fork(after_in_child=lambda: os._exit(7))\n")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCE)])}
    found = run(script(tmp_path, ENDS_EARLY), whose, env=path)
    assert len(found) == 3 and all("ended before it was bound" in text for text, _ in found)
    assert len({count for _, count in found}) == 1  # descriptors


@needs_the_engine
def test_die_with_parent(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        """
        import os, signal, threading, time, rankspawn

        def outlive():
            time.sleep(600)

        if __name__ == "__main__":
            context = rankspawn.get_context("spawn", die_with_parent=True)
            processes = [context.Process(target=outlive) for _ in range(2)]
            processes[0].start()
            thread = threading.Thread(target=processes[1].start)  # the thread's end is not the parent's end
            thread.start()
            thread.join()
            time.sleep(0.1)
            print(*(process.pid for process in processes if process.is_alive()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + PATIENCE
    while any(Path("/proc", str(pid), "exe").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path("/proc", str(pid), "exe").exists() for pid in pids)


# ---- the function, and what it relies on ----------------------------------------------------------------------------


def test_what_is_no_context() -> None:
    for method in ("fork", "", "thread"):
        with pytest.raises(ValueError, match="expected 'spawn', 'forkserver' or 'warm'"):
            get_context(method)
    with pytest.raises(ValueError, match="the server is the parent"):
        get_context("forkserver", die_with_parent=True)
    for bindings in (Binding({0}), [{0}], 3):
        with pytest.raises(TypeError):
            get_context("spawn", bindings)  # type: ignore[arg-type]


def test_a_context_is_one_of_multiprocessings(method: str) -> None:
    ctx = get_context(method)
    assert isinstance(ctx, BaseContext) and ctx.get_start_method() == method
    assert ctx.get_context() is ctx and ctx.get_context("spawn") is multiprocessing.get_context("spawn")
    assert issubclass(ctx.Process, multiprocessing.process.BaseProcess)
    assert get_context(method).Process is not ctx.Process
    assert ctx.Process(target=int).binding_report is None


def test_a_context_can_be_sent(method: str) -> None:
    places = (Binding({CPUS[0]}), None)
    again = pickle.loads(pickle.dumps(get_context(method, places, die_with_parent=method == "spawn")))
    assert (again._name, again._bindings, again._die_with_parent) == (method, places, method == "spawn")


def test_the_default_context_may_be_ours(tmp_path: Path) -> None:
    """multiprocessing.Process uses the default context, and a program may set that to one of ours."""
    program = script(
        tmp_path,
        """
        import json, multiprocessing, os, rankspawn, sys
        from multiprocessing import context

        def report(pipe):
            pipe.send(sorted(os.sched_getaffinity(0)))

        if __name__ == "__main__":
            cpu = int(sys.argv[1])
            context._concrete_contexts["rankspawn"] = rankspawn.get_context("spawn", [rankspawn.Binding({cpu})])
            multiprocessing.set_start_method("rankspawn")
            ours, childs = multiprocessing.Pipe()
            process = multiprocessing.Process(target=report, args=(childs,))
            process.start()
            print(json.dumps(ours.recv()))
            process.join()
        """,
    )
    assert run(program, str(CPUS[-1])) == [CPUS[-1]]


def test_an_unknown_multiprocessing_is_named() -> None:
    code = (
        "import json, rankspawn; from multiprocessing import spawn\n"
        "stock = spawn.get_preparation_data\n"
        "spawn.get_preparation_data = lambda name, more: stock(name)\n"
        "try: rankspawn.get_context()\n"
        "except ImportError as error: print(json.dumps(str(error)))"
    )
    text = run("-c", code)
    assert "does not know this multiprocessing" in text and "get_preparation_data takes 'name more'" in text


# The names that the standard library's own start, and the first function of the child, use in Python 3.10 to 3.15.
KNOWN = {
    popen_spawn_posix.Popen._launch: """
        resource_tracker getfd _fds append spawn get_preparation_data _name io BytesIO set_spawning_popen reduction dump
        os pipe get_command_line extend util spawnv_passfds get_executable pid sentinel open write getbuffer Finalize
        close_fds finalizer close
        """,
    popen_forkserver.Popen._launch: """
        spawn get_preparation_data _name io BytesIO set_spawning_popen reduction dump forkserver connect_to_new_process
        _fds sentinel os dup util Finalize close_fds finalizer open write getbuffer read_signed pid
        """,
    spawn._main: "os fdopen process current_process _inheriting reduction pickle load prepare _bootstrap",
}


@pytest.mark.parametrize("stock", KNOWN, ids=["spawn", "forkserver", "the child"])
def test_what_the_stock_start_does_is_known(stock: Any) -> None:
    """Our start does the same in its own order. A Python whose start does more, or less, must be read before it is
    supported."""
    assert {name for name in stock.__code__.co_names if name} == set(KNOWN[stock].split())
