"""Members of a session are found, and ended whatever they do; those that cannot be ended are named."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rankspawn._end import way as _way
from rankspawn._end import without
from rankspawn._end.sessions import describe_stuck, kill_members, members
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.processes import PATIENCE, eventually, frozen_by_v1, has_ended, state
from tests.support.seccomp import GETSID, refuse_getsid
from tests.support.state import NOBODY, become, fork, in_child

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sessions as Linux has them")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(autouse=True, params=["engine", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with the engine's C and with Python."""
    if request.param == "python":
        monkeypatch.setattr(_way, "way", without)
    elif EXTENSION_ERROR is not None:
        pytest.skip("this install has no extension")
    assert _way.way.__name__ == {"engine": "rankspawn._spawn", "python": "rankspawn._end.without"}[request.param]
    return str(request.param)


# For tests that change functions of Python's, or the path of procfs.
only_python = pytest.mark.parametrize("way", ["python"], indirect=True)

# How the programs of a session begin: tell() writes the pid, and numbers that it is given, to the pipe.
PRELUDE = """
import os, signal, sys
def tell(*also):
    os.write(1, (" ".join(map(str, [os.getpid(), *also])) + "\\n").encode())
def rest():
    while True: signal.pause()
"""


class Session:
    """A session whose leader runs ``code``. told: what its members have written by tell(), a list for each line."""

    def __init__(self, code: str) -> None:
        self.leader = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", PRELUDE + code],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.sid = self.leader.pid
        self.told: list[list[int]] = []

    def hear(self, lines: int) -> list[int]:
        """The pids of the processes that tell next."""
        assert self.leader.stdout is not None
        new = [list(map(int, self.leader.stdout.readline().split())) for _ in range(lines)]
        self.told += new
        return [line[0] for line in new]

    def close(self) -> None:
        for pid in {pid for pid, *_ in self.told} | {self.sid}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.leader.communicate(timeout=PATIENCE)  # a process that never called tell() may have the pipe


@pytest.fixture
def session() -> Iterator[Callable[[str], Session]]:
    """Starts sessions, and ends what is left of them after the test."""
    with ExitStack() as stack:

        def start(code: str) -> Session:
            started = Session(code)
            stack.callback(started.close)
            return started

        yield start


# Five processes: the leader, its child, a grandchild that leads a group, one whose parent has ended, and one that has
# left the session.
FAMILY = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    if os.fork() == 0:
        os.setpgid(0, 0); tell(); rest()
    tell(); rest()
middle = os.fork()
if middle == 0:
    middle = os.getpid()
    if os.fork() == 0:
        while os.getppid() == middle: pass
        tell(); rest()
    os._exit(0)
os.waitpid(middle, 0)
if os.fork() == 0:
    os.setsid(); tell(); rest()
tell(); rest()
"""


def test_members_are_all_but_who_has_left(session: Callable[[str], Session]) -> None:
    family, other = session(FAMILY), session("tell(); rest()")
    told = set(family.hear(5))
    other.hear(1)
    escaped = {pid for pid in told if os.getsid(pid) == pid} - {family.sid}
    assert len(escaped) == 1
    assert members({family.sid}) == dict.fromkeys(told - escaped, family.sid)
    assert members({family.sid, other.sid}) == {**dict.fromkeys(told - escaped, family.sid), other.sid: other.sid}
    assert members({family.sid}, ended={family.sid}).keys() == told - escaped - {family.sid}
    assert members(set()) == {}


def test_all_members_are_ended_and_nobody_else(session: Callable[[str], Session]) -> None:
    family, other = session(FAMILY), session("tell(); rest()")
    told = set(family.hear(5))
    other.hear(1)
    inside = set(members({family.sid}))
    assert kill_members({family.sid}, PATIENCE) == {}
    assert all(has_ended(pid) for pid in inside)
    assert not any(has_ended(pid) for pid in [*told - inside, other.sid])
    assert kill_members({family.sid}, 0) == {}


@pytest.mark.parametrize("known", [True, False])
def test_leader_that_ended_first(session: Callable[[str], Session], known: bool) -> None:
    """Nobody reaps the leader, so its pid stays taken; the caller may know that it has ended."""
    orphans = session("if os.fork() and os.fork():\n  os._exit(0)\nos.setpgid(0, 0); tell(); rest()")
    told = orphans.hear(2)
    eventually(lambda: state(orphans.sid) == "Z")
    ended = {orphans.sid} if known else set()
    assert members({orphans.sid}, ended).keys() == set(told)
    assert kill_members({orphans.sid}, PATIENCE, ended) == {}
    assert all(map(has_ended, told))


def test_zombies_are_no_members(session: Callable[[str], Session]) -> None:
    negligent = session("child = os.fork()\nif not child: os._exit(0)\ntell(child); rest()")
    negligent.hear(1)
    child = negligent.told[0][1]
    eventually(lambda: state(child) == "Z")
    assert members({negligent.sid}) == {negligent.sid: negligent.sid}
    assert kill_members({negligent.sid}, PATIENCE) == {}


@only_python
@pytest.mark.parametrize("pidfds", [True, False])
def test_who_is_reaped_during_the_look_is_no_member(
    session: Callable[[str], Session], pidfds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends after its session was asked for, and before it is asked whether it has ended."""
    brief = session("tell(); rest()")
    brief.hear(1)
    getsid = os.getsid

    def getsid_and_reap(pid: int) -> int:
        sid = getsid(pid)
        if pid == brief.sid:
            brief.leader.kill()
            brief.leader.wait()
        return sid

    with monkeypatch.context() as python:
        if not pidfds:
            python.delattr(os, "pidfd_open")
        python.setattr(os, "getsid", getsid_and_reap)
        assert members({brief.sid}) == {}
    assert brief.leader.returncode == -signal.SIGKILL, "it lived until the look came to it"


