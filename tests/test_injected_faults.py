"""strace's fault injection makes system calls fail in a small launcher of this module's own.

strace attaches when the launcher is about to start something, so that a fault hits this start and nothing before it.
Each test reads strace's log, because a test whose fault never happened would test nothing. Before and after its starts
the launcher compares what conftest.py compares around every test.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankspawn._start.engine import EXTENSION_ERROR

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the engine's mechanisms are Linux's"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (Debian, Ubuntu: apt-get install strace)"),
]

SECONDS = 60

LAUNCHER = """
import ctypes, json, os, resource, signal, subprocess, sys, threading, traceback
sys.path[:0] = json.loads(sys.argv[1])
from pathlib import Path
from rankspawn import Binding, BindingError, MemoryPolicy, Popen
from rankspawn._start.engine import mechanisms
from tests.support.state import changed_since, snapshot

# Yama may restrict ptrace to ancestors, and strace is a sibling: prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY).
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
cpus = sorted(os.sched_getaffinity(0))

def attempt(*args, **kwargs):
    "What a start gave: its exception, or the process's status and what ran."
    try:
        process = Popen(*args, **kwargs)
    except Exception as error:
        return {"raised": type(error).__name__, "errno": getattr(error, "errno", None), "text": str(error)}
    out = process.communicate(timeout=30)[0]
    refused = [[one.step, one.errno] for one in process.binding_report.refused]
    return {"status": process.returncode, "mechanism": process.mechanism, "refused": refused, "out": out}

print("here", flush=True)
while asked := sys.stdin.readline():
    asked = json.loads(asked)
    os.environ["RANKSPAWN_MECHANISM"] = asked["mechanism"]
    mechanisms.cache_clear()
    mechanisms()  # its probe is a clone, too
    exec("def scenario():" + asked["body"])
    before = snapshot()
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        answer = {"found": scenario()}
    except BaseException:
        answer = {"failed": traceback.format_exc()}
    print(json.dumps({**answer, "changed": changed_since(before)}), flush=True)
"""


def line_of(pipe: Any, what: str) -> str:
    ready, _, _ = select.select([pipe], [], [], SECONDS)
    assert ready, f"no word from {what} in {SECONDS} s"
    line: str = pipe.readline()
    return line


class Strace:
    """A strace that is attached when the block begins, and detached when it ends."""

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def __enter__(self) -> None:
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        said = line_of(self.process.stderr, "strace")
        if "attached" not in said:
            self.process.communicate()
            pytest.skip(f"strace may not attach here: {said.strip()}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()


class Faults:
    """Runs scenarios in a launcher under faults."""

    def __init__(self, launcher: subprocess.Popen[str], log: Path) -> None:
        self.launcher = launcher
        self.log = log
        self.hit: list[str] = []

    def run(self, scenario: str, *faults: str, mechanism: str = "clone") -> Any:
        """What ``scenario``, the body of a function in LAUNCHER, returns under ``faults`` (CALL:error=NAME[:when=N]).

        strace counts for when= in each process by itself. self.hit has the lines of strace's log with a fault.
        """
        body = "".join("\n    " + line for line in scenario.strip().splitlines())
        print(json.dumps({"mechanism": mechanism, "body": body}), file=self.launcher.stdin, flush=True)
        assert line_of(self.launcher.stdout, "the launcher") == "ready\n"
        calls = [fault.partition(":")[0] for fault in faults]
        command = ["strace", "-f", "-o", str(self.log), f"--trace={','.join(calls)}", "-p", str(self.launcher.pid)]
        with Strace([*command, *(f"--inject={fault}" for fault in faults)]):
            print(file=self.launcher.stdin, flush=True)
            answer = json.loads(line_of(self.launcher.stdout, "the scenario"))
        assert "found" in answer, answer["failed"]
        assert answer["changed"] == {}
        lines = self.log.read_text().splitlines()
        self.hit = [line for line in lines if "(INJECTED)" in line]
        # strace splits the line of a call during which another process does something: "<... pidfd_open resumed>".
        missed = [
            call for call in calls if not any(f"{call}(" in line or f"{call} resumed" in line for line in self.hit)
        ]
        assert not missed, "\n".join(["no fault in:", *missed, *lines])
        return answer["found"]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """One launcher for all tests, because the interpreter takes long to start."""
    script = tmp_path_factory.mktemp("faults") / "launcher.py"
    script.write_text(LAUNCHER)
    command = [sys.executable, str(script), json.dumps(sys.path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        # conftest.py compares the children's command lines, and a process in the middle of execve(2) has none.
        assert line_of(process.stdout, "the launcher") == "here\n"
        yield process
        process.kill()


@pytest.fixture
def faults(launcher: subprocess.Popen[str], tmp_path: Path) -> Faults:
    return Faults(launcher, tmp_path / "log")


BINDING = "binding=Binding(frozenset(cpus[:1]), MemoryPolicy('local')%s)"
BOUND = "return attempt(['true'], " + BINDING % "" + ")"
BOUND_IF_POSSIBLE = "return attempt(['true'], " + BINDING % ", required=False" + ")"
STARTED = {"status": 0, "mechanism": "clone", "refused": [], "out": None}


# The launcher makes these calls, too. So it makes one before the start, which the fault hits with when=1. The child's
# first call is hit again, because strace counts in each process by itself.
FIRST_OF_ALL = defaultdict(
    str,
    openat="""
