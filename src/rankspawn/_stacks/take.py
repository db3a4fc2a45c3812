"""The stacks of all processes of all ranks at once, within a limited time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

from .._public import public
from .facts import Frame, Process, Thread
from .fold import as_text, fold
from .kernel import command_of, processes_below, python_of, threads_of, why_refused
from .spy import INSTALL, dump_all, find
from .unwinder import can_read, frames_of

SECONDS = 2.0
"""How many seconds a look may take."""


@public
class Stacks:
    """A look at the processes of a job. ``str(look)`` is all that was seen, as text.

    Attributes:
        taken_at: When, in seconds since the epoch.
        because: The reason for the look, as text.
        seconds: How long it took.
        processes: What was seen; for each rank its own process first, and then those that it started.
        notes: What could not be seen, why, and what to do; each once.
    """

    def __init__(
        self,
        taken_at: float,
        because: str,
        seconds: float,
        processes: tuple[Process, ...],
        notes: tuple[str, ...] = (),
    ) -> None:
        self.taken_at = taken_at
        self.because = because
        self.seconds = seconds
        self.processes = processes
        self.notes = notes

    @property
    def folded(self) -> str:
        """Where each rank is, in one line; ranks that are at the same place are named together."""
        return fold(self.processes)

    def __str__(self) -> str:
        return as_text(self.taken_at, self.because, self.seconds, self.processes, self.notes)


def take(ranks: Mapping[int, int | None], because: str, seconds: float = SECONDS, proc: str = "/proc") -> Stacks:
    """Look at processes and at all that they have started. No process gets a signal.

    The look first asks the kernel about all of them. Then it reads Python frames, with the standard library if this
    interpreter can, else with py-spy; the ranks' own processes come before those that they have started.

    Args:
        ranks: The RANK that each process belongs to, or None, by pid.
        because: The reason for the look; it is part of the text.
        seconds: How long it may take. Processes that come too late have only what the kernel says.
        proc: Where procfs is mounted.
    """
    began, taken_at = time.monotonic(), time.time()
    seen: dict[int, Process] = {}
    pythons: dict[int, int] = {}
    refused = False
    below = processes_below(ranks, proc)
    if not os.path.isdir(f"{proc}/self"):
        return Stacks(taken_at, because, 0.0, (), (f"there is no {proc}, which stacks are read from",))
    for root, pids in below.items():
        for pid in pids:
            try:
                if (minor := python_of(pid, proc)) is not None:
                    pythons[pid] = minor
            except PermissionError:
                refused = True
            threads = threads_of(pid, all_details=pid not in pythons, proc=proc)
            if threads:
                seen[pid] = Process(pid, ranks[root], command_of(pid, proc), threads)
    first = [pid for pid in seen if pid in pythons and pid in ranks]
    order = first + [pid for pid in seen if pid in pythons and pid not in ranks]
    problem, refused_too = _add_frames(seen, order, pythons, began + seconds)
    notes = [problem] if problem else []
    if refused or refused_too:
        notes.append(f"Python stacks could not be read: the kernel refuses it ({why_refused(proc)})")
    return Stacks(taken_at, because, time.monotonic() - began, tuple(seen.values()), tuple(notes))


def can_look(proc: str = "/proc") -> bool:
    """Whether this system has what a look needs."""
    return sys.platform == "linux" and os.path.isdir(f"{proc}/self")


def add_to(path: str | os.PathLike[str], found: Stacks) -> None:
    """Add the text of a look to a file. If that fails (a full disk), the look's notes say why."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        with open(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{found}\n")
    except OSError as error:
        found.notes = (*found.notes, f"{os.fspath(path)}: {error.strerror}")


def _add_frames(
    seen: dict[int, Process], order: list[int], pythons: Mapping[int, int], until: float
) -> tuple[str, bool]:
    """Read these processes' Python frames into ``seen``. Returns why some have none, and if the kernel refused."""
    refused = False
    others = []
    for pid in order:
        if not can_read(pythons[pid]):
            others.append(pid)
            continue
        try:
            seen[pid] = _with_frames(seen[pid], frames_of(pid), f"Python 3.{pythons[pid]}")
        except PermissionError:
            refused = True
        except (OSError, RuntimeError, ValueError) as error:
            others.append(pid)
            seen[pid] = seen[pid].replace(problem=f"{error}")
    program = find() if others else None
    late = set(others)
    if program is not None:
        try:
            for pid, dump in dump_all(program, [seen[pid] for pid in others], until):
                late.discard(pid)
                refused = refused or dump.refused
                if dump.problem:
                    seen[pid] = seen[pid].replace(problem=dump.problem)
                else:
                    seen[pid] = _with_frames(seen[pid], dump.frames, "py-spy")
        except OSError as error:
            return f"py-spy cannot be started: {error}", refused
    if others and program is None:
        return f"Python stacks could not be read: {INSTALL}", refused
    if late:
        return f"no time was left to look at {len(late)} of {len(order)} Python processes", refused
    return "", refused


def _with_frames(process: Process, frames: Mapping[int, tuple[Frame, ...]], by: str) -> Process:
    """The process, with the frames of each of its threads."""
    known = {thread.tid for thread in process.threads}
    threads = [thread.replace(frames=frames.get(thread.tid, ())) for thread in process.threads]
    threads += [Thread(tid, "", "", frames=found) for tid, found in frames.items() if tid not in known]
    return process.replace(threads=tuple(threads), by=by, problem="")
