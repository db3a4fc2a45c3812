"""SubprocessHandler: the same tests on torch's and on ours, then what torch gets wrong, then what is ours alone.

The tests on torch's own run where torch is installed (make test-torch).
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import rankspawn
from rankspawn import AffinityMode, Binding, MemoryPolicy, NumaOptions
from rankspawn._binding import PlacementError
from rankspawn._torch import handler as _handler

# Imported here and not in the fixture, because the import starts a thread that stays.
try:
    from torch.distributed.elastic.multiprocessing import subprocess_handler as torchs
except ImportError:
    torchs = None

SH = "/bin/sh"


@pytest.fixture(params=["torch", "ours"])
def handlers(request: pytest.FixtureRequest) -> Any:
    """The module-like thing that has SubprocessHandler and get_subprocess_handler."""
    if request.param == "ours":
        return rankspawn
    if torchs is None:
        pytest.skip("torch is not installed")
    return torchs


def start(handlers: Any, *args: object, **kwargs: Any) -> Any:
    given = {"env": {}, "stdout": None, "stderr": None, "local_rank_id": 0, "numa_options": None, **kwargs}
    return handlers.get_subprocess_handler(SH, ("-c", *args), **given)


def finish(handler: Any) -> int:
    """Wait for the process, then close its log files; torch's caller calls close() only while a process runs."""
    status = handler.proc.wait(timeout=30)
    for file in (handler._stdout, handler._stderr):
        if file is not None:
            file.close()
    return int(status)


def test_signature(handlers: Any) -> None:
    theirs = ["entrypoint", "args", "env", "stdout", "stderr", "local_rank_id", "numa_options"]
    assert list(inspect.signature(handlers.SubprocessHandler).parameters) == theirs
    function = inspect.signature(handlers.get_subprocess_handler).parameters
    assert list(function) == theirs
    assert function["numa_options"].default is None


