"""The rank group: whoever waits sees at once that a rank has ended, and the ranks end together, whatever happens.

The fixture of conftest.py asserts after each test that no process is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from rankspawn import RankGroup, launch
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.processes import PATIENCE, eventually, has_ended, new_cgroup, state
from tests.support.state import NOBODY, become, changed_since, fork, in_child, snapshot

try:
    import uvloop
except ImportError:
    uvloop = None

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may trace any process, or become another user")

SLEEPING = ["/bin/sleep", "1000"]
# It makes a file when it runs and ignores SIGTERM.
STUBBORN = ["/bin/sh", "-c", "trap '' TERM; : > ready.$RANK; while :; do sleep 0.05; done"]
KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


@contextmanager
def stubborn(folder: Path, nprocs: int = 2, **options: Any) -> Iterator[RankGroup]:
    """A group of ranks that already ignore SIGTERM."""
    with launch(STUBBORN, nprocs, cwd=folder, **options) as group:
        eventually(lambda: len(list(folder.glob("ready.*"))) == nprocs)
        yield group
        group.kill()


# ---- waiting ---------------------------------------------------------------------------------------------------------


def test_ranks_are_seen_to_end_in_their_own_order() -> None:
    with launch(shell("sleep 0.$((2 * RANK + 1)); exit $RANK"), 3) as group:
        ended: list[int] = []
        while group.running:
            ended += group.wait_any(PATIENCE)
        assert ended == [0, 1, 2]
        assert group.returncodes == {0: 0, 1: 1, 2: 2}
        assert group.poll() == (0, 1, 2)
        assert group.wait_any(0) == []
        assert not group.stopping and group.first_failure == 1


def test_waiting_has_an_end() -> None:
    with launch(shell("[ $RANK = 1 ] || exec sleep 1000"), 3) as group:
        assert group.wait_any(PATIENCE) == [1]
        assert group.wait_any(0.01) == []
        assert group.running == (0, 2) and group.poll() == (None, 0, None)
        with pytest.raises(TimeoutError, match=r"^2 of 3 ranks still run: 0, 2$"):
            group.wait(0.01)
        with pytest.raises(TimeoutError):
            group.wait(-1)
        assert group.pids() == tuple(rank.pid for rank in group.ranks)
        group.send_signal(signal.SIGKILL)
        assert group.wait() == (KILLED, 0, KILLED)


def test_an_error_names_some_of_many() -> None:
    with launch(SLEEPING, 21) as group, pytest.raises(TimeoutError, match=r"^21 of 21 .*: 0, 1, .* 19, \.\.\.$"):
        group.wait(0)


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 1e7, None])
def test_a_timeout_may_be_as_long_as_it_likes(timeout: float | None) -> None:
    """epoll_wait(2) takes 24 days at most, and the group any timeout."""
    with launch(shell("sleep 0.1"), 2, grace=float("inf")) as group:
        group.wait_any(timeout)
        assert group.wait(timeout) == (0, 0)
    with launch(SLEEPING, 2, grace=float("inf")) as group:
        group.terminate(timeout)
        assert group.returncodes == {0: TERMINATED, 1: TERMINATED}


def test_waiting_costs_nothing() -> None:
    """Whoever waits sleeps in one system call, and the kernel wakes it only when something has happened."""

    def switches() -> int:
        lines = Path("/proc/thread-self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("voluntary_ctxt_switches")))

    with launch(SLEEPING, 16) as group:
        group.poll()
        before = switches()
        assert group.wait_any(1) == []
        # Polling would switch 50 times.
        assert switches() - before < 5


def test_the_first_failure_ends_the_others() -> None:
    with launch(shell("[ $RANK = 2 ] || exec sleep 1000; exit 7"), 4) as group:
        assert group.wait(PATIENCE) == (TERMINATED, TERMINATED, 7, TERMINATED)
        assert group.first_failure == 2 and group.stopping and not group.killing


def test_what_does_not_end_after_a_failure_is_killed(tmp_path: Path) -> None:
    with stubborn(tmp_path, grace=0.1) as group:
        os.kill(group.pids()[1], signal.SIGKILL)
        assert group.wait(PATIENCE) == (KILLED, KILLED)
        assert group.first_failure == 1 and group.killing


def test_a_failure_ends_nobody_when_told_so() -> None:
    with launch(shell("[ $RANK = 0 ] && exit 1; sleep 0.2"), 3, keep_going=True) as group:
        assert group.wait(PATIENCE) == (1, 0, 0)
        assert not group.stopping


def test_ends_are_seen_where_no_descriptor_is_left_to_watch_for_them() -> None:
    def limited() -> None:
        import rankspawn._end.deaths  # noqa: F401 # which a wait imports later

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with launch(["sleep", "0.3"], 2) as group:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # what is open stays open
            assert group.wait(PATIENCE) == (0, 0)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    in_child(limited)


def test_a_descriptor_wakes_a_loop_of_ones_own() -> None:
    reading, writing = os.pipe()
    with launch(SLEEPING, 2) as group:
        group.watch(reading)
        os.write(writing, b".")
        assert group.advance(None)
        os.close(reading)
        os.close(writing)
        assert group.advance(0.01)


# ---- who else waits --------------------------------------------------------------------------------------------------


def test_a_rank_may_be_waited_for_by_itself() -> None:
    with launch(shell("exit $RANK"), 4, keep_going=True) as group:
        assert group.ranks[3].wait(PATIENCE) == 3
        assert group.ranks[2].wait() == 2
        assert group.wait(PATIENCE) == (0, 1, 2, 3)
        assert group.ranks[0].wait() == 0


def test_a_thread_that_waits_for_a_rank_that_does_not_end(tmp_path: Path) -> None:
    """The thread is in waitpid(2), and holds the lock of the rank's Popen."""
    with stubborn(tmp_path) as group:
        thread = threading.Thread(target=group.ranks[1].wait)
        thread.start()
        group.kill()
        thread.join(PATIENCE)
        assert group.returncodes == {0: KILLED, 1: KILLED} and group.ranks[1].returncode == KILLED


