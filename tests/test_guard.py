"""The guard: whatever the launcher was doing when it was killed, no process of its ranks' sessions is left."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import random
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import rankspawn
from rankspawn._end import guard as _guard
from rankspawn._end.cgroup import GroupCgroup, new_name
from rankspawn._end.guard import Guard
from rankspawn._start import engine as _engine
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.processes import PATIENCE, eventually, frozen_by_v1, has_ended, new_cgroup
from tests.support.state import NOBODY, become, fork, in_child

if sys.platform.startswith("linux") and EXTENSION_ERROR is None:
    from rankspawn._group.start import start_ranks

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the guard is Linux's"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
]

TAG = "RANKSPAWN_TEST_GUARD"

# A rank with two children in process groups of their own, each with a child; each of the five says when it runs.
FAMILY = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(2):
    if os.fork() == 0:
        os.setpgid(0, 0)
        os.fork()
        break
os.write(1, b".")
while True: signal.pause()
"""
MEMBERS = 5

RANK = [sys.executable, "-I", "-S", "-c", FAMILY]
SLEEPING = ["/bin/sleep", "1000"]


def running(where: str, what: str) -> set[int]:
    """The running processes that have ``what`` in the file ``where`` of their /proc directory."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if what.encode() in (folder / where).read_bytes() and not has_ended(int(folder.name)):
                found.add(int(folder.name))
        except OSError:
            continue
    return found


class Launcher:
    """A launcher in a process of its own, which the test kills; it runs ``body(launcher)``, then waits."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.guard: Any = None
        self._reading, self._writing = os.pipe()

    def run(self, body: Callable[[Launcher], object]) -> None:
        def run() -> None:
            body(self)
            while True:
                signal.pause()

        self.pid = fork(run)

    def start(self, nprocs: int, command: list[str] = RANK, **settings: Any) -> list[Any]:
        """Called in the launcher: start ranks, which register with its guard."""
        ranks: list[Any] = []
        settings = {"streams": [(None, None, None)] * nprocs, **settings}
        start_ranks(
            ranks, [command] * nprocs, env={**os.environ, TAG: self.tag}, rank_env=[{}] * nprocs,
            bindings=[None] * nprocs, guard=self.guard.fd, **settings,
        )  # fmt: skip
        return ranks

    def start_families(self, nprocs: int = 2, **settings: Any) -> list[Any]:
        """Called in the launcher: start ranks with FAMILY, and wait until all their processes run."""
        reading, writing = os.pipe()
        ranks = self.start(nprocs, streams=[(None, writing, None)] * nprocs, **settings)
        os.close(writing)
        for _ in range(nprocs * MEMBERS):
            assert os.read(reading, 1) == b"."
        return ranks

    def tell(self, what: Any) -> None:
        os.write(self._writing, json.dumps(what).encode() + b"\n")

    def hear(self) -> Any:
        ready, _, _ = select.select([self._reading], [], [], PATIENCE)
        assert ready, "the launcher says nothing"
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(self._reading, 1)
        return json.loads(line)

    def kill(self) -> None:
        """Send SIGKILL, and wait for the launcher's end, at which its ranks lose their parent."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0

    @property
    def ranks(self) -> set[int]:
        return running("environ", f"{TAG}={self.tag}")

    def close(self) -> None:
        if self.pid:
            self.kill()
        for pid in self.ranks:
            os.kill(pid, signal.SIGKILL)
        os.close(self._reading)
        os.close(self._writing)


@contextmanager
def launcher(body: Callable[[Launcher], object]) -> Iterator[Launcher]:
    made = Launcher(f"{os.getpid()}.{random.getrandbits(64)}")
    made.run(body)
    try:
        yield made
    finally:
        made.close()


def guarded(nprocs: int = 2, **settings: Any) -> Callable[[Launcher], None]:
    """A launcher's body: it starts a guard and ranks with children, and tells the guard's pid."""

    def body(self: Launcher) -> None:
        self.guard = Guard.start()
        self.start_families(nprocs, **settings)
        self.tell(self.guard.process.pid)

    return body


@pytest.fixture
def parent() -> Iterator[Path]:
    with new_cgroup() as folder:
        yield folder


def test_nothing_is_left_of_it_when_closed() -> None:
    """The fixture of conftest.py asserts that no descriptor and no child is left."""
    guard = Guard.start()
    assert not os.get_inheritable(guard.fd)
    assert guard.process.returncode is None
    guard.close()
    assert (guard.fd, guard.process.returncode) == (-1, -signal.SIGKILL)
    guard.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_launcher_that_has_become_another_user() -> None:
    def close() -> list[object]:
        guard = Guard.start()
        become(NOBODY)
        guard.close()
        return [guard.fd, guard.process.returncode]

    assert in_child(close) == [-1, 0]


@pytest.mark.parametrize("copied", [False, True])
def test_what_reaped_ranks_have_left_is_ended_when_the_launcher_says_so(copied: bool) -> None:
    """copied: a forked copy of the launcher holds the pipe, and does not hold up the end."""
    guard = Guard.start()
    told, telling = os.pipe()
    copy = 0
    try:
        ranks: list[rankspawn.Popen] = []
        # The child is in a process group of its own: the rank's group is gone with the rank.
        code = "import os; pid = os.fork(); pid or os.setpgid(0, 0); pid or os.execlp('sleep', 'sleep', '1000')"
        command = [sys.executable, "-c", f"{code}; os.write(1, b'%7d' % pid)"]
        start_ranks(
            ranks, [command] * 2, env=None, rank_env=[{}] * 2, bindings=[None] * 2, streams=[(None, telling, None)] * 2,
            guard=guard.fd,
        )  # fmt: skip
        assert [rank.wait() for rank in ranks] == [0, 0]
        left = [int(os.read(told, 7)) for _ in ranks]
        assert not any(map(has_ended, left))
        if copied and (copy := os.fork()) == 0:
            signal.pause()
        guard.end_what_is_left()
        assert guard.process.returncode == 0
        assert all(map(has_ended, left))
    finally:
        if copy:
            os.kill(copy, signal.SIGKILL)
            os.waitpid(copy, 0)
        guard.close()
        os.close(told)
        os.close(telling)


@pytest.mark.parametrize("die_with_parent", [False, True])
def test_launcher_killed(die_with_parent: bool) -> None:
    with launcher(guarded(die_with_parent=die_with_parent)) as killed:
        guard = killed.hear()
        assert len(killed.ranks) == 2 * MEMBERS
        killed.kill()
        eventually(lambda: not killed.ranks)
        eventually(lambda: has_ended(guard))


def test_launcher_that_ends_by_itself() -> None:
    def body(self: Launcher) -> None:
        guarded()(self)
        os._exit(0)

    with launcher(body) as ended:
        ended.hear()
        eventually(lambda: not ended.ranks)


def test_launcher_killed_before_the_guard_is_up() -> None:
    """SIGSTOP holds the guard from its first moments until the launcher is dead."""

    def body(self: Launcher) -> None:
        self.guard = Guard.start()
        self.guard.process.send_signal(signal.SIGSTOP)
        self.start_families()
        self.tell(self.guard.process.pid)

    with launcher(body) as killed:
        guard = killed.hear()
        killed.kill()
        assert len(killed.ranks) == 2 * MEMBERS
        os.kill(guard, signal.SIGCONT)
        eventually(lambda: not killed.ranks)
        eventually(lambda: has_ended(guard))


def test_launcher_killed_between_clone_and_registration(parent: Path) -> None:
    """The child is born into a frozen cgroup, so it has not run one instruction."""

    def body(self: Launcher) -> None:
        self.guard = Guard.start()
        self.tell(self.guard.process.pid)
        self.start(1, SLEEPING, cgroup=os.open(parent, os.O_PATH))

    (parent / "cgroup.freeze").write_text("1")
    with launcher(body) as killed:
        guard = killed.hear()
        eventually(lambda: (parent / "cgroup.procs").read_text())
        (child,) = map(int, (parent / "cgroup.procs").read_text().split())
        killed.kill()
        time.sleep(0.2)
        assert os.getsid(child) != child
        assert not has_ended(child) and not has_ended(guard)
        (parent / "cgroup.freeze").write_text("0")
        eventually(lambda: has_ended(child))
        eventually(lambda: has_ended(guard))


@contextmanager
def slow_to_open(path: Path) -> Iterator[None]:
    """Whoever opens the file to write waits for the time in /proc/sys/fs/lease-break-time, because the file is leased
    (fcntl(2), F_SETLEASE)."""
    reading, writing = os.pipe()

    def hold() -> None:
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            os.write(writing, b"y")
        except OSError:
            os.write(writing, b"n")
        signal.pause()

    holder = fork(hold)
    try:
        if os.read(reading, 1) == b"n":
            pytest.skip("no lease can be had on this file system")
        yield
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.close(reading)
        os.close(writing)


def test_launcher_killed_between_registration_and_exec(tmp_path: Path) -> None:
    """The child waits in open(2) of its log file: it has its session, and has not called execve yet."""
    log = tmp_path / "log"

    def body(self: Launcher) -> None:
        self.guard = Guard.start()
        self.tell(self.guard.process.pid)
        self.start(1, SLEEPING, streams=[(None, log, None)])

    def children(pid: int) -> set[int]:
        return {child.pid for child in psutil.Process(pid).children()}

    with slow_to_open(log), launcher(body) as killed:
        guard = killed.hear()
        eventually(lambda: [pid for pid in children(killed.pid) - {guard} if os.getsid(pid) == pid])
        (child,) = children(killed.pid) - {guard}
        eventually(lambda: Path(f"/proc/{child}/wchan").read_text() not in ("", "0"))
        killed.kill()
        eventually(lambda: has_ended(child))
        eventually(lambda: has_ended(guard))


def test_launcher_killed_at_random_moments() -> None:
    """The launcher starts and ends eight ranks with children, with or without death signals."""

    def body(self: Launcher) -> None:
        self.tell("here")
        while True:
            self.guard = Guard.start()
            ranks = self.start(8, ["/bin/sh", "-c", "sleep 1000 & sleep 1000"], die_with_parent=random.random() < 0.5)
            for rank in ranks:
                rank.send_signal_group(signal.SIGKILL)
            for rank in ranks:
                rank.wait()
            self.guard.close()

    for _ in range(50):
        with launcher(body) as killed:
            killed.hear()
            moment = random.random() * 0.1
            time.sleep(moment)
            guards = f"\0{killed.pid}\0{_guard.PATIENCE_SECONDS}"  # two arguments of the guard's command line
            killed.kill()
            until = time.monotonic() + PATIENCE
            while left := killed.ranks | running("cmdline", guards):
                assert time.monotonic() < until, f"{left} are left after a kill after {moment} s"
                time.sleep(0.005)
    time.sleep(0.2)
    assert not running("environ", f"{TAG}={os.getpid()}."), "somebody came up later"


@pytest.mark.parametrize("closes", [False, True])
def test_forked_copy_of_the_launcher_lives_on(closes: bool) -> None:
    """The copy may hold the pipe for registrations open. The guard ends the ranks at once, and itself after a wait."""

    def body(self: Launcher) -> None:
        self.guard = Guard.start(patience=1.0)
        self.start_families()
        copy = os.fork()
        if copy == 0:
            if closes:
                self.guard.close()
            signal.pause()
        self.tell([self.guard.process.pid, copy])

    with launcher(body) as killed:
        guard, copy = killed.hear()
        try:
            time.sleep(0.1)
            assert not has_ended(guard)
            killed.kill()
            eventually(lambda: not killed.ranks)
            assert closes or not has_ended(guard)
            eventually(lambda: has_ended(guard))
            assert not has_ended(copy)
        finally:
            os.kill(copy, signal.SIGKILL)


@pytest.mark.parametrize("copied", [False, True])
def test_without_a_pidfd_of_the_launcher(copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before Linux 5.3, or in a Python built on an older one: the guard sees the launcher's end by the end of the
    pipe, or by its own parent's pid."""
    monkeypatch.setattr(_guard, "_own_pidfd", list)

    def body(self: Launcher) -> None:
        self.guard = Guard.start(patience=1.0)
        self.start_families()
        copy = os.fork() if copied else 0
        if copied and copy == 0:
            signal.pause()
        self.tell([self.guard.process.pid, copy])

    with launcher(body) as killed:
        guard, copy = killed.hear()
        try:
            time.sleep(0.3)
            assert len(killed.ranks) == 2 * MEMBERS
            killed.kill()
            eventually(lambda: not killed.ranks)
            eventually(lambda: has_ended(guard))
        finally:
            if copied:
                os.kill(copy, signal.SIGKILL)


