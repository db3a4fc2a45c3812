"""Every step of a start is made to fail, on the reference and on ours, by every mechanism.

conftest.py asserts after each of these that no descriptor, child, thread, mask or policy is left changed.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rankspawn import Binding, BindingError, MemoryPolicy, Popen
from rankspawn._start.engine import mechanisms
from tests.support.state import NOBODY, become, fork, in_child

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the engine's mechanisms are Linux's")

_spawn = pytest.importorskip("rankspawn._spawn", reason="this install has no extension")

ENGINES = ["clone", "posix_spawn"]
MECHANISMS = [*ENGINES, "subprocess"]

# Ids that Binding takes and no machine has.
NO_CPU, NO_NODE = 60_000, 1_000

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@dataclass(frozen=True)
class Failure:
    """What a caller sees of an exception."""

    kind: type[BaseException]
    errno: int | None
    strerror: str | None
    filename: Any
    text: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        number, strerror, filename = (getattr(error, name, None) for name in ("errno", "strerror", "filename"))
        return cls(type(error), number, strerror, filename, str(error))


def attempt(start: Callable[..., subprocess.Popen[Any]], *args: Any, **kwargs: Any) -> Failure | int:
    """How a start went: the exception, or the exit status of the process."""
    try:
        process = start(*args, **kwargs)
    except Exception as error:
        return Failure.of(error)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    return process.wait()


@dataclass
class Engine:
    """The mechanism that was asked for, and what ran: (mechanism, failed step or "", errno) for each call into C."""

    name: str
    ran: list[tuple[str, str, int]]

    def last(self) -> tuple[str, str, int]:
        assert len(self.ran) == 1, self.ran
        return self.ran.pop()


@pytest.fixture(params=MECHANISMS)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Ours with one mechanism; each call of the extension's spawn is recorded."""
    ran: list[tuple[str, str, int]] = []
    real = _spawn.spawn

    def watched(*args: Any) -> Any:
        outcome = real(*args)
        if outcome is not None:
            name = {_spawn.CLONE: "clone", _spawn.POSIX_SPAWN: "posix_spawn"}[args[-1]]
            ran.append((name, _spawn.STEP_NAMES[outcome[0]], outcome[1]))
        return outcome

    monkeypatch.setenv("RANKSPAWN_MECHANISM", request.param)
    monkeypatch.setattr(_spawn, "spawn", watched)
    mechanisms.cache_clear()
    yield Engine(request.param, ran)
    mechanisms.cache_clear()


