"""launch(): what it gives and tells the ranks, what it refuses, and that a call that fails leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rankspawn import Binding, BindingError, Job, Popen, launch
from rankspawn._binding import PlacementError
from rankspawn._output.logs import rank_files
from rankspawn._start.engine import EXTENSION_ERROR, mechanisms
from tests.support.processes import PATIENCE, eventually, has_ended, new_cgroup, writable_cgroups
from tests.support.state import NOBODY, become, in_child

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

SLEEPING = ["/bin/sleep", "1000"]
PYTHON = [sys.executable, "-I", "-S", "-c"]
TELL = [*PYTHON, "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]), flush=True)"]


def told(folder: Path, nprocs: int, attempt: int = 0) -> list[Any]:
    """What the ranks have printed."""
    logs = [folder / f"attempt_{attempt}" / f"{rank}" / "stdout.log" for rank in range(nprocs)]
    return [json.loads(log.read_text()) for log in logs]


# ---- what the ranks are given ----------------------------------------------------------------------------------------


def test_what_ranks_are_told(tmp_path: Path) -> None:
    with launch(TELL, 3, log_dir=tmp_path) as group:
        assert group.wait(PATIENCE) == (0, 0, 0)
    for rank, (_, env, folder) in enumerate(told(tmp_path, 3)):
        expected = {
            "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "ROLE_RANK": f"{rank}", "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3", "ROLE_WORLD_SIZE": "3", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
            "ROLE_NAME": "default", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "False",
            "TORCHELASTIC_ERROR_FILE": str(tmp_path / "attempt_0" / f"{rank}" / "error.json"),
        }  # fmt: skip
        assert {name: env.get(name) for name in expected} == expected
        assert 0 < int(env["MASTER_PORT"]) < 65536
        assert env["PATH"] == os.environ["PATH"] and folder == os.getcwd()
        assert int(env["OMP_NUM_THREADS"]) > 0


def test_what_ranks_of_one_of_several_machines_are_told(tmp_path: Path) -> None:
    job = Job(2, 29511, "node0.example", "night", nnodes=3, node_rank=1, restart_count=2, max_restarts=5)
    with launch(TELL, 2, job=job, log_dir=tmp_path) as group:
        assert group.wait(PATIENCE) == (0, 0)
        assert group.report()["job"]["run_id"] == "night"
    for rank, (_, env, _) in enumerate(told(tmp_path, 2, attempt=2)):
        expected = {
            "RANK": f"{2 + rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "3", "MASTER_ADDR": "node0.example", "MASTER_PORT": "29511",
            "TORCHELASTIC_RUN_ID": "night", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "5",
        }  # fmt: skip
        assert {name: env.get(name) for name in expected} == expected


def test_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's own variables win over the job's, and the job's win over the inherited ones."""
    monkeypatch.setenv("RANK", "inherited")
    shared = {"PATH": os.environ["PATH"], "RANK": "inherited", "SHARED": "yes"}
    with launch(
        TELL, 2, env=shared, rank_env=[{"OWN": "first"}, {"OWN": "second", "LOCAL_RANK": "7"}], log_dir=tmp_path
    ) as group:
        assert group.wait(PATIENCE) == (0, 0)
    (_, first, _), (_, second, _) = told(tmp_path, 2)
    assert (first["OWN"], first["RANK"], first["LOCAL_RANK"], first["SHARED"]) == ("first", "0", "0", "yes")
    assert (second["OWN"], second["RANK"], second["LOCAL_RANK"]) == ("second", "1", "7")
    assert "HOME" not in first
    assert shared == {"PATH": os.environ["PATH"], "RANK": "inherited", "SHARED": "yes"}


def test_a_command_for_each_rank_and_a_folder(tmp_path: Path) -> None:
    with launch(lambda rank: [*TELL, f"of {rank}"], 3, log_dir=tmp_path, cwd=tmp_path) as group:
        assert group.wait(PATIENCE) == (0, 0, 0)
    assert [(args, folder) for args, _, folder in told(tmp_path, 3)] == [([f"of {n}"], str(tmp_path)) for n in range(3)]


def test_ranks_are_popens_in_sessions_of_their_own() -> None:
    with launch(SLEEPING, 2) as group:
        assert all(isinstance(rank, Popen) and rank.args == SLEEPING for rank in group.ranks)
        assert [os.getsid(pid) for pid in group.pids()] == list(group.pids())
        assert all(rank.mechanism == "clone" for rank in group.ranks)