try:
    open('/dev/null').close()
except PermissionError:
    pass
""",
    write="""
try:
    os.write(1, b'')
except PermissionError:
    pass
""",
)


# ---- a step of the child that fails --------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["EPERM", "ENOSYS", "EINVAL"])
@pytest.mark.parametrize("call", ["sched_setaffinity", "set_mempolicy"])
def test_binding(faults: Faults, call: str, code: str) -> None:
    found = faults.run(BOUND, f"{call}:error={code}")
    assert (found["raised"], found["errno"]) == ("BindingError", getattr(errno, code))
    assert f"{call}: {os.strerror(getattr(errno, code))}" in found["text"]
    if (call, code) == ("set_mempolicy", "EPERM"):
        assert "SYS_NICE" in found["text"]
    assert len(faults.hit) == 1


def test_binding_that_is_not_required(faults: Faults) -> None:
    found = faults.run(BOUND_IF_POSSIBLE, "sched_setaffinity:error=EPERM", "set_mempolicy:error=ENOSYS")
    refused = [["sched_setaffinity", errno.EPERM], ["set_mempolicy", errno.ENOSYS]]
    assert found == {**STARTED, "refused": refused}


@pytest.mark.parametrize(
    ("call", "step", "keywords"),
    [
        ("setsid", "setsid", "start_new_session=True"),
        ("chdir", "chdir", "cwd='/'"),
        ("setgroups", "setgroups", "extra_groups=[os.getgid()]"),
        ("setregid", "setregid", "group=os.getgid()"),
        ("setreuid", "setreuid", "user=os.getuid()"),
        ("prctl", "prctl", "die_with_parent=True"),
        ("dup3", "stdout", "stdout=subprocess.PIPE"),
        ("openat", "stdout", "stdout=Path('/dev/null')"),
        ("setpgid", "setpgid", "process_group=0"),
        ("execve", "execve", ""),
    ],
)
def test_step(faults: Faults, call: str, step: str, keywords: str) -> None:
    if call == "setpgid" and sys.version_info < (3, 11):
        pytest.skip("process_group came with Python 3.11")
    found = faults.run(f"{FIRST_OF_ALL[call]}return attempt(['/bin/true'], {keywords})", f"{call}:error=EPERM:when=1")
    assert (found["raised"], found["errno"]) == ("PermissionError", errno.EPERM)
    if step == "execve":
        assert found["text"].endswith("'/bin/true'")
    elif step == "chdir":
        assert found["text"].endswith("'/'")
    elif call == "openat":
        assert found["text"].endswith("'/dev/null'")
    else:
        assert f"{step}: " in found["text"]


@pytest.mark.parametrize("die_with_parent", [True, False])
def test_program_of_a_thread(faults: Faults, die_with_parent: bool) -> None:
    """The thread that called Popen gets the error, whichever thread made the child."""
    scenario = f"""
found = []
def start():
    found.append(attempt(['/bin/true'], die_with_parent={die_with_parent}))
thread = threading.Thread(target=start)
thread.start()
thread.join()
return found[0]
"""
    found = faults.run(scenario, "execve:error=EACCES")
    assert (found["raised"], found["errno"]) == ("PermissionError", errno.EACCES)


@pytest.mark.parametrize("without", [(), ("clone3:error=ENOSYS",)], ids=["clone3", "clone"])
def test_signal_actions(faults: Faults, without: tuple[str, ...]) -> None:
    """No start fails where seccomp forbids rt_sigaction, because execve(2) resets caught signals itself."""
    found = faults.run("return attempt(['/bin/sh', '-c', 'kill -USR1 $$'])", "rt_sigaction:error=EPERM", *without)
    assert found["status"] == -signal.SIGUSR1


# ---- an optional call that fails: the next way is taken ------------------------------------------------------------


def listing(keywords: str) -> str:
    """A scenario that starts a program which lists its descriptors, once for each of ``keywords``."""
    return f"""
before = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (400, before[1]))
for number in (300, 310):
    os.dup2(0, number, inheritable=True)