def on(*mechanisms: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("engine", mechanisms, indirect=True)


# ---- the program ----------------------------------------------------------------------------------------------------


def file(path: Path, content: bytes | str = "", mode: int = 0o755) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def too_long(folder: Path) -> list[Any]:
    # One string over MAX_ARG_STRLEN, 32 pages.
    return ["true", "x" * (32 * resource.getpagesize())]


def in_a_loop(folder: Path) -> list[Any]:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    return [folder / "a"]


PROGRAMS: dict[str, Callable[[Path], list[Any]]] = {
    "missing": lambda folder: [folder / "none"],
    "missing, as text": lambda folder: [str(folder / "none"), "argument"],
    "missing, as bytes": lambda folder: [os.fsencode(folder / "none")],
    "missing, not ASCII": lambda folder: [folder / "nön"],
    "missing in PATH": lambda folder: ["rankspawn-none"],
    "empty": lambda folder: [""],
    "below a file": lambda folder: [file(folder / "file") / "none"],
    "not executable": lambda folder: [file(folder / "file", "#!/bin/sh\n", 0o644)],
    "a directory": lambda folder: [folder],
    "no interpreter": lambda folder: [file(folder / "script", "#!/no/such/interpreter\n")],
    "a directory as interpreter": lambda folder: [file(folder / "script", f"#!{folder}\n")],
    "no format": lambda folder: [file(folder / "file", b"\1\2\3\4")],
    "no content": lambda folder: [file(folder / "file")],
    "half an ELF file": lambda folder: [file(folder / "file", b"\x7fELF" + bytes(60))],
    "long name": lambda folder: [folder / ("x" * 256)],
    "long argument": too_long,
    "links in a loop": in_a_loop,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(engine: Engine, program: str, tmp_path: Path) -> None:
    # As text, because newer standard libraries may use posix_spawn themselves, whose error names a Path as text.
    args = [os.fspath(one) for one in PROGRAMS[program](tmp_path)]
    expected = attempt(subprocess.Popen, args)
    assert isinstance(expected, Failure) and expected.filename == args[0]
    assert attempt(Popen, args) == expected
    if engine.name != "subprocess":
        assert engine.last() == (engine.name, "execve", expected.errno)


def test_program_that_is_being_written(engine: Engine, tmp_path: Path) -> None:
    program = file(tmp_path / "program", Path("/bin/true").read_bytes())
    with program.open("r+b"):
        command = [os.fspath(program)]
        assert attempt(Popen, command) == attempt(subprocess.Popen, command)
        if engine.name != "subprocess":
            assert engine.last() == (engine.name, "execve", errno.ETXTBSY)
    assert attempt(Popen, [program]) == 0


def test_path_of_the_child_is_searched(engine: Engine, tmp_path: Path) -> None:
    """A file that exists and cannot be run gives the error, rather than the later folders that have no such file."""
    (tmp_path / "bad").mkdir()
    file(tmp_path / "bad" / "tool", mode=0o644)
    for path in (f"{tmp_path}/bad:/nowhere", f"/nowhere:{tmp_path}/bad", "/nowhere", ""):
        env = {"PATH": path}
        expected = attempt(subprocess.Popen, ["tool"], env=env)
        assert isinstance(expected, Failure)
        assert attempt(Popen, ["tool"], env=env) == expected


@needs_root
def test_program_that_a_user_may_not_reach(engine: Engine, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    program = file(closed / "program", "#!/bin/sh\n")

    def start_both() -> list[Any]:
        become(NOBODY)
        return [attempt(start, [os.fspath(program)]) for start in (subprocess.Popen, Popen)]

    expected, found = in_child(start_both)
    assert found == expected and found.kind is PermissionError


# ---- arguments that cannot be passed on -----------------------------------------------------------------------------


class Opaque:
    """Of no use as an argument."""


ARGUMENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "NUL in args": (["true", "a\0b"], {}),
    "NUL in args, bytes": (["true", b"a\0b"], {}),
    "NUL in args, not ASCII": (["true", "ä\0"], {}),
    "NUL in the program": (["/bin/tr\0ue"], {}),
    "NUL in executable": (["true"], {"executable": "/bin/tr\0ue"}),
    "NUL in a value": (["true"], {"env": {"NAME": "a\0b"}}),
    "NUL in a name": (["true"], {"env": {"NA\0ME": "value"}}),
    "NUL in cwd": (["true"], {"cwd": "/tm\0p"}),
    "= in a name": (["true"], {"env": {"A=B": "value"}}),
    "= in a name, bytes": (["true"], {"env": {b"A=B": b"value"}}),
    "name is an int": (["true"], {"env": {1: "value"}}),
    "value is an int": (["true"], {"env": {"NAME": 1}}),
    "value is None": (["true"], {"env": {"NAME": None}}),
    "env is a list": (["true"], {"env": [("NAME", "value")]}),
    "an int among args": (["true", 1], {}),
    "None among args": (["true", None], {}),
    "args is an int": (7, {}),
    "no args": ([], {}),
    "surrogate that is no byte": (["true", "\ud800"], {}),
    "executable is an int": (["true"], {"executable": 7}),
    "cwd is an int": (["true"], {"cwd": 7}),
    "cwd is an object": (["true"], {"cwd": Opaque()}),
    "stdin is an object": (["true"], {"stdin": Opaque()}),
    "stdin is text": (["true"], {"stdin": "file"}),
    "stdout is closed": (["true"], {"stdout": 9_999}),
    "stdin is closed": (["true"], {"stdin": 9_999}),
    "stderr is closed": (["true"], {"stderr": 9_999}),
    "stdout is negative": (["true"], {"stdout": -7}),
    "stdout is huge": (["true"], {"stdout": 1 << 40}),
    "umask is text": (["true"], {"umask": "022"}),
    "umask is huge": (["true"], {"umask": 1 << 40}),
    "pass_fds: closed": (["true"], {"pass_fds": [9_999]}),
    "pass_fds: the highest number": (["true"], {"pass_fds": [2**31 - 1]}),
    "pass_fds: negative": (["true"], {"pass_fds": [-1]}),
    "pass_fds: huge": (["true"], {"pass_fds": [1 << 40]}),
    "pass_fds: text": (["true"], {"pass_fds": ["one"]}),
    "pass_fds: None": (["true"], {"pass_fds": [None]}),
    "pass_fds: an int": (["true"], {"pass_fds": 3}),
    "user: negative": (["true"], {"user": -1}),
    "user: huge": (["true"], {"user": 1 << 64}),
    "user: unknown": (["true"], {"user": "rankspawn-nobody"}),
    "user: a float": (["true"], {"user": 1.5}),
    "group: negative": (["true"], {"group": -1}),
    "group: huge": (["true"], {"group": 1 << 64}),
    "group: unknown": (["true"], {"group": "rankspawn-nobody"}),
    "extra_groups: negative": (["true"], {"extra_groups": [-1]}),
    "extra_groups: huge": (["true"], {"extra_groups": [1 << 64]}),
    "extra_groups: text": (["true"], {"extra_groups": "staff"}),
    "extra_groups: a float": (["true"], {"extra_groups": [1.5]}),
    "extra_groups: too many": (["true"], {"extra_groups": [1] * 70_000}),
    "cwd: missing": (["true"], {"cwd": "/no/such/folder"}),
    "cwd: missing, a path": (["true"], {"cwd": Path("/no/such/folder")}),
    "cwd: missing, bytes": (["true"], {"cwd": b"/no/such/folder"}),
    "cwd: empty": (["true"], {"cwd": ""}),
    "cwd: a file": (["true"], {"cwd": "/bin/true"}),
    "preexec_fn fails": (["true"], {"preexec_fn": lambda: 1 // 0}),
    "unknown keyword": (["true"], {"unknown": 1}),
}
# The step that must be reported, where the child is the one to see the argument. The others never reach the engine.
STEPS = {
    "stdout is closed": "stdout",
    "stdin is closed": "stdin",
    "stderr is closed": "stderr",
    "pass_fds: closed": "pass_fds",
    "pass_fds: the highest number": "pass_fds",
    "cwd: missing": "chdir",
    "cwd: missing, a path": "chdir",
    "cwd: missing, bytes": "chdir",
    "cwd: empty": "chdir",
    "cwd: a file": "chdir",
}


def same_to_a_caller(ours: Failure, reference: Failure) -> None:
    """The class, the errno and the file name are the same; ours may put the step before the system's words."""
    assert (ours.kind, ours.errno) == (reference.kind, reference.errno)
    if reference.strerror is not None:
        assert ours.strerror is not None and ours.strerror.split(": ")[-1] == reference.strerror
    # Where cwd is given, CPython up to 3.12.1 names it, whichever step before the exec failed.
    assert ours.filename == reference.filename


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.filterwarnings("ignore:pass_fds overriding close_fds")
def test_argument(engine: Engine, case: str) -> None:
    args, kwargs = ARGUMENTS[case]
    expected = attempt(subprocess.Popen, args, **kwargs)
    found = attempt(Popen, args, **kwargs)
    if expected == 0:
        pytest.skip("this Python's subprocess takes it")
    assert isinstance(found, Failure) and isinstance(expected, Failure), (found, expected)
    same_to_a_caller(found, expected)
    if engine.name != "subprocess" and case in STEPS:
        mechanism, step, code = engine.last()
        assert (step, code) == (STEPS[case], expected.errno)
        assert mechanism in ("clone", engine.name)
        if step != "chdir":
            assert found.text.endswith(f"{step}: {expected.strerror}")
    else:
        assert engine.ran == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="process_group came with Python 3.11")
@pytest.mark.parametrize(
    "engine",
    [
        "clone",
        "posix_spawn",
        "subprocess",
    ],
    indirect=True,
)
@pytest.mark.parametrize("group", [1, 2**22 + 1, 0], ids=["of another session", "missing", "of a session's leader"])
def test_process_group_that_cannot_be_joined(engine: Engine, group: int) -> None:
    kwargs = {"process_group": group, "start_new_session": group == 0}
    found, expected = (attempt(start, ["true"], **kwargs) for start in (Popen, subprocess.Popen))
    assert isinstance(found, Failure) and isinstance(expected, Failure)
    same_to_a_caller(found, expected)
    if engine.name != "subprocess":
        assert engine.last()[1:] == ("setpgid", expected.errno)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="process_group came with Python 3.11")
@pytest.mark.parametrize("group", ["x", 1 << 40, 1.5], ids=str)
def test_process_group_of_a_wrong_type(engine: Engine, group: Any) -> None:
    found, expected = (attempt(start, ["true"], process_group=group) for start in (Popen, subprocess.Popen))
    assert isinstance(found, Failure) and isinstance(expected, Failure)
    assert found.kind is expected.kind
    assert engine.ran == []


def test_path_like_args_and_a_shell(engine: Engine) -> None:
    for args in (Path("true"), [Path("true")]):
        found, expected = (attempt(start, args, shell=True) for start in (Popen, subprocess.Popen))
        assert found == expected


@pytest.mark.parametrize("number", [0, 1, 2])
@on("clone", "posix_spawn", "subprocess")
def test_standard_stream_that_is_closed_here(engine: Engine, number: int) -> None:
    """Popen refuses the number of a closed stream, given as the child's, as subprocess does."""
    keyword = ("stdin", "stdout", "stderr")[number]

    def start_both() -> list[Any]:
        os.close(number)
        return [attempt(start, ["true"], **{keyword: number}) for start in (subprocess.Popen, Popen)]

    expected, found = in_child(start_both)
    if expected == 0:
        pytest.skip("this Python's subprocess does not look")
    assert isinstance(found, Failure)
    same_to_a_caller(found, expected)


@on("clone", "posix_spawn", "subprocess")
def test_number_that_was_closed_a_moment_ago(engine: Engine) -> None:
    """A stale descriptor is most often the lowest free number, which the kernel gives to the pidfd."""

    def start() -> list[Any]:
        stale = os.dup(0)
        os.close(stale)
        if engine.name == "subprocess":
            # Not compared: subprocess's own error pipe takes the number, so the child finds it open.
            return [errno.EBADF]
        found = attempt(Popen, ["true"], pass_fds=[stale])
        return [found.errno if isinstance(found, Failure) else found]

    assert in_child(start) == [errno.EBADF]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_pipes_while_a_standard_stream_is_closed_here(engine: Engine, number: int) -> None:
    """A pipe then has the number of a standard stream, which is the target of another pipe."""

    def start() -> list[Any]:
        os.close(number)
        words: list[Any] = []
        with Popen(["/bin/sh", "-c", "cat; echo err >&2"], stdin=-1, stdout=-1, stderr=-1) as process:
            words += process.communicate(b"in")
        return [*words, process.returncode, attempt(Popen, ["true"])]

    assert in_child(start) == [b"in", b"err\n", 0, 0]


# ---- limits ---------------------------------------------------------------------------------------------------------


def limit_processes() -> None:
    # The limit does not hold root. Of another user's processes, it counts at least the caller.
    become(NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))


def test_no_process_more(engine: Engine) -> None:
    def start_both() -> list[Any]:
        limit_processes()
        found = [attempt(start, ["/bin/true"]) for start in (subprocess.Popen, Popen)]
        return [*found, list(engine.ran)]

    mechanisms()  # because its probe starts a process, too
    expected, found, ran = in_child(start_both)
    assert expected.kind is BlockingIOError and expected.errno == errno.EAGAIN
    assert (found.kind, found.errno) == (expected.kind, expected.errno)
    if engine.name != "subprocess":
        assert ran == [(engine.name, "clone", errno.EAGAIN)]


@on("clone", "posix_spawn")
def test_no_thread_more(engine: Engine) -> None:
    """With die_with_parent, a thread of the engine's makes the process, and pthread_create(3) itself can fail."""

    def start_in_thread() -> list[Any]:
        found: list[Any] = []
        may_start = threading.Event()

        def start() -> None:
            may_start.wait()
            found.append(attempt(Popen, ["/bin/true"], die_with_parent=True))

        thread = threading.Thread(target=start)
        thread.start()
        limit_processes()
        may_start.set()
        thread.join()
        return [*found, list(engine.ran)]

    mechanisms()
    found, ran = in_child(start_in_thread)
    assert found.kind is BlockingIOError and found.text.endswith("pthread_create: Resource temporarily unavailable")
    assert ran == [("clone", "pthread_create", errno.EAGAIN)]


def fill_descriptors() -> None:
    """Leave no number free below the limit."""
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    while True:
        try:
            os.dup(0)
        except OSError as error:
            assert error.errno == errno.EMFILE
            return


@on("clone", "posix_spawn")
def test_no_descriptor_more(engine: Engine) -> None:
    """A start needs no descriptor but the pidfd, and that one is optional."""

    def start() -> list[Any]:
        fill_descriptors()
        process = Popen(["/bin/true"])
        return [process.pidfd, process.mechanism, process.wait(timeout=30)]

    assert in_child(start) == [None, engine.name, 0]


@on("clone")
def test_log_file_without_a_free_descriptor_here(engine: Engine, tmp_path: Path) -> None:
    """The child opens its log in a table of its own, which has room."""

    def start() -> list[Any]:
        fill_descriptors()
        process = Popen(["/bin/echo", "said"], stdout=tmp_path / "log")
        return [process.pidfd, process.mechanism, process.wait(timeout=30)]

    assert in_child(start) == [None, "clone", 0]
    assert (tmp_path / "log").read_text() == "said\n"


def test_no_descriptor_for_pipes(engine: Engine) -> None:
    def start_both() -> list[Any]:
        fill_descriptors()
        return [attempt(start, ["/bin/true"], stdout=subprocess.PIPE) for start in (subprocess.Popen, Popen)]

    expected, found = in_child(start_both)
    assert found == expected and found.errno == errno.EMFILE


@on("clone", "posix_spawn")
def test_lower_limit_than_the_descriptors_that_are_open(engine: Engine) -> None:
    """The child closes what is above the limit, except what pass_fds asks for."""

    def start() -> list[Any]:
        high = os.dup2(1, 200)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        os.set_inheritable(high, True)
        listing = "test -e /proc/self/fd/200 && exit 1; exit 0"
        return [attempt(Popen, ["/bin/sh", "-c", listing], pass_fds=fds) for fds in ((), (high,))]

    assert in_child(start) == [0, 1]


@on("clone")
def test_probe_that_fails_once_is_asked_again(engine: Engine) -> None:
    def start() -> str | None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        if os.geteuid() == 0:
            os.setresuid(NOBODY, NOBODY, 0)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
        attempt(Popen, ["/bin/true"])
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
        process = Popen(["/bin/true"])
        process.wait()
        return process.mechanism

    assert in_child(start) == "clone"


# ---- ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "step"),
    [({"extra_groups": [0]}, "setgroups"), ({"group": 0}, "setregid"), ({"user": 0}, "setreuid")],
    ids=["extra_groups", "group", "user"],
)
def test_ids_that_a_user_may_not_take(engine: Engine, kwargs: dict[str, Any], step: str) -> None:
    def start_both() -> list[Any]:
        become(NOBODY)
        found = [attempt(start, ["/bin/true"], **kwargs) for start in (subprocess.Popen, Popen)]
        return [*found, list(engine.ran)]

    expected, found, ran = in_child(start_both)
    assert expected.kind is PermissionError
    same_to_a_caller(found, expected)
    if engine.name != "subprocess":
        # posix_spawn cannot set ids, so it declines, and the next mechanism runs.
        assert ran == [("clone", step, errno.EPERM)]