def test_launcher_that_closes_every_descriptor() -> None:
    """Daemons close all descriptors: the end of the pipe is not the launcher's end."""

    def body(self: Launcher) -> None:
        guarded()(self)
        os.closerange(3, 256)

    with launcher(body) as closing:
        guard = closing.hear()
        eventually(lambda: len(os.listdir(f"/proc/{closing.pid}/fd")) <= 3)
        time.sleep(0.1)
        assert not has_ended(guard)
        assert len(closing.ranks) == 2 * MEMBERS
        closing.kill()
        eventually(lambda: not closing.ranks)


def test_launcher_without_standard_streams() -> None:
    def body(self: Launcher) -> None:
        os.closerange(0, 3)
        self.guard = Guard.start()
        assert self.guard.fd > 2
        self.start(2, SLEEPING)
        self.tell(self.guard.process.pid)

    with launcher(body) as killed:
        guard = killed.hear()
        # A rank that is still in execve(2) shows an empty environment.
        eventually(lambda: len(killed.ranks) == 2)
        killed.kill()
        eventually(lambda: not killed.ranks)
        eventually(lambda: has_ended(guard))


def test_rank_that_ended_and_was_reaped_before_the_launcher_died() -> None:
    """The guard still ends what the rank has left in its session."""

    def body(self: Launcher) -> None:
        self.guard = Guard.start()
        (rank,) = self.start_families(1)
        time.sleep(0.1)
        rank.kill()
        rank.wait()
        self.tell(self.guard.process.pid)

    with launcher(body) as killed:
        killed.hear()
        assert len(killed.ranks) == MEMBERS - 1
        time.sleep(0.1)
        killed.kill()
        eventually(lambda: not killed.ranks)


