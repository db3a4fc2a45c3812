"""The members of a session, and how all of them are killed.

A rank is started with setsid(2): it leads a session, whose number is the rank's own, and what it starts is in that
session until it calls setsid itself. A session cannot be signalled as a process group can, so its members are
found and signalled one by one, pass after pass, until a pass finds none.

Two things make that sound:

 -  A session's number stays taken for as long as the session has a member, zombies included (free_pid in the kernel's
    kernel/pid.c). It is safe to look for as long as its leader has not been reaped, or a member is known to exist.
    The callers of these functions ensure that.
 -  A pass that finds no member proves nothing if a process ended during it, because that process may have forked
    after /proc was listed. Then there is another pass. (A process that only forks and ends escapes most passes.)

It imports nothing of ours.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

TYPE_CHECKING = False  # typing's own costs more than this module

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence, Set

_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has one way to end a process, named SIGTERM

# Between two passes: the time in which a killed process ends, and one that has much memory to free.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1

# Where thousands of processes come and go, one ends during every pass.
_MOST_PASSES = 100

_NOBODY: frozenset[int] = frozenset()


def members(
    sessions: Set[int], ended: Set[int] = _NOBODY, proc: str = "/proc", *, kill: bool = False
) -> dict[int, int]:
    """The processes that live in these sessions, leaders included: pid -> session. Zombies do not live.

    A pass over all processes takes a system call for each, and a few more for each member. Windows has no sessions:
    there, psutil finds the trees below these processes.

    Args:
        sessions: Their numbers.
        ended: Pids known to be zombies, the leaders' for example; they are skipped.
        proc: Where procfs is mounted. Where it is not, or is another PID namespace's, only leaders are found. Where it
            hides processes (hidepid, proc(5)), set-user-ID programs are not found.
        kill: SIGKILL to each when it is found; by the end of the pass it may have forked and ended.
    """
    before = ended
    for _ in range(_MOST_PASSES):
        found, gone = _look(sessions, ended, proc, kill)
        if found or gone <= before:
            break
        before = gone
    return found


def kill_members(
    sessions: Set[int],
    timeout: float,
    ended: Set[int] = _NOBODY,
    found: dict[int, int] | None = None,
    proc: str = "/proc",
) -> dict[int, int]:
    """End every process of these sessions by SIGKILL.

    A process that has called setsid itself is not found: only a cgroup holds it.

    Args:
        sessions: As for members().
        timeout: How many seconds it may take.
        ended: As for members().
        found: What members() has said, where it has been asked since the leaders ended.
        proc: As for members().

    Returns:
        Those that are left: pid -> session; normally none. describe_stuck() says what keeps one.
    """
    until = time.monotonic() + timeout
    # No rank has these numbers; to killpg they are this process's own group, and every process there is.
    sessions = sessions - {0, 1}
    for sid in sessions if hasattr(os, "killpg") else ():
        # The whole group of the leader at once: a fork that is under way in it fails, so no child escapes.
        try:
            os.killpg(sid, _KILL)
        except OSError:
            continue  # it has no member, or none that we may signal
    pause = _FIRST_PAUSE
    if found is None:
        found = members(sessions, ended, proc, kill=True)
    while found and (left := until - time.monotonic()) > 0:
        _kill(found, min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)
        found = members(sessions, ended, proc, kill=True)
    return found


def signal_members(
    sessions: Set[int],
    signals: Sequence[int],
    *,
    groups: bool = False,
    proc: str = "/proc",
) -> None:
    """Signal the members of these sessions that the leaders' process groups do not hold.

    One pass finds them; a SIGSTOP has passes until one finds nobody new, since who is stopped starts nobody. Each gets
    the signals through a pidfd of its own, after its session has been asked for again. Another user's process,
    which may not be signalled, gets none.

    Args:
        sessions: The numbers of the sessions, which are the leaders' own; as for members().
        signals: What each gets, in this order.
        groups: Also those in the leaders' process groups, but for the leaders.
        proc: As for members().
    """
    told: set[int] = set()
    more = bool(sessions) and hasattr(os, "getpgid")
    while more:
        more = False
        for pid in _pids(sessions, proc):
            try:
                sid = os.getsid(pid)
                if sid in sessions and pid not in told and pid != sid and (groups or os.getpgid(pid) != sid):
                    told.add(pid)
                    more = signal.SIGSTOP in signals
                    signal_one(pid, sid, signals)
            except OSError:
                continue  # it has ended; or some systems do not say it of other sessions' processes


def signal_one(pid: int, session: int, signals: Iterable[int]) -> None:
    """Signal a process if it is still a member of ``session``.

    Raises:
        OSError: It has ended, or may not be signalled.
    """
    pidfd = _pidfd(pid)
    try:
        # The pidfd is of this member, or of one that has ended since, which gets nothing.
        if os.getsid(pid) == session:
            for sig in signals:
                _signal(pid, pidfd, sig)
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def ignores(pid: int, sig: int, proc: str = "/proc") -> bool:
    """Whether a process ignores a signal (proc(5)); True where it cannot be told."""
    try:
        mask = int(_line(f"{proc}/{pid}/status", "SigIgn:"), 16)
    except ValueError:
        return True
    return bool(mask >> (sig - 1) & 1)


def describe_stuck(pid: int, proc: str = "/proc") -> str:
    """What keeps a process that SIGKILL has not ended, or whose end is not reported: a sentence without full stop."""
    try:
        name, state, _ = _stat(pid, proc)
    except (OSError, ValueError):
        return f"process {pid}: nothing can be read of it"
    who = f"process {pid} ({name})"
    if state in "ZX":
        tracer = _line(f"{proc}/{pid}/status", "TracerPid:")
        if tracer not in ("", "0"):
            return f"{who} has ended, but process {tracer}, which traces it, has not waited for it"
        return f"{who} has ended, but was not reaped"
    try:
        os.kill(pid, 0)
    except PermissionError:
        return f"{who} runs as another user, and this one may not signal it"
    except OSError:
        return f"{who} has ended"
    where = _line(f"{proc}/{pid}/wchan")
    where = f" in the kernel's {where}" if where not in ("", "0") else ""
    if state == "D":
        return f"{who} is in uninterruptible sleep{where}: it ends when the kernel lets go of it"
    return f"{who} is in state {state}{where}"


def _look(sessions: Set[int], ended: Set[int], proc: str, kill: bool) -> tuple[dict[int, int], set[int]]:
    """The members, and the processes that ended during the look or were zombies before."""
    if not hasattr(os, "getsid"):
        return _trees(sessions), set()
    found: dict[int, int] = {}
    gone: set[int] = set()
    for pid in _pids(sessions, proc):
        if pid in ended:
            continue
        try:
            sid = os.getsid(pid)
        except ProcessLookupError:
            gone.add(pid)
            continue
        except PermissionError:  # some systems do not say it of other sessions' processes
            continue
        if sid in sessions:
            if kill:
                _kill({pid: sid}, 0.0)
            if _has_ended(pid, proc):
                gone.add(pid)
            else:
                found[pid] = sid
    return found, gone


def _pids(sessions: Set[int], proc: str) -> Iterable[int]:
    try:
        if os.readlink(f"{proc}/self") == str(os.getpid()):
            # The youngest first, which are listed last: a process that forks and ends again and again is met in time.
            return [int(name) for name in reversed(os.listdir(proc)) if name.isdecimal()]
    except OSError:
        if not sys.platform.startswith("linux"):
            import psutil

            return psutil.pids()
    return sessions


def _has_ended(pid: int, proc: str) -> bool:
    """Whether all threads of a process have ended, or it has been reaped meanwhile."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except (AttributeError, OSError):
        pidfd = -1
    if pidfd >= 0:
        try:
            return _wait(pidfd, 0)
        finally:
            os.close(pidfd)
    try:
        _, state, threads = _stat(pid, proc)
    except (OSError, ValueError):
        return _is_gone(pid)  # a file that is not there says nothing where there is no procfs
    # Where only the first thread has ended, the kernel calls the whole process a zombie.
    return state in "ZX" and threads <= 1