def test_too_many_groups(engine: Engine) -> None:
    """More than NGROUPS_MAX (65536): subprocess raises before the start; for ours, the kernel refuses in the child."""
    found, expected = (attempt(start, ["true"], extra_groups=[1] * 70_000) for start in (Popen, subprocess.Popen))
    assert isinstance(found, Failure) and isinstance(expected, Failure)
    assert found.kind is expected.kind


# ---- the binding ----------------------------------------------------------------------------------------------------

REFUSED_BINDINGS = {
    "CPU that is not there": (Binding(frozenset({NO_CPU})), "sched_setaffinity"),
    "bind to an absent node": (Binding(None, MemoryPolicy("bind", frozenset({NO_NODE}))), "set_mempolicy"),
    "prefer an absent node": (Binding(None, MemoryPolicy("preferred", frozenset({NO_NODE}))), "set_mempolicy"),
    "interleave over an absent node": (
        Binding(None, MemoryPolicy("interleave", frozenset({NO_NODE}))),
        "set_mempolicy",
    ),
    "a node beyond the kernel's mask": (Binding(None, MemoryPolicy("bind", frozenset({4_095}))), "set_mempolicy"),
}


@pytest.mark.parametrize("case", REFUSED_BINDINGS)
@on(*ENGINES)
def test_refused_binding(engine: Engine, case: str) -> None:
    binding, step = REFUSED_BINDINGS[case]
    found = attempt(Popen, ["true"], binding=binding)
    assert isinstance(found, Failure)
    assert found.kind is BindingError and found.errno == errno.EINVAL
    assert step in found.text and "Invalid argument" in found.text
    # posix_spawn cannot bind, so it declines, and the next mechanism runs.
    assert engine.last() == ("clone", step, errno.EINVAL)


