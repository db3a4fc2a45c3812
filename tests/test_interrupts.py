"""Ctrl-C at any instruction: of a launch, of a group's end. Nothing of it is left, and the interrupt arrives."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dis import opname
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import rankspawn
from rankspawn import RankGroup, launch
from rankspawn._end.deferral import Deferral
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.processes import PATIENCE, eventually, has_ended

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
]

OURS = str(Path(rankspawn.__file__).parent)

# No handler of a signal runs before these: the interpreter does not look for signals there. An exception of a tracer
# that comes there is fatal to `except`: the interpreter takes the handled exception for the current one for ever, which
# keeps what its traceback holds. (`except` begins with the first, and ends with the second; the third is behind its
# comparison, from Python 3.14 on.)
NEVER_BEFORE = ("PUSH_EXC_INFO", "POP_EXCEPT", "NOT_TAKEN")


class Interrupt:
    """While it is set, Ctrl-C comes before the given instruction of our code, counted from 0, or the next possible."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.came = False

    def __enter__(self) -> Interrupt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not self.came:
            self.left -= 1
            if self.left < 0 and opname[frame.f_code.co_code[frame.f_lasti]] not in NEVER_BEFORE:
                self.came = True
                signal.raise_signal(signal.SIGINT)
        return self._trace


def start(folder: Path) -> RankGroup:
    # What the rank has started leads a process group of its own, and the rank waits for it.
    code = "import os\nif os.fork() == 0: os.setpgid(0, 0)\nimport time; time.sleep(1000)"
    return launch([sys.executable, "-I", "-S", "-c", code], 1, tee=True, guard=True, grace=0.0, env={"LANG": "C"})


def state() -> tuple[set[str], list[str], list[str]]:
    """Open files, children, and temporary folders of logs."""
    fds = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            fds.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            continue
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return fds, children, sorted(os.listdir(os.environ["TMPDIR"]))


def interrupted(work: Callable[[], object], at: int) -> bool:
    """Do the work with an interrupt at that instruction; whether it came before the work was done."""
    interrupt = Interrupt(at)
    try:
        with interrupt:
            work()
    except KeyboardInterrupt:
        assert interrupt.came
    else:
        assert not interrupt.came, "the interrupt was lost"
    return interrupt.came


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    # The hundreds of collections of a test need not look at all objects of the tests before it.
    gc.collect()
    gc.freeze()
    yield tmp_path
    gc.unfreeze()


# Until the end has taken the handlers, an interrupt finds a group that is open: of the first instructions.
FIRST = 400
# A number that shares no factor with the lengths of loops.
STEP = 401 if os.environ.get("RANKSPAWN_LONG", "0") in ("", "0") else 13


@pytest.mark.filterwarnings("ignore:a group of ranks was not closed:ResourceWarning")
def test_at_any_instruction_of_a_launch(folder: Path) -> None:
    start(folder).close()
    before = state()
    at = 0
    while True:
        group: list[RankGroup] = []
        came = interrupted(lambda group=group: group.append(start(folder)), at)  # type: ignore[misc]
        for one in group:
            one.close()
        del group
        gc.collect()
        assert state() == before, f"instruction {at}"
        if not came:
            return
        at += STEP


@pytest.mark.filterwarnings("ignore:a group of ranks was not closed:ResourceWarning")
@pytest.mark.parametrize("end", ["close", "terminate", "kill"])
def test_at_any_instruction_of_the_end(folder: Path, end: str) -> None:
    start(folder).close()
    before = state()
    at = 0
    while True:
        group = start(folder)
        (rank,) = group.pids()
        came = interrupted(getattr(group, end), at)
        if end == "close":
            assert group.is_closed or at < FIRST, f"instruction {at}"
        group.close()
        assert has_ended(rank)
        del group
        gc.collect()
        assert state() == before, f"instruction {at}"
        if not came:
            return
        at += STEP


MANY = """
import os, signal, subprocess, sys, time
from rankspawn import launch
script = "trap '' TERM INT; set -m; sleep 1000 & sleep 1000"
group = launch(["/bin/sh", "-c", script], 4, tee=True, guard=True, grace=30)
time.sleep(0.3)
print(*group.pids(), flush=True)
came = 0
def rounds():
    global came
    try:
        with group:
            sys.stdin.readline()
    except KeyboardInterrupt:
        came += 1
try:
    rounds()
    time.sleep(0.1)
except KeyboardInterrupt:
    came += 1
print("closed" if group.is_closed else "open", came > 0, flush=True)
"""


def test_many_interrupts_one_millisecond_apart(folder: Path) -> None:
    """As from a key that is held down: the first ends the grace, and none gets past what ends the ranks."""
    for _ in range(5):
        program = subprocess.Popen(
            [sys.executable, "-c", MANY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )
        with program:
            assert program.stdin is not None and program.stdout is not None
            pids = [int(pid) for pid in program.stdout.readline().split()]
            for _ in range(15):
                program.send_signal(signal.SIGINT)
                time.sleep(0.001)
            said = program.stdout.read()
            program.stdin.close()
            assert program.wait(PATIENCE) in (0, 1, -signal.SIGINT)
        assert said in ("closed True\n", ""), said
        assert len(pids) == 4
        eventually(lambda pids=pids: all(map(has_ended, pids)))  # type: ignore[misc]
        assert not [name for name in os.listdir(folder) if name.startswith("rankspawn")]


def test_a_handler_that_looks_at_any_instruction_of_the_first_wait_loses_no_rank() -> None:
    """Both looks register the ranks' pidfds."""
    at, came = 0, True
    while came:
        came, left = False, at

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal came, left
            if not frame.f_code.co_filename.endswith("/_end/watch.py"):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and not came:
                left -= 1
                if left < 0:
                    came = True
                    group.poll()
            return trace

        with launch(["sleep", "1000"], 2, guard=False, keep_going=True) as group:
            sys.settrace(trace)
            try:
                group._watch._register()
            finally:
                sys.settrace(None)
            for rank in group.ranks:
                rank.kill()
            assert group.wait(PATIENCE) == (-signal.SIGKILL, -signal.SIGKILL), f"at instruction {at}"
        at += 1
    assert at > 20


def test_handlers_run_when_the_block_is_over() -> None:
    came: list[tuple[int, bool]] = []
    inside = True

    def handler(sig: int, frame: FrameType | None) -> None:
        came.append((sig, frame is not None))
        assert not inside
        if sig == signal.SIGUSR2:
            raise ZeroDivisionError

    before = [signal.signal(sig, handler) for sig in (signal.SIGUSR1, signal.SIGUSR2)]
    try:
        with pytest.raises(ZeroDivisionError), Deferral():
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR1)
            with Deferral():
                signal.raise_signal(signal.SIGUSR1)
            assert not came
            inside = False
        assert sorted(came) == [(signal.SIGUSR1, True), (signal.SIGUSR2, True)]
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        for sig, old in zip((signal.SIGUSR1, signal.SIGUSR2), before, strict=True):
            signal.signal(sig, old)
