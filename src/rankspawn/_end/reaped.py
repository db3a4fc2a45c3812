"""Processes left in the sessions of ranks that other code reaped (an ignored SIGCHLD, os.waitpid(-1) in a handler).

The leader does not hold the session's number any more, and another process may have it. A process of that session is
known to be the rank's by two things:

 -  No process has the number as its pid. The kernel gives it to no process while the session has a member (free_pid in
    kernel/pid.c): where a process has it, the session had become empty before.
 -  The environment that the process was executed with has the mark of the ranks' launch: a variable that no stranger
    has with that value.

A warm rank's forked children, and processes that were executed without the variable (``env -i``), cannot be told from
strangers like this. The guard knows them, because it has watched the session since the rank began.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import partial

from .. import _procfs
from .sessions import members
from .without import signal_one

TYPE_CHECKING = False  # typing's own costs more than this module

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

_PAUSE = 0.02  # seconds between two looks, while the killed processes end


def members_by_mark(numbers: Set[int], mark: str) -> tuple[dict[int, int], dict[int, int]]:
    """The processes that live in sessions with these numbers, whose leaders have been reaped: pid -> session.

    Args:
        numbers: The sessions.
        mark: NAME=VALUE, in the environment of all that the ranks have executed.

    Returns:
        Those that are known to be the ranks', and those that may be strangers'.
    """
    held = {number for number in numbers if _procfs.is_gone(number)}
    found = members(held) if held else {}
    # Who is about to end has no environment any more, is waited for, and gets no signal.
    own = {pid for pid in found if _has(pid, mark) or _ends(pid)}
    # Again: a stranger may have got the number during the search.
    found = {pid: number for pid, number in found.items() if _procfs.is_gone(number) and not _procfs.is_gone(pid)}
    return (
        {pid: number for pid, number in found.items() if pid in own},
        {pid: number for pid, number in found.items() if pid not in own},
    )


def signal_by_mark(found: dict[int, int], mark: str, signals: Sequence[int]) -> None:
    """Signal those that members_by_mark() has found, each if it is still the same process."""
    for pid, number in found.items():
        with suppress(OSError):  # it has ended, or may not be signalled
            signal_one(pid, number, signals, only_if=partial(_has, pid, mark))


def kill_by_mark(numbers: Set[int], mark: str, seconds: float) -> tuple[dict[int, int], dict[int, int]]:
    """Kill the processes known to be the ranks', again and again, until none is left or ``seconds`` have passed.

    Returns:
        As members_by_mark(): those that do not end, and those that may be strangers', which get no signal.
    """
    from .ranks import SIGKILL

    until = time.monotonic() + seconds
    while True:
        own, unknown = members_by_mark(numbers, mark)
        if unknown:
            time.sleep(_PAUSE)  # in the middle of an execve(2), a process has no environment
            own, unknown = members_by_mark(numbers, mark)
        if not own or time.monotonic() > until:
            return own, unknown
        signal_by_mark(own, mark, (SIGKILL,))
        time.sleep(_PAUSE)


def _ends(pid: int) -> bool:
    """Whether a process has ended, or is about to: its environment goes first."""
    try:
        stat = _procfs.read_stat(_procfs.folder(pid))
    except OSError:
        return _procfs.is_gone(pid)
    return stat.ending and stat.threads <= 1


def _has(pid: int, mark: str) -> bool:
    """Whether a process was executed with that variable. Another user's environment cannot be read."""
    with suppress(OSError), open(f"{_procfs.folder(pid)}/environ", "rb") as file:
        return os.fsencode(mark) in file.read().split(b"\0")
    return False