def kernel_remembers() -> bool:
    """Whether the kernel still tells a status that somebody else has waited for (Linux 6.15)."""
    return tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 15)


@pytest.mark.parametrize("seen", [False, True], ids=["before it was seen to end", "after"])
def test_a_rank_that_is_reaped_behind_our_back(seen: bool) -> None:
    with launch(shell("[ $RANK = 1 ] || exec sleep 1000; exit 3"), 3) as group:
        if seen:
            assert group.wait_any(PATIENCE) == [1]
        assert os.waitpid(-1, 0) == (group.pids()[1], 3 << 8)
        if not seen:
            assert group.wait_any(PATIENCE) == [1]
        known = seen or kernel_remembers()
        assert group.returncodes == {1: 3 if known else 0}
        if known:
            assert group.wait(PATIENCE) == (TERMINATED, 3, TERMINATED)
    assert group.ranks[1].returncode == (3 if known else 0)


def test_a_launcher_that_ignores_its_childrens_end() -> None:
    def run() -> tuple[int, ...]:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with launch(shell("exit $RANK"), 3, keep_going=True) as group:
            return group.wait(PATIENCE)

    assert in_child(run) == ((0, 1, 2) if kernel_remembers() else (0, 0, 0))


@pytest.mark.parametrize("seen", [False, True], ids=["before it was seen to end", "after"])
def test_nobody_else_is_signalled_for_a_rank_that_was_reaped(seen: bool) -> None:
    """The rank's pid may be another process's by then. Here another child has it, as its pid, session and group."""

    def run() -> list[str]:
        # ns_last_pid makes the kernel give the rank's pid to the next process.
        with launch(shell("exit 0"), 1) as group:
            if seen:
                assert group.wait_any(PATIENCE) == [0]
            (pid,) = group.pids()
            os.waitpid(-1, 0)
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
            with subprocess.Popen(SLEEPING, start_new_session=True) as stranger:
                group.close()
                try:
                    stranger.wait(0.2)
                    fate = "killed"
                except subprocess.TimeoutExpired:
                    fate = "alive"
                stranger.kill()
            return ["taken" if stranger.pid == pid else "not taken", fate]

    if not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK):
        pytest.skip("the next process's number cannot be chosen here")
    for _ in range(20):
        found = in_child(run)
        assert found[1] == "alive"
        if found[0] == "taken":
            return
    pytest.skip("another process took the number each time")


@contextmanager
def debugger(pid: int) -> Iterator[None]:
    """A process that traces ``pid``, and does not wait for its end."""
    told, telling = os.pipe()
    staying, leave = os.pipe()

    def trace() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        ptrace_seize = 0x4206
        if libc.ptrace(ptrace_seize, pid, None, None):
            raise OSError(ctypes.get_errno(), "ptrace")
        os.write(telling, b".")
        os.close(leave)
        os.read(staying, 1)

    tracer = fork(trace)
    try:
        assert os.read(told, 1) == b"."
        yield
    finally:
        for fd in (told, telling, staying, leave):
            os.close(fd)
        os.waitpid(tracer, 0)


