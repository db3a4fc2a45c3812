"""Many ranks started by one call: each gets its own settings, all start or none, and the starting threads come and
go."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rankspawn import Binding, BindingError, MemoryPolicy, Popen, launch
from rankspawn._end import ranks as _ending
from rankspawn._group.start import start_ranks
from rankspawn._start import crew as _crew
from rankspawn._start.engine import mechanisms
from tests.support.processes import eventually, has_ended, new_cgroup
from tests.support.state import NOBODY, become, changed_since, fork, in_child, snapshot
from tests.test_signals import storm

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the engine's mechanisms are Linux's")

_spawn = pytest.importorskip("rankspawn._spawn", reason="this install has no extension")

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0
FOREVER = ["/bin/sleep", "1000"]
NO_STREAMS = (None, None, None)
NO_CPU = 60_000  # no machine has this CPU
CPUS = sorted(os.sched_getaffinity(0))

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
needs_two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
first_middle_last = pytest.mark.parametrize("broken", [0, 7, 15])


@pytest.fixture(params=["clone", "posix_spawn", "subprocess"])
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each mechanism in turn, as the one that is tried first."""
    monkeypatch.setenv("RANKSPAWN_MECHANISM", request.param)
    mechanisms.cache_clear()
    yield request.param
    monkeypatch.undo()
    mechanisms.cache_clear()


def start(commands: list[list[str]], ranks: list[Popen] | None = None, **keywords: Any) -> list[Popen]:
    """Start ``commands`` as ranks, with the settings in ``keywords`` and no others."""
    count = len(commands)
    settings = {
        "env": None,
        "rank_env": [{}] * count,
        "bindings": [None] * count,
        "streams": [NO_STREAMS] * count,
        **keywords,
    }
    ranks = [] if ranks is None else ranks
    start_ranks(ranks, commands, **settings)
    return ranks


def ended(ranks: list[Popen]) -> list[int]:
    return [rank.wait(timeout=PATIENCE) for rank in ranks]


def end(ranks: list[Popen]) -> None:
    for rank in ranks:
        rank.kill()
    assert set(ended(ranks)) <= {-signal.SIGKILL}


def no_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def refused(kind: type[OSError], commands: list[list[str]], **keywords: Any) -> Any:
    """The error of a start that must fail. Asserts that no rank and no child is left."""
    ranks: list[Popen] = []
    with pytest.raises(kind) as caught:
        start(commands, ranks, **keywords)
    assert type(caught.value) is kind
    assert ranks == [] and no_children()
    return caught.value


REGISTRATION = struct.Struct("qi4x")  # spawn_registration of csrc/spawn.h


