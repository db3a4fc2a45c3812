"""Popen: the same tests on subprocess.Popen and on ours by each mechanism, then what is ours alone."""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rankspawn
from rankspawn import Binding, BindingError, MemoryPolicy, Popen, _spawn
from rankspawn._start import popen as _popen
from tests.support.processes import eventually, has_ended

PYTHON = sys.executable
MECHANISMS = ("clone", "posix_spawn", "subprocess")


@pytest.fixture(params=["reference", *MECHANISMS])
def popen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """subprocess.Popen, then ours by each mechanism. Asserts that this one ran, or clone where posix_spawn declined."""
    if request.param == "reference":
        yield subprocess.Popen
        return
    monkeypatch.setenv("RANKSPAWN_MECHANISM", request.param)
    _popen.mechanisms.cache_clear()

    def start(*args: Any, **kwargs: Any) -> Popen:
        process = Popen(*args, **kwargs)
        allowed = {"posix_spawn": ("posix_spawn", "clone")}.get(request.param, (request.param,))
        assert process.mechanism in (("subprocess",) if kwargs.get("preexec_fn") else allowed)
        return process

    yield start
    monkeypatch.undo()
    _popen.mechanisms.cache_clear()


def run(popen: Callable[..., Any], *command: str, **kwargs: Any) -> tuple[bytes, bytes, int]:
    with popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs) as process:
        out, err = process.communicate(timeout=30)
    return out, err, process.returncode


def python(popen: Callable[..., Any], code: str, **kwargs: Any) -> str:
    out, err, status = run(popen, PYTHON, "-c", code, **kwargs)
    assert (err, status) == (b"", 0)
    return out.decode().strip()


# ---- what subprocess can do ---------------------------------------------------------------------------------------