def test_bindings() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    bindings = [Binding({cpus[0]}), None, Binding({cpus[-1]})]
    with launch(SLEEPING, 3, bindings=bindings) as group:
        assert [os.sched_getaffinity(pid) for pid in group.pids()] == [{cpus[0]}, set(cpus), {cpus[-1]}]
        facts = [rank["binding"] for rank in group.report()["attempts"][0]["ranks"]]
    assert [fact["asked"] is None for fact in facts] == [False, True, False]
    assert facts[0]["asked"] == {"cpus": str(cpus[0]), "memory": None}
    assert facts[2]["effective"] is not None and facts[2]["effective"]["cpus"] == str(cpus[-1])


def test_placement(tmp_path: Path) -> None:
    with launch(TELL, 2, numa="node", memory_policy="preferred", log_dir=tmp_path) as group:
        group.wait(PATIENCE)
        bindings = [rank.binding_report.requested for rank in group.ranks]
    for binding, (_, env, _) in zip(bindings, told(tmp_path, 2), strict=True):
        assert binding is not None and binding.cpus and binding.cpus <= os.sched_getaffinity(0)
        assert binding.memory is not None
        assert env["OMP_NUM_THREADS"].isdecimal()


def test_threads_that_the_user_has_set(tmp_path: Path) -> None:
    with launch(TELL, 1, numa="node", env={**os.environ, "OMP_NUM_THREADS": "3"}, log_dir=tmp_path) as group:
        group.wait(PATIENCE)
    assert told(tmp_path, 1)[0][1]["OMP_NUM_THREADS"] == "3"


def test_files_of_the_callers_own(tmp_path: Path) -> None:
    files = rank_files(str(tmp_path), 2, 4)
    with launch(["/bin/sh", "-c", "echo out $RANK; echo err $RANK >&2"], 2, files=files) as group:
        assert group.wait(PATIENCE) == (0, 0)
        assert group.files == tuple(files)
    assert (tmp_path / "attempt_4" / "1" / "stdout.log").read_text() == "out 1\n"
    assert (tmp_path / "attempt_4" / "0" / "stderr.log").read_text() == "err 0\n"


@pytest.mark.parametrize("ranks", [None, {1}])
def test_tee(ranks: set[int] | None, capfd: pytest.CaptureFixture[str]) -> None:
    """After the block all output is shown, also a killed rank's, and the temporary files are removed."""
    script = "echo out $RANK; echo err $RANK >&2; printf last; kill -9 $$"
    with launch(["/bin/sh", "-c", script], 2, tee=True, tee_ranks=ranks, keep_going=True) as group:
        assert group.wait(PATIENCE) == (-9, -9)
        assert group.files is not None
        folder = Path(group.files[0].error).parent.parent.parent
        assert folder.exists()
    assert not folder.exists()
    out, err = capfd.readouterr()
    shown = sorted(ranks or {0, 1})
    assert sorted(out.splitlines()) == sorted(f"[rank {n}]:{text}" for n in shown for text in (f"out {n}", "last"))
    assert sorted(err.splitlines()) == [f"[rank {n}]:err {n}" for n in shown]


def test_a_rank_that_fills_its_stdout(tmp_path: Path) -> None:
    """Nobody has to read, because the ranks write to files. This holds where the tee's output is closed, too."""
    script = "head -c 20000000 /dev/zero; echo done >&2"
    reading, writing = os.pipe()
    os.close(reading)
    before = os.dup(1)
    sys.stdout.flush()
    os.dup2(writing, 1)
    try:
        with launch(["/bin/sh", "-c", script], 2, log_dir=tmp_path, tee=True, tee_ranks=[0]) as group:
            assert group.wait(PATIENCE) == (0, 0)
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(writing)
    for rank in ("0", "1"):
        assert (tmp_path / "attempt_0" / rank / "stdout.log").stat().st_size == 20_000_000
        assert (tmp_path / "attempt_0" / rank / "stderr.log").read_text() == "done\n"


def test_a_rank_that_closes_its_streams(tmp_path: Path) -> None:
    script = "exec <&- >&- 2>&-; sleep 0.05; exit 3"
    with launch(["/bin/sh", "-c", script], 2, log_dir=tmp_path, tee=True, keep_going=True) as group:
        assert group.wait(PATIENCE) == (3, 3)


@pytest.mark.parametrize("die", [True, False, None])
def test_death_signals(die: bool | None) -> None:
    def pids_of_a_launcher_that_dies() -> list[int]:
        group = launch(SLEEPING, 2, die_with_parent=die)
        pids = list(group.pids())
        # So that the group's __del__ does nothing when this process ends.
        group._is_over = True
        return pids

    pids = in_child(pids_of_a_launcher_that_dies)
    if die is False:
        assert not any(map(has_ended, pids))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: all(map(has_ended, pids)))