def test_environment_is_added_to_ours(handlers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RS_INHERITED", "inherited")
    monkeypatch.setenv("RS_BOTH", "ours")
    env = {"RS_BOTH": "the rank's"}
    handler = start(handlers, 'echo "$RS_INHERITED $RS_BOTH $0"', "first", env=env, stdout=str(tmp_path / "out"))
    assert finish(handler) == 0
    assert (tmp_path / "out").read_text() == "inherited the rank's first\n"


def test_arguments_become_text(handlers: Any, tmp_path: Path) -> None:
    handler = start(handlers, 'echo "$0 $1 $2"', 7, 1.5, tmp_path, stdout=str(tmp_path / "out"))
    assert finish(handler) == 0
    assert (tmp_path / "out").read_text() == f"7 1.5 {tmp_path}\n"
    assert handler.proc.args == (SH, "-c", 'echo "$0 $1 $2"', "7", "1.5", str(tmp_path))


def test_log_files(handlers: Any, tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    out.write_text("something old and longer than the new")
    handler = start(handlers, "echo out; echo err >&2; exit 3", stdout=str(out), stderr=str(err))
    assert finish(handler) == 3
    assert (out.read_text(), err.read_text()) == ("out\n", "err\n")


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_log_files(handlers: Any, nothing: str | None, capfd: pytest.CaptureFixture[str]) -> None:
    handler = start(handlers, "echo inherited", stdout=nothing, stderr=nothing)
    assert (handler._stdout, handler._stderr) == (None, None)
    assert finish(handler) == 0
    assert capfd.readouterr().out == "inherited\n"


def test_session_of_its_own(handlers: Any, tmp_path: Path) -> None:
    handler = start(handlers, "exec sleep 60", local_rank_id=5)
    assert handler.local_rank_id == 5
    assert isinstance(handler.proc, subprocess.Popen)
    assert os.getsid(handler.proc.pid) == handler.proc.pid
    handler.close()
    assert handler.proc.wait(timeout=30) == -signal.SIGTERM


@pytest.mark.parametrize("sig", [None, signal.SIGINT, signal.SIGKILL])
def test_close_signals_the_group(handlers: Any, sig: signal.Signals | None, tmp_path: Path) -> None:
    """The grandchild gets the signal, too. The program resets SIGINT, because sh ignores it in background commands."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.fork();"
    code += " f = open(sys.argv[1], 'w'); f.write('x'); f.flush(); signal.pause()"
    handler = handlers.get_subprocess_handler(
        sys.executable, ("-c", code, fifo), {}, stdout=None, stderr=None, local_rank_id=0
    )
    with fifo.open() as reading:
        assert reading.read(2) == "xx"
        handler.close(sig)
        assert handler.proc.wait(timeout=30) == -(sig or signal.SIGTERM)
        # read() returns the end of the file when no process has the FIFO open any more.
        assert reading.read() == ""


def test_close_closes_the_files(handlers: Any, tmp_path: Path) -> None:
    handler = start(handlers, "exec sleep 60", stdout=str(tmp_path / "out"), stderr=str(tmp_path / "err"))
    files = (handler._stdout, handler._stderr)
    assert [file.closed for file in files] == [False, False]
    handler.close()
    assert [file.closed for file in files] == [True, True]
    handler.proc.wait()


def test_subclass_that_starts_the_process_itself(handlers: Any, tmp_path: Path) -> None:
    """voir does so: its _popen replaces ours, and reads _stdout and _stderr."""

    class Own(handlers.SubprocessHandler):  # type: ignore[name-defined, misc]
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            assert (type(args), env["RS"]) == (tuple, "1")
            return subprocess.Popen(
                args, env=env, stdout=self._stdout, stderr=self._stderr, start_new_session=True, cwd="/"
            )

    handler = Own(SH, ("-c", "pwd; echo err >&2"), {"RS": "1"}, str(tmp_path / "out"), str(tmp_path / "err"), 0, None)
    assert finish(handler) == 0
    assert ((tmp_path / "out").read_text(), (tmp_path / "err").read_text()) == ("/\n", "err\n")


def test_subclass_that_adds_to_the_environment(handlers: Any, tmp_path: Path) -> None:
    class Own(handlers.SubprocessHandler):  # type: ignore[name-defined, misc]
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            return super()._popen(args, {**env, "RS": "added"})

    handler = Own(SH, ("-c", "echo $RS"), {}, str(tmp_path / "out"), None, 0, None)
    assert finish(handler) == 0
    assert (tmp_path / "out").read_text() == "added\n"


def test_missing_program(handlers: Any) -> None:
    with pytest.raises(FileNotFoundError) as error:
        handlers.SubprocessHandler("/nonexistent", (), {}, None, None, 0, None)
    assert error.value.filename == "/nonexistent"


def test_log_file_that_cannot_be_made(handlers: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        start(handlers, "true", stdout=str(tmp_path / "no" / "out"))
    assert error.value.filename == str(tmp_path / "no" / "out")


# ---- what torch gets wrong ----------------------------------------------------------------------------------------


def test_log_files_are_closed_when_the_start_fails(tmp_path: Path) -> None:
    opened = []

    class Own(rankspawn.SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            opened.append(self._stdout)
            raise RuntimeError("as a start that fails")

    with pytest.raises(RuntimeError, match="as a start"):
        Own(SH, (), {}, str(tmp_path / "out"), None, 0, None)
    assert [file is not None and file.closed for file in opened] == [True]


def test_one_path_for_both_streams_is_opened_once(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    handler = start(rankspawn, "echo a; echo b >&2; echo c", stdout=log, stderr=log)
    assert handler.proc.wait(timeout=30) == 0
    assert Path(log).read_text() == "a\nb\nc\n"
    assert handler._stdout is handler._stderr
    handler.close()
    assert Path(log).read_text() == "a\nb\nc\n"


def test_group_is_signalled_when_the_leader_has_been_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    handler = start(rankspawn, f"sleep 60 > {fifo} &")
    with fifo.open() as reading:
        assert handler.proc.wait(timeout=30) == 0
        handler.close()
        assert reading.read() == ""


def test_closing_again_is_harmless() -> None:
    handler = start(rankspawn, "exit 0")
    handler.proc.wait(timeout=30)
    handler.close()
    handler.close(signal.SIGKILL)


def test_closing_again_is_harmless_for_a_process_of_a_subclass() -> None:
    class Own(rankspawn.SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            return subprocess.Popen(args, env=env, start_new_session=True)

    handler = Own(SH, ("-c", "exec sleep 60"), {}, None, None, 0, None)
    handler.close()
    assert handler.proc.wait(timeout=30) == -signal.SIGTERM
    handler.close()


# ---- binding ------------------------------------------------------------------------------------------------------


def shown_binding(handler: Any, out: Path) -> tuple[str, str]:
    assert finish(handler) == 0
    cpus, policy = out.read_text().splitlines()
    return cpus.split("\t")[1], policy.split()[1]


SHOW = "grep Cpus_allowed_list /proc/self/status; head -n 1 /proc/self/numa_maps"


def test_node_binding(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = NumaOptions(AffinityMode.NODE, memory_policy="bind")
    handler = start(rankspawn, SHOW, stdout=str(out), numa_options=options)
    report = handler.proc.binding_report
    assert report.requested is not None
    assert report.requested.cpus is not None
    assert report.requested.cpus <= os.sched_getaffinity(0)
    cpus, policy = shown_binding(handler, out)
    assert cpus == rankspawn._binding.format_ids(report.requested.cpus)
    assert policy == str(report.requested.memory)


def test_ranks_of_a_machine_without_devices_are_dealt_over_it() -> None:
    """Mode exclusive divides by LOCAL_WORLD_SIZE, which torch's agent sets; torch itself raises without a GPU."""
    cores = min(2, len(os.sched_getaffinity(0)))
    options = NumaOptions(AffinityMode.EXCLUSIVE)
    seen = []
    for rank in range(cores):
        env = {"LOCAL_WORLD_SIZE": str(cores)}
        handler = start(rankspawn, "exit 0", env=env, local_rank_id=rank, numa_options=options)
        seen.append(handler.proc.binding_report.requested.cpus)
        finish(handler)
    assert set.intersection(*map(set, seen)) == set() or cores == 1


def test_torchs_own_options_are_taken(tmp_path: Path) -> None:
    binding = pytest.importorskip("torch.numa.binding")
    options = binding.NumaOptions(affinity_mode=binding.AffinityMode.EXCLUSIVE)
    handler = start(rankspawn, SHOW, stdout=str(tmp_path / "out"), numa_options=options)
    assert handler.proc.binding_report.requested.memory is None
    shown_binding(handler, tmp_path / "out")


def test_binding_applies_when_a_subclass_starts_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock Popen's child is bound from birth, and the caller is unchanged (the autouse fixture checks that)."""
    cpu = max(os.sched_getaffinity(0))
    wanted = Binding({cpu}, MemoryPolicy("interleave", {0}))
    monkeypatch.setattr(_handler, "binding_for", lambda *_: wanted)

    class Own(rankspawn.SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            return subprocess.Popen(args, env=env, stdout=self._stdout, start_new_session=True)

    out = tmp_path / "out"
    handler = Own(SH, ("-c", SHOW), {}, str(out), None, 0, None)
    assert shown_binding(handler, out) == (str(cpu), "interleave:0")


def test_cpus_from_birth_without_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = max(os.sched_getaffinity(0))
    monkeypatch.setattr(_handler, "binding_for", lambda *_: Binding({cpu}))
    monkeypatch.setattr("rankspawn._start.popen.mechanisms", lambda: ())
    for number in range(100):
        out = tmp_path / str(number)
        look = ("-c", "grep Cpus_allowed_list /proc/self/status")
        handler = rankspawn.SubprocessHandler(SH, look, {}, str(out), None, number)
        assert handler.proc.wait() == 0
        handler.close()
        assert out.read_text().split()[1] == str(cpu)


def test_errors_of_a_subclass_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_handler, "binding_for", lambda *_: Binding({5000}))

    class Own(rankspawn.SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            raise AssertionError("not reached: the binding is refused first")

    with pytest.raises(rankspawn.BindingError, match="sched_setaffinity"):
        Own(SH, (), {}, None, None, 0, None)


def test_falling_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from rankspawn._place import plan as _placement

    _handler._plan.cache_clear()

    def impossible(*_: Any, **__: Any) -> Any:
        raise PlacementError("no such place")

    monkeypatch.setattr(_placement, "plan", impossible)
    with pytest.raises(PlacementError, match="no such place"):
        start(rankspawn, "exit 0", numa_options=NumaOptions(AffinityMode.NODE))
    with caplog.at_level(logging.WARNING, "rankspawn"):
        fall_back = NumaOptions(AffinityMode.NODE, should_fall_back_if_binding_fails=True)
        handler = start(rankspawn, "exit 0", numa_options=fall_back)
    assert finish(handler) == 0
    assert "local rank 0 starts unbound" in caplog.text


def test_refused_policy_is_said_when_falling_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_handler, "binding_for", lambda *_: Binding(None, MemoryPolicy("bind", {900}), required=False))
    with caplog.at_level(logging.WARNING, "rankspawn"):
        handler = start(rankspawn, "exit 0")
    assert finish(handler) == 0
    assert "runs without set_mempolicy: Invalid argument" in caplog.text


def test_refused_policy_is_said_once_when_a_subclass_adds_to_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel refuses the policy to the thread that calls _popen, and to the child that our Popen starts there."""
    monkeypatch.setattr(_handler, "binding_for", lambda *_: Binding(None, MemoryPolicy("bind", {900}), required=False))

    class Own(rankspawn.SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            if self.local_rank_id == 0:
                return super()._popen(args, {**env, "ADDED": "yes"})
            return rankspawn.Popen(args, env=env, start_new_session=True)

    for rank in range(2):
        with caplog.at_level(logging.WARNING, "rankspawn"):
            handler = Own(SH, ("-c", "exit 0"), {}, None, None, rank, None)
        assert finish(handler) == 0
        assert caplog.messages == [f"local rank {rank} runs without set_mempolicy: Invalid argument"]
        caplog.clear()


def test_ten_ranks_at_once() -> None:
    handlers = [start(rankspawn, "exec sleep 60", local_rank_id=n) for n in range(10)]
    for handler in handlers:
        handler.close()
    deadline = time.monotonic() + 30
    assert [handler.proc.wait(timeout=deadline - time.monotonic()) for handler in handlers] == [-signal.SIGTERM] * 10