def test_streams_and_status(popen: Callable[..., Any]) -> None:
    script = "read line; echo out $line; echo err >&2; exit 3"
    with popen(
        ["/bin/sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.communicate("in\n", timeout=30) == ("out in\n", "err\n")
    assert process.returncode == 3


def test_stderr_into_stdout(popen: Callable[..., Any]) -> None:
    with popen("echo a; echo b >&2", shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.communicate()[0] == b"a\nb\n"


def test_devnull(popen: Callable[..., Any]) -> None:
    code = "import os; print(*(os.readlink(f'/proc/self/fd/{n}') for n in (0, 2)), os.read(0, 1))"
    with popen(
        [PYTHON, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.communicate()[0] == b"/dev/null /dev/null b''\n"


def test_devnull_with_stderr_into_it(popen: Callable[..., Any], tmp_path: Path) -> None:
    code = "import os, sys; open(sys.argv[1], 'w').write(' '.join(os.readlink(f'/proc/self/fd/{n}') for n in (1, 2)))"
    command = [PYTHON, "-c", code, str(tmp_path / "told")]
    with popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as process:
        process.wait()
    assert (tmp_path / "told").read_text() == "/dev/null /dev/null"


def test_environment(popen: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    show = "import os; print(sorted((k, v) for k, v in os.environb.items() if k.startswith(b'RS_')))"
    env = {"RS_A": "1", b"RS_B": b"\xff", "RS_Ü": "ü", "RS_EMPTY": ""}
    assert python(popen, show, env=env) == repr(
        sorted(((b"RS_A", b"1"), (b"RS_B", b"\xff"), ("RS_Ü".encode(), "ü".encode()), (b"RS_EMPTY", b"")))
    )
    monkeypatch.setenv("RS_INHERITED", "yes")
    assert "RS_INHERITED" in python(popen, show)
    assert python(popen, "import os; print(len(os.environb) <= 1)", env={}) == "True"  # LC_CTYPE may be coerced


def test_arguments_of_all_kinds(popen: Callable[..., Any], tmp_path: Path) -> None:
    code = "import os, sys; print([os.fsencode(a) for a in sys.argv[1:]])"
    out, _, _ = run(popen, PYTHON, "-c", code, "", "ü", b"\xff\xfe", tmp_path, "x" * 100_000)  # type: ignore[arg-type]
    assert eval(out) == [b"", "ü".encode(), b"\xff\xfe", os.fsencode(tmp_path), b"x" * 100_000]


def test_searches_the_path_of_the_child(popen: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\necho found\n")
    (tmp_path / "tool").chmod(0o755)
    assert run(popen, "tool", env={"PATH": f"/nonexistent::{tmp_path}"}) == (b"found\n", b"", 0)
    with pytest.raises(FileNotFoundError) as error:
        popen(["tool"])
    assert error.value.filename == "tool"


def test_path_search_tells_of_what_is_there(popen: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("not executable")
    with pytest.raises(PermissionError) as error:
        popen(["tool"], env={"PATH": f"{tmp_path}:/nonexistent"})
    assert error.value.filename == "tool"


def test_executable_apart_from_args(popen: Callable[..., Any]) -> None:
    out, _, _ = run(popen, "my name", "-c", "echo $0", executable="/bin/sh")
    assert out == b"my name\n"


def test_cwd_umask_and_session(popen: Callable[..., Any], tmp_path: Path) -> None:
    code = "import os; print(os.getcwd(), oct(os.umask(0)), os.getsid(0) == os.getpid())"
    assert python(popen, code, cwd=tmp_path, umask=0o27, start_new_session=True) == f"{tmp_path} 0o27 True"


def test_cwd_through_a_descriptor_that_the_child_does_not_keep(popen: Callable[..., Any], tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        assert python(popen, "import os; print(os.getcwd())", cwd=f"/proc/self/fd/{folder}") == str(tmp_path)
    finally:
        os.close(folder)


@pytest.mark.skipif(not hasattr(os, "setpgid") or sys.version_info < (3, 11), reason="process_group came with 3.11")
def test_process_group(popen: Callable[..., Any]) -> None:
    assert python(popen, "import os; print(os.getpgid(0) == os.getpid())", process_group=0) == "True"


def dumpable() -> int:
    return ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change its ids")
def test_ids(popen: Callable[..., Any]) -> None:
    was_dumpable = dumpable()
    changed = {"user": 65534, "group": 65533, "extra_groups": [65532, 65531]}
    out, err, status = run(popen, "/bin/grep", "-E", "^(Uid|Gid|Groups)", "/proc/self/status", **changed)
    assert (err, status) == (b"", 0)
    shown = {words[0]: words[1:] for words in map(str.split, out.decode().splitlines())}
    assert shown == {"Uid:": ["65534"] * 4, "Gid:": ["65533"] * 4, "Groups:": ["65531", "65532"]}
    # If the child changed its ids in our memory, the kernel would make us undumpable: no debugger could attach.
    assert dumpable() == was_dumpable


def open_in_child(popen: Callable[..., Any], **kwargs: Any) -> list[int]:
    code = "import os; print(*sorted(int(n) for n in os.listdir('/proc/self/fd')))"
    # The descriptor that lists the folder is the lowest free one; the listing shows it.
    return [int(n) for n in python(popen, code, **kwargs).split()]


def test_closes_descriptors(popen: Callable[..., Any]) -> None:
    made = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    try:
        for fd in made:
            os.set_inheritable(fd, True)
        high = os.dup2(made[0], 500)
        try:
            assert open_in_child(popen) == [0, 1, 2, 3]
            keep = (made[3], made[7], high)
            assert set(open_in_child(popen, pass_fds=keep)) - {3} == {0, 1, 2, *keep} - {3}
            assert set(made) <= set(open_in_child(popen, close_fds=False))
        finally:
            os.close(high)
    finally:
        for fd in made:
            os.close(fd)


def test_pass_fds_that_is_not_inheritable_here(popen: Callable[..., Any]) -> None:
    reading, writing = os.pipe()
    try:
        code = f"import os; os.write({writing}, b'through')"
        python(popen, code, pass_fds=[writing])
        assert os.read(reading, 100) == b"through"
        assert not os.get_inheritable(writing)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 0, 1), (1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 1, 1)])
def test_swapped_standard_descriptors(popen: Callable[..., Any], order: tuple[int, int, int], tmp_path: Path) -> None:
    """Streams given as 0, 1 and 2 themselves, in every order."""
    saved = [os.dup(n) for n in range(3)]
    names = [tmp_path / str(n) for n in range(3)]
    try:
        for n, name in enumerate(names):
            fd = os.open(name, os.O_RDWR | os.O_CREAT)
            os.dup2(fd, n)
            os.close(fd)
        code = "import os; f = os.open('told', os.O_WRONLY | os.O_CREAT); os.write(f, ' '.join("
        code += "os.path.basename(os.readlink(f'/proc/self/fd/{n}')) for n in range(3)).encode())"
        process = popen([PYTHON, "-c", code], stdin=order[0], stdout=order[1], stderr=order[2], cwd=tmp_path)
        process.wait()
    finally:
        for n, fd in enumerate(saved):
            os.dup2(fd, n)
            os.close(fd)
    assert (tmp_path / "told").read_text() == " ".join(map(str, order))


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_pipes_when_standard_descriptors_are_closed(popen: Callable[..., Any], closed: tuple[int, ...]) -> None:
    saved = {n: os.dup(n) for n in closed}
    try:
        for n in closed:
            os.close(n)
        process = popen(
            ["/bin/sh", "-c", "cat; echo err >&2"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        got = process.communicate(b"through")
    finally:
        for n, fd in saved.items():
            os.dup2(fd, n)
            os.close(fd)
    assert got == (b"through", b"err\n")


def test_signals_of_the_child(popen: Callable[..., Any]) -> None:
    def seen(**kwargs: Any) -> list[int]:
        out, _, _ = run(popen, "/bin/cat", "/proc/self/status", **kwargs)
        status = dict(line.split(":\t", 1) for line in out.decode().splitlines())
        return [int(status[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")]

    pipe, usr1, usr2 = (1 << (sig - 1) for sig in (signal.SIGPIPE, signal.SIGUSR1, signal.SIGUSR2))
    ignored_before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    caught_before = signal.signal(signal.SIGUSR2, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        blocked, ignored, caught = seen()
        assert (blocked, ignored & (usr1 | pipe), caught) == (usr2, usr1, 0)
        assert seen(restore_signals=False)[1] & (usr1 | pipe) == usr1 | pipe
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        signal.signal(signal.SIGUSR1, ignored_before)
        signal.signal(signal.SIGUSR2, caught_before)


def test_preexec_fn_takes_the_standard_path(popen: Callable[..., Any]) -> None:
    assert python(popen, "import os; print(os.getcwd())", preexec_fn=lambda: os.chdir("/")) == "/"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"extra_groups": [2**64]}, ValueError),
        ({"extra_groups": [0] * 65537}, ValueError),
        ({"user": 2**64}, OverflowError),
        ({"umask": 1.5}, TypeError),
        ({"stdin": subprocess.STDOUT}, OSError),
        ({"stdout": -5}, OSError),
        ({"pass_fds": (object,)}, TypeError),
        ({"pass_fds": (-1,)}, ValueError),
        ({"env": {"PATH": 5}}, TypeError),
        ({"env": {"A=B": ""}}, ValueError),
        ({"env": {"A": "\0"}}, ValueError),
        ({"cwd": "/\0"}, ValueError),
        ({"cwd": 1.5}, TypeError),
        ({"executable": "/bin/\0"}, ValueError),
        ({"executable": 7}, TypeError),
    ],
    ids=repr,
)
def test_values_that_cannot_be_passed_on(
    popen: Callable[..., Any], options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        popen(["true"], **options)


def test_descriptors_given_as_other_numbers(popen: Callable[..., Any]) -> None:
    run(popen, "/bin/true", pass_fds=(1.5,))
    run(popen, "/bin/true", pass_fds=())


@pytest.mark.parametrize("timeout", [3e6, 1e10, float("inf"), threading.TIMEOUT_MAX])
def test_wait_with_a_very_long_timeout(popen: Callable[..., Any], timeout: float) -> None:
    with popen(["/bin/sleep", "0.05"]) as process:
        assert process.wait(timeout=timeout) == 0


def test_killed_child(popen: Callable[..., Any]) -> None:
    with popen(["/bin/sleep", "60"]) as process:
        assert process.poll() is None
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.send_signal(signal.SIGTERM)  # nothing to signal


def test_wait_with_a_timeout(popen: Callable[..., Any]) -> None:
    with popen(["/bin/sleep", "60"]) as process:
        with pytest.raises(subprocess.TimeoutExpired) as error:
            process.wait(timeout=0.05)
        assert error.value.timeout == 0.05
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0)
        process.terminate()
        assert process.wait(timeout=30) == -signal.SIGTERM
        assert process.wait(timeout=0) == -signal.SIGTERM


def test_many_threads_wait_for_one_child(popen: Callable[..., Any]) -> None:
    with popen(["/bin/sleep", "0.2"]) as process:
        statuses: list[int] = []
        waits: list[Any] = [lambda: process.wait(30), process.wait, lambda: process.wait(20)]
        threads = [threading.Thread(target=lambda w=w: statuses.append(w())) for w in waits * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses == [0] * 9


def test_child_reaped_by_another(popen: Callable[..., Any]) -> None:
    process = popen(["/bin/sh", "-c", "exit 3"])
    os.waitpid(process.pid, 0)
    assert process.wait(timeout=30) == 0  # as in the standard library: the status is lost


def test_forgotten_child_warns_and_is_reaped_later(popen: Callable[..., Any]) -> None:
    process = popen(["/bin/sleep", "60"], start_new_session=True)
    pid = process.pid
    with pytest.warns(ResourceWarning, match=f"subprocess {pid} is still running"):
        del process
    assert [p.pid for p in subprocess._active] == [pid]  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    subprocess._cleanup()  # type: ignore[attr-defined]
    assert subprocess._active == []  # type: ignore[attr-defined]


def test_audit_event(popen: Callable[..., Any]) -> None:
    seen: list[Any] = []
    listening = True

    def listen(event: str, args: Any) -> None:
        if listening and event == "subprocess.Popen":
            seen.append(args)

    sys.addaudithook(listen)  # a hook cannot be removed, so it is switched off below
    run(popen, "/bin/sh", "-c", "exit 0", env={"A": "B"}, cwd="/")
    listening = False
    assert seen == [("/bin/sh", ["/bin/sh", "-c", "exit 0"], "/", {"A": "B"})]


def test_name_and_repr(popen: Callable[..., Any]) -> None:
    with popen(["/bin/true"]) as process:
        process.wait()
    assert repr(process) == "<Popen: returncode: 0 args: ['/bin/true']>"


def test_subclass_that_passes_the_seam_on_by_position(popen: Callable[..., Any]) -> None:
    """sarge does so: it calls the method with positional arguments, and replaces the preexec_fn."""
    base = subprocess.Popen if popen is subprocess.Popen else Popen
    called = []

    class Sarge(base):  # type: ignore[misc, valid-type]
        def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *rest: Any) -> None:
            called.append(args)
            super()._execute_child(args, executable, preexec_fn, *rest)

        def _get_handles(self, stdin: Any, stdout: Any, stderr: Any) -> Any:
            return super()._get_handles(stdin, stdout, stderr)

    with Sarge(["/bin/echo", "hi"], stdout=subprocess.PIPE) as process:
        assert process.communicate()[0] == b"hi\n"
    assert called == [["/bin/echo", "hi"]]


def test_from_many_threads(popen: Callable[..., Any]) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                assert run(popen, "/bin/echo", "hi") == (b"hi\n", b"", 0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# ---- what is ours -------------------------------------------------------------------------------------------------


def test_binding_is_there_from_birth() -> None:
    cpu = max(os.sched_getaffinity(0))
    binding = Binding({cpu}, MemoryPolicy("bind", {0}))
    out, _, _ = run(Popen, "/bin/cat", "/proc/self/status", "/proc/self/numa_maps", binding=binding)
    lines = out.decode().splitlines()
    assert f"Cpus_allowed_list:\t{cpu}" in lines
    # The policy holds for every page of the new image, from the stack on.
    maps = [line.split()[1] for line in lines if "kernelpagesize" in line]
    assert maps
    assert set(maps) == {"bind:0"}


@pytest.mark.parametrize(
    "policy",
    ["default", "local", "bind", "preferred", "preferred-many", "interleave", "weighted-interleave"],
)
def test_memory_policies(policy: Any) -> None:
    memory = MemoryPolicy(policy, frozenset() if policy in ("default", "local") else {0})
    with Popen(["/bin/sleep", "60"], binding=Binding(None, memory)) as process:
        effective = process.binding_report.effective
        process.kill()
    assert effective is not None
    assert effective.memory == memory
    assert effective.cpus == os.sched_getaffinity(0)


def test_report() -> None:
    binding = Binding({min(os.sched_getaffinity(0))})
    with Popen(["/bin/sleep", "60"], binding=binding) as process:
        report = process.binding_report
        assert (report.requested, report.refused, report.pid) == (binding, (), process.pid)
        assert report.effective is not None
        assert report.effective.cpus == binding.cpus
        process.kill()
    assert report.effective is None


def test_refused_binding_that_is_not_required() -> None:
    binding = Binding({5000}, MemoryPolicy("bind", {900}), required=False)
    with Popen(["/bin/true"], binding=binding) as process:
        assert process.wait() == 0
    assert [str(step) for step in process.binding_report.refused] == [
        "sched_setaffinity: Invalid argument",
        "set_mempolicy: Invalid argument",
    ]


def test_refused_binding_says_what_to_do() -> None:
    with pytest.raises(BindingError, match=r"sched_setaffinity: Invalid argument.*5000.*cpuset") as error:
        Popen(["/bin/true"], binding=Binding({5000}))
    assert (error.value.step, error.value.errno) == ("sched_setaffinity", 22)


def test_binding_of_a_wrong_type() -> None:
    with pytest.raises(TypeError, match="binding: expected a Binding or None, got "):
        Popen(["/bin/true"], binding={"cpus": {0}})  # type: ignore[arg-type]


@pytest.mark.parametrize("extra", [{"binding": Binding({0})}, {"die_with_parent": True}, {"cgroup": "/nonexistent"}])
def test_preexec_fn_beside_ours(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="preexec_fn"):
        Popen(["/bin/true"], preexec_fn=lambda: None, **extra)


def test_log_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text("given")
    (tmp_path / "out").write_text("something old and longer")
    with Popen("cat; echo err >&2", shell=True, stdin=Path("in"), stdout=Path("out"), stderr=Path("err"), cwd="/") as p:
        assert p.wait() == 0
    assert [(tmp_path / name).read_text() for name in ("out", "err")] == ["given", "err\n"]


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_one_log_path_for_both_is_opened_once(mechanism: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSPAWN_MECHANISM", mechanism)
    _popen.mechanisms.cache_clear()
    try:
        log = tmp_path / "log"
        with Popen("echo a; echo b >&2; echo c", shell=True, stdout=log, stderr=Path(log)) as process:
            process.wait()
    finally:
        monkeypatch.undo()
        _popen.mechanisms.cache_clear()
    # posix_spawn declines, because it would report a log that cannot be opened as a failed exec.
    assert process.mechanism == {"posix_spawn": "clone"}.get(mechanism, mechanism)
    assert log.read_text() == "a\nb\nc\n"


def test_log_path_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        Popen(["/bin/true"], stdout=tmp_path / "no" / "log")
    assert error.value.filename == str(tmp_path / "no" / "log")


def test_log_path_that_is_a_fifo(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with Popen(["/bin/echo", "through"], stdout=fifo) as process:
            assert process.wait() == 0
        assert os.read(reader, 10) == b"through\n"
        assert os.read(reader, 10) == b""  # no writer was left open here
    finally:
        os.close(reader)


def test_pidfd_is_of_the_process_and_goes_with_it() -> None:
    with Popen(["/bin/sleep", "60"]) as process:
        assert process.pidfd is not None
        assert f"Pid:\t{process.pid}\n" in Path(f"/proc/self/fdinfo/{process.pidfd}").read_text()
        assert not os.get_inheritable(process.pidfd)
        assert select.select([process.pidfd], [], [], 0)[0] == []
        process.kill()
        assert select.select([process.pidfd], [], [], 30)[0] == [process.pidfd]
    assert process.pidfd is None


def test_group_signal_after_the_leader_was_waited_for(tmp_path: Path) -> None:
    """The orphan of a reaped leader is still in the leader's group, and gets the signal."""
    code = "trap '' TERM; sleep 60 & echo $!; exec 1>&-; exit 0"
    with Popen(["/bin/sh", "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        assert process.wait() == 0
        process.send_signal_group(signal.SIGKILL)
        eventually(lambda: has_ended(orphan))
        process.send_signal_group(signal.SIGKILL)  # the group is empty: nothing happens


def test_group_signal_needs_a_leader() -> None:
    with Popen(["/bin/true"]) as process, pytest.raises(ValueError, match="start_new_session"):
        process.send_signal_group(signal.SIGTERM)


def test_group_signal_without_the_kernels_help(monkeypatch: pytest.MonkeyPatch) -> None:
    with Popen(["/bin/sleep", "60"], start_new_session=True) as process:
        process._pidfd = None  # as on a system without pidfds
        process.send_signal_group(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(ProcessLookupError, match=r"Linux 6\.9"):
            process.send_signal_group(signal.SIGKILL)


def test_unknown_mechanism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSPAWN_MECHANISM", "fork")
    _popen.mechanisms.cache_clear()
    try:
        with pytest.raises(ValueError, match="expected clone, posix_spawn or subprocess"):
            Popen(["/bin/true"])
    finally:
        monkeypatch.undo()
        _popen.mechanisms.cache_clear()


def test_binding_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_popen, "mechanisms", lambda: ())
    cpu = max(os.sched_getaffinity(0))
    with Popen(["/bin/sleep", "60"], binding=Binding({cpu})) as process:
        assert process.mechanism == "subprocess"
        assert os.sched_getaffinity(process.pid) == {cpu}
        process.kill()
    with pytest.raises(BindingError, match="set_mempolicy"):
        Popen(["/bin/true"], binding=Binding(None, MemoryPolicy("local")))
    with pytest.raises(BindingError, match="sched_setaffinity"):
        Popen(["/bin/sleep", "60"], binding=Binding({5000}))
    with Popen(["/bin/true"], binding=Binding({5000}, MemoryPolicy("local"), required=False)) as process:
        process.wait()
    assert [step.step for step in process.binding_report.refused] == ["set_mempolicy", "sched_setaffinity"]
    for asked in ({"die_with_parent": True}, {"cgroup": "/nonexistent"}):
        with pytest.raises(OSError, match="need rankspawn's engine"):
            Popen(["/bin/true"], **asked)  # type: ignore[arg-type]


def test_handler_that_raises_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine blocks signals while it makes a child, so Ctrl-C mostly strikes right after: no child may stay."""

    class Struck(Exception):
        pass

    class Engine:
        """The real engine, and a signal handler that raises as soon as spawn returns."""

        def __getattr__(self, name: str) -> Any:
            return getattr(_spawn, name)

        def spawn(self, *args: Any) -> None:
            assert _spawn.spawn(*args) is _spawn.ALL_DONE
            raise Struck

    monkeypatch.setattr(_popen, "_spawn", Engine())
    with pytest.raises(Struck):
        Popen(["/bin/sleep", "60"], start_new_session=True)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_child_of_a_forked_process() -> None:
    """The engine keeps nothing that a fork would break."""
    pid = os.fork()
    if pid == 0:
        with Popen(["/bin/true"], die_with_parent=True) as process:
            os._exit(process.wait(timeout=30))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_asyncio_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", Popen)
    started: list[Popen] = []
    original = Popen._execute_child
    monkeypatch.setattr(Popen, "_execute_child", lambda self, *a: (original(self, *a), started.append(self))[0])

    async def main() -> bytes:
        process = await asyncio.create_subprocess_exec("/bin/echo", "hi", stdout=asyncio.subprocess.PIPE)
        return (await process.communicate())[0]

    assert asyncio.run(main()) == b"hi\n"
    assert [process.mechanism for process in started] == ["clone"]
    started.clear()


def test_public_names() -> None:
    assert set(rankspawn.__all__) == {name for name in rankspawn.__all__ if hasattr(rankspawn, name)}


# ---- the end of a process that another thread waits for --------------------------------------------------------------

needs_pidfd = pytest.mark.skipif(sys.platform != "linux", reason="needs a pidfd")


@needs_pidfd
@pytest.mark.parametrize("mechanism", ["clone", "posix_spawn"])
def test_poll_sees_an_end_beside_a_wait(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSPAWN_MECHANISM", mechanism)
    _popen.mechanisms.cache_clear()
    try:
        for _ in range(100):
            with Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
                waiting = threading.Thread(target=process.wait)
                waiting.start()
                assert process.poll() is None
                assert process.stdin is not None and process.pidfd is not None
                watched = os.dup(process.pidfd)
                process.stdin.close()
                select.select([watched], [], [])
                os.close(watched)
                assert process.poll() == 0
                waiting.join()
    finally:
        monkeypatch.undo()
        _popen.mechanisms.cache_clear()


@needs_pidfd
def test_poll_in_a_handler_that_interrupts_a_wait() -> None:
    """The handler runs inside the wait that holds the lock: it must not wait for that lock."""
    found: list[int | None] = []

    def poll(*_: object) -> None:
        select.select([pidfd], [], [])
        found.append(process.poll())

    with Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        assert process.pidfd is not None and process.stdin is not None
        pidfd = os.dup(process.pidfd)
        before = signal.signal(signal.SIGUSR1, poll)
        closing = process.stdin
        interrupting = threading.Timer(
            0.1, lambda: (signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1), closing.close())
        )
        interrupting.start()
        try:
            assert process.wait() == 0
        finally:
            interrupting.join()
            signal.signal(signal.SIGUSR1, before)
            os.close(pidfd)
    assert found in ([None], [0])


@needs_pidfd
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_signal_leaves_the_end_to_who_waits(sig: signal.Signals) -> None:
    """subprocess reaps a process that has ended before it signals it; an event loop would not find its exit status."""
    with Popen(["/bin/sh", "-c", "exit 7"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        process.send_signal(sig)
        assert process.returncode is None
        assert os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]) == 7
        process.send_signal(sig)  # somebody else has reaped it: nobody is signalled
        assert process.returncode == 0


def test_signal_after_the_end_is_none(popen: Callable[..., Any]) -> None:
    process = popen(["/bin/sh", "-c", "exit 7"])
    assert process.wait() == 7
    process.send_signal(signal.SIGTERM)
    process.kill()
    assert process.poll() == 7


# ---- without the engine ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity(2)")
@pytest.mark.parametrize("required", [True, False])
def test_cpus_are_inherited_at_birth_without_the_engine(required: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_popen, "mechanisms", lambda: ())
    before = os.sched_getaffinity(0)
    binding = Binding({max(before)}, required=required)
    wanted = f"Cpus_allowed_list:\t{max(before)}\n".encode()
    for _ in range(100):
        look = ["/bin/grep", "Cpus_allowed_list", "/proc/self/status"]
        with Popen(look, binding=binding, stdout=subprocess.PIPE) as process:
            assert process.communicate()[0] == wanted
        assert process.mechanism == "subprocess"
        assert not process.binding_report.late and not process.binding_report.refused
    assert os.sched_getaffinity(0) == before


def test_mask_that_comes_late_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, and where no thread can be made."""
    from rankspawn._start import without

    def refused(_: object) -> None:
        raise without.NoThreadError("can't start new thread")

    monkeypatch.setattr(_popen, "mechanisms", lambda: ())
    monkeypatch.setattr(without, "in_thread", refused)
    with Popen(["/bin/cat"], stdin=subprocess.PIPE, binding=Binding({max(os.sched_getaffinity(0))})) as process:
        assert process.binding_report.late and not process.binding_report.refused
        effective = process.binding_report.effective
        assert effective is not None and effective.cpus == {max(os.sched_getaffinity(0))}
    with Popen(["/bin/true"], binding=None) as process:
        assert not process.binding_report.late


def test_mask_that_is_refused_without_the_engine_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_popen, "mechanisms", lambda: ())
    with pytest.raises(BindingError, match="sched_setaffinity"):
        Popen(["/usr/bin/touch", str(tmp_path / "file")], binding=Binding({5000}))
    assert not (tmp_path / "file").exists()