@pytest.mark.parametrize("case", REFUSED_BINDINGS)
@on(*ENGINES)
def test_refused_binding_that_is_not_required(engine: Engine, case: str) -> None:
    binding, step = REFUSED_BINDINGS[case]
    lenient = Binding(binding.cpus, binding.memory, required=False)
    process = Popen(["true"], binding=lenient)
    assert process.wait() == 0
    assert process.mechanism == "clone"
    assert [(one.step, one.errno) for one in process.binding_report.refused] == [(step, errno.EINVAL)]
    assert process.binding_report.requested is lenient
    assert engine.last() == ("clone", "", 0)


@on(*ENGINES)
def test_refused_binding_with_ids_beside_it(engine: Engine) -> None:
    """With ids the child has memory of its own; its report of the binding must arrive all the same."""
    binding = Binding(frozenset({NO_CPU}), MemoryPolicy("bind", frozenset({NO_NODE})), required=False)
    process = Popen(["true"], binding=binding, user=os.geteuid())
    assert process.wait() == 0 and process.mechanism == "clone"
    assert [one.step for one in process.binding_report.refused] == ["sched_setaffinity", "set_mempolicy"]
    assert {one.errno for one in process.binding_report.refused} == {errno.EINVAL}


@on("subprocess")
def test_binding_without_the_engine(engine: Engine) -> None:
    """psutil binds to CPUs. A memory policy is refused by an error, and never dropped in silence."""
    found = attempt(Popen, ["true"], binding=Binding(None, MemoryPolicy("local")))
    assert isinstance(found, Failure)
    assert (found.kind, found.errno) == (BindingError, errno.ENOTSUP) and "set_mempolicy" in found.text
    found = attempt(Popen, ["sleep", "100"], binding=Binding(frozenset({NO_CPU})))
    assert isinstance(found, Failure)
    assert (found.kind, found.errno) == (BindingError, errno.EINVAL) and "sched_setaffinity" in found.text
    process = Popen(["true"], binding=Binding(frozenset({NO_CPU}), MemoryPolicy("local"), required=False))
    assert process.wait() == 0 and process.mechanism == "subprocess"
    assert {one.step for one in process.binding_report.refused} == {"sched_setaffinity", "set_mempolicy"}
    for keyword in ({"die_with_parent": True}, {"cgroup": "/"}):
        found = attempt(Popen, ["true"], **keyword)
        assert isinstance(found, Failure) and found.errno == errno.ENOTSUP


