"""The work on many ranks and processes without the engine's C; _end.pxi has the same functions.

A "rank" here is a Popen that leads a session of its own.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .. import _procfs
from .._start.ending import wait_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence, Set

    from .._start.popen import Popen

_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has one way to end a process, named SIGTERM

# Where thousands of processes come and go, one ends during every pass.
_MOST_PASSES = 100


# ---- ranks ----------------------------------------------------------------------------------------------------------


def look(ranks: Sequence[Popen]) -> list[int | None]:
    """How ranks have ended, without reaping them. For systems with waitid(2).

    It asks by pidfd where it can, because a number may be another child's by now.

    Returns:
        For each, the status as from waitpid(2); None: it runs; -1: other code has reaped it.
    """
    return [_see(rank, os.WNOWAIT) for rank in ranks]


def await_ends(ranks: Sequence[Popen], seconds: float) -> None:
    """Wait until all that have a pidfd have ended, or ``seconds`` have passed; a signal may end the wait."""
    until = time.monotonic() + seconds
    for rank in ranks:
        pidfd = rank._pidfd
        if pidfd is not None and not _procfs.wait(pidfd.fd, until - time.monotonic()):
            return


def collect(ranks: Sequence[Popen]) -> list[tuple[int | None, tuple[Any, ...]]]:
    """Reap the ranks that have ended. The caller holds the locks that Popen has for that.

    Returns:
        For each, what look() returns, and what the rank used as the fields of resource.struct_rusage (empty if
        unknown).
    """
    collected: list[tuple[int | None, tuple[Any, ...]]] = []
    for rank in ranks:
        try:
            # By its number: a look by the pidfd shows first that it is the rank's own.
            if rank.pidfd is not None and hasattr(os, "waitid") and _see(rank, os.WNOWAIT) == -1:
                raise ChildProcessError
            pid, status, usage = os.wait4(rank.pid, os.WNOHANG)
            collected.append((status, tuple(usage)) if pid else (None, ()))
        except ChildProcessError:
            collected.append((-1, ()))
    return collected


def _see(rank: Popen, options: int) -> int | None:
    try:
        return wait_status(rank.pid, rank._pidfd, options | os.WNOHANG)
    except ChildProcessError:
        return -1


def signal_groups(ranks: Iterable[Popen], signals: Sequence[int]) -> list[int]:
    """Signal the process groups of ranks. A group without members is no error.

    Returns:
        The pids of the ranks in whose groups this process may signal no process.
    """
    refused = []
    for rank in ranks:
        for sig in signals:
            try:
                rank.send_signal_group(sig)
            except ProcessLookupError:
                continue
            except PermissionError:
                refused.append(rank.pid)
                break
    return refused


# ---- sessions -------------------------------------------------------------------------------------------------------


def kill_groups(sessions: Iterable[int]) -> None:
    """Send SIGKILL to the process groups of the sessions' leaders, each as a whole: a fork under way in one fails."""
    for sid in sessions if hasattr(os, "killpg") else ():
        with suppress(OSError):  # it has no member, or none that we may signal
            os.killpg(sid, _KILL)


def members(sessions: Set[int], ended: Set[int], kill: bool, proc: str = "/proc") -> dict[int, int]:
    """As sessions.members()."""
    before = ended
    for _ in range(_MOST_PASSES):
        found, gone = _look(sessions, ended, proc, kill)
        if found or gone <= before:
            break
        before = gone
    return found


def are_empty(sessions: Set[int], ended: Set[int]) -> bool:
    """Whether sessions certainly have no living member; False where that cannot be found out.

    It is harmless if other code has reaped a leader meanwhile, because nothing is signalled.

    Args:
        sessions: Their numbers.
        ended: As for sessions.members().
    """
    return False  # this search cannot tell


def kill_found(found: Mapping[int, int], pause: float) -> None:
    """Send SIGKILL to these members, pid -> session, and wait at most ``pause`` seconds for their end."""
    pidfds: list[int] = []
    until = time.monotonic() + pause
    blind = False
    try:
        for pid, sid in found.items():
            pidfd = _procfs.open_pidfd(pid)
            if pidfd >= 0:
                pidfds.append(pidfd)
            try:
                # Looked at again: the pidfd is of this member, or of one that has ended since, which gets nothing.
                if not hasattr(os, "getsid") or _procfs.session(pid) == sid:
                    _signal(pid, pidfd, _KILL)
                    blind = blind or pidfd < 0
            except OSError:
                continue  # it has ended; or it is another user's, and stays
        for pidfd in pidfds:
            _procfs.wait(pidfd, until - time.monotonic())
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    if blind:
        time.sleep(max(0.0, until - time.monotonic()))


def signal_members(sessions: Set[int], signals: Sequence[int], groups: bool, proc: str = "/proc") -> None:
    """As sessions.signal_members()."""
    told: set[int] = set()
    more = bool(sessions) and hasattr(os, "getpgid")
    while more:
        more = False
        for pid in _all_or(sessions, proc):
            try:
                sid = _procfs.session(pid, proc)
                if sid in sessions and pid not in told and pid != sid and (groups or _procfs.group(pid, proc) != sid):
                    told.add(pid)
                    more = signal.SIGSTOP in signals
                    signal_one(pid, sid, signals)
            except OSError:
                continue  # it has ended


def signal_one(pid: int, session: int, signals: Iterable[int], only_if: Callable[[], bool] = lambda: True) -> None:
    """As sessions.signal_one(), but checked of the very process that gets the signals."""
    pidfd = _procfs.open_pidfd(pid)
    try:
        # The pidfd is of this member, or of one that has ended since, which gets nothing.
        if _procfs.session(pid) == session and only_if():
            for sig in signals:
                _signal(pid, pidfd, sig)
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _look(sessions: Set[int], ended: Set[int], proc: str, kill: bool) -> tuple[dict[int, int], set[int]]:
    """The members, and the processes that ended during the look or were zombies before."""
    if not hasattr(os, "getsid"):
        return _trees(sessions), set()
    found: dict[int, int] = {}
    gone: set[int] = set()
    for pid in _all_or(sessions, proc):
        try:
            sid = _procfs.session(pid, proc)
        except ProcessLookupError:
            gone.add(pid)
            continue
        except OSError:
            continue
        # If other code has reaped a leader, a member of another session may have its number by now.
        if sid in sessions and not (pid == sid and pid in ended):
            if kill:
                kill_found({pid: sid}, 0.0)
            if _procfs.has_ended(pid, proc):
                gone.add(pid)
            else:
                found[pid] = sid
    return found, gone


def _all_or(sessions: Set[int], proc: str) -> Iterable[int]:
    """All processes; or the leaders alone, where nothing lists the others."""
    found = _procfs.pids(proc)
    return sessions if found is None else found


def _signal(pid: int, pidfd: int, sig: int) -> None:
    if pidfd >= 0:
        try:
            return signal.pidfd_send_signal(pidfd, sig)
        except ProcessLookupError:
            return None
        except OSError:
            pass  # a seccomp profile refuses the call; or it is another user's, and kill(2) fails, too
    os.kill(pid, sig)


def _trees(leaders: Set[int]) -> dict[int, int]:
    import psutil

    found = {}
    for leader in leaders:
        try:
            process = psutil.Process(leader)
            found.update({one.pid: leader for one in (process, *process.children(recursive=True))})
        except psutil.NoSuchProcess:
            continue
    return found