def _is_gone(pid: int) -> bool:
    try:
        os.getsid(pid)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _kill(found: dict[int, int], pause: float) -> None:
    """SIGKILL to these processes, and a wait for their end, of ``pause`` seconds at most."""
    pidfds: list[int] = []
    until = time.monotonic() + pause
    blind = False
    try:
        for pid, sid in found.items():
            pidfd = _pidfd(pid)
            if pidfd >= 0:
                pidfds.append(pidfd)
            try:
                # Looked at again: the pidfd is of this member, or of one that has ended since, which gets nothing.
                if not hasattr(os, "getsid") or os.getsid(pid) == sid:
                    _signal(pid, pidfd, _KILL)
                    blind = blind or pidfd < 0
            except OSError:
                continue  # it has ended; or it is another user's, and stays
        for pidfd in pidfds:
            _wait(pidfd, until - time.monotonic())
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    if blind:
        time.sleep(max(0.0, until - time.monotonic()))


def _signal(pid: int, pidfd: int, sig: int) -> None:
    if pidfd >= 0:
        try:
            return signal.pidfd_send_signal(pidfd, sig)
        except ProcessLookupError:
            return None
        except OSError:
            pass  # a seccomp profile refuses the call; or it is another user's, and kill(2) fails, too
    os.kill(pid, sig)


def _pidfd(pid: int) -> int:
    """A pidfd of a process; -1 where there is none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def _wait(pidfd: int, seconds: float) -> bool:
    """Wait for a process to end; whether it has."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(max(0.0, seconds) * 1000))


def _stat(pid: int, proc: str) -> tuple[str, str, int]:
    """Name, state and number of threads of a process (proc(5))."""
    with open(f"{proc}/{pid}/stat", encoding="utf-8", errors="replace") as file:
        before, _, after = file.read().rpartition(")")
    fields = after.split()
    return before.partition("(")[2], fields[0], int(fields[17])


def _line(path: str, start: str = "") -> str:
    """What follows ``start`` in the file; "" where there is nothing."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return next((line[len(start) :].strip() for line in file if line.startswith(start)), "")
    except OSError:
        return ""


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
