"""Signals while processes are started: storms of them, and the deaths of launchers and of their threads.

A handler must never run between clone and exec, because the child is in its parent's memory then.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rankspawn import Popen
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.state import fork, in_child

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the engine's mechanisms are Linux's"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
]

# CI sets RANKSPAWN_LONG=1 for storms of full length.
STORM_SECONDS = 10 if os.environ.get("RANKSPAWN_LONG", "0") not in ("", "0") else 3
PATIENCE = 60.0

# ---- storms ----------------------------------------------------------------------------------------------------------

HANDLER = r"""
/* A handler that notes in which process it runs, in memory that a forked child shares as well. */
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct runs { long here, elsewhere; };

static long launcher;
static struct runs *runs;

static void
note(int sig)
{
    (void)sig;
    /* The raw call, because some versions of libc cached the pid. */
    long *count = syscall(SYS_getpid) == launcher ? &runs->here : &runs->elsewhere;
    __atomic_add_fetch(count, 1, __ATOMIC_RELAXED);
}

/* Returns where the counts are. */
struct runs *
catch_signals(const int *signals, int count)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = note;
    action.sa_flags = SA_RESTART;
    launcher = syscall(SYS_getpid);
    runs = mmap(NULL, sizeof *runs, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < count; i++) {
        sigaction(signals[i], &action, NULL);
    }
    return runs;
}
"""

LAUNCHER = """
import ctypes, json, os, resource, signal, subprocess, sys, threading, time
sys.path[:0] = json.loads(sys.argv[1])
library, seconds = sys.argv[2], float(sys.argv[3])
from rankspawn import Binding, MemoryPolicy, Popen
from tests.support.state import changed_since, snapshot

launcher = os.getpid()
caught = [signal.SIGUSR1, signal.SIGALRM, signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH]
runs = {"here": 0, "elsewhere": 0}

def note(*_):
    runs["here" if os.getpid() == launcher else "elsewhere"] += 1

if library:
    loaded = ctypes.CDLL(library)
    loaded.catch_signals.restype = ctypes.POINTER(ctypes.c_long)
    counts = loaded.catch_signals((ctypes.c_int * len(caught))(*caught), len(caught))
else:
    for sig in caught:
        signal.signal(sig, note)

binding = Binding(frozenset(os.sched_getaffinity(0)), MemoryPolicy("local"))
ways = [{}, {"binding": binding}, {"stdout": subprocess.PIPE}, {"die_with_parent": True}, {"close_fds": False}]
ways.append({"user": os.geteuid()} if os.geteuid() == 0 else {})
started, wrong = [], []

def start_many(number):
    done = 0
    while time.monotonic() < until:
        done += 1
        way = ways[(number + done) % len(ways)]
        try:
            if done % 16 == 0:
                # A start that fails: the engine reaps this child, whatever signals come meanwhile.
                try:
                    Popen(["/no/such/program"], **way)
                    wrong.append("started nothing")
                except FileNotFoundError:
                    pass
            with Popen(["/bin/true"], **way) as process:
                status = process.wait(timeout=30) if done % 2 else process.wait()
            if status or process.mechanism != os.environ["EXPECTED"]:
                wrong.append([status, process.mechanism, str(way)])
        except BaseException as error:
            wrong.append([repr(error), str(way)])
    started.append(done)