class Guard:
    """The pipe into which ranks write their pids. A rank that finds it full waits in the middle of its start."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe2(os.O_CLOEXEC)
        self.filled = 0

    def hold_after(self, ranks: int) -> None:
        """Let the first ``ranks`` ranks write, whichever they are, and hold the others."""
        self.filled = fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 1) - REGISTRATION.size * ranks
        os.write(self.writing, bytes(self.filled))

    def let_go(self) -> None:
        """Let all ranks write."""
        while self.filled:
            self.filled -= len(os.read(self.reading, self.filled))
        # A page of the pipe that is partly read gives room only when it is wholly read.
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 65536)

    def pids(self) -> list[int]:
        """The pids that ranks have written, when nobody can write any more."""
        self.close(self.writing)
        sent = b""
        while more := os.read(self.reading, 4096):
            sent += more
        return [pid for _, pid in REGISTRATION.iter_unpack(sent)]

    @staticmethod
    def close(*fds: int) -> None:
        for fd in fds:
            with suppress(OSError):  # a test may have closed it
                os.close(fd)


@pytest.fixture
def guard() -> Iterator[Guard]:
    made = Guard()
    yield made
    made.close(made.reading, made.writing)


# ---- each its own ----------------------------------------------------------------------------------------------------


def test_each_rank_is_its_own(tmp_path: Path, mechanism: str) -> None:
    """Each of many ranks has its own command, variables, binding, streams and session, in rank order."""
    count = 24
    bound = mechanism != "subprocess"
    code = "import json, os, sys; json.dump([sys.argv[1], os.environ['RANK'], os.getsid(0), os.getpid(), "
    code += "sorted(os.sched_getaffinity(0)), sys.stdin.read()], sys.stdout); sys.stderr.write(sys.argv[1])"
    for number in range(count):
        (tmp_path / f"{number}.in").write_text(f"for {number}")
    before = time.monotonic_ns()
    ranks = start(
        [[sys.executable, "-S", "-c", code, f"argument {number}"] for number in range(count)],
        rank_env=[{"RANK": str(number)} for number in range(count)],
        # The mechanism "subprocess" binds after the start, so the program may still see the old mask.
        bindings=[
            Binding({CPUS[number % len(CPUS)]}) if mechanism != "subprocess" else None for number in range(count)
        ],
        streams=[tuple(tmp_path / f"{number}.{end}" for end in ("in", "out", "err")) for number in range(count)],
    )
    after = time.monotonic_ns()
    assert ended(ranks) == [0] * count
    for number, rank in enumerate(ranks):
        assert isinstance(rank, Popen) and rank.args[-1] == f"argument {number}"
        assert rank.mechanism == ("clone" if bound else mechanism)
        assert not bound or (rank._executed_ns is not None and before < rank._executed_ns < after)
        cpus = [CPUS[number % len(CPUS)]] if bound else CPUS
        told = json.loads((tmp_path / f"{number}.out").read_text())
        assert told == [f"argument {number}", str(number), rank.pid, rank.pid, cpus, f"for {number}"]
        assert (tmp_path / f"{number}.err").read_text() == f"argument {number}"


def test_what_a_mechanism_declines_the_next_one_starts(mechanism: str) -> None:
    """posix_spawn cannot bind, so clone starts the ranks with a binding."""
    bindings = [Binding({CPUS[0]}) if number % 2 else None for number in range(8)]
    ranks = start([["/bin/true"]] * 8, bindings=bindings)
    assert ended(ranks) == [0] * 8
    plain, bound = {"clone": ("clone", "clone"), "posix_spawn": ("posix_spawn", "clone")}.get(
        mechanism, (mechanism,) * 2
    )
    assert [rank.mechanism for rank in ranks] == [plain, bound] * 4


def test_a_rank_is_a_popen(tmp_path: Path) -> None:
    (rank,) = start([["/bin/sh", "-c", "exit 3"]], streams=[(subprocess.DEVNULL, tmp_path / "log", subprocess.STDOUT)])
    assert "returncode: None" in repr(rank) and rank.pidfd is not None
    assert rank.binding_report.requested is None
    assert rank.communicate(timeout=PATIENCE) == (None, None)
    assert (rank.returncode, rank.poll(), rank.wait(0)) == (3, 3, 3)
    rank.send_signal_group(signal.SIGTERM)  # nobody is left in the group: this does nothing
    with start([FOREVER])[0] as rank:
        rank.send_signal_group(signal.SIGTERM)
        assert rank.wait(PATIENCE) == -signal.SIGTERM


def test_pipes_are_the_callers_to_make() -> None:
    with pytest.raises(ValueError, match="rank 0: a rank's stream cannot be PIPE"):
        start([["/bin/true"]], streams=[(None, subprocess.PIPE, None)])
    reading, writing = os.pipe()
    ranks = start([["/bin/echo", "one"], ["/bin/echo", "two"]], streams=[(None, writing, None)] * 2)
    os.close(writing)
    assert ended(ranks) == [0, 0]
    with os.fdopen(reading) as pipe:
        assert sorted(pipe) == ["one\n", "two\n"]


# ---- the environment -------------------------------------------------------------------------------------------------

OWN: list[dict[str, str]] = [
    {},
    {"RS_SHARED": "mine"},
    {"RS_NEW": "1", "RS_OTHER": ""},
    {"RS_Ü": "ü", "RS_SHARED": "mine, too", "RS_SHAREDX": "=x="},
    {"PATH": "/nowhere", "HOME": "/"},
]


@pytest.mark.parametrize("shared", [None, {"RS_SHAREDX": "1", "RS_SHARED": "all", "RS_Ü": "a", "PATH": "/bin"}, {}])
def test_environment(tmp_path: Path, shared: dict[str, str] | None, mechanism: str) -> None:
    """A rank gets the shared variables, and its own in addition to them or in place of them."""
    logs = [(None, tmp_path / str(number), None) for number in range(len(OWN))]
    assert ended(start([["/usr/bin/env", "-0"]] * len(OWN), env=shared, rank_env=OWN, streams=logs)) == [0] * len(OWN)
    for number, own in enumerate(OWN):
        expected = {os.fsencode(name): os.fsencode(value) for name, value in (shared or {}).items()}
        if shared is None:
            # readline, which pytest imports, sets LINES and COLUMNS in C's environment, and not in os.environ.
            expected = {**os.environb}
        expected |= {os.fsencode(name): os.fsencode(value) for name, value in own.items()}
        lines = (tmp_path / str(number)).read_bytes().removesuffix(b"\0").split(b"\0") if expected else []
        found = [line for line in lines if not line.startswith((b"LINES=", b"COLUMNS="))]
        assert sorted(found) == sorted(name + b"=" + value for name, value in expected.items())


@pytest.mark.parametrize("first", [0, 95, 2**63])
def test_variables_in_layers(tmp_path: Path, first: int, mechanism: str) -> None:
    """What all share replaces what they inherit, the numbers replace both, and a rank's own variables all."""
    count = 12
    own: list[dict[str, str]] = [{} for _ in range(count)]
    own[3] = {"RS_NUMBER": "mine", "RS_SHARED": "mine", "RS_OWN": "mine"}
    logs = [(None, tmp_path / str(number), None) for number in range(count)]
    ranks = start(
        [["/usr/bin/env", "-0"]] * count,
        env={"RS_NUMBER": "inherited", "RS_SHARED": "inherited", "RS_INHERITED": "inherited", "RS_ALL": "inherited"},
        shared={"RS_SHARED": "shared", "RS_NEW": "shared", "RS_ALL": "shared"},
        numbered={"RS_NUMBER": first, "RS_ALL": 0},
        rank_env=own,
        streams=logs,
    )
    assert ended(ranks) == [0] * count
    for number, (_, log, _) in enumerate(logs):
        expected = {"RS_NUMBER": f"{first + number}", "RS_ALL": f"{number}", "RS_SHARED": "shared", "RS_NEW": "shared"}
        expected |= {"RS_INHERITED": "inherited", **own[number]}
        found = log.read_text().removesuffix("\0").split("\0")
        assert sorted(found) == sorted(f"{name}={value}" for name, value in expected.items())


