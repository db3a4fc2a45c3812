"""A look at processes as one line, and as text."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence

from .._ids import format_ids
from .facts import Frame, Process, Thread

_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in uninterruptible sleep",
    "T": "stopped",
    "t": "stopped by a debugger",
    "I": "idle",
    "Z": "ended",
    "X": "ended",
}

# Files of the interpreter and of installed packages: the last call outside of them is the program's own.
_LIBRARY = re.compile(r"/(?:site|dist)-packages/|/lib(?:64)?/(?:python|pypy)3|^<frozen ")


def fold(processes: Iterable[Process]) -> str:
    """Where each rank is: "7 ranks (0-2,4-7): in all_reduce, train.py:88; rank 3: in DataLoader, data.py:41"."""
    by_rank: dict[int | None, list[Process]] = {}
    for process in processes:
        by_rank.setdefault(process.rank, []).append(process)
    places: dict[str, list[int]] = {}
    for rank, its in by_rank.items():
        # A wrapper waits for its child, and the child's stack says more.
        telling = next((process for process in its if process.has_frames), None) or next(
            (process for process in its if process.threads[0].call not in ("wait4", "waitid")), its[0]
        )
        place = place_of(telling)
        if rank is not None:
            places.setdefault(place, []).append(rank)
        else:
            places.setdefault(f"process {telling.pid}: {place}", [])
    told = []
    for place, ranks in sorted(places.items(), key=lambda one: (-len(one[1]), one[1])):
        who = f"{len(ranks)} ranks ({format_ids(ranks)}): " if len(ranks) > 1 else f"rank {ranks[0]}: " if ranks else ""
        told.append(who + place)
    return "; ".join(told)


def place_of(process: Process) -> str:
    """Where the first thread of a process is, in a few words."""
    first = process.threads[0]
    if not first.frames:
        return where_in_kernel(first)
    inner = next((number for number, frame in enumerate(first.frames) if not is_library(frame)), 0)
    own = first.frames[inner]
    what = first.frames[inner - 1] if inner else own
    return f"in {what.function}, {os.path.basename(own.file)}:{own.line}"


def is_library(frame: Frame) -> bool:
    """Whether a frame is the interpreter's or an installed package's, and not the program's own."""
    return _LIBRARY.search(frame.file) is not None


def where_in_kernel(thread: Thread) -> str:
    """What the kernel says about a thread: "sleeping in read (pipe_read)"."""
    state = _STATES.get(thread.state, f"in state {thread.state}")
    if thread.call:
        return f"{state} in {thread.call}" + (f" ({thread.wchan})" if thread.wchan else "")
    return state + (f" in the kernel's {thread.wchan}" if thread.wchan else "")


def as_text(
    taken_at: float, because: str, seconds: float, processes: Sequence[Process], notes: Sequence[str] = ()
) -> str:
    """All that was seen, for people: lines of text, each with its newline."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(taken_at))
    lines = [f"stacks of {when} ({because}), taken in {seconds:.2f} s", *notes]
    for process in processes:
        whose = "" if process.rank is None else f"rank {process.rank}, "
        lines += ["", f"{whose}process {process.pid}: {process.command}"]
        lines += [f"  {process.problem}"] if process.problem else []
        for thread in process.threads:
            if thread.state and not thread.frames and process.has_frames and thread.tid != process.pid:
                continue  # the threads of libraries, which run no Python
            said = where_in_kernel(thread) if thread.state else "seen by " + process.by
            lines.append(f"  thread {thread.tid}" + (f" ({thread.name})" if thread.name else "") + f", {said}")
            lines += [f"    {frame.function} ({frame.file}:{frame.line})" for frame in thread.frames]
            lines += [f"    [kernel] {function}" for function in thread.kernel] if not thread.frames else []
    return "".join(f"{printable(line)}\n" for line in lines)


def printable(line: str) -> str:
    """A line without characters that a terminal would obey, such as ESC: they are written "\\x1b"."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