try:
    return [
        attempt(['/bin/sh', '-c', 'cd /proc/self/fd; echo *'], stdout=subprocess.PIPE, text=True, **keywords)
        for keywords in {keywords}
    ]
finally:
    os.close(300)
    os.close(310)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
"""


def open_in_child(found: dict[str, Any]) -> set[str]:
    assert found["status"] == 0 and found["mechanism"] in ("clone", "posix_spawn"), found
    # The shell opens the folder to expand *: that is the first free number.
    return set(found["out"].split())


@pytest.mark.parametrize("code", ["ENOSYS", "EPERM", "EINVAL"])
def test_close_range(faults: Faults, code: str) -> None:
    """Without close_range(2) the child copies the whole table, and closes what /proc lists."""
    found = faults.run(listing("[{}, {'pass_fds': [310]}, {'close_fds': False}]"), f"close_range:error={code}")
    none, one, all_of_them = (open_in_child(start) for start in found)
    assert none == {"0", "1", "2", "3"}
    assert one == {"0", "1", "2", "3", "310"}
    assert {"0", "1", "2", "300", "310"} <= all_of_them


def test_close_range_without_unshare(faults: Faults) -> None:
    """A kernel has the call without its flag: the first child's call fails, and the second child copies the table."""
    (found,) = faults.run(listing("[{'pass_fds': [310]}]"), "close_range:error=EINVAL:when=1")
    assert open_in_child(found) == {"0", "1", "2", "3", "310"}


def test_close_range_and_proc(faults: Faults) -> None:
    """With neither close_range(2) nor /proc, the child closes every number below the limit."""
    scenario = FIRST_OF_ALL["openat"].replace("Permission", "FileNotFound") + listing("[{}]")
    (found,) = faults.run(scenario, "close_range:error=ENOSYS", "openat:error=ENOENT:when=1")
    assert open_in_child(found) == {"0", "1", "2", "3"}
    assert any("/proc/self/fd" in line for line in faults.hit)


PIDFD = """
process = Popen(['/bin/sh', '-c', 'exit 3'], start_new_session=True)
return [process.pidfd is not None, process.mechanism, process.wait(timeout=30), process.pidfd is not None]
"""


@pytest.mark.parametrize("code", ["EINVAL", "ENOSYS", "EPERM", "E2BIG"])
def test_clone3(faults: Faults, code: str) -> None:
    """Where clone3 fails, clone gives a pidfd as well."""
    assert faults.run(PIDFD, f"clone3:error={code}") == [True, "clone", 3, True]


@pytest.mark.parametrize("code", ["EINVAL", "EMFILE", "ENFILE", "EPERM", "ENOSYS"])
def test_clone_with_a_pidfd(faults: Faults, code: str) -> None:
    found = faults.run(PIDFD, "clone3:error=ENOSYS", f"clone:error={code}:when=1")
    assert found == [False, "clone", 3, False]


@pytest.mark.parametrize("code", ["EMFILE", "ENFILE"])
def test_clone3_with_a_pidfd(faults: Faults, code: str) -> None:
    assert faults.run(PIDFD, f"clone3:error={code}:when=1") == [False, "clone", 3, False]


@pytest.mark.parametrize("code", ["EAGAIN", "ENOMEM"])
@pytest.mark.parametrize("without", [(), ("clone3:error=ENOSYS",)], ids=["clone3", "clone"])
def test_no_memory_for_a_process(faults: Faults, code: str, without: tuple[str, ...]) -> None:
    """The engine does not try again with fewer flags: the caller gets this error."""
    call = "clone" if without else "clone3"
    found = faults.run("return attempt(['true'])", f"{call}:error={code}", *without)
    assert found["errno"] == getattr(errno, code) and "clone: " in found["text"]
    assert len(faults.hit) == 1 + len(without)


def test_clone_in_every_form(faults: Faults) -> None:
    found = faults.run("return attempt(['true'])", "clone:error=EPERM", "clone3:error=EPERM")
    assert (found["raised"], found["errno"]) == ("PermissionError", errno.EPERM) and "clone: " in found["text"]


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A new, empty cgroup v2."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(mount) for _, mount, kind, *_ in mounts if kind == "cgroup2"]
    if not roots:
        pytest.skip("no cgroup v2 is mounted")
    group = roots[0] / f"rankspawn-faults-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup v2 can be made here: {error}")
    yield group
    group.rmdir()


@pytest.mark.parametrize("code", ["ENOSYS", "EPERM", "EBUSY"])
@pytest.mark.parametrize("user", ["", ", user=os.getuid()"])
def test_clone3_into_a_cgroup(faults: Faults, cgroup: Path, code: str, user: str) -> None:
    """Where clone3 fails, the child writes itself into the cgroup before it does anything else."""
    scenario = f"""
return attempt(['grep', '^0:', '/proc/self/cgroup'], cgroup={str(cgroup)!r}, stdout=subprocess.PIPE, text=True{user})
"""
    found = faults.run(scenario, f"clone3:error={code}")
    assert found == {**STARTED, "out": f"0::/{cgroup.name}\n"}