def test_program_is_searched_in_the_path_of_the_rank(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tool").write_text(f"#!/bin/sh\necho {name}\n")
        (tmp_path / name / "tool").chmod(0o755)
    paths = [{}, {"PATH": str(tmp_path / "b")}, {}, {"PATH": f"{tmp_path}/b:{tmp_path}/a"}]
    logs = [(None, tmp_path / str(number), None) for number in range(4)]
    ranks = start([["tool"]] * 4, env={"PATH": str(tmp_path / "a")}, rank_env=paths, streams=logs)
    assert ended(ranks) == [0] * 4
    assert [log.read_text() for _, log, _ in logs] == ["a\n", "b\n", "a\n", "b\n"]


@pytest.mark.parametrize(
    ("own", "text"),
    [({"A=B": "c"}, "illegal environment variable name"), ({"A": "b\0c"}, "embedded null byte")],
)
def test_environment_that_cannot_be(own: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=f"^rank 2: {text}$"):
        start([["/bin/true"]] * 3, rank_env=[{}, {}, own])
    with pytest.raises(ValueError, match=f"^{text}$"):
        start([["/bin/true"]] * 3, env=own)


# ---- the binding -----------------------------------------------------------------------------------------------------


@needs_two_cpus
def test_unbound_and_refused_ranks_have_the_callers_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are fewer starting threads than places, so a thread has bound itself elsewhere before it starts them."""
    monkeypatch.setattr(_crew, "_workers", lambda count: 2)
    kinds: list[tuple[Binding | None, list[int]]] = [
        (Binding({CPUS[0]}), [CPUS[0]]),
        (None, CPUS),
        (Binding({CPUS[1]}), [CPUS[1]]),
        (Binding({NO_CPU}, required=False), CPUS),
        (Binding({CPUS[1]}), [CPUS[1]]),
    ]
    order = [0, 2, *random.Random(0).choices(range(len(kinds)), k=58)]
    ranks = start([FOREVER] * 60, bindings=[kinds[kind][0] for kind in order])
    found = [sorted(os.sched_getaffinity(rank.pid)) for rank in ranks]
    steps = [[(step.step, step.errno) for step in rank.binding_report.refused] for rank in ranks]
    end(ranks)
    assert found == [kinds[kind][1] for kind in order]
    assert steps == [[("sched_setaffinity", errno.EINVAL)] if kind == 3 else [] for kind in order]


@needs_two_cpus
def test_bound_caller_and_its_memory_policy() -> None:
    """What a rank is not given, it inherits from the thread that called, and not from the thread that starts it."""
    found: list[Any] = []

    def ask() -> None:
        os.sched_setaffinity(0, {CPUS[1]})
        _spawn.set_mempolicy(4, None)  # MPOL_LOCAL
        ranks = start([FOREVER] * 6, bindings=[Binding({CPUS[0]}), None] * 3)
        found.extend(os.sched_getaffinity(rank.pid) for rank in ranks)
        found.append(Path(f"/proc/{ranks[1].pid}/numa_maps").read_text().split()[1])
        found.append(os.sched_getaffinity(0))
        end(ranks)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [{CPUS[0]}, {CPUS[1]}] * 3 + ["local", {CPUS[1]}]


def limit_descriptors(room: int) -> None:
    """Limit this process to ``room`` more descriptors."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + room, hard))
    filled = []
    try:
        while True:
            filled.append(os.dup(0))
    except OSError:
        for fd in filled[-room:]:
            os.close(fd)


# ---- all or nothing --------------------------------------------------------------------------------------------------


@first_middle_last
def test_missing_program(mechanism: str, broken: int) -> None:
    commands = [FOREVER] * 16
    commands[broken] = ["/no/such/program"]
    error = refused(FileNotFoundError, commands)
    assert (error.errno, error.filename, error.rank) == (errno.ENOENT, "/no/such/program", broken)
    assert str(error) == f"[Errno 2] rank {broken}: No such file or directory: '/no/such/program'"


@first_middle_last
def test_program_that_may_not_be_executed(broken: int, tmp_path: Path) -> None:
    (tmp_path / "program").write_text("#!/bin/sh\n")
    commands = [FOREVER] * 16
    commands[broken] = [str(tmp_path / "program")]
    assert refused(PermissionError, commands).rank == broken


@first_middle_last
def test_refused_binding(mechanism: str, broken: int) -> None:
    bindings: list[Binding | None] = [None] * 16
    bindings[broken] = Binding({NO_CPU})
    error = refused(BindingError, [FOREVER] * 16, bindings=bindings)
    assert (error.rank, error.step, error.binding) == (broken, "sched_setaffinity", bindings[broken])
    assert str(error).startswith(f"[Errno 22] rank {broken}: sched_setaffinity: ")


def test_refused_memory_policy() -> None:
    bindings = [None, Binding(None, MemoryPolicy("bind", frozenset({1000})))]
    error = refused(BindingError, [FOREVER] * 2, bindings=bindings)
    assert str(error).startswith("[Errno 22] rank 1: set_mempolicy: ")


@first_middle_last
def test_log_file_that_cannot_be_made(mechanism: str, broken: int, tmp_path: Path) -> None:
    streams = [(None, tmp_path / str(number), subprocess.STDOUT) for number in range(16)]
    streams[broken] = (None, tmp_path / "none" / "log", subprocess.STDOUT)
    error = refused(FileNotFoundError, [FOREVER] * 16, streams=streams)
    assert (error.rank, error.filename) == (broken, str(tmp_path / "none" / "log"))


def test_folder_that_is_not_there(mechanism: str) -> None:
    error = refused(FileNotFoundError, [["/bin/true"]] * 3, cwd="/no/such/folder")
    assert error.filename == "/no/such/folder" and error.rank in (0, 1, 2)


def test_arguments_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match="zip"):
        start([["/bin/true"]] * 3, rank_env=[{}])


def test_after_a_failure_no_other_is_begun() -> None:
    asked: list[Callable[[], int]] = []
    refused(FileNotFoundError, [["/no/such/program"], *[["/bin/true"]] * 200], progress=asked.append)
    assert asked[0]() < 100