@needs_root
def test_a_rank_that_a_debugger_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank's pidfd says that it has ended, and waitid(2) that it has not, until the debugger has waited for it."""
    from rankspawn._end import watch as _watch
    from rankspawn._group import ending as _group

    monkeypatch.setattr(_group, "KILL_SECONDS", 0.5)
    looks = []
    returncodes = _watch.returncodes
    monkeypatch.setattr(_watch, "returncodes", lambda ranks: looks.append(ranks) or returncodes(ranks))
    group = launch(SLEEPING, 3)
    with debugger(group.pids()[1]):
        group.send_signal(signal.SIGKILL)
        eventually(lambda: state(group.pids()[1]) == "Z")
        looks.clear()
        with pytest.raises(TimeoutError, match="1 of 3 ranks still run: 1"):
            group.wait(0.5)
        assert len(looks) < 50, "it spins"
        for end in (group.kill, group.close):
            with pytest.raises(TimeoutError, match=f"^rank 1: process {group.pids()[1]} .* which traces it"):
                end()
        assert group.returncodes == {0: KILLED, 2: KILLED}
        assert group.report()["attempts"][0]["ranks"][1]["exit"] is None
    eventually(lambda: group.poll()[1] == KILLED)
    group.close()
    assert group.ranks[1].returncode == KILLED


@needs_root
def test_a_rank_that_cannot_be_killed_keeps_nobody_else_alive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rankspawn._group import ending as _group

    monkeypatch.setattr(_group, "KILL_SECONDS", 0.2)
    # Each rank has a child in a process group of its own, in the rank's session.
    child = "import os; os.fork() or os.setpgid(0, 0); open(f'ready.{os.getpid()}', 'w'); os.kill(os.getpid(), 19)"
    group = launch(python(child), 2, cwd=tmp_path, grace=0.1)
    eventually(lambda: len(list(tmp_path.glob("ready.*"))) == 4)
    pids = [int(path.suffix[1:]) for path in tmp_path.glob("ready.*")]
    with debugger(group.pids()[0]):
        with pytest.raises(TimeoutError, match=r"^rank 0: ") as caught:
            group.close()
        assert "rank 1" not in str(caught.value)
        assert all(map(has_ended, pids))
    group.close()
    assert None not in [rank.returncode for rank in group.ranks]


@needs_root
def test_ranks_of_another_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """We may send them neither SIGTERM nor SIGKILL: the errors say so, and no call hangs."""
    from rankspawn._group import ending as _group

    monkeypatch.setattr(_group, "KILL_SECONDS", 0.2)
    group = launch(SLEEPING, 2)

    def run() -> list[str]:
        told = []
        mine = launch(SLEEPING, 2, grace=0.1, guard=False)  # the guard is still that of the old user
        become(NOBODY)
        for end in (mine.stop, lambda: mine.send_signal(signal.SIGTERM), lambda: mine.wait(0.05), mine.close):
            try:
                end()
            except OSError as error:
                told.append(f"{type(error).__name__}: {error}")
        return [*told, *map(str, mine.pids())]

    *told, one, other = in_child(run)
    for pid in (one, other):
        os.kill(int(pid), signal.SIGKILL)  # the death of their launcher has not ended them either
    assert [text.partition(":")[0] for text in told] == [
        "PermissionError", "PermissionError", "TimeoutError", "TimeoutError",
    ]  # fmt: skip
    assert "rank 1: " in told[3] and "runs as another user" in told[3]
    assert group.poll() == (None, None)
    group.close()


# ---- ending ----------------------------------------------------------------------------------------------------------