def test_clone3_and_the_write(faults: Faults, cgroup: Path) -> None:
    scenario = f"{FIRST_OF_ALL['write']}return attempt(['true'], cgroup={str(cgroup)!r})"
    found = faults.run(scenario, "clone3:error=ENOSYS", "write:error=EACCES:when=1")
    assert (found["raised"], found["errno"]) == ("PermissionError", errno.EACCES) and "cgroup.procs: " in found["text"]


def test_clone3_into_a_cgroup_without_a_pidfd(faults: Faults, cgroup: Path) -> None:
    scenario = f"""
return attempt(['grep', '^0:', '/proc/self/cgroup'], cgroup={str(cgroup)!r}, stdout=subprocess.PIPE, text=True)
"""
    assert faults.run(scenario, "clone3:error=EMFILE:when=1") == {**STARTED, "out": f"0::/{cgroup.name}\n"}


@pytest.mark.parametrize("code", ["EINVAL", "ENOSYS", "EPERM"])
def test_group_signal(faults: Faults, code: str) -> None:
    """Without the pidfd's call, killpg(2) signals the group while the leader holds its number; later calls raise."""
    scenario = """
process = Popen(['/bin/sh', '-c', 'sleep 100 & wait'], start_new_session=True)
process.send_signal_group(signal.SIGTERM)
found = [process.wait(timeout=30)]
try:
    process.send_signal_group(signal.SIGTERM)
except OSError as error:
    found.append([type(error).__name__, str(error)])
return found
"""
    status, (raised, text) = faults.run(scenario, f"pidfd_send_signal:error={code}")
    assert status == -15
    # EPERM may mean that the members are another user's, and not that the kernel is old: so it is raised.
    if code == "EPERM":
        assert raised == "PermissionError" and "process group" in text
    else:
        assert raised == "ProcessLookupError" and "waited for" in text


def test_group_signal_to_nobody(faults: Faults) -> None:
    scenario = """
process = Popen(['true'], start_new_session=True)
process.wait(timeout=30)
process.send_signal_group(signal.SIGTERM)
return 'said nothing'
"""
    assert faults.run(scenario, "pidfd_send_signal:error=ESRCH") == "said nothing"


@pytest.mark.parametrize("code", ["EMFILE", "EPERM", "ENOSYS"])
def test_pidfd_of_posix_spawn(faults: Faults, code: str) -> None:
    found = faults.run(PIDFD, f"pidfd_open:error={code}", mechanism="posix_spawn")
    assert found == [False, "posix_spawn", 3, False]


@pytest.mark.parametrize("code", ["ENOSYS", "EPERM"])
def test_close_range_of_posix_spawn(faults: Faults, code: str) -> None:
    (found,) = faults.run(listing("[{}]"), f"close_range:error={code}", mechanism="posix_spawn")
    assert open_in_child(found) == {"0", "1", "2", "3"} and found["mechanism"] == "posix_spawn"


def test_interrupted_wait_for_a_failed_child(faults: Faults) -> None:
    """Every signal to the caller can end wait4(2) with EINTR; the engine then waits again."""
    found = faults.run("return attempt(['/no/such/program'])", "wait4:error=EINTR:when=1..3")
    assert (found["raised"], found["errno"]) == ("FileNotFoundError", errno.ENOENT)


def test_interrupted_wait_for_the_thread(faults: Faults) -> None:
    """The thread that made a child with a death signal waits for its end in waitid(2), and waits again after EINTR."""
    scenario = """
found = []
thread = threading.Thread(target=lambda: found.append(attempt(['/bin/true'], die_with_parent=True)))
thread.start()
thread.join()
return found[0]
"""
    found = faults.run(scenario, "waitid:error=EINTR:when=1..3")
    assert found == STARTED


def test_close_range_without_a_free_descriptor(faults: Faults) -> None:
    """The child cannot open /proc/self/fd then; it must close what is above the limit all the same."""
    scenario = """
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
high = os.dup2(0, 300)
os.set_inheritable(high, True)
resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard))
filled = []
try:
    while True:
        filled.append(os.dup(0))
except OSError:
    pass
found = attempt(['/bin/sh', '-c', 'exec 3</dev/null; test ! -e /proc/self/fd/300'])
for fd in (*filled, high):
    os.close(fd)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
return found
"""
    assert faults.run(scenario, "close_range:error=ENOSYS")["status"] == 0