def test_a_failure_ends_what_ranks_have_started(guard: Guard, tmp_path: Path) -> None:
    """The first rank has started a child by the time that another rank fails."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    held: list[int] = []

    def wait_for_the_child() -> None:
        held.append(os.open(fifo, os.O_RDONLY))
        guard.let_go()

    thread = threading.Thread(target=wait_for_the_child)
    thread.start()
    guard.hold_after(1)
    refused(
        FileNotFoundError,
        [["/bin/sh", "-c", f"sleep 1000 > {fifo} & wait"]] * 8 + [["/no/such/program"]],
        guard=guard.writing,
    )
    thread.join()
    assert select.select(held, [], [], PATIENCE)[0], "somebody has it open to write"
    assert os.read(held[0], 1) == b""
    os.close(held[0])


def test_descriptors_run_out_for_what_is_opened_here(tmp_path: Path) -> None:
    """The caller opens FIFOs before it starts any rank: at some rank no descriptor is left, and no rank has started."""

    def launch() -> list[Any]:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        os.open(fifo, os.O_RDWR)  # so that later opens do not wait
        limit_descriptors(5)
        error = refused(OSError, [["/bin/true"]] * 12, streams=[(fifo, None, None)] * 12)
        return [error.errno, error.rank, str(error), error.filename, len([os.dup(0) for _ in range(5)])]

    fifo = str(tmp_path / "fifo")
    assert in_child(launch) == [errno.EMFILE, 5, f"[Errno 24] rank 5: Too many open files: {fifo!r}", fifo, 5]


def test_descriptors_run_out_for_pidfds() -> None:
    """Ranks then start without a pidfd, as a Popen does, and can be waited for all the same."""

    def launch() -> list[Any]:
        limit_descriptors(5)
        ranks = start([["/bin/sh", "-c", "exit 3"]] * 16)
        return [sum(rank.pidfd is not None for rank in ranks), ended(ranks)]

    assert in_child(launch) == [5, [3] * 16]


@needs_root
def test_processes_run_out() -> None:
    """RLIMIT_NPROC counts the user's ranks, and the threads that start them."""

    def launch() -> list[Any]:
        become(NOBODY)
        before = snapshot()
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        resource.setrlimit(resource.RLIMIT_NPROC, (1 + _crew._workers(40) + 10, hard))
        error = refused(BlockingIOError, [FOREVER] * 40)
        resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
        again = ended(start([["/bin/true"]] * 40))
        found = [error.errno, error.rank, str(error), again]
        del error  # its traceback refers to the ranks
        gc.collect()
        return [*found, changed_since(before)]

    code, rank, text, again, changed = in_child(launch)
    assert code == errno.EAGAIN and 0 < rank < 40
    assert text == f"[Errno 11] rank {rank}: clone: Resource temporarily unavailable"
    assert (again, changed) == ([0] * 40, {})


BECOME_ROOT = """
#define _GNU_SOURCE
#include <unistd.h>
int main(void) { return setresuid(0, 0, 0) || write(1, ".", 1) != 1 || sleep(2); }
"""


@needs_root
def test_kill_that_is_not_allowed(tmp_path: Path) -> None:
    """We may not kill a rank that has become another user. Its Popen stays in the list, for whoever catches the
    error."""
    compiler = shutil.which("cc")
    if compiler is None or os.statvfs(tmp_path).f_flag & os.ST_NOSUID:
        pytest.skip("needs a C compiler, and a folder for set-user-ID programs")
    program = tmp_path / "become-root"
    subprocess.run([compiler, "-x", "c", "-", "-o", str(program)], input=BECOME_ROOT, text=True, check=True)
    program.chmod(0o4755)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o111)

    def launch() -> list[Any]:
        become(NOBODY)
        reading, writing = os.pipe()
        ranks = start([FOREVER, [str(program)], FOREVER], streams=[(None, writing, None)] * 3)
        assert os.read(reading, 1) == b"."
        _ending.KILL_SECONDS = 0.1  # only in this process, which ends with the test
        _ending.end_ranks(ranks)
        return [[rank.args for rank in ranks], ended(ranks), no_children()]

    assert in_child(launch) == [[[str(program)]], [0], True]


# ---- signals ---------------------------------------------------------------------------------------------------------


class Struck(Exception):
    """Raised by a signal handler."""


def test_handler_that_raises_right_after_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python most often raises KeyboardInterrupt as soon as the engine's call returns: no rank may be left."""

    class Crew(_spawn.Crew):  # type: ignore[misc]
        def run(self, *args: Any) -> Any:
            said = super().run(*args)
            assert said == []
            raise Struck

    monkeypatch.setattr(_spawn, "Crew", Crew)
    ranks: list[Popen] = []
    with pytest.raises(Struck):
        start([FOREVER] * 12, ranks)
    assert ranks == [] and no_children()


def test_handler_that_raises_while_they_start(guard: Guard) -> None:
    """The signal comes in the middle of the start; its handler runs when the engine's call returns."""

    def strike(*_: object) -> None:
        raise Struck

    def send(started: Callable[[], int]) -> None:
        eventually(lambda: started() == 5)
        os.kill(os.getpid(), signal.SIGALRM)
        guard.let_go()

    before = signal.signal(signal.SIGALRM, strike)
    threads: list[threading.Thread] = []

    def watch(started: Callable[[], int]) -> None:
        threads.append(threading.Thread(target=send, args=(started,)))
        threads[0].start()

    guard.hold_after(5)
    ranks: list[Popen] = []
    try:
        with pytest.raises(Struck):
            start([FOREVER] * 12, ranks, guard=guard.writing, progress=watch)
    finally:
        signal.signal(signal.SIGALRM, before)
        threads[0].join()
    assert ranks == [] and no_children()


def test_handler_that_raises_at_any_moment() -> None:
    """Whoever catches the exception has the Popen of every rank that runs."""

    def strike(*_: object) -> None:
        raise Struck

    before = signal.signal(signal.SIGALRM, strike)
    chance = random.Random(0)
    struck = 0
    try:
        for _ in range(60):
            ranks: list[Popen] = []
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.003))
                start([FOREVER] * 12, ranks, die_with_parent=True)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Struck:
                struck += 1
            end(ranks)
            assert no_children()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert struck > 5


