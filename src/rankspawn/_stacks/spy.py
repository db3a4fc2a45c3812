"""Python frames by py-spy (``pip install "rankspawn[stacks]"``), with one py-spy process for each process to look at.

py-spy knows every Python from 2.7 on. It can stop a process by ptrace(2) for the milliseconds of its look, so that the
stacks of threads that run are consistent.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO, Any

from .._frozen import Frozen
from .._start.engine import mechanisms
from .._start.popen import Popen
from .facts import Frame, Process
from .kernel import state_of

INSTALL = 'pip install "rankspawn[stacks]" installs py-spy, which reads the Python stacks'


class Dump(Frozen):
    """What py-spy found in one process.

    Attributes:
        frames: The calls of each thread, by its number; the innermost call first.
        refused: Whether this process may not look into that one.
        problem: Why there are no frames, or "".
    """

    frames: dict[int, tuple[Frame, ...]]
    refused: bool = False
    problem: str = ""


def find() -> str | None:
    """The path of py-spy: the one beside this interpreter, else the one on PATH."""
    beside = shutil.which("py-spy", path=os.path.dirname(sys.executable)) if sys.executable else None
    return beside or shutil.which("py-spy")


def dump_all(program: str, processes: Sequence[Process], until: float) -> Iterator[tuple[int, Dump]]:
    """Look at processes, a few at a time.

    py-spy does not stop a process whose first thread sleeps, because its stack does not change, nor a process that
    cannot be stopped, because a thread is in uninterruptible sleep or a debugger holds it.

    Args:
        program: py-spy's path.
        processes: The processes, with what the kernel says about them, the most important first.
        until: When to give up, in seconds of time.monotonic(). Looks that are not done by then are left out.
    """
    waiting = [(process, _may_run_on(process)) for process in reversed(processes)]
    at_once = max(4, 2 * (os.cpu_count() or 1))
    running: list[_Look] = []
    try:
        while (waiting or running) and time.monotonic() < until:
            while waiting and len(running) < at_once:
                running.append(_Look(program, *waiting.pop()))
            _wait_for_one(running, until)
            for look in [look for look in running if look.popen.poll() is not None]:
                running.remove(look)
                dump = look.result()
                if dump.problem and not dump.refused and look.runs_on and _can_be_stopped(look.process):
                    waiting.append((look.process, False))  # another thread ran, and changed what was read
                else:
                    yield look.process.pid, dump
    finally:
        for look in running:
            look.give_up()


class _Look:
    """py-spy while it looks at one process.

    Args:
        program: py-spy's path.
        process: The process.
        runs_on: Whether the process keeps running during the look; False stops it.
    """

    def __init__(self, program: str, process: Process, runs_on: bool) -> None:
        self.process, self.runs_on = process, runs_on
        self._output = _new_file()
        command = [program, "dump", "--json", *(["--nonblocking"] if runs_on else []), "--pid", str(process.pid)]
        try:
            self.popen = Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                die_with_parent=sys.platform == "linux" and bool(mechanisms()),
            )
        except BaseException:
            self._output.close()
            raise

    def result(self) -> Dump:
        """What it found, once it has ended."""
        with self._output:
            self._output.seek(0)
            return _read(self._output.read().decode(errors="replace"), self.popen.returncode)

    def give_up(self) -> None:
        """End it. The process that it looked at keeps running."""
        self.popen.kill()
        self.popen.wait()
        self._output.close()
        # The kernel lets go of what a tracer held that has ended. A SIGSTOP that was on its way then still arrives.
        if not self.runs_on and state_of(self.process.pid) == "T":
            with suppress(OSError):
                os.kill(self.process.pid, signal.SIGCONT)


def _may_run_on(process: Process) -> bool:
    return process.threads[0].state != "R" or not _can_be_stopped(process)


def _can_be_stopped(process: Process) -> bool:
    return not any(thread.state in "DTt" for thread in process.threads)


def _wait_for_one(running: Sequence[_Look], until: float) -> None:
    """Sleep until one has ended, or the time is over."""
    poller = select.poll()
    for look in running:
        if look.popen.pidfd is not None:
            poller.register(look.popen.pidfd, select.POLLIN)
    blind = any(look.popen.pidfd is None for look in running)
    left = max(0.0, until - time.monotonic())
    poller.poll(1000 * (min(left, 0.01) if blind else left))


def _new_file() -> IO[bytes]:
    """A file without a name for py-spy's output, so that py-spy never waits for a reader."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("py-spy"), "w+b")
    import tempfile

    return tempfile.TemporaryFile()


def _read(text: str, returncode: int) -> Dump:
    if returncode:
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [f"py-spy ended with {returncode}"]
        refused = any(word in text for word in ("Permission denied", "Operation not permitted", "EPERM", "EACCES"))
        return Dump({}, refused, "py-spy: " + "; ".join(line.removeprefix("Error: ") for line in lines[:3]))
    try:
        # What py-spy says to stderr, if anything, stands before its JSON.
        threads: list[Any] = json.loads(text[text.index("[\n") if "[\n" in text else text.index("[") :])
        frames = {
            int(thread["os_thread_id"] or thread["pid"]): tuple(
                [Frame(one["name"], one["filename"], int(one["line"] or 0)) for one in thread["frames"]]
            )
            for thread in threads
        }
    except (ValueError, KeyError, TypeError) as error:
        return Dump({}, problem=f"py-spy's answer cannot be understood: {error!r}")
    return Dump(frames)