before = snapshot()
# The storm begins after this line, when all handlers are in place.
print("ready", flush=True)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
until = time.monotonic() + seconds
threads = [threading.Thread(target=start_many, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    while thread.is_alive():
        # Python runs handlers in this thread, so it must not wait for a lock all the time.
        thread.join(0.05)
signal.setitimer(signal.ITIMER_REAL, 0)
changed = changed_since(before)
if library:
    runs = {"here": counts[0], "elsewhere": counts[1]}
print(json.dumps({"started": started, "wrong": wrong[:20], "changed": changed, **runs}), flush=True)
"""


@contextmanager
def storm(pid: int) -> Iterator[None]:
    """Send signals to process ``pid``, and some that kill nobody to its whole process group, children included."""
    over = threading.Event()

    def blow() -> None:
        while not over.is_set():
            for sig in (signal.SIGUSR1, signal.SIGALRM, signal.SIGCHLD):
                os.kill(pid, sig)
            # The default action ignores these, so a child does not die of them after execve(2).
            for sig in (signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH):
                os.killpg(pid, sig)
            time.sleep(0.0002)

    thread = threading.Thread(target=blow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = tmp_path_factory.mktemp("handler") / "handler.c"
    source.write_text(HANDLER)
    library = source.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(library)], check=True)
    return library


def in_storm(library: str, tmp_path: Path, mechanism: str) -> dict[str, Any]:
    script = tmp_path / "launcher.py"
    script.write_text(LAUNCHER)
    command = [sys.executable, str(script), json.dumps(sys.path), library, str(STORM_SECONDS)]
    env = {**os.environ, "RANKSPAWN_MECHANISM": mechanism, "EXPECTED": "clone"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None
        try:
            assert run.stdout.readline() == "ready\n"
            with storm(run.pid):
                ready, _, _ = select.select([run.stdout], [], [], STORM_SECONDS + PATIENCE)
                assert ready, f"it hangs: nothing was said for {STORM_SECONDS + PATIENCE} s"
                line = run.stdout.readline()
        finally:
            # No process of the group may stay. The launcher is not reaped yet, so its pid is still its own.
            os.killpg(run.pid, signal.SIGKILL)
    told: dict[str, Any] = json.loads(line)
    return told


@pytest.mark.parametrize("kind", ["python", "c"])
def test_storm(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    library = str(request.getfixturevalue("handler")) if kind == "c" else ""
    told = in_storm(library, tmp_path, "clone")
    assert told["wrong"] == []
    assert told["elsewhere"] == 0
    # It was a storm, and there were starts in it.
    assert told["here"] > 100
    assert len(told["started"]) == 8 and min(told["started"]) > 0
    assert told["changed"] == {}


# ---- who dies with whom ----------------------------------------------------------------------------------------------

# A program that lives until it is killed, and holds the pipe that is its stdout until then.
FOREVER = ["/bin/sleep", "1000"]


def wait_until_gone(tid: int) -> None:
    """Wait until the kernel has removed a thread that has ended, because it sends the death signal when it does so."""
    deadline = time.monotonic() + PATIENCE
    while Path("/proc/self/task", str(tid)).exists():
        assert time.monotonic() < deadline, "the thread does not end"
        time.sleep(0.001)


def started_in_thread(args: list[str], **kwargs: Any) -> Popen:
    """Start in a thread that has ended when this returns."""
    processes: list[Popen] = []
    tids: list[int] = []

    def start() -> None:
        tids.append(threading.get_native_id())
        processes.append(Popen(args, die_with_parent=True, **kwargs))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    wait_until_gone(tids[0])
    return processes[0]


def outlives_its_thread() -> bytes:
    with started_in_thread(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.mechanism == "clone"
        out: bytes = process.communicate(b"still here", timeout=PATIENCE)[0]
    return out


def test_thread_that_ends_takes_nobody_with_it() -> None:
    assert outlives_its_thread() == b"still here"


def test_thread_that_ends_in_a_forked_process() -> None:
    """After os.fork() the child has none of the parent's threads, and none of the engine's."""
    with started_in_thread(FOREVER) as process:
        assert in_child(outlives_its_thread) == b"still here"
        process.kill()


def test_many_threads_that_end() -> None:
    processes = [started_in_thread(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(8)]
    for process in processes:
        with process:
            assert process.communicate(b"still here", timeout=PATIENCE)[0] == b"still here"


def test_mask_of_the_thread_is_the_childs() -> None:
    """The engine's own thread makes the child, and must not pass on its own signal mask, which is full."""
    blocked: list[str] = []

    def start(die_with_parent: bool) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        command = ["grep", "SigBlk", "/proc/self/status"]
        with Popen(command, stdout=subprocess.PIPE, text=True, die_with_parent=die_with_parent) as process:
            blocked.append(process.communicate(timeout=PATIENCE)[0].split()[1])

    for die_with_parent in (False, True):
        thread = threading.Thread(target=start, args=(die_with_parent,))
        thread.start()
        thread.join()
    assert [int(mask, 16) for mask in blocked] == [1 << (signal.SIGUSR2 - 1)] * 2


def test_affinity_of_the_thread_is_the_childs() -> None:
    """A child inherits from the thread that called Popen, whichever thread made it."""
    cpus = os.sched_getaffinity(0)
    found: list[Any] = []

    def start() -> None:
        os.sched_setaffinity(0, {max(cpus)})
        with Popen(FOREVER, die_with_parent=True) as process:
            found.append(os.sched_getaffinity(process.pid))
            process.kill()

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert found == [{max(cpus)}]


@pytest.mark.parametrize("how", ["main thread", "thread", "thread that ended"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None], ids=["SIGKILL", "SIGTERM", "_exit"])
def test_children_end_with_the_launcher(how: str, end: signal.Signals | None) -> None:
    held, holding = os.pipe()
    told, telling = os.pipe()
    staying, leave = os.pipe()
    started = threading.Event()
    processes: list[Popen] = []

    def start() -> None:
        processes.append(Popen(FOREVER, die_with_parent=True, stdout=holding))
        started.set()

    def start_and_stay() -> None:
        start()
        signal.pause()

    def launch() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if how == "main thread":
            start()
        elif how == "thread":
            threading.Thread(target=start_and_stay, daemon=True).start()
            started.wait()
        else:
            processes.append(started_in_thread(FOREVER, stdout=holding))
        os.close(holding)
        os.write(telling, str(processes[0].mechanism).encode())
        os.read(staying, 1)

    launcher = fork(launch)
    os.close(holding)
    assert os.read(told, 100) == b"clone"
    # From here on only the child holds the pipe's write end, so the pipe ends when the child ends.
    assert select.select([held], [], [], 0) == ([], [], [])
    if end is None:
        os.write(leave, b".")
    else:
        os.kill(launcher, end)
    os.waitpid(launcher, 0)
    assert select.select([held], [], [], PATIENCE) == ([held], [], []), "the child outlives its launcher"
    assert os.read(held, 1) == b""
    for fd in (held, told, telling, staying, leave):
        os.close(fd)


def test_launcher_that_ends_while_it_starts() -> None:
    """The launcher is killed at any moment, also between clone and prctl(PR_SET_PDEATHSIG): no child stays."""
    for turn in range(40):
        held, holding = os.pipe()

        def launch() -> None:
            while True:
                Popen(FOREVER, die_with_parent=True, stdout=holding)  # noqa: B023 - run within this turn

        launcher = fork(launch)
        os.close(holding)
        time.sleep(0.0005 * turn)
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
        assert select.select([held], [], [], PATIENCE) == ([held], [], []), "a child outlives its launcher"
        os.close(held)


def test_launcher_that_is_stopped_and_continued() -> None:
    """A stop reaches all threads, also those in vfork once their children have executed; no start is lost by it."""
    told, telling = os.pipe()
    wrong: list[Any] = []

    def start_many() -> None:
        while not select.select([told], [], [], 0)[0]:
            for die_with_parent in (False, True):
                with Popen(["/bin/true"], die_with_parent=die_with_parent) as process:
                    status = process.wait(timeout=PATIENCE)
                if status or process.mechanism != "clone":
                    wrong.append(status)

    def launch() -> None:
        threads = [threading.Thread(target=start_many) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    launcher = fork(launch)
    for _ in range(20):
        time.sleep(0.005)
        os.kill(launcher, signal.SIGSTOP)
        stopped, deadline = None, time.monotonic() + PATIENCE
        while stopped is None and time.monotonic() < deadline:
            stopped = os.waitid(os.P_PID, launcher, os.WSTOPPED | os.WNOHANG)
            time.sleep(0.0005)
        os.kill(launcher, signal.SIGCONT)
        assert stopped is not None, "the launcher does not stop"
    os.write(telling, b".")
    _, status = os.waitpid(launcher, 0)
    assert status == 0
    os.close(told)
    os.close(telling)


@pytest.mark.parametrize("caught", [False, True], ids=["ignored", "caught"])
def test_signal_to_the_group_while_processes_start(caught: bool) -> None:
    """Children ignore what the launcher ignores. What it catches has its default action in them, from the start."""

    def launch() -> list[Any]:
        os.setpgid(0, 0)
        signal.signal(signal.SIGUSR1, (lambda *_: None) if caught else signal.SIG_IGN)
        over = threading.Event()

        def blow() -> None:
            while not over.is_set():
                os.killpg(0, signal.SIGUSR1)

        thread = threading.Thread(target=blow)
        thread.start()
        found = set()
        for _ in range(100):
            with Popen(["/bin/true"]) as process:
                found.add(process.wait())
        over.set()
        thread.join()
        return sorted(found)

    ended = in_child(launch)
    assert set(ended) <= ({0, -signal.SIGUSR1} if caught else {0})