@pytest.mark.parametrize("die_with_parent", [False, True])
@pytest.mark.parametrize("nohup", [False, True])
def test_signals_of_a_rank_are_fresh(tmp_path: Path, mechanism: str, nohup: bool, die_with_parent: bool) -> None:
    """Blocked, ignored or caught in the launcher, a signal does in a rank what it does by default: but for nohup's."""
    if die_with_parent and mechanism == "subprocess":
        pytest.skip("a death signal needs the engine")

    def launch() -> None:
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGRTMAX, *[signal.SIGHUP] * nohup):
            signal.signal(sig, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        blocked = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGRTMIN]
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        command = ["sed", "-n", "s/^Sig\\(Blk\\|Ign\\|Pnd\\):.0*//p", "/proc/self/status"]
        # The logs are open files, because posix_spawn can pass those too.
        alone, *logs = [os.open(tmp_path / str(number), os.O_WRONLY | os.O_CREAT) for number in range(13)]
        ranks = start([command] * 12, streams=[(None, log, None) for log in logs], die_with_parent=die_with_parent)
        ranks.append(Popen(command, stdout=alone, die_with_parent=die_with_parent))
        assert {rank.mechanism for rank in ranks} == {"clone" if die_with_parent else mechanism}
        assert [rank.wait() for rank in ranks] == [0] * 13
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {*blocked}
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN

    assert os.waitpid(fork(launch), 0)[1] == 0
    as_subprocess_does, *found = [(tmp_path / str(number)).read_text().split() for number in range(13)]
    # glibc's posix_spawn ignores the two signals that it keeps for itself in every child.
    found = [[f"{ignored:x}" for one in words if (ignored := int(one, 16) & ~0x180000000)] for words in found]
    assert found == [["1"] if nohup else []] * 12
    assert len(as_subprocess_does) == 2


@pytest.mark.parametrize("die_with_parent", [False, True])
def test_rank_of_a_thread_that_blocks_signals_can_be_told_to_end(mechanism: str, die_with_parent: bool) -> None:
    if die_with_parent and mechanism == "subprocess":
        pytest.skip("a death signal needs the engine")
    found: list[int] = []

    def launch() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        ranks = start([FOREVER] * 4, die_with_parent=die_with_parent)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        found.extend(rank.wait(PATIENCE) for rank in ranks)

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert found == [-signal.SIGTERM] * 4


@pytest.mark.parametrize("die_with_parent", [False, True])
def test_ends_are_told_as_with_popen(die_with_parent: bool) -> None:
    """A rank's SIGCHLD stays pending in a launcher that blocks it, and reaches the handler of one that catches it."""

    def launch() -> list[Any]:
        caught: list[int] = []
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        assert ended(start([["/bin/true"]] * 8, die_with_parent=die_with_parent)) == [0] * 8
        found = [signal.SIGCHLD in signal.sigpending()]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        assert ended(start([["/bin/true"]] * 8, die_with_parent=die_with_parent)) == [0] * 8
        found.append(signal.SIGCHLD in signal.sigpending())
        signal.signal(signal.SIGCHLD, lambda *_: caught.append(threading.get_native_id()))
        assert ended(start([["/bin/true"]] * 8, die_with_parent=die_with_parent)) == [0] * 8
        return [*found, set(caught) == {os.getpid()}]

    assert in_child(launch) == [True, False, True]


# ---- who dies with whom, and who does not ----------------------------------------------------------------------------


def in_thread(function: Callable[[], object]) -> None:
    """Run ``function`` in a thread, and return when the thread has also left the kernel's list."""
    tids: list[int] = []

    def run() -> None:
        tids.append(threading.get_native_id())
        function()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    eventually(lambda: not Path("/proc/self/task", str(tids[0])).exists())


@pytest.mark.parametrize("how", ["main thread", "thread that ended"])
@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
def test_ranks_outlive_threads_and_die_with_the_launcher(how: str, bound: bool) -> None:
    """The launcher is a fork of a process with keepers of its own, and a fork has no threads but one."""
    held, holding = os.pipe()
    told, telling = os.pipe()
    ours = start([FOREVER] * 3, die_with_parent=True)

    def launch() -> None:
        ranks: list[Popen] = []

        def start_all() -> None:
            start(
                [FOREVER] * 12,
                ranks,
                die_with_parent=True,
                streams=[(None, holding, None)] * 12,
                bindings=[Binding({CPUS[number % len(CPUS)]}) if bound else None for number in range(12)],
            )

        start_all() if how == "main thread" else in_thread(start_all)
        os.close(holding)
        time.sleep(0.05)  # time for a death signal, which must not come
        os.write(telling, struct.pack("i", sum(rank.poll() is None for rank in ranks)))
        time.sleep(PATIENCE)

    launcher = fork(launch)
    os.close(holding)
    assert struct.unpack("i", os.read(told, 4)) == (12,)
    # From here on only the ranks hold the pipe open, so the pipe ends when they have ended.
    assert select.select([held], [], [], 0) == ([], [], [])
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert select.select([held], [], [], PATIENCE) == ([held], [], []), "a rank outlives its launcher"
    assert os.read(held, 1) == b""
    assert [rank.poll() for rank in ours] == [None] * 3
    end(ours)
    for fd in (held, told, telling):
        os.close(fd)


def test_launcher_that_is_killed_while_it_starts() -> None:
    for turn in range(25):
        held, holding = os.pipe()

        def launch() -> None:
            while True:
                start([FOREVER] * 8, die_with_parent=True, streams=[(None, holding, None)] * 8)  # noqa: B023

        launcher = fork(launch)
        os.close(holding)
        time.sleep(0.001 * turn)
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
        assert select.select([held], [], [], PATIENCE) == ([held], [], []), "a rank outlives its launcher"
        os.close(held)


def keepers() -> int:
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text())
        except OSError:
            continue
    return names.count("rankspawn\n")


def test_threads_stay_for_a_death_signal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_crew, "_workers", lambda count: 3)
    ranks = start([FOREVER] * 8)
    assert keepers() == 0
    end(ranks)
    ranks = start([FOREVER] * 8, die_with_parent=True)
    assert keepers() == 3
    for rank in ranks[1:]:
        rank.kill()
        rank.wait()
    assert keepers() > 0 and ranks[0].poll() is None
    ranks[0].kill()
    eventually(lambda: keepers() == 0)  # the rank is not reaped yet: its end counts
    ranks[0].wait()