@on(*ENGINES)
def test_cpus_of_which_some_are_not_there(engine: Engine) -> None:
    """The kernel takes those CPUs of a mask that exist, which counts as refused; the report shows them."""
    cpu = min(os.sched_getaffinity(0))
    binding = Binding(frozenset({cpu, NO_CPU}))
    with pytest.raises(BindingError, match="granted only in part"):
        Popen(["cat"], binding=binding, stdin=subprocess.PIPE)
    with Popen(["cat"], binding=binding.replace(required=False), stdin=subprocess.PIPE) as process:
        assert [step.step for step in process.binding_report.refused] == ["sched_setaffinity"]
        effective = process.binding_report.effective
        assert effective is not None and effective.cpus == {cpu}
        assert process.stdin is not None
        process.stdin.close()
        # It ends, and nobody has waited for it.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process.binding_report.effective is None and process.returncode is None
    assert process.binding_report.effective is None


def test_binding_that_is_none() -> None:
    none: tuple[int, ...] = ()
    for wrong in (none, (-1,), (1 << 40,)):
        with pytest.raises(ValueError, match="cpus"):
            Binding(frozenset(wrong))
    for mode, nodes in (("bind", ()), ("preferred", (0, 1)), ("local", (0,)), ("nearest", ()), ("bind", (-1,))):
        with pytest.raises(ValueError, match="memory"):
            MemoryPolicy(mode, frozenset(nodes))  # type: ignore[arg-type]
    for ids in ({"0"}, {0.0}, {True}, "0"):
        with pytest.raises(TypeError):
            Binding(ids)  # type: ignore[arg-type]


