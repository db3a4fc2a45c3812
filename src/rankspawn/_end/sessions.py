"""Finds the members of a session, and kills all of them.

A rank is started with setsid(2): it leads a session, whose number is the rank's own. The processes that it starts
are in that session until they call setsid themselves. A session cannot be signalled as a process group can, so its
members are found and signalled one by one, pass after pass, until a pass finds none.

Two things make that sound:

 -  A session's number stays taken for as long as the session has a member, zombies included (free_pid in the kernel's
    kernel/pid.c). Looking is safe as long as its leader has not been reaped, or a member is known to exist. The
    callers of these functions ensure that.
 -  A pass that finds no member proves nothing if a process ended during it, because that process may have forked
    after /proc was listed. Then there is another pass. (A process that only forks and ends escapes most passes.)
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress

from .._procfs import depth, folder, line, read_stat, session
from . import way as _way

TYPE_CHECKING = False  # typing's own costs more than this module

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

# Between two passes: the time in which a killed process ends, and one that has much memory to free.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1

_NOBODY: frozenset[int] = frozenset()


def members(sessions: Set[int], ended: Set[int] = _NOBODY, *, kill: bool = False) -> dict[int, int]:
    """The processes that live in these sessions, leaders included: pid -> session. Zombies do not live.

    A pass over all processes takes a system call for each, and a few more for each member. Windows has no sessions:
    there, psutil finds the trees below these processes.

    Args:
        sessions: Their numbers.
        ended: Leaders that have been seen to end; they are skipped.
        kill: Send SIGKILL to each as soon as it is found, because it could fork and end before the pass is over.

    Where procfs hides processes (hidepid, proc(5)), set-user-ID programs are not found. Where no procfs is mounted, the
    engine tries every number that a process can have; without the engine only leaders are found.
    """
    return _way.way.members(sessions, ended, kill)  # type: ignore[no-any-return]


def kill_members(
    sessions: Set[int], timeout: float, ended: Set[int] = _NOBODY, found: dict[int, int] | None = None
) -> dict[int, int]:
    """End every process of these sessions by SIGKILL.

    A process that has called setsid itself is not found: only a cgroup holds it.

    Args:
        sessions: As for members().
        timeout: How many seconds it may take.
        ended: As for members().
        found: What members() returned, if it was called after the leaders ended.

    Returns:
        Those that are left: pid -> session; normally none. describe_stuck() says what keeps one.
    """
    way, until = _way.way, time.monotonic() + timeout
    # No rank has these numbers; to killpg they are this process's own group, and every process there is.
    sessions = sessions - {0, 1}
    pause = _FIRST_PAUSE
    if found is None:
        way.kill_groups(sessions)
        found = members(sessions, ended, kill=True)
    while found and (left := until - time.monotonic()) > 0:
        way.kill_groups(sessions)
        way.kill_found(found, min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)
        found = members(sessions, ended, kill=True)
    return found


def signal_members(sessions: Set[int], signals: Sequence[int], *, groups: bool = False) -> None:
    """Signal the members of these sessions that the leaders' process groups do not hold.

    One pass finds them. A SIGSTOP takes passes until one finds no new member, because a stopped process starts none.
    Each gets the signals through a pidfd of its own, after its session has been checked again. Another user's process,
    which may not be signalled, gets none.

    Args:
        sessions: The numbers of the sessions, which are the leaders' own; as for members().
        signals: What each gets, in this order.
        groups: Whether to signal those in the leaders' process groups, too, except the leaders.
    """
    if sessions:
        _way.way.signal_members(sessions, signals, groups)


def signal_one(pid: int, session: int, signals: Sequence[int]) -> None:
    """Signal a process if it is still a member of ``session``.

    Raises:
        OSError: It has ended, or may not be signalled.
    """
    from .without import signal_one as signal_by_pidfd

    signal_by_pidfd(pid, session, signals)


def why_blind(leader: int, proc: str = "/proc") -> str:
    """Why the members of a session cannot be found on this system; "" where they can be.

    Args:
        leader: The session's leader, which has not been reaped.
        proc: Where procfs is mounted.
    """
    if not hasattr(os, "getsid"):
        return ""
    try:
        os.getsid(leader)
    except ProcessLookupError:
        return ""
    except OSError as error:
        try:
            session(leader, proc)
        except OSError:
            return f"getsid: {error.strerror}, and {proc} does not say either which session a process belongs to"
    if _way.way.__name__.endswith("without") and sys.platform == "linux" and depth(proc) == 0:
        return f"{proc} does not list the processes of this PID namespace, and without its engine rankspawn needs that"
    return ""


def ignores(pid: int, sig: int, proc: str = "/proc") -> bool:
    """Whether a process ignores a signal (proc(5)); True where that is not known."""
    try:
        mask = int(line(f"{folder(pid, proc)}/status", "SigIgn:"), 16)
    except ValueError:
        return True
    return bool(mask >> (sig - 1) & 1)


def describe_left(pid: int, proc: str = "/proc") -> str:
    """A process that is left alone: its number and name."""
    with suppress(OSError):
        return f"process {pid} ({read_stat(folder(pid, proc)).name})"
    return f"process {pid}"


def describe_stuck(pid: int, proc: str = "/proc") -> str:
    """Why a process has not ended after SIGKILL, or why its end is not reported: a sentence without full stop."""
    try:
        stat = read_stat(folder(pid, proc))
    except OSError:
        return f"process {pid}: its state cannot be read"
    who = f"process {pid} ({stat.name})"
    if stat.state in "ZX":
        tracer = line(f"{folder(pid, proc)}/status", "TracerPid:")
        if tracer not in ("", "0"):
            return f"{who} has ended, but process {tracer}, which traces it, has not waited for it"
        return f"{who} has ended, but was not reaped"
    try:
        os.kill(pid, 0)
    except PermissionError:
        return f"{who} runs as another user: this user may not signal it"
    except OSError:
        return f"{who} has ended"
    where = line(f"{folder(pid, proc)}/wchan")
    where = f" in the kernel's {where}" if where not in ("", "0") else ""
    if stat.state == "D":
        return f"{who} is in uninterruptible sleep{where}: it ends when the kernel lets go of it"
    return f"{who} is in state {stat.state}{where}"