def test_ids_can_be_changed_while_threads_stay() -> None:
    """setresuid(3) signals every thread to change its ids, and waits for all of them."""

    def launch() -> list[int]:
        ranks: list[Popen] = []
        in_thread(lambda: start([FOREVER] * 4, ranks, die_with_parent=True))
        signal.alarm(20)  # ends this process where setresuid hangs
        os.setresuid(*os.getresuid())
        signal.alarm(0)
        end(ranks)
        return [rank.returncode for rank in ranks]

    assert in_child(launch) == [-signal.SIGKILL] * 4


# Threads with stacks of 1 GiB, in an address space that has ``room`` GiB left.
FEW_THREADS = """
import json, os, resource, sys, threading
sys.path[:0] = json.loads(sys.argv[1])
room, die_with_parent, main = json.loads(sys.argv[2])
if resource.getrlimit(resource.RLIMIT_STACK)[0] != 1 << 30:
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 30, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    os.execv(sys.executable, [sys.executable, *sys.argv])
from rankspawn._start import crew as _crew
from tests.test_crew import FOREVER, end, keepers, start
_crew._workers = lambda count: 4
found = []

def launch():
    pages = int(open("/proc/self/statm").read().split()[0])
    size = pages * resource.getpagesize() + int(room * (1 << 30))
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))
    ranks = []
    try:
        start([FOREVER] * 8, ranks, die_with_parent=die_with_parent)
    except OSError as error:
        found.append([type(error).__name__, str(error), error.rank, ranks])
    else:
        found.append([keepers(), [rank.poll() for rank in ranks]])
        end(ranks)

if main:
    launch()
else:
    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
print(json.dumps(found[0]))
"""