@pytest.mark.parametrize("nprocs", [1, 40])
def test_progress(nprocs: int) -> None:
    asked: list[Callable[[], int]] = []
    with launch(["/bin/true"], nprocs, progress=asked.append):
        assert [ask() for ask in asked] == [nprocs]


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nprocs, options, text",
    [
        (0, {}, "nprocs: expected a positive integer, got 0"),
        (-1, {}, "nprocs: expected a positive integer, got -1"),
        (2, {"job": Job(3, 29500)}, "nprocs: expected 3, as in job, got 2"),
        (2, {"bindings": [None]}, "bindings: expected 2 items, one for each rank, got 1"),
        (2, {"rank_env": [{}] * 3}, "rank_env: expected 2 items, one for each rank, got 3"),
        (2, {"files": []}, "files: expected 2 items, one for each rank, got 0"),
        (1, {"numa": "node", "bindings": [None]}, "bindings say where ranks go: leave out numa='node'"),
        (1, {"memory_policy": "local", "bindings": [None]}, "bindings say where ranks go: leave out memory_policy"),
        (1, {"memory_policy": "local", "numa": None}, "numa=None leaves ranks unbound: it excludes memory_policy"),
        (1, {"memory_policy": "local", "numa": "none"}, "numa='none' leaves ranks unbound: it excludes memory_policy"),
        (1, {"numa": "nowhere"}, "nowhere"),
        (1, {"numa": "node", "memory_policy": "elsewhere"}, "elsewhere"),
        (1, {"grace": -1}, "grace: expected a non-negative number of seconds, got -1"),
        (1, {"grace": float("nan")}, "grace: expected a non-negative number of seconds, got nan"),
        (1, {"files": [None], "log_dir": "/tmp"}, "log_dir and files exclude each other"),
        (1, {"tee_ranks": [0]}, "tee_ranks needs tee"),
        (1, {"env": {"a=b": "c"}}, "illegal environment variable name"),
        (2, {"rank_env": [{}, {"a": "\0"}]}, "rank 1: embedded null byte"),
    ],
)
def test_arguments_that_do_not_fit(nprocs: int, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        launch(SLEEPING, nprocs, **options)
    assert text in str(caught.value)


def test_a_placement_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankspawn._place import plan as _placement

    def refuse(*_: Any, **__: Any) -> None:
        raise PlacementError("no room")

    monkeypatch.setattr(_placement, "plan", refuse)
    with pytest.raises(PlacementError, match="no room"):
        launch(SLEEPING, 1, numa="node")


@contextlib.contextmanager
def nothing_is_made(tmp_path: Path) -> Iterator[None]:
    """No process is left, and no file in ``tmp_path`` (which is where temporary folders go, too)."""
    before = sorted(tmp_path.rglob("*"))
    yield
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go in this test."""
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("broken", [0, 7, 15])
def test_all_or_nothing_when_a_binding_is_refused(broken: int, temporary: Path) -> None:
    bindings: list[Binding | None] = [None] * 16
    bindings[broken] = Binding({5000})
    with nothing_is_made(temporary), pytest.raises(BindingError, match="5000") as caught:
        launch(SLEEPING, 16, bindings=bindings, tee=True, guard=True)
    assert caught.value.rank == broken  # type: ignore[attr-defined]


def test_all_or_nothing_when_a_program_is_not_there(temporary: Path) -> None:
    with nothing_is_made(temporary), pytest.raises(FileNotFoundError, match="rank 5: No such file"):
        launch(lambda rank: ["/no/such/program"] if rank == 5 else SLEEPING, 8, tee=True)


def test_all_or_nothing_when_a_log_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "attempt_0").mkdir()
    (tmp_path / "attempt_0" / "2").write_text("in the way")
    with pytest.raises(FileExistsError):
        launch(SLEEPING, 3, log_dir=tmp_path)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_all_or_nothing_with_what_the_ranks_had_started_already(tmp_path: Path) -> None:
    """The start is refused late: by then the ranks have children in process groups of their own."""
    code = "import os; os.fork() or os.setpgid(0, 0); open(f'ready.{os.getpid()}', 'w'); os.kill(os.getpid(), 19)"
    from rankspawn._start import crew as _crew

    run = _crew._run

    def run_and_fail(*arguments: Any) -> None:
        run(*arguments)
        eventually(lambda: len(list(tmp_path.glob("ready.*"))) == 4)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_crew, "_run", run_and_fail)
        with pytest.raises(KeyboardInterrupt):
            launch([*PYTHON, code], 2, cwd=tmp_path)
    assert all(has_ended(int(path.suffix[1:])) for path in tmp_path.glob("ready.*"))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_all_or_nothing_with_a_cgroup(temporary: Path) -> None:
    with new_cgroup() as folder:
        with nothing_is_made(temporary), pytest.raises(FileNotFoundError, match="rank 3"):
            launch(lambda rank: ["/no/such/program"] if rank == 3 else SLEEPING, 4, tee=True, cgroup=folder)
        assert not [path for path in folder.iterdir() if path.is_dir()]


def test_a_cgroup_that_is_none(temporary: Path) -> None:
    with nothing_is_made(temporary), pytest.raises(OSError, match="no cgroup"):
        launch(SLEEPING, 2, cgroup=temporary, tee=True)
    with pytest.raises(FileNotFoundError):
        launch(SLEEPING, 2, cgroup=temporary / "none")
    if old := writable_cgroups("cgroup"):
        with pytest.raises(OSError, match="cgroup of version 1"):
            launch(SLEEPING, 2, cgroup=old[0])


@pytest.fixture
def mechanism(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("RANKSPAWN_MECHANISM", request.param)
    mechanisms.cache_clear()
    yield request.param
    mechanisms.cache_clear()


@pytest.mark.parametrize("mechanism", ["clone", "posix_spawn", "subprocess"], indirect=True)
def test_mechanisms(mechanism: str) -> None:
    with launch(
        ["/bin/sh", "-c", "sleep 1000 & exit $RANK"], 3, keep_going=True, die_with_parent=False, guard=False
    ) as group:
        assert group.wait(PATIENCE) == (0, 1, 2)
        assert {rank.mechanism for rank in group.ranks} == {mechanism}


@pytest.mark.parametrize("mechanism", ["subprocess"], indirect=True)
def test_what_needs_the_engine(mechanism: str, temporary: Path) -> None:
    options: list[dict[str, Any]] = [{"guard": True}, {"die_with_parent": True}]
    for option in options:
        with nothing_is_made(temporary), pytest.raises(OSError, match="rankspawn's engine") as caught:
            launch(SLEEPING, 2, **option)
        assert caught.value.errno == errno.ENOTSUP


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_a_limit_below_the_number_of_ranks(temporary: Path) -> None:
    """launch() raises before it makes anything."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        with nothing_is_made(temporary), pytest.raises(OSError) as caught:
            launch(lambda rank: pytest.fail("asked"), 200, tee=True)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (200, limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE
    assert "200 ranks need a descriptor each, and this process may have 200" in str(caught.value)


@pytest.mark.parametrize("free", range(12))
def test_without_free_descriptors_nobody_is_left(free: int) -> None:
    """Descriptors run out at each place in turn: at the port, the pidfds, the selector."""
    with launch(["true"], 1, numa=None, guard=False, keep_going=True) as group:  # which imports what a launch needs
        group.wait(PATIENCE)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    held = [os.dup(0)]
    try:
        while held[-1] < highest:  # no lower number stays free
            held.append(os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1 + free, limits[1]))
        try:
            with launch(
                ["/bin/sh", "-c", "exit $RANK"], 4, numa=None, guard=False, keep_going=True, job=Job(4, 1)
            ) as group:
                assert group.wait(PATIENCE) == (0, 1, 2, 3)
                assert all(rank.pidfd is not None for rank in group.ranks)
                enough = True
        except OSError as error:
            assert error.errno == errno.EMFILE and "4 ranks need a descriptor each" in str(error)
            enough = False
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in held:
            os.close(fd)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    # Four pidfds, their epoll, the selector and its bell, and the socket that holds the port.
    assert enough == (free >= 8)


@needs_root
@pytest.mark.parametrize("free", [0, 1, 5, 9])
def test_without_free_processes_nobody_is_left(free: int) -> None:
    """RLIMIT_NPROC stops rank k of N. The launcher becomes a user without other processes, because root is exempt."""

    def run() -> tuple[int, str]:
        become(NOBODY)
        resource.setrlimit(resource.RLIMIT_NPROC, (1 + free, 1 + free))
        try:
            launch(SLEEPING, 12, guard=False)
        except OSError as error:
            code, text = error.errno or 0, str(error)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        eventually(lambda: len(os.listdir("/proc/self/task")) == 1)
        return code, text

    mechanisms()  # because its probe starts a process, too
    code, text = in_child(run)
    assert code == errno.EAGAIN and "Resource temporarily unavailable" in text and "rank " in text


def test_a_thousand_ranks() -> None:
    """The process has a high enough limit, so each rank has a pidfd, and the group sees it end without polling."""

    def run() -> list[Any]:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < 1100:
            return ["no descriptors"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (1100, hard))
        script = "[ $RANK -lt 500 ] && exit 0; exec sleep 1000"
        with launch(["/bin/sh", "-c", script], 1000) as group:
            pidfds = sum(rank.pidfd is not None for rank in group.ranks)
            while len(group.running) > 500:
                group.wait_any(PATIENCE)
            group.terminate()
            codes = group.returncodes
        ends = [codes[rank] for rank in range(1000)]
        return [ends.count(0), ends.count(-signal.SIGTERM), pidfds]

    assert in_child(run) in ([500, 500, 1000], ["no descriptors"])