def test_binding_of_a_wrong_type(engine: Engine) -> None:
    for wrong in (7, "0-3", {0}, MemoryPolicy("local")):
        found = attempt(Popen, ["true"], binding=wrong)
        assert isinstance(found, Failure) and found.kind is TypeError
    assert engine.ran == []


def test_preexec_fn_beside_a_binding(engine: Engine) -> None:
    asked: list[dict[str, Any]] = [{"binding": Binding(frozenset({0}))}, {"die_with_parent": True}, {"cgroup": "/"}]
    for ours in asked:
        found = attempt(Popen, ["true"], preexec_fn=int, **ours)
        assert isinstance(found, Failure) and found.kind is ValueError
    assert engine.ran == []


def cpuset_of_one_cpu() -> Path:
    """A new cpuset (of cgroup v1 or v2) that holds the first CPU. Skips the test where none can be made."""
    cpu, name = min(os.sched_getaffinity(0)), f"rankspawn-test-{os.getpid()}"
    for root, v1 in ((Path("/sys/fs/cgroup/cpuset"), True), (Path("/sys/fs/cgroup"), False)):
        if not (root / ("cpuset.cpus" if v1 else "cgroup.controllers")).exists():
            continue
        group = root / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / "cpuset.cpus").write_text(str(cpu))
            (group / "cpuset.mems").write_text((root / ("cpuset.mems" if v1 else "cpuset.mems.effective")).read_text())
        except OSError:
            group.rmdir()
            continue
        return group
    pytest.skip("no cpuset can be made here")


@on(*ENGINES)
def test_cpu_outside_the_cpuset(engine: Engine) -> None:
    others = os.sched_getaffinity(0) - {min(os.sched_getaffinity(0))}
    if not others:
        pytest.skip("one CPU")
    group = cpuset_of_one_cpu()

    def start() -> list[Any]:
        (group / "cgroup.procs").write_text("0")
        found = attempt(Popen, ["true"], binding=Binding(frozenset(others)))
        lenient = Popen(["true"], binding=Binding(frozenset(others), required=False))
        lenient.wait()
        return [found, [(one.step, one.errno) for one in lenient.binding_report.refused]]

    try:
        found, refused = in_child(start)
    finally:
        group.rmdir()
    assert found.kind is BindingError and found.errno == errno.EINVAL and "cpuset" in found.text
    assert refused == [("sched_setaffinity", errno.EINVAL)]


# ---- cgroups --------------------------------------------------------------------------------------------------------