@pytest.mark.parametrize(
    ("room", "die_with_parent", "main", "expected"),
    [
        (1.5, True, False, [1, [None] * 8]),
        (1.5, False, False, [0, [None] * 8]),
        (0.5, True, True, [0, [None] * 8]),
        (0.5, False, False, [0, [None] * 8]),
        (
            0.5,
            True,
            False,
            ["BlockingIOError", "[Errno 11] rank 0: pthread_create: Resource temporarily unavailable", 0, []],
        ),
    ],
    ids=["one thread", "one thread, no death signal", "none, main thread", "none, no death signal", "none"],
)
def test_threads_run_out(room: float, die_with_parent: bool, main: bool, expected: list[Any], tmp_path: Path) -> None:
    """Then fewer threads start the ranks. With no thread at all the caller starts them, unless death signals would then
    depend on a thread that may end."""
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    if hard != resource.RLIM_INFINITY and hard < 1 << 30:
        pytest.skip("the stack limit cannot be raised to 1 GiB")
    script = tmp_path / "launcher.py"
    script.write_text(FEW_THREADS)
    command = [sys.executable, str(script), json.dumps(sys.path), json.dumps([room, die_with_parent, main])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


# ---- the guard, progress, hooks, the cgroup --------------------------------------------------------------------------


def test_guard_is_told_of_every_rank(guard: Guard, mechanism: str) -> None:
    if mechanism == "subprocess":
        assert refused(OSError, [["/bin/true"]] * 3, guard=guard.writing).errno == errno.ENOTSUP
        return
    ranks = start([["/bin/true"]] * 20, guard=guard.writing)
    assert ended(ranks) == [0] * 20
    assert {rank.mechanism for rank in ranks} == {"clone"}, "posix_spawn cannot tell it"
    assert sorted(guard.pids()) == sorted(rank.pid for rank in ranks)


def test_guard_is_told_before_the_program_runs(guard: Guard) -> None:
    """The guard is told even of a rank whose program cannot be executed."""
    refused(FileNotFoundError, [["/no/such/program"]], guard=guard.writing)
    (pid,) = guard.pids()
    assert has_ended(pid)


def test_guard_is_told_by_leaders(guard: Guard) -> None:
    """A rank has its own session before it tells its pid."""
    sessions: list[bool] = []

    def children() -> list[int]:
        return [int(pid) for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]

    def look() -> None:
        eventually(lambda: len(children()) == 1)
        (pid,) = children()
        until = time.monotonic() + 1
        while not sessions and time.monotonic() < until:
            sessions.extend([True] if os.getsid(pid) == pid else [])
        guard.let_go()

    guard.hold_after(0)
    thread = threading.Thread(target=look)
    thread.start()
    ranks = start([FOREVER], guard=guard.writing)
    thread.join()
    end(ranks)
    assert sessions == [True]


def test_guard_that_has_gone(guard: Guard) -> None:
    guard.close(guard.reading)
    error = refused(BrokenPipeError, [["/bin/true"]] * 3, guard=guard.writing)
    assert str(error) == f"[Errno 32] rank {error.rank}: guard: Broken pipe"


def test_progress(guard: Guard) -> None:
    """Another thread can see how many ranks have started while the call lasts."""
    seen: list[int] = []
    watchers: list[threading.Thread] = []

    def watch(started: Callable[[], int]) -> None:
        def look() -> None:
            eventually(lambda: started() == 7)
            seen.append(started())
            guard.let_go()
            eventually(lambda: started() == 20)

        seen.append(started())
        watchers.append(threading.Thread(target=look))
        watchers[0].start()

    guard.hold_after(7)
    assert ended(start([["/bin/true"]] * 20, progress=watch, guard=guard.writing)) == [0] * 20
    watchers[0].join()
    assert seen == [0, 7]


def test_progress_by_every_mechanism(mechanism: str) -> None:
    asked: list[Callable[[], int]] = []
    assert ended(start([["/bin/true"]] * 4, progress=asked.append)) == [0] * 4
    assert [started() for started in asked] == [4]


def test_audit_event_of_each_rank() -> None:
    def launch() -> list[Any]:
        events: list[Any] = []
        sys.addaudithook(lambda name, args: events.append(args) if name == "subprocess.Popen" else None)
        assert ended(start([["/bin/true", "0"], ["true", "1"]], env={"A": "a"}, rank_env=[{}, {"B": "b"}])) == [0, 0]
        return [(program, args, cwd, dict(env)) for program, args, cwd, env in events]

    assert in_child(launch) == [
        ("/bin/true", ["/bin/true", "0"], None, {"A": "a"}),
        ("true", ["true", "1"], None, {"A": "a", "B": "b"}),
    ]


def test_audit_event_has_the_whole_environment() -> None:
    def start_two() -> list[Any]:
        events: list[Any] = []
        sys.addaudithook(lambda name, args: events.append(args[-1]) if name == "subprocess.Popen" else None)
        os.environ["RS_INHERITED"] = "1"
        assert ended(start([["/bin/true"]] * 2, shared={"RS_SHARED": "2"}, numbered={"RANK": 7})) == [0, 0]
        assert launch(["/bin/true"], 2, guard=False).wait() == (0, 0)
        return [[env.get(name) for name in ("RS_INHERITED", "RS_SHARED", "RANK", "LOCAL_RANK")] for env in events]

    assert in_child(start_two) == [
        ["1", "2", "7", None],
        ["1", "2", "8", None],
        ["1", None, "0", "0"],
        ["1", None, "1", "1"],
    ]


def test_a_rank_has_what_any_popen_has(tmp_path: Path, mechanism: str) -> None:
    """Most of it is the class's: what the standard class gives to each instance is the same for all ranks."""
    ranks = start([["/bin/true"], ["/bin/true"]], streams=[(None, tmp_path / "out", None), NO_STREAMS])
    alone = subprocess.Popen(["/bin/true"], start_new_session=True)
    assert (alone.wait(), *ended(ranks)) == (0, 0, 0)
    for rank in ranks:
        assert isinstance(rank, subprocess.Popen) and rank.args == ["/bin/true"]
        assert rank.mechanism in (mechanism, "clone")
        for name, value in vars(alone).items():
            if name not in ("pid", "_waitpid_lock"):
                assert getattr(rank, name) == value, name
        assert repr(rank) == "<RankProcess: returncode: 0 args: ['/bin/true']>"
        assert rank._waitpid_lock is not ranks[not ranks.index(rank)]._waitpid_lock  # type: ignore[attr-defined]
        assert rank.communicate() == (None, None)


def test_ranks_are_born_in_a_cgroup(tmp_path: Path) -> None:
    with new_cgroup() as folder:
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        logs = [(None, tmp_path / str(number), None) for number in range(6)]
        assert ended(start([["grep", "^0:", "/proc/self/cgroup"]] * 6, cgroup=fd, streams=logs)) == [0] * 6
        os.close(fd)
        assert {log.read_text().rpartition("/")[2] for _, log, _ in logs} == {f"{folder.name}\n"}


# ---- many ------------------------------------------------------------------------------------------------------------


def test_many_threads_at_once_while_others_fork() -> None:
    def launch() -> list[Any]:
        wrong: list[Any] = []
        before = snapshot()
        over = threading.Event()

        def launch_groups(number: int) -> None:
            for turn in range(6):
                log_free = start(
                    [["/bin/sh", "-c", f"exit {rank}"] for rank in range(10)],
                    die_with_parent=bool((number + turn) % 2),
                    bindings=[Binding({CPUS[rank % len(CPUS)]}) if turn % 3 else None for rank in range(10)],
                )
                if ended(log_free) != list(range(10)):
                    wrong.append([rank.returncode for rank in log_free])
                commands = [FOREVER] * 9 + [["/no/such/program"]]
                try:
                    start(commands)
                    wrong.append("started nothing")
                except FileNotFoundError as error:
                    if error.rank != 9:  # type: ignore[attr-defined]
                        wrong.append(error)

        def fork_and_spawn(fork_here: bool) -> None:
            while not over.is_set():
                if fork_here:
                    pid = fork(lambda: None)
                    if os.waitpid(pid, 0)[1]:
                        wrong.append("a forked process")
                elif subprocess.run(["/bin/true"], check=False).returncode:
                    wrong.append("a spawned process")

        launchers = [threading.Thread(target=launch_groups, args=(number,)) for number in range(4)]
        others = [threading.Thread(target=fork_and_spawn, args=(kind,)) for kind in (True, False)]
        for thread in (*launchers, *others):
            thread.start()
        for thread in launchers:
            thread.join()
        over.set()
        for thread in others:
            thread.join()
        return [wrong, changed_since(before)]

    assert in_child(launch) == [[], {}]


def test_hundreds_of_ranks(tmp_path: Path) -> None:
    """Each has a pidfd and a log, under a limit that allows few descriptors more than the pidfds."""

    def launch() -> list[Any]:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if hard != resource.RLIM_INFINITY and hard < 600:
            return []
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
        ranks = start(
            [["/bin/echo", str(number)] for number in range(500)],
            streams=[(None, tmp_path / str(number), subprocess.STDOUT) for number in range(500)],
            bindings=[Binding({CPUS[number % len(CPUS)]}) for number in range(500)],
        )
        return [ended(ranks), all(rank.pidfd is not None for rank in ranks)]

    if not (found := in_child(launch)):
        pytest.skip("fewer than 600 descriptors are allowed here")
    assert found == [[0] * 500, True]
    assert [(tmp_path / str(number)).read_text() for number in range(500)] == [f"{number}\n" for number in range(500)]


# ---- what other tools see --------------------------------------------------------------------------------------------


def test_no_data_race(tmp_path: Path) -> None:
    """crew_races.c under ThreadSanitizer, without the child half of the engine."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc")
    probe = [compiler, "-fsanitize=thread", "-x", "c", "-", "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, input=b"int main(void) { return 0; }", check=False).returncode:
        pytest.skip("this compiler has no ThreadSanitizer")
    built, options = [], ["-std=c11", "-O1", "-g", "-iquote", "csrc"]
    child = {"csrc/child.c", "csrc/clone3.c"}
    engine = sorted(str(path.relative_to(ROOT)) for way in ("*.c", "search/*.c") for path in (ROOT / "csrc").glob(way))
    for source in [*engine, "tests/crew_races.c"]:
        built.append(str(tmp_path / Path(source).with_suffix(".o").name))
        way = "-D_exit=leave_at_once" if source in child else "-fsanitize=thread"
        subprocess.run([compiler, *options, way, "-c", source, "-o", built[-1]], cwd=ROOT, check=True)
    program = str(tmp_path / "crew_races")
    subprocess.run([compiler, "-fsanitize=thread", *built, "-o", program, "-pthread"], check=True)
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [program, str(CPUS[0]), "/bin/true"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not know this kernel's address space")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


HANDLER = r"""
/* A handler that notes where it runs: in the launcher, in a thread of a crew, in another process. */
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static long launcher;
static long *runs;

static void
note(int sig)
{
    char name[16];
    (void)sig;
    prctl(PR_GET_NAME, name);
    long where = syscall(SYS_getpid) != launcher ? 2 : strcmp(name, "rankspawn") == 0;
    __atomic_add_fetch(&runs[where], 1, __ATOMIC_RELAXED);
}

long *
catch_signals(const int *signals, int count)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = note;
    action.sa_flags = SA_RESTART;
    launcher = syscall(SYS_getpid);
    runs = mmap(NULL, 3 * sizeof *runs, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < count; i++) {
        sigaction(signals[i], &action, NULL);
    }
    return runs;
}
"""

IN_STORM = """
import ctypes, json, os, signal, struct, sys, threading, time
sys.path[:0] = json.loads(sys.argv[1])
from rankspawn import Binding, Popen
from tests.support.state import changed_since, snapshot
from tests.test_crew import CPUS, ended, start