@pytest.mark.parametrize(("way", "pidfds"), [("engine", True), ("python", True), ("python", False)], indirect=["way"])
def test_process_whose_first_thread_has_ended_lives(
    session: Callable[[str], Session], pidfds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """proc(5) and psutil call such a process a zombie, although its other threads, as torch's may, still run."""
    code = """
import ctypes, threading, time
def run():
    while open("/proc/self/task/%d/stat" % os.getpid()).read().rpartition(")")[2].split()[0] != "Z": pass
    tell(); rest()
threading.Thread(target=run).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    threaded = session(code)
    threaded.hear(1)
    assert state(threaded.sid) == "Z"
    with monkeypatch.context() as python:
        if not pidfds:
            python.delattr(os, "pidfd_open")
        assert members({threaded.sid}) == {threaded.sid: threaded.sid}
        assert kill_members({threaded.sid}, PATIENCE) == {}
        assert members({threaded.sid}) == {}


def test_stopped_members_are_ended(session: Callable[[str], Session]) -> None:
    stopped = session("if os.fork() == 0: os.setpgid(0, 0)\ntell(); os.kill(os.getpid(), signal.SIGSTOP)")
    for pid in stopped.hear(2):
        eventually(lambda pid=pid: state(pid) == "T")  # type: ignore[misc]
    assert kill_members({stopped.sid}, PATIENCE) == {}


# ---- those that will not be caught ----------------------------------------------------------------------------------


def test_who_forks_and_ends_is_caught(session: Callable[[str], Session]) -> None:
    """The process has another pid at each look, and a group of its own, so that no killpg reaches it."""
    code = "tell()\nwhile True:\n  if os.fork(): os._exit(0)\n  os.setpgid(0, 0)"
    for _ in range(20):
        hopping = session(code)
        hopping.hear(1)
        eventually(lambda hopping=hopping: state(hopping.sid) == "Z")  # type: ignore[misc]
        assert kill_members({hopping.sid}, PATIENCE) == {}
        assert [members({hopping.sid}) for _ in range(20)] == [{}] * 20


@needs_root
@pytest.mark.parametrize("group", ["one", "its own"])
def test_fork_storm_is_ended(session: Callable[[str], Session], group: str) -> None:
    """As many processes as a user may have, each of which forks whenever another has ended."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.setgroups([]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
full = False
while True:
    try:
        if os.fork() == 0 and {group != "one"}: os.setpgid(0, 0)
    except BlockingIOError:
        if not full and os.getsid(0) == os.getpid(): tell(); full = True
"""
    storm = session(code)
    try:
        storm.hear(1)
        eventually(lambda: len(members({storm.sid})) > 80)
        assert kill_members({storm.sid}, PATIENCE) == {}
        assert members({storm.sid}) == {}
    finally:

        def calm() -> None:
            become(NOBODY)
            os.kill(-1, signal.SIGKILL)  # kills all of this user's processes at once

        os.waitpid(fork(calm), 0)


# ---- those that may not be signalled --------------------------------------------------------------------------------


def test_who_is_not_in_the_session_any_more_is_not_signalled(session: Callable[[str], Session]) -> None:
    """A pid was found in the session, and is another process's by the time of the signal."""
    bystander = session("tell(); rest()")
    bystander.hear(1)
    _way.way.kill_found({bystander.sid: bystander.sid + 1}, 0.01)
    time.sleep(0.05)
    assert not has_ended(bystander.sid)


@needs_root
def test_numbers_that_mean_everybody_end_nobody() -> None:
    """killpg(0) signals the caller's own group; killpg(1) is kill(-1), all that the caller may signal."""

    def as_nobody() -> tuple[dict[int, int], bool]:
        become(NOBODY)
        os.setsid()
        bystander = fork(signal.pause)
        left = kill_members({0, 1}, 0.05)
        lives = os.waitpid(bystander, os.WNOHANG) == (0, 0)
        os.kill(bystander, signal.SIGKILL)
        os.waitpid(bystander, 0)
        return left, lives

    assert in_child(as_nobody) == ({}, True)


@needs_root
def test_member_of_another_user_is_left_and_said(session: Callable[[str], Session]) -> None:
    roots = session("if os.fork() == 0: os.setpgid(0, 0)\ntell(); rest()")
    told = set(roots.hear(2))

    def as_nobody() -> tuple[dict[int, int], list[str]]:
        become(NOBODY)
        left = kill_members({roots.sid}, 0.05)
        return left, [describe_stuck(pid) for pid in left]

    left, said = in_child(as_nobody)
    assert left == dict.fromkeys(told, roots.sid)
    assert all("another user" in text for text in said)
    assert not any(map(has_ended, told))


def test_member_in_uninterruptible_sleep_is_left_in_time_and_said(session: Callable[[str], Session]) -> None:
    asleep = session("if os.fork() == 0: os.setpgid(0, 0)\ntell(os.getppid()); rest()")
    asleep.hear(2)
    child = next(pid for pid, _ in asleep.told if pid != asleep.sid)
    with frozen_by_v1(child):
        before = time.process_time()
        assert kill_members({asleep.sid}, 1.0) == {child: asleep.sid}
        assert time.process_time() - before < 0.2, "it waits, and does not spin"
        assert has_ended(asleep.sid)
        said = describe_stuck(child)
        assert said.startswith(f"process {child} (python") and "uninterruptible sleep" in said
    assert kill_members({asleep.sid}, PATIENCE) == {}


def test_traced_member_ends_and_its_parent_is_not_told(session: Callable[[str], Session]) -> None:
    """It is no member any more; but nobody can reap it before the tracer has waited for it."""
    traced = session("tell(); rest()")
    traced.hear(1)
    reading, writing = os.pipe()

    def trace() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        ptrace_seize = 0x4206
        answer = libc.ptrace(ptrace_seize, traced.sid, None, None)
        os.write(writing, b"y" if answer == 0 else b"n")
        signal.pause()

    tracer = fork(trace)
    try:
        if os.read(reading, 1) == b"n":
            pytest.skip("ptrace is not allowed here")
        assert kill_members({traced.sid}, PATIENCE) == {}
        assert traced.leader.poll() is None
        said = describe_stuck(traced.sid)
        assert said.endswith(f"has ended, but process {tracer}, which traces it, has not waited for it")
    finally:
        os.kill(tracer, signal.SIGKILL)
        os.waitpid(tracer, 0)
        os.close(reading)
        os.close(writing)
    assert traced.leader.wait(PATIENCE) == -signal.SIGKILL


def test_what_is_said_of_others(session: Callable[[str], Session]) -> None:
    lives = session("tell(); rest()")
    lives.hear(1)
    eventually(lambda: state(lives.sid) == "S")
    assert f"process {lives.sid} (python" in describe_stuck(lives.sid) and "state S" in describe_stuck(lives.sid)
    lives.leader.kill()
    eventually(lambda: state(lives.sid) == "Z")
    assert describe_stuck(lives.sid).endswith("has ended, but was not reaped")
    lives.leader.wait()
    assert describe_stuck(lives.sid) == f"process {lives.sid}: its state cannot be read"


# ---- with less to work with -----------------------------------------------------------------------------------------


@only_python
def test_without_pidfds(session: Callable[[str], Session], monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux before 5.3 has none, and neither has a Python that was built on it.

    Python 3.15's subprocess, by which the test waits for the leader, has looked for the function at its import.
    """
    family = session(FAMILY)
    told = set(family.hear(5))
    with monkeypatch.context() as python:
        python.delattr(os, "pidfd_open")
        inside = set(members({family.sid}))
        assert len(inside) == len(told) - 1
        assert kill_members({family.sid}, PATIENCE) == {}
    assert all(has_ended(pid) for pid in inside)


def test_without_free_descriptors(session: Callable[[str], Session]) -> None:
    """One descriptor is free: enough to list /proc, and none for a pidfd."""
    family = session(FAMILY)
    family.hear(5)
    inside = set(members({family.sid}))

    def without() -> dict[int, int]:
        highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, highest + 1))
        held = []
        while True:
            try:
                held.append(os.dup(0))
            except OSError:
                break
        os.close(held.pop())
        opened = os.pidfd_open
        os.pidfd_open = lambda pid: opened(pid, 1 << 20)  # EINVAL: the one free descriptor is for the listing
        return kill_members({family.sid}, PATIENCE)

    assert in_child(without) == {}
    assert all(has_ended(pid) for pid in inside)


@only_python
@pytest.mark.parametrize("link", [None, "1234567890"])
def test_without_a_procfs_of_ours_the_leaders_groups_are_ended(
    session: Callable[[str], Session], link: str | None, tmp_path: Path
) -> None:
    """No procfs is mounted, or it is another PID namespace's, in which pids mean other processes."""
    if link is not None:
        (tmp_path / "self").symlink_to(link)
        (tmp_path / str(os.getppid())).mkdir()
    group = session("os.fork(); tell(); rest()")
    told = group.hear(2)
    assert without.members({group.sid}, set(), False, str(tmp_path)) == {group.sid: group.sid}
    without.kill_groups({group.sid})
    eventually(lambda: all(map(has_ended, told)))
    assert without.members({group.sid}, set(), True, str(tmp_path)) == {}


@needs_root
def test_in_a_new_pid_namespace_with_the_old_procfs() -> None:
    """While a container is set up, the pids in /proc are not those that system calls take."""
    clone_newpid = 0x20000000

    def outer() -> tuple[bool, bool]:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(clone_newpid) < 0:
            pytest.skip("no PID namespace can be made here")

        def inner() -> tuple[bool, bool]:
            child = os.fork()
            if child == 0:
                os.setsid()
                signal.pause()
            while os.getsid(child) != child:
                pass
            found = members({child})
            left = kill_members({child}, PATIENCE)
            return found == {child: child}, left == {} and os.waitpid(child, 0)[1] == signal.SIGKILL

        return in_child(inner)

    assert in_child(outer) == (True, True)


# ---- getsid(2) is refused -------------------------------------------------------------------------------------------

# A rank leaves a child in a process group of its own; the launcher says its number, and what it was warned of.
GROUP_WITHOUT_GETSID = """
import os, sys, warnings
from tests.support.seccomp import refuse_getsid
refuse_getsid(int(sys.argv[1]))
from rankspawn import launch
from rankspawn._cli.main import main
leave = (
    "import os, time\\nif os.fork() == 0:\\n    os.setpgid(0, 0); os.write(1, b'%d\\\\n' % os.getpid())\\n"
    "    os.close(1); os.close(2)\\ntime.sleep(100)"
)
reading, writing = os.pipe()
stdout = os.dup(1)
os.dup2(writing, 1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with launch([sys.executable, "-I", "-S", "-c", leave], 1):
        left = int(os.read(reading, 100))
os.dup2(stdout, 1)
try:
    os.kill(left, 9)
    print("left")
except ProcessLookupError:
    print("ended")
print(*(str(one.message) for one in caught), flush=True)
main(["doctor"])
"""


needs_getsid = pytest.mark.skipif(
    os.uname().machine not in GETSID, reason="the number of getsid on this machine's processor is not known here"
)


@needs_getsid
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
def test_where_getsid_is_refused_proc_says_the_session(error: int, session: Callable[[str], Session]) -> None:
    family = session(FAMILY)
    told = set(family.hear(5))
    outside = {pid for pid in told if os.getsid(pid) != family.sid}

    def end() -> tuple[set[int], dict[int, int]]:
        refuse_getsid(error)
        return set(members({family.sid})), kill_members({family.sid}, PATIENCE)

    assert in_child(end) == (told - outside, {})
    assert all(map(has_ended, told - outside)) and not any(map(has_ended, outside))


@needs_root
@needs_getsid
@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
def test_where_nothing_tells_about_sessions_it_is_said(error: int, way: str) -> None:
    inside = 'mount -t tmpfs tmpfs /proc && exec "$@"'
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", inside, "sh", sys.executable, "-c"]
    done = subprocess.run(
        [*command, GROUP_WITHOUT_GETSID, str(error)],
        env={**os.environ, **({"RANKSPAWN_MECHANISM": "subprocess"} if way == "python" else {})},
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if done.stderr.startswith(("unshare:", "mount:")):
        pytest.skip(done.stderr)
    left, warning, *doctor = done.stdout.splitlines() or [done.stderr]
    assert left == "left", done
    assert "may run on, because their sessions cannot be searched: getsid" in warning
    (line,) = (line for line in doctor if line.startswith("sessions "))
    assert "no: getsid" in line