def cgroup_root() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(mount, os.W_OK):
            return Path(mount)
    return None


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A new, empty cgroup v2."""
    root = cgroup_root()
    group = None if root is None else root / f"rankspawn-test-{os.getpid()}"
    try:
        if group is None:
            raise OSError
        group.mkdir()
    except OSError:
        pytest.skip("no cgroup v2 can be made here")
    yield group
    for inner in group.iterdir():
        if inner.is_dir():  # 3.10's glob("*/") gives files, too
            inner.rmdir()
    group.rmdir()


@on(*ENGINES)
def test_cgroup_that_is_none(engine: Engine, tmp_path: Path) -> None:
    plain = file(tmp_path / "file")
    for wrong, code, filename in (
        (tmp_path / "none", errno.ENOENT, tmp_path / "none"),
        (str(tmp_path / "none"), errno.ENOENT, tmp_path / "none"),
        (plain, errno.ENOTDIR, plain),
    ):
        found = attempt(Popen, ["true"], cgroup=wrong)
        assert isinstance(found, Failure) and (found.errno, found.filename) == (code, str(filename))
    found = attempt(Popen, ["true"], cgroup="/\0")
    assert isinstance(found, Failure) and found.kind is ValueError
    assert engine.ran == []
    # A directory that is no cgroup's, and a descriptor that is not open.
    for no_cgroup, code in ((tmp_path, errno.ENOENT), (9_999, errno.EBADF)):
        found = attempt(Popen, ["true"], cgroup=no_cgroup)
        assert isinstance(found, Failure) and found.text.endswith(f"cgroup.procs: {os.strerror(code)}")
        assert engine.last() == ("clone", "cgroup.procs", code)


@on(*ENGINES)
def test_cgroup_that_is_a_negative_descriptor(engine: Engine) -> None:
    found = attempt(Popen, ["true"], cgroup=-3)
    assert isinstance(found, Failure)


@on(*ENGINES)
def test_cgroup_that_takes_no_process(engine: Engine, cgroup: Path) -> None:
    """A threaded cgroup takes a whole process, too. Its sibling becomes invalid by it, and takes none (cgroups(7))."""
    threaded, sibling = cgroup / "threaded", cgroup / "sibling"
    threaded.mkdir()
    (threaded / "cgroup.type").write_text("threaded")
    sibling.mkdir()
    assert attempt(Popen, ["true"], cgroup=threaded) == 0
    assert engine.last() == ("clone", "", 0)
    found = attempt(Popen, ["true"], cgroup=sibling)
    assert isinstance(found, Failure) and found.errno == errno.EOPNOTSUPP and "cgroup.procs" in found.text
    assert engine.last() == ("clone", "cgroup.procs", errno.EOPNOTSUPP)


@needs_root
@on(*ENGINES)
def test_cgroup_that_is_not_delegated(engine: Engine, cgroup: Path) -> None:
    def start() -> Failure | int:
        become(NOBODY)
        return attempt(Popen, ["true"], cgroup=cgroup)

    found = in_child(start)
    assert isinstance(found, Failure) and found.kind is PermissionError and "cgroup.procs" in found.text


# ---- streams that the child opens -----------------------------------------------------------------------------------


def opened_by_python(path: Path, mode: str) -> Failure:
    with pytest.raises(OSError) as caught:
        open(path, mode).close()
    return Failure.of(caught.value)


@pytest.mark.parametrize("engine", ["clone", "posix_spawn", "subprocess"], indirect=True)
@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
@pytest.mark.parametrize("place", ["none/log", ".", "loop", "file/log"])
def test_log_that_cannot_be_opened(engine: Engine, stream: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    file(tmp_path / "file")
    path = tmp_path / place
    if (stream, place) == ("stdin", "."):
        path = tmp_path / "none"  # because a folder can be opened for reading
    expected = opened_by_python(path, "r" if stream == "stdin" else "w")
    found = attempt(Popen, ["true"], **{stream: path})
    assert isinstance(found, Failure)
    assert (found.kind, found.errno, str(found.filename)) == (expected.kind, expected.errno, str(path))
    if engine.name != "subprocess":
        # posix_spawn declines, because it could not tell this from a missing program.
        assert engine.last() == ("clone", stream, expected.errno)


@needs_root
@pytest.mark.parametrize("engine", ["clone", "posix_spawn", "subprocess"], indirect=True)
def test_log_that_a_user_may_not_write(engine: Engine, tmp_path: Path) -> None:
    log = file(tmp_path / "log", mode=0o600)

    def start() -> Failure | int:
        become(NOBODY)
        return attempt(Popen, ["/bin/true"], stdout=log)

    found = in_child(start)
    assert isinstance(found, Failure) and found.kind is PermissionError and str(found.filename) == str(log)


def test_log_with_a_nul_in_its_name(engine: Engine) -> None:
    found = attempt(Popen, ["true"], stdout=Path("/tmp/a\0b"))
    assert isinstance(found, Failure) and found.kind is ValueError
    assert engine.ran == []


def state_of(pid: int) -> str:
    """The letter of proc(5): R runs, S sleeps, D sleeps uninterruptibly, Z has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("engine", "stream"),
    [
        ("clone", "stdin"),
        ("clone", "stdout"),
        ("posix_spawn", "stdin"),
        ("posix_spawn", "stdout"),
        ("subprocess", "stdin"),
        ("subprocess", "stdout"),
    ],
    indirect=["engine"],
)
def test_stream_that_takes_long_to_open_can_be_interrupted(engine: Engine, stream: str, tmp_path: Path) -> None:
    """open(2) of a FIFO waits for the other end. Ctrl-C must end the launcher meanwhile, if the launcher waits."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def start() -> bool:
        reading, writing = os.pipe()

        def start_it() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(writing, b".")
            attempt(Popen, ["/bin/true"], **{stream: fifo})

        pid = fork(start_it)
        os.read(reading, 1)
        asleep = 0
        while asleep < 20 and state_of(pid) != "Z":
            # A launcher that only sleeps is inside open(2), or, with the engine, inside vfork.
            asleep = asleep + 1 if state_of(pid) in "SD" else 0
            threading.Event().wait(0.005)
        os.kill(pid, signal.SIGINT)
        for _ in range(50):
            threading.Event().wait(0.01)
            ended, _ = os.waitpid(pid, os.WNOHANG)
            if ended:
                return True
        # Opening the other end lets the child continue, and with it the launcher.
        other_end = os.open(fifo, os.O_RDWR)
        os.waitpid(pid, 0)
        os.close(other_end)
        return False

    assert in_child(start)


# ---- what else goes on in the caller --------------------------------------------------------------------------------


def test_failed_start_where_children_reap_themselves(engine: Engine) -> None:
    """With SIGCHLD ignored, the kernel reaps children itself: that the engine finds none to wait for is no failure."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        for _ in range(20):
            found = attempt(Popen, ["/no/such/program"])
            assert isinstance(found, Failure) and found.kind is FileNotFoundError
        assert attempt(Popen, ["false"]) == 0
        assert attempt(lambda: Popen(["/bin/sh", "-c", "exit 3"], die_with_parent=engine.name != "subprocess")) == 0
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_failed_start_beside_a_thread_that_waits_for_any_child(engine: Engine) -> None:
    def start() -> list[Any]:
        done = threading.Event()

        def wait_for_any() -> None:
            while not done.is_set():
                try:
                    os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    continue

        thread = threading.Thread(target=wait_for_any)
        thread.start()
        found = []
        for turn in range(60):
            program = "/bin/true" if turn % 3 == 0 else "/no/such/program"
            ended = attempt(Popen, [program])
            found.append(ended if isinstance(ended, int) else ended.kind)
        done.set()
        thread.join()
        return found

    found = in_child(start)
    assert found == [0, FileNotFoundError, FileNotFoundError] * 20