def without_clone3():
    "A seccomp filter, as container runtimes had: the call's number, 435 everywhere, is answered with ENOSYS."
    rules = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 435, 0x06, 0, 0, 0x50000 | 38, 0x06, 0, 0, 0x7FFF0000)
    kept = ctypes.create_string_buffer(rules)
    program = struct.pack("HxxxxxxP", 4, ctypes.addressof(kept))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, ctypes.c_ulong(2), program) == 0, os.strerror(ctypes.get_errno())

if sys.argv[3]:
    without_clone3()
library = ctypes.CDLL(sys.argv[2])
library.catch_signals.restype = ctypes.POINTER(ctypes.c_long)
caught = [signal.SIGUSR1, signal.SIGALRM, signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH]
runs = library.catch_signals((ctypes.c_int * len(caught))(*caught), len(caught))
wrong, done = [], []

def launch(number):
    turn = 0
    while time.monotonic() < until:
        turn += 1
        bindings = [Binding({CPUS[0]}) if turn % 2 else None] * 8
        try:
            found = ended(start([["/bin/true"]] * 8, die_with_parent=bool(turn % 3), bindings=bindings))
        except BaseException as error:
            found = repr(error)
        if found != [0] * 8 or Popen(["/bin/true"]).wait():
            wrong.append(found)
    done.append(turn)

before = snapshot()
print("ready", flush=True)
until = time.monotonic() + 2
threads = [threading.Thread(target=launch, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps([wrong[:5], len(done), min(done) > 3, changed_since(before), *runs[:3]]), flush=True)
"""


@pytest.mark.parametrize("without", ["", "clone3"], ids=["clone3", "clone"])
def test_storm_of_signals(tmp_path: Path, without: str) -> None:
    """No rank and no thread of a crew runs a handler of the program."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library, script = tmp_path / "handler.so", tmp_path / "launcher.py"
    script.write_text(IN_STORM)
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=HANDLER, text=True, check=True)
    command = [sys.executable, str(script), json.dumps(sys.path), str(library), without]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as launcher:
        assert launcher.stdout is not None
        try:
            assert launcher.stdout.readline() == "ready\n"
            with storm(launcher.pid):
                assert select.select([launcher.stdout], [], [], PATIENCE)[0], "it hangs"
                told = json.loads(launcher.stdout.readline())
        finally:
            os.killpg(launcher.pid, signal.SIGKILL)
    wrong, threads, busy, changed, here, in_crew, elsewhere = told
    assert (wrong, threads, busy, changed) == ([], 3, True, {})
    assert here > 100 and (in_crew, elsewhere) == (0, 0)


@pytest.mark.parametrize("own", [0, 1], ids=["a CPU for all", "a CPU each"])
def test_ranks_are_born_bound_by_every_mechanism(mechanism: str, own: int, tmp_path: Path) -> None:
    """Each looks at its mask first of all; without the engine a thread that has bound itself starts it."""
    cpus = [CPUS[own * number % len(CPUS)] for number in range(100)]
    logs = [tmp_path / str(number) for number in range(100)]
    ranks = start(
        [["/bin/grep", "Cpus_allowed_list", "/proc/self/status"]] * 100,
        bindings=[Binding({cpu}) for cpu in cpus],
        streams=[(None, log, None) for log in logs],
    )
    assert ended(ranks) == [0] * 100
    assert [log.read_text().split() for log in logs] == [["Cpus_allowed_list:", str(cpu)] for cpu in cpus]
    assert not any(rank.binding_report.late for rank in ranks)
    assert sorted(os.sched_getaffinity(0)) == CPUS


def test_launch_by_a_thread_that_blocks_sigterm() -> None:
    found: list[tuple[int, ...]] = []

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        with launch(FOREVER, 2, keep_going=True) as group:
            group.terminate()
            found.append(group.wait(PATIENCE))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(-signal.SIGTERM, -signal.SIGTERM)]