def test_what_a_rank_started_ends_with_the_group(tmp_path: Path) -> None:
    """This holds even when the rank itself has ended long before, with status 0."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with launch(shell(f"sleep 60 > {fifo} &"), 1) as group:
        with fifo.open() as held:
            assert group.wait_any(PATIENCE) == [0]
            group.close()
            assert held.read() == ""  # the end of the file: no process has it open to write any more


def test_ranks_that_ignore_sigterm_are_killed(tmp_path: Path) -> None:
    with stubborn(tmp_path) as group:
        group.terminate(grace=0.1)
        assert group.running == () and set(group.returncodes.values()) == {KILLED}
        assert [rank.returncode for rank in group.ranks] == [KILLED, KILLED]


def test_who_asks_again_cannot_make_it_longer(tmp_path: Path) -> None:
    with stubborn(tmp_path) as group:
        group.stop(grace=1000)
        assert group.stopping and group.kill_at is not None
        first = group.kill_at
        group.stop(grace=2000)
        assert group.kill_at == first
        group.stop(grace=0.1)
        assert group.wait(PATIENCE) == (KILLED, KILLED)


def test_who_was_told_to_end_is_killed_in_time_for_wait_any(tmp_path: Path) -> None:
    with stubborn(tmp_path) as group:
        group.stop(grace=0.1)
        ended = []
        while group.running:
            ended += group.wait_any()
        assert sorted(ended) == [0, 1]


def test_a_stopped_rank_can_end_well() -> None:
    with launch(SLEEPING, 2) as group:
        group.send_signal(signal.SIGSTOP)
        eventually(lambda: [state(pid) for pid in group.pids()] == ["T", "T"])
        group.terminate()
        assert group.returncodes == {0: TERMINATED, 1: TERMINATED}


SAVING = (
    "import signal, sys, time; signal.signal(15, lambda *_: sys.exit())\n"
    "try:\n"
    "  open('ready', 'w')\n"
    "  while True: time.sleep(0.1)  # a signal that comes just before a sleep is acted on after it\n"
    "finally: time.sleep(0.3); open('saved', 'w')"
)


@pytest.mark.parametrize("end", ["terminate", "wait", "close"])
def test_what_a_shell_runs_has_its_time_to_end(end: str, tmp_path: Path) -> None:
    """The shell is the rank, and SIGTERM ends it at once; the program that it runs needs time to save its state."""
    script = f'[ $RANK = 1 ] && {{ read -r _ < fifo; exit 1; }}; {sys.executable} -I -S -c "{SAVING}"; exit 0'
    os.mkfifo(tmp_path / "fifo")
    with launch(shell(script), 2, cwd=tmp_path) as group:
        eventually((tmp_path / "ready").exists)
        if end == "wait":
            (tmp_path / "fifo").write_text("\n")
            assert group.wait(PATIENCE) == (TERMINATED, 1)
        else:
            getattr(group, end)()
        assert (tmp_path / "saved").exists()


def test_what_a_shell_runs_has_no_more_than_its_time(tmp_path: Path) -> None:
    script = "(trap '' TERM; : > ready; exec sleep 1000) & wait"
    with launch(shell(script), 1, cwd=tmp_path) as group:
        eventually((tmp_path / "ready").exists)
        group.stop(grace=0.3)
        with pytest.raises(TimeoutError, match="processes that they started still run"):
            group.wait(0.05)
        assert group.running == ()
        assert group.wait(PATIENCE) == (TERMINATED,)


def test_ranks_that_end_while_they_are_told_to() -> None:
    for turn in range(12):
        with launch(shell(f"sleep 0.0$(( (RANK * 7 + {turn}) % 10 ))"), 8, keep_going=True) as group:
            time.sleep(0.005 * turn)
            group.terminate()
            assert set(group.returncodes) == set(range(8))
            assert set(group.returncodes.values()) <= {0, TERMINATED}


def test_grandchildren_in_groups_of_their_own(tmp_path: Path) -> None:
    """They are in the session of a rank that is long dead, each in a process group that gets no signal."""
    code = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(3):
    if os.fork() == 0:
        os.setpgid(0, 0)
        os.fork()
        open(f"ready.{os.getpid()}", "w")
        while True: signal.pause()
"""
    with launch(python(code), 2, cwd=tmp_path) as group:
        assert group.wait(PATIENCE) == (0, 0)
        eventually(lambda: len(list(tmp_path.glob("ready.*"))) == 12)
        pids = [int(path.suffix[1:]) for path in tmp_path.glob("ready.*")]
        assert not any(map(has_ended, pids))
    assert all(map(has_ended, pids))


LEAVING = """
import os, signal
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open("new", "w") as file: file.write(str(os.getpid()))
        os.rename("new", "left")
        while True: signal.pause()
    os._exit(0)
os.wait()
"""


def test_what_leaves_its_session_lives_on(tmp_path: Path) -> None:
    """A process that calls setsid itself is not found again, as the README says."""
    with launch(python(LEAVING), 1, cwd=tmp_path) as group:
        group.wait(PATIENCE)
        eventually((tmp_path / "left").exists)
    pid = int((tmp_path / "left").read_text())
    assert not has_ended(pid)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: has_ended(pid))