@on("clone", "posix_spawn")
def test_environment_that_grows_meanwhile(engine: Engine) -> None:
    """setenv(3) may move the table that environ points to, and the engine reads it after it has released the GIL."""

    def start() -> list[Any]:
        done = threading.Event()

        def grow() -> None:
            turn = 0
            while not done.is_set():
                turn += 1
                os.environ[f"RANKSPAWN_TEST_{turn % 4000}"] = "x" * 20
                if turn % 4000 == 0:
                    for name in [name for name in os.environ if name.startswith("RANKSPAWN_TEST_")]:
                        del os.environ[name]

        thread = threading.Thread(target=grow)
        thread.start()
        found = []
        for _ in range(400):
            ended = attempt(Popen, ["/bin/true"])
            found.append(ended)
            if ended != 0:
                break
        done.set()
        thread.join()
        return found

    assert set(in_child(start)) == {0}


@on("clone", "posix_spawn")
def test_exception_of_a_handler_leaves_no_child(engine: Engine) -> None:
    """Ctrl-C while ranks are started: each child is in an object, or was killed and reaped, or never was.

    subprocess.Popen loses children here. With any class the object itself can be lost, when the handler raises between
    Popen's return and the assignment; the standard library keeps the pids of those.
    """

    class Interrupted(Exception):
        pass

    armed = False

    def interrupt(*_: object) -> None:
        if armed:
            raise Interrupted

    def start() -> int:
        nonlocal armed
        signal.signal(signal.SIGALRM, interrupt)
        # As an error, the warning would end __del__ before it notes the pid.
        warnings.simplefilter("ignore", ResourceWarning)
        lost = 0
        for turn in range(600):
            process = None
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, 50e-6 + 1e-6 * (turn % 500))
                process = Popen(["/bin/true"])
                # Python may run the handler of a signal that has come by now as late as in the next call.
                armed = False
            except Interrupted:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            if process is not None:
                process.wait()
            while True:
                try:
                    left = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
                except ChildProcessError:
                    break
                if left is not None and left.si_pid not in {one.pid for one in subprocess._active}:  # type: ignore[attr-defined]
                    os.waitpid(left.si_pid, 0)
                    lost += 1
                subprocess._cleanup()  # type: ignore[attr-defined]
        return lost

    assert in_child(start) == 0


@on("clone")
def test_signal_goes_by_pidfd(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another thread is in wait(), the pid can be reaped and given away between poll() and kill(2)."""
    by_pid: list[tuple[int, int]] = []
    real = os.kill
    with Popen(["sleep", "100"]) as process:

        def watched(pid: int, sig: int) -> None:
            by_pid.append((pid, sig))
            real(pid, sig)

        monkeypatch.setattr(os, "kill", watched)
        process.terminate()
    assert process.returncode == -signal.SIGTERM
    assert by_pid == []


@needs_root
@on("clone")
def test_group_that_may_not_be_signalled(engine: Engine) -> None:
    def start() -> Failure | None:
        with Popen(["/bin/sh", "-c", "sleep 100 >/dev/null & exit 0"], start_new_session=True) as process:
            process.wait()
        if process.pidfd is None:
            return None

        def signal_as_nobody() -> Failure:
            become(NOBODY)
            with pytest.raises(OSError) as caught:
                process.send_signal_group(signal.SIGTERM)
            return Failure.of(caught.value)

        found = in_child(signal_as_nobody)
        process.send_signal_group(signal.SIGKILL)
        return found

    found = in_child(start)
    assert found is None or found.kind is PermissionError


@on("clone", "posix_spawn")
@pytest.mark.parametrize("stack", [64, 128])
def test_thread_with_a_small_stack(engine: Engine, stack: int) -> None:
    """The child's stack lies on its caller's stack."""
    found: list[Any] = []

    def start() -> None:
        found.append(attempt(Popen, ["true"]))
        found.append(attempt(Popen, ["true"], die_with_parent=True))

    threading.stack_size(stack * 1024)
    try:
        thread = threading.Thread(target=start)
        thread.start()
    finally:
        threading.stack_size(0)
    thread.join()
    assert found == [0, 0]