def take_number(number: int) -> subprocess.Popen[bytes] | None:
    """Start a session leader with this pid; None when other processes took the number each time."""
    for _ in range(200):
        try:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
        except OSError:
            pytest.skip("numbers of processes cannot be chosen here")
        process = subprocess.Popen(SLEEPING, start_new_session=True)
        if process.pid == number:
            return process
        process.kill()
        process.wait()
    return None


def test_number_that_has_become_anothers() -> None:
    """A rank's session has ended, and a stranger's session has its number when the launcher dies."""

    def body(self: Launcher) -> None:
        self.guard = Guard.start()
        self.start(1, SLEEPING)
        (rank,) = self.start(1, ["/bin/true"])
        rank.wait()
        self.tell([self.guard.process.pid, rank.pid])

    with launcher(body) as killed:
        guard, number = killed.hear()
        time.sleep(0.3)
        stranger = take_number(number)
        try:
            if stranger is None:
                pytest.skip("the number could not be had")
            killed.kill()
            eventually(lambda: has_ended(guard))
            assert not killed.ranks
            assert stranger.poll() is None
        finally:
            if stranger is not None:
                stranger.kill()
                stranger.wait()


@contextmanager
def stranger_with(number: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is no rank, in a session of its own, whose number was a rank's."""
    stranger = take_number(number)
    try:
        if stranger is None:
            pytest.skip("the number could not be had")
        yield stranger
    finally:
        if stranger is not None:
            stranger.kill()
            stranger.wait()


@contextmanager
def adopting() -> Iterator[None]:
    """Make this process the parent of its descendants' orphans, and reap them when the block ends, not before."""
    set_child_subreaper = 36  # of linux/prctl.h
    prctl = ctypes.CDLL(None).prctl
    before = psutil.Process().children()
    assert prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        prctl(set_child_subreaper, 0, 0, 0, 0)
        adopted = [child for child in psutil.Process().children() if child not in before]
        _, alive = psutil.wait_procs(adopted, timeout=PATIENCE)
        assert not alive


def test_number_that_becomes_anothers_while_the_guard_is_busy() -> None:
    """One rank cannot be killed for a while; the session of another is over, and its number is a stranger's."""

    def body(self: Launcher) -> None:
        self.guard = Guard.start()
        self.tell([self.guard.process.pid, *(rank.pid for rank in self.start(2, SLEEPING))])

    with adopting(), launcher(body) as killed:
        guard, stuck, number = killed.hear()
        with frozen_by_v1(stuck):
            killed.kill()
            os.waitpid(number, 0)
            time.sleep(0.2)
            with stranger_with(number) as stranger:
                time.sleep(0.5)
                assert not has_ended(guard) and not has_ended(stuck)
                assert stranger.poll() is None


def test_number_that_becomes_anothers_while_the_guard_is_stopped() -> None:
    """The stranger's session leader is younger than the registration of the rank."""

    def body(self: Launcher) -> None:
        self.guard = Guard.start()
        (rank,) = self.start(1, SLEEPING)
        time.sleep(0.1)
        self.guard.process.send_signal(signal.SIGSTOP)
        rank.kill()
        rank.wait()
        self.tell([self.guard.process.pid, rank.pid])

    with launcher(body) as killed:
        guard, number = killed.hear()
        with stranger_with(number) as stranger:
            killed.kill()
            os.kill(guard, signal.SIGCONT)
            eventually(lambda: has_ended(guard))
            assert stranger.poll() is None


def test_number_that_becomes_anothers_before_the_guard_is_up() -> None:
    """A rank has registered, and its number is a stranger's when the guard reads that."""

    def body(self: Launcher) -> None:
        self.guard = Guard.start()
        self.guard.process.send_signal(signal.SIGSTOP)
        (rank,) = self.start(1, ["/bin/true"])
        rank.wait()
        time.sleep(0.05)
        self.tell([self.guard.process.pid, rank.pid])

    with launcher(body) as killed:
        guard, number = killed.hear()
        with stranger_with(number) as stranger:
            os.kill(guard, signal.SIGCONT)
            time.sleep(0.2)
            killed.kill()
            eventually(lambda: has_ended(guard))
            assert stranger.poll() is None


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Run guards under strace, which makes a system call fail; the path of its log."""

    def install(what: str, *options: str) -> Path:
        if shutil.which("strace") is None:
            pytest.skip("needs strace (Debian, Ubuntu: apt-get install strace)")
        log, wrapper = tmp_path / "strace.log", tmp_path / "guard"
        call = what.partition(":")[0]
        # -D: the guard, not strace, is the launcher's child.
        command = ["strace", "-D", "-qq", "-o", str(log), *options, f"--trace={call}", f"--inject={what}"]
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.join([*command, _guard._program()])} "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setattr(_guard, "_program", lambda: str(wrapper))
        return log

    return install


@pytest.mark.parametrize(
    "what",
    [
        "pidfd_open:error=ENOSYS",  # before Linux 5.3
        "pidfd_open:error=EPERM",  # a seccomp profile of that time
        "pidfd_send_signal:error=EPERM",
        "getsid:error=EPERM",  # a security module
        "lseek:error=EINVAL",  # of a procfs whose parts cannot be skipped
    ],
)
def test_system_call_that_the_kernel_refuses(what: str, fault: Callable[[str], Path]) -> None:
    log = fault(what)
    # The ranks must not be reaped: the guard seeks past ranks that /proc shows.
    with adopting(), launcher(guarded(12)) as killed:
        guard = killed.hear()
        killed.kill()
        eventually(lambda: not killed.ranks)
        eventually(lambda: has_ended(guard))
    assert "(INJECTED)" in log.read_text()


def test_leader_that_is_not_the_first_witness(fault: Callable[[str], Path]) -> None:
    """The leader could not be watched, so its child is: the child's end says nothing about the leader."""
    log = fault("epoll_ctl:error=ENOSPC:when=3")  # after the pipe and the launcher: the rank, when it registers

    def body(self: Launcher) -> None:
        self.guard = Guard.start()
        os.kill(self.guard.process.pid, signal.SIGSTOP)  # it meets the rank when there is a child
        (rank,) = self.start(1, ["/bin/sh", "-c", "sleep 1000 & wait; while :; do sleep 0.5 & wait; done"])
        self.tell([self.guard.process.pid, rank.pid])

    with launcher(body) as killed:
        guard, rank = killed.hear()
        eventually(lambda: len(killed.ranks) == 2)
        os.kill(guard, signal.SIGCONT)
        eventually(lambda: log.exists() and "(INJECTED)" in log.read_text())
        time.sleep(0.3)
        (child,) = killed.ranks - {rank}
        os.kill(child, signal.SIGKILL)
        eventually(lambda: has_ended(child))
        killed.kill()
        eventually(lambda: not killed.ranks)
        eventually(lambda: has_ended(guard))


def test_number_that_becomes_anothers_without_pidfds(fault: Callable[[str], Path]) -> None:
    log = fault("pidfd_open:error=ENOSYS")

    def body(self: Launcher) -> None:
        self.guard = Guard.start()
        self.start(1, SLEEPING)
        (rank,) = self.start(1, ["/bin/true"])
        rank.wait()
        self.tell([self.guard.process.pid, rank.pid])

    with launcher(body) as killed:
        guard, number = killed.hear()
        eventually(lambda: log.exists() and "(INJECTED)" in log.read_text())
        time.sleep(0.3)
        with stranger_with(number) as stranger:
            killed.kill()
            eventually(lambda: has_ended(guard))
            assert not killed.ranks
            assert stranger.poll() is None


# A group of 2 ranks, each of which leaves a child in a process group of its own, and a word when all are there.
IN_A_NAMESPACE = """
import os, sys, time
from rankspawn import launch
family = "import os, time\\nif os.fork() == 0: os.setpgid(0, 0)\\nelse: os.fork()\\nos.write(1, b'.'); time.sleep(1000)"
reading, writing = os.pipe()
os.dup2(writing, 1)
with launch([sys.executable, "-I", "-S", "-c", family], 2, guard=True, rank_env=[{sys.argv[1]: sys.argv[2]}] * 2):
    for _ in range(6):
        os.read(reading, 1)
    os.write(2, b"here\\n")
    time.sleep(1000)
"""


@pytest.mark.parametrize(
    "proc",
    [
        ":",  # unshare --pid without --mount-proc: /proc shows the outer namespace
        "mount -t proc proc /proc",
        "mount -t tmpfs tmpfs /proc",  # none
        "mount -t proc -o hidepid=2 proc /proc",
    ],
)
def test_whatever_proc_shows(proc: str) -> None:
    tag = f"{os.getpid()}.{random.getrandbits(64)}"
    inside = f'{proc} || exit 1; "$@" & wait $!; sleep 1000'
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", inside, "sh"]
    command += [sys.executable, "-c", IN_A_NAMESPACE, TAG, tag]
    environment = {**os.environ, "PYTHONPATH": str(Path(rankspawn.__file__).parent.parent)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as unshared:
        try:
            assert unshared.stderr is not None
            said = []
            for line in unshared.stderr:
                said.append(line.decode())
                if line == b"here\n":  # without /proc, AddressSanitizer writes warnings first
                    break
            if said[-1:] != ["here\n"] and any(line.startswith(("unshare:", "mount:")) for line in said):
                pytest.skip("".join(said))
            assert said[-1:] == ["here\n"], said
            family = running("environ", f"{TAG}={tag}")
            assert len(family) == 6
            (launching,) = running("cmdline", f"{TAG}\0{tag}\0") - {unshared.pid, *shells(unshared.pid)}
            os.kill(launching, signal.SIGKILL)
            eventually(lambda: not running("environ", f"{TAG}={tag}"))
        finally:
            unshared.kill()


def shells(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children()}


def test_guard_killed_first() -> None:
    """The launcher can see the guard's end; its ranks run on; it can start no rank that would not be guarded."""

    def body(self: Launcher) -> None:
        self.guard = Guard.start()
        ranks = self.start_families()
        poller = select.poll()
        poller.register(self.guard.process.pidfd, select.POLLIN)
        before = poller.poll(0)
        self.guard.process.kill()
        seen = bool(poller.poll(PATIENCE * 1000))
        try:
            self.start(1, SLEEPING)
        except OSError as error:
            text, code = str(error), error.errno
        self.tell([before, seen, code, text, [rank.poll() for rank in ranks]])

    with launcher(body) as unguarded:
        before, seen, code, text, ended = unguarded.hear()
        assert (before, seen, code, ended) == ([], True, errno.EPIPE, [None, None])
        assert "guard" in text
        assert len(unguarded.ranks) == 2 * MEMBERS


def test_guard_that_cannot_end_does_not_hold_up_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_guard, "PATIENCE_SECONDS", 0.1)
    guard = Guard.start()
    try:
        with frozen_by_v1(guard.process.pid):
            guard.close()
            assert guard.process.returncode is None
    finally:
        guard.process.kill()
        guard.process.wait()
        guard.close()


def test_guard_is_out_of_the_way() -> None:
    """Signals that are meant for the launcher do not end the guard, and it holds nothing of the launcher's open."""
    guard = Guard.start()
    try:
        process = Path("/proc", str(guard.process.pid))
        ignored = 1 << (signal.SIGINT - 1) | 1 << (signal.SIGTERM - 1) | 1 << (signal.SIGHUP - 1)

        def ignores() -> bool:
            status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
            return int(status["SigIgn"], 16) & ignored == ignored

        eventually(ignores)
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            guard.process.send_signal(sig)
        assert os.getsid(guard.process.pid) == guard.process.pid
        assert os.readlink(process / "cwd") == "/"
        open_files = {os.readlink(path).partition(":")[0] for path in (process / "fd").iterdir()}
        assert open_files == {os.devnull, "pipe", "anon_inode"}
        time.sleep(0.05)
        assert guard.process.poll() is None
    finally:
        guard.close()


def test_guard_is_small() -> None:
    """It maps its own few pages, not the launcher's: it costs no more beside a large launcher."""
    guard = Guard.start()
    try:
        process = Path("/proc", str(guard.process.pid))
        eventually(lambda: (process / "wchan").read_text() not in ("", "0"))
        if b"libasan" in (process / "maps").read_bytes():
            pytest.skip("AddressSanitizer's memory is not the guard's")
        rollup = dict(line.split(":") for line in (process / "smaps_rollup").read_text().splitlines()[1:])
        assert int(rollup["Pss"].split()[0]) <= 400  # KiB
        assert (process / "comm").read_text() == "rankspawn-guard\n"
    finally:
        guard.close()


def test_frozen_program_has_a_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a frozen program or an embedded interpreter, sys.executable is another program, or none."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "")
    test_launcher_killed(False)


@pytest.mark.parametrize("lack", ["program", "execute permission", "engine"])
def test_install_without_a_guard(lack: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fixture of conftest.py asserts that no descriptor is left."""
    program = tmp_path / "rankspawn-guard"
    monkeypatch.setattr(_guard, "_program", lambda: str(program))
    if lack == "execute permission":
        program.touch(mode=0o644)
    elif lack == "engine":
        monkeypatch.setattr(_engine, "mechanisms", tuple)
        monkeypatch.setattr(_engine, "EXTENSION_ERROR", "No module named 'rankspawn._spawn'")
    said = {
        "program": f"a guard needs the program rankspawn-guard, which is not at {program}",
        "execute permission": f"a guard needs the program {program}, which may not be executed",
        "engine": f"a guard needs rankspawn's engine: {_engine.why_no_engine()}",
    }
    assert Guard.why_not() == said[lack]
    assert lack != "engine" or "No module named" in said[lack]
    with pytest.raises(OSError) as caught:
        Guard.start()
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOTSUP, said[lack])


def test_guard_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "rankspawn-guard"
    program.write_bytes(b"\x7fELF, and no more")
    program.chmod(0o755)
    monkeypatch.setattr(_guard, "_program", lambda: str(program))
    with pytest.raises(OSError) as caught:
        Guard.start()
    assert caught.value.errno == errno.ENOEXEC


def test_program_started_by_hand() -> None:
    done = subprocess.run([_guard._program()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rankspawn-guard: rankspawn starts this program, not a person\n"


# ---- the launcher's temporary folder --------------------------------------------------------------------------------


def with_folder(folder: Path, command: list[str] = SLEEPING) -> Callable[[Launcher], None]:
    """A launcher's body: a guard that knows the folder, and a rank."""

    def body(self: Launcher) -> None:
        self.guard = Guard.start(folder=folder, patience=2.0)
        (rank,) = self.start(1, command)
        self.tell([self.guard.process.pid, rank.pid])

    return body


def fill(folder: Path) -> None:
    """What ranks may leave in a folder: many files, folders in folders, links out of it, a name with any bytes."""
    (folder / "attempt_0" / "0" / "deeper" / "deepest").mkdir(parents=True)
    for number in range(300):
        (folder / "attempt_0" / "0" / f"stdout-{number}.log").write_text("text")
    (folder / "attempt_0" / os.fsdecode(b"\xff\n *")).mkdir()
    (folder / "attempt_0" / "0" / "deeper" / "out").symlink_to(folder.parent / "mine", target_is_directory=True)
    (folder / "file").symlink_to(folder.parent / "mine" / "precious")
    os.mkfifo(folder / "fifo")


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[Path]:
    """A file beside the launcher's folder, which is there at the end of the test, too."""
    path = tmp_path / "mine" / "precious"
    path.parent.mkdir()
    path.write_text("text")
    yield path
    assert path.read_text() == "text"


def test_temporary_folder_of_a_killed_launcher_is_removed(tmp_path: Path, mine: Path) -> None:
    folder = tmp_path / "rankspawn-folder"
    folder.mkdir()
    fill(folder)
    with launcher(with_folder(folder)) as killed:
        guard, _ = killed.hear()
        killed.kill()
        eventually(lambda: has_ended(guard))
        assert list(tmp_path.iterdir()) == [mine.parent]


def test_temporary_folder_stays_while_a_rank_is_left(tmp_path: Path) -> None:
    """The guard's patience is over before the rank can be killed."""
    folder = tmp_path / "rankspawn-folder"
    folder.mkdir()
    with adopting(), launcher(with_folder(folder)) as killed:
        guard, stuck = killed.hear()
        with frozen_by_v1(stuck):
            killed.kill()
            os.waitpid(guard, 0)
            assert folder.is_dir()


@pytest.mark.parametrize("what", ["another folder", "a symbolic link", "nothing"])
def test_what_has_the_temporary_folders_name_now_stays(what: str, tmp_path: Path, mine: Path) -> None:
    """The launcher has removed its folder or moved it away before it was killed: the guard holds the folder itself."""
    folder = tmp_path / "rankspawn-folder"
    folder.mkdir()
    with launcher(with_folder(folder)) as killed:
        guard, _ = killed.hear()
        folder.rename(tmp_path / "moved")
        if what == "another folder":
            folder.mkdir()
        elif what == "a symbolic link":
            folder.symlink_to(mine.parent, target_is_directory=True)
        before = sorted(tmp_path.iterdir())
        killed.kill()
        eventually(lambda: has_ended(guard))
        assert sorted(tmp_path.iterdir()) == before


def test_no_mount_in_the_temporary_folder_is_emptied(tmp_path: Path, mine: Path) -> None:
    folder = tmp_path / "rankspawn-folder"
    (folder / "mounted").mkdir(parents=True)
    (folder / "file").touch()
    bind = ["mount", "--bind", str(mine.parent), str(folder / "mounted")]
    if subprocess.run(bind, capture_output=True, check=False).returncode != 0:
        pytest.skip("no mount can be made here")
    try:
        with launcher(with_folder(folder)) as killed:
            guard, _ = killed.hear()
            killed.kill()
            eventually(lambda: has_ended(guard))
            assert [path.name for path in folder.iterdir()] == ["mounted"]
            assert mine.exists()
    finally:
        subprocess.run(["umount", str(folder / "mounted")], check=True)


def test_no_guard_for_what_is_no_folder(tmp_path: Path) -> None:
    """A link is none: whoever made it may not decide what is removed. conftest.py looks for descriptors."""
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for name, error in (("link", NotADirectoryError), ("none", FileNotFoundError)):
        with pytest.raises(error):
            Guard.start(folder=tmp_path / name)


# ---- with a cgroup --------------------------------------------------------------------------------------------------

ESCAPED = ["/bin/sh", "-c", "setsid sleep 1000 & exec sleep 1000"]


@pytest.mark.parametrize("held", [False, True])
def test_what_left_its_session_is_ended_by_the_cgroup_alone(held: bool, parent: Path) -> None:
    """The guard also removes the cgroup's directory. Without a cgroup, it cannot find processes that called setsid."""

    def body(self: Launcher) -> None:
        group = GroupCgroup.make(parent) if held else None
        self.guard = Guard.start(cgroup=None if group is None else group.path)
        self.start(2, ESCAPED, cgroup=None if group is None else group.fd)
        self.tell(self.guard.process.pid)

    with launcher(body) as killed:
        guard = killed.hear()
        eventually(lambda: len(running("cmdline", "sleep\x001000\0") & killed.ranks) == 4)
        killed.kill()
        eventually(lambda: has_ended(guard))
        assert len(killed.ranks) == (0 if held else 2)
        assert not held or [path for path in parent.iterdir() if path.is_dir()] == []


def test_cgroup_that_is_gone_when_the_launcher_dies(parent: Path) -> None:
    def body(self: Launcher) -> None:
        group = GroupCgroup.make(parent)
        self.guard = Guard.start(cgroup=group.path)
        group.remove()
        self.start_families()
        self.tell(self.guard.process.pid)

    with launcher(body) as killed:
        guard = killed.hear()
        killed.kill()
        eventually(lambda: has_ended(guard))
        assert not killed.ranks


@pytest.mark.parametrize("what", ["a file", "cgroup.kill"])
def test_cgroup_that_refuses(what: str, tmp_path: Path) -> None:
    """The guard ends the sessions all the same."""
    wrong = tmp_path / "wrong"
    if what == "a file":
        wrong.touch()
    else:
        (wrong / what).mkdir(parents=True)

    def body(self: Launcher) -> None:
        self.guard = Guard.start(cgroup=str(wrong))
        self.start_families()
        self.tell(self.guard.process.pid)

    with launcher(body) as killed:
        killed.hear()
        killed.kill()
        eventually(lambda: not killed.ranks)


def test_cgroup_without_cgroup_kill(parent: Path, fault: Callable[[str, str, str], Path]) -> None:
    """Before Linux 5.14: the guard freezes the cgroup and kills each process, those of cgroups below it too."""
    log = fault("openat:error=ENOENT", "-P", "cgroup.kill")

    def body(self: Launcher) -> None:
        group = GroupCgroup.make(parent)
        os.mkdir(f"{group.path}/below")
        self.guard = Guard.start(cgroup=group.path)
        self.start(2, ESCAPED, cgroup=group.fd)
        self.tell([self.guard.process.pid, group.path])

    with launcher(body) as killed:
        guard, path = killed.hear()
        eventually(lambda: len(running("cmdline", "sleep\x001000\0") & killed.ranks) == 4)
        for pid in sorted(killed.ranks)[1:]:
            Path(path, "below", "cgroup.procs").write_text(str(pid))
        killed.kill()
        eventually(lambda: has_ended(guard))
        assert not killed.ranks
        assert [path for path in parent.iterdir() if path.is_dir()] == []
    assert "(INJECTED)" in log.read_text()


def test_launcher_killed_right_after_it_has_made_the_cgroup(parent: Path) -> None:
    """The guard knows the cgroup's name before the cgroup is made."""

    def body(self: Launcher) -> None:
        name = new_name()
        self.guard = Guard.start(cgroup=str(parent / name))
        GroupCgroup.make(parent, name)
        self.tell(self.guard.process.pid)

    with launcher(body) as killed:
        guard = killed.hear()
        assert [path for path in parent.iterdir() if path.is_dir()] != []
        killed.kill()
        eventually(lambda: has_ended(guard))
        assert [path for path in parent.iterdir() if path.is_dir()] == []