def test_what_leaves_its_session_ends_with_the_cgroup(tmp_path: Path) -> None:
    with new_cgroup() as folder:
        with launch(python(LEAVING), 1, cwd=tmp_path, cgroup=folder) as group:
            group.wait(PATIENCE)
            eventually((tmp_path / "left").exists)
            assert [path for path in folder.iterdir() if path.is_dir()]
        assert has_ended(int((tmp_path / "left").read_text()))
        assert not [path for path in folder.iterdir() if path.is_dir()]


def test_closing_again_does_nothing() -> None:
    before = snapshot()
    group = launch(SLEEPING, 4)
    group.close()
    # Even while the group is still referred to.
    assert changed_since(before) == {}
    group.close()
    assert group.wait() == group.poll() == (TERMINATED,) * 4
    assert group.wait_any() == [] and not group.advance()
    group.terminate()
    group.kill()
    group.send_signal(signal.SIGTERM)
    group.stop()


def test_a_group_that_nobody_holds_is_killed() -> None:
    group = launch(SLEEPING, 2)
    pids = group.pids()
    with pytest.warns(ResourceWarning, match=f"not closed: pids .*{pids[1]}"):
        del group
    assert [state(pid) for pid in pids] == ["", ""]


def test_a_group_that_is_open_when_the_interpreter_ends(tmp_path: Path) -> None:
    """The children of its ranks end too, though no death signal reaches them, and only the warning is printed."""
    script = (
        "import sys, time; from pathlib import Path; from rankspawn import launch\n"
        "group = launch(['/bin/sh', '-c', 'sleep 1000 & echo $! > new; mv new pid; wait'], 1, cwd=sys.argv[1])\n"
        "while not (path := Path(sys.argv[1], 'pid')).exists(): time.sleep(0.01)\n"
    )
    done = subprocess.run([sys.executable, "-X", "dev", "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if "ResourceWarning" in line], done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert has_ended(int((tmp_path / "pid").read_text()))


# ---- signals ---------------------------------------------------------------------------------------------------------


@contextmanager
def alarm(handler: Callable[..., object], seconds: float = 0.1) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("call", ["stop", "terminate", "kill", "close", "poll"])
@pytest.mark.parametrize("waiting", ["wait", "wait_any", "advance"])
def test_a_handler_may_use_the_group_that_is_waited_for(waiting: str, call: str, tmp_path: Path) -> None:
    """The handler runs during the wait, which must then wait for something else."""
    with stubborn(tmp_path, 3, grace=0.1) as group:
        if call == "poll":
            os.kill(group.pids()[0], signal.SIGKILL)
            eventually(lambda: state(group.pids()[0]) == "Z")

        with alarm(lambda *_: getattr(group, call)() and None):
            if call == "poll":
                signal.raise_signal(signal.SIGALRM)
                group.stop(grace=0)
            if waiting == "wait":
                assert group.wait(PATIENCE) == (KILLED,) * 3
            elif waiting == "wait_any":
                while group.running:
                    group.wait_any(PATIENCE)
            else:
                while group.advance(PATIENCE):
                    pass
        assert group.returncodes == dict.fromkeys(range(3), KILLED)


# An exception between open() and its `with` leaves the file to the garbage collector, which closes it and warns: no
# Python code can prevent that.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_an_exception_of_a_handler_loses_nothing(tmp_path: Path) -> None:
    """Wherever the exception comes, the next wait knows which ranks have ended, and which failed first."""

    class Alarm(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarm

    for turn in range(40):
        with launch(shell("sleep 0.01; exit $((RANK == 5))"), 8, keep_going=True) as group:
            with contextlib.suppress(Alarm), alarm(ring, 0.005 + 0.0007 * turn):
                group.wait(PATIENCE)
                time.sleep(PATIENCE)
            assert group.wait(PATIENCE) == (0, 0, 0, 0, 0, 1, 0, 0)
            assert group.first_failure == 5


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    with stubborn(tmp_path) as group:
        with pytest.raises(KeyboardInterrupt), alarm(signal.default_int_handler):
            group.terminate()  # its grace is 30 seconds
        assert group.returncodes == {0: KILLED, 1: KILLED} and state(group.pids()[0]) == ""


def test_leaving_the_block_by_an_interrupt(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), alarm(signal.default_int_handler):
        with stubborn(tmp_path, grace=0.2) as group:
            group.wait()
    assert group.returncodes == {0: KILLED, 1: KILLED}


# ---- threads ---------------------------------------------------------------------------------------------------------


class Waiter(threading.Thread):
    """A thread that waits for a group, and keeps the answer or the exception."""

    def __init__(self, wait: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.wait, self.answer = wait, None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self.wait()
        except BaseException as error:
            self.answer = error

    def come_to_an_end(self) -> object:
        self.join(PATIENCE)
        assert not self.is_alive(), "it waits for ever"
        return self.answer


@pytest.mark.parametrize("call", ["stop", "terminate", "kill", "close"])
def test_a_thread_that_waits_while_another_ends_the_group(call: str, tmp_path: Path) -> None:
    with stubborn(tmp_path, grace=0.1) as group:
        waiter = Waiter(group.wait)
        time.sleep(0.1)
        getattr(group, call)()
        assert waiter.come_to_an_end() == (KILLED, KILLED)


def test_threads_that_wait_for_one_group() -> None:
    with launch(shell("sleep 0.$((RANK + 1))"), 4) as group:

        def each() -> list[int]:
            ended = []
            while group.running:
                ended += group.wait_any()
            return ended

        waiters = [Waiter(each), Waiter(each), Waiter(group.wait)]
        answers = [waiter.come_to_an_end() for waiter in waiters]
        assert answers[2] == (0, 0, 0, 0)
        first, second = answers[:2]
        assert isinstance(first, list) and isinstance(second, list) and len({*first, *second}) <= 4
        assert len(first + second) == len({*first, *second}), "a rank's end was told twice"


def test_groups_of_many_threads() -> None:
    def run(number: int) -> tuple[int, ...]:
        with launch(shell(f"exit $(( {number} + RANK ))"), 3, keep_going=True) as group:
            return group.wait(PATIENCE)

    waiters = [Waiter(lambda number=number: run(number)) for number in range(12)]  # type: ignore[misc]
    assert [waiter.come_to_an_end() for waiter in waiters] == [(n, n + 1, n + 2) for n in range(12)]


def test_two_groups_at_once() -> None:
    with launch(SLEEPING, 2) as one, launch(shell("exit 3"), 2, keep_going=True) as other:
        assert other.wait(PATIENCE) == (3, 3)
        assert one.poll() == (None, None)
        other.close()
        assert one.poll() == (None, None)


# ---- a fork of the launcher ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", [False, True])
def test_a_forked_copy_that_closes_its_group_ends_nobody(guard: bool) -> None:
    with launch(shell("echo; exec sleep 1000"), 2, tee=True, guard=guard) as group:
        group.poll()

        def leave() -> list[str]:
            told = []
            for use in (group.poll, group.wait, group.stop, group.terminate, group.kill):
                try:
                    use()
                except ChildProcessError as error:
                    told.append(str(error))
            group.close()
            with group:
                pass
            return told

        told = in_child(leave)
        copy = f"the ranks are children of process {os.getpid()}, of which this is a forked copy"
        assert told == [f"[Errno {errno.ECHILD}] {copy}"] * 5
        files = group.files
        assert files is not None and all(path.stdout is not None and path.stdout.exists() for path in files)
        # The copy shares our epoll descriptor's file, and must not have changed it.
        os.kill(group.pids()[1], signal.SIGKILL)
        assert group.wait(PATIENCE) == (TERMINATED, KILLED)
    assert not Path(files[0].error).parent.exists()


def guard_of(group: RankGroup) -> int:
    """The pid of a group's guard: the only child of this process that is no rank."""
    (guard,) = {child.pid for child in psutil.Process().children()} - set(group.pids())
    return guard


@pytest.mark.parametrize("waiting", ["wait", "wait_any", "await"])
def test_the_death_of_the_guard_is_said_at_once_and_once(waiting: str) -> None:
    with launch(shell("exec sleep 1000"), 2, guard=True, die_with_parent=False) as group:

        def wait() -> None:
            if waiting == "await":
                asyncio.run(asyncio.wait_for(group._wait_in_loop(), PATIENCE))
            else:
                getattr(group, waiting)(PATIENCE)

        guard = guard_of(group)
        os.kill(guard, signal.SIGKILL)
        with pytest.raises(RuntimeWarning, match=rf"the guard \(process {guard}\) has ended"):  # warnings are errors
            wait()
        os.kill(group.pids()[0], signal.SIGKILL)
        wait()
        assert group.returncodes[0] == KILLED


def test_a_forked_copy_that_ends_as_python_ends() -> None:
    """The copy's atexit functions and finalizers run, and must touch neither the ranks nor the folder of their logs."""
    script = (
        "import os, sys; from rankspawn import launch\n"
        "with launch(['/bin/sleep', '1000'], 2, tee=True) as group:\n"
        "    group.poll()\n"
        "    if (pid := os.fork()) == 0: sys.exit(3)\n"
        "    print(os.waitpid(pid, 0)[1] >> 8, group.poll(), os.path.exists(os.path.dirname(group.files[1].error)))\n"
    )
    # From Python 3.12 on os.fork() warns of threads, and tee has one.
    python = [sys.executable, "-W", "ignore:This process:DeprecationWarning"]
    done = subprocess.run([*python, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("3 (None, None) True\n", "", 0)


# A rank of a group that a daemon thread waits for, which leaves a child in its session, and one in a group of its own.
IN_A_DAEMON_THREAD = """
import sys, threading, time
from rankspawn import launch
family = (
    "import os, time\\nif os.fork() == 0: os.setpgid(0, 0)\\nelse: os.fork()\\n"
    "os.write(1, b'%d\\\\n' % os.getpid()); os.close(1); os.close(2); time.sleep(1000)"
)
def wait():
    with launch([sys.executable, "-I", "-S", "-c", family], 2, guard=sys.argv[1] == "True") as group:
        group.wait()
threading.Thread(target=wait, daemon=True).start()
print(sys.stdin.readline(), end="")
if sys.argv[2] == "raises": raise SystemExit(3)
"""


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("end", ["returns", "raises"])
def test_a_daemon_thread_that_waits_when_the_interpreter_ends_leaves_nothing(guard: bool, end: str) -> None:
    command = [sys.executable, "-c", IN_A_DAEMON_THREAD, str(guard), end]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin is not None and program.stdout is not None
        family = [int(program.stdout.readline()) for _ in range(6)]
        _, complaint = program.communicate("end\n", PATIENCE)
        left = [pid for pid in family if not has_ended(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert (left, program.returncode) == ([], 3 if end == "raises" else 0), complaint


# ---- asyncio ---------------------------------------------------------------------------------------------------------

if uvloop is not None:
    # libuv makes a pipe for its first loop, and keeps it.
    with contextlib.closing(uvloop.new_event_loop()) as first:
        first.run_until_complete(asyncio.sleep(0))

RUNNERS: dict[str, Any] = {"asyncio": asyncio.new_event_loop, "uvloop": getattr(uvloop, "new_event_loop", None)}


@pytest.fixture(params=sorted(RUNNERS))
def run(request: pytest.FixtureRequest) -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """A function that runs a coroutine in a loop, for each kind of loop."""
    make = RUNNERS[request.param]
    if make is None:
        pytest.skip("uvloop is not installed")
    loop = make()
    loop.set_debug(True)

    def complain(_: object, context: dict[str, Any]) -> None:
        complaints.append(context)

    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(complain)
    try:
        yield lambda main: loop.run_until_complete(asyncio.wait_for(main, PATIENCE))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    assert complaints == []


def test_await(run: Any) -> None:
    async def main() -> tuple[int, ...]:
        with launch(shell("sleep 0.1; exit $RANK"), 3, keep_going=True) as group:
            return await group

    assert run(main()) == (0, 1, 2)


def test_await_ends_the_others_after_a_failure(run: Any, tmp_path: Path) -> None:
    async def main() -> tuple[int, ...]:
        with stubborn(tmp_path, grace=0.1) as group:
            os.kill(group.pids()[1], signal.SIGKILL)
            return await group

    assert run(main()) == (KILLED, KILLED)


def test_await_many_groups(run: Any) -> None:
    async def one(number: int) -> tuple[int, ...]:
        async with launch(shell(f"sleep 0.{number}; exit {number}"), 2, keep_going=True) as group:
            return await group

    async def main() -> list[tuple[int, ...]]:
        return await asyncio.gather(*map(one, range(8)))

    assert run(main()) == [(number, number) for number in range(8)]


def test_async_with_ends_what_runs(run: Any) -> None:
    async def main() -> RankGroup:
        async with launch(SLEEPING, 2) as group:
            await asyncio.sleep(0.05)
            return group

    assert run(main()).returncodes == {0: TERMINATED, 1: TERMINATED}


def test_async_with_that_is_cancelled_kills(run: Any, tmp_path: Path) -> None:
    """The cancellation comes while the group gives the ranks their grace; the loop goes on meanwhile."""

    async def hold(groups: list[RankGroup]) -> None:
        async with launch(STUBBORN, 2, cwd=tmp_path) as group:
            groups.append(group)
            while len(list(tmp_path.glob("ready.*"))) < 2:
                await asyncio.sleep(0.01)

    async def main() -> None:
        groups: list[RankGroup] = []
        task = asyncio.create_task(hold(groups))
        while not (groups and groups[0].stopping):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert groups[0].returncodes == {0: KILLED, 1: KILLED}

    run(main())


def test_cancelling_leaves_the_ranks_alone(run: Any) -> None:
    async def main() -> None:
        with launch(SLEEPING, 2) as group:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(group, 0.05)
            task = asyncio.ensure_future(group)
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert group.poll() == (None, None)
            group.send_signal(signal.SIGKILL)
            assert await group == (KILLED, KILLED)

    run(main())


@pytest.mark.parametrize("call", ["stop", "terminate", "kill", "close"])
def test_tasks_that_await_while_another_ends_the_group(call: str, run: Any, tmp_path: Path) -> None:
    async def wait(group: RankGroup) -> tuple[int, ...]:
        return await group

    async def main() -> list[tuple[int, ...]]:
        with stubborn(tmp_path, grace=0.1) as group:
            tasks = [asyncio.create_task(wait(group)) for _ in range(3)]
            await asyncio.sleep(0.05)
            getattr(group, call)()
            # The new group's epoll most likely has the same number as the closed group's.
            with launch(shell("sleep 0.3"), 2) as another:
                assert await another == (0, 0)
            return await asyncio.gather(*tasks)

    assert run(main()) == [(KILLED, KILLED)] * 3


def test_await_what_a_shell_runs(run: Any, tmp_path: Path) -> None:
    script = f'{sys.executable} -I -S -c "{SAVING}"; exit 0'

    async def main() -> None:
        async with launch(shell(script), 1, cwd=tmp_path):
            while not (tmp_path / "ready").exists():
                await asyncio.sleep(0.01)

    run(main())
    assert (tmp_path / "saved").exists()


def test_await_in_a_thread_while_another_stops_the_group(run: Any, tmp_path: Path) -> None:
    async def wait(group: RankGroup) -> tuple[int, ...]:
        return await group

    with stubborn(tmp_path, grace=0.1) as group:
        waiter = Waiter(lambda: run(wait(group)))
        time.sleep(0.2)
        group.stop()
        assert waiter.come_to_an_end() == (KILLED, KILLED)


def test_awaiting_costs_nothing(run: Any) -> None:
    """The loop sleeps, and calls nothing of ours until something has happened."""

    async def main() -> int:
        with launch(SLEEPING, 16) as group:
            turns = 0
            advance = group.advance

            def count(*timeout: float) -> bool:
                nonlocal turns
                turns += 1
                return advance(*timeout)

            group.advance = count  # type: ignore[method-assign, assignment]
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(group, 0.5)
            return turns

    assert run(main()) < 5


# ---- telling ---------------------------------------------------------------------------------------------------------


def test_a_report_before_and_after(tmp_path: Path) -> None:
    with launch(STUBBORN, 2, cwd=tmp_path) as group:
        eventually(lambda: len(list(tmp_path.glob("ready.*"))) == 2)
        before = group.report()
        group.kill()
    after = group.report()
    for report in (before, after):
        assert (report["nprocs"], report["command"]) == (2, STUBBORN)
        assert [rank["pid"] for rank in report["attempts"][0]["ranks"]] == list(group.pids())
    running, ended = before["attempts"][0]["ranks"][1], after["attempts"][0]["ranks"][1]
    assert running["exit"] is None and running["now"] is not None and running["binding"]["effective"] is not None
    assert ended["exit"] is not None and ended["exit"]["signal"] == "SIGKILL" and ended["now"] is None
    assert ended["binding"] == running["binding"]
    assert ended["rusage"] is not None and ended["exited"] is not None


def test_failures_are_told(tmp_path: Path) -> None:
    with launch(shell("echo rank $RANK says; exit $RANK"), 3, log_dir=tmp_path, keep_going=True) as group:
        group.wait(PATIENCE)
        assert sorted(failure.rank for failure in group.failures()) == [1, 2]
