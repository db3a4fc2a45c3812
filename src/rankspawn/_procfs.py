"""What the kernel says about other processes: which exist, in which session and group, and whether they have ended.

The procfs of an outer PID namespace (``unshare --pid`` without ``--mount-proc``) shows other numbers than system calls
accept. The line NSpid has both (Linux 4.1).
"""

from __future__ import annotations

import errno
import os
import select
import sys
from contextlib import suppress

from ._frozen import Frozen

TYPE_CHECKING = False  # importing typing's would take longer than this module

if TYPE_CHECKING:
    from collections.abc import Iterable


class Stat(Frozen):
    """The line of a procfs about a process or a thread (proc_pid_stat(5)).

    Attributes:
        name: The name of its program, cut to 15 bytes, or the name that it gave itself.
        state: The letter of its state.
        parent: The process that started or adopted it.
        group: Its process group.
        session: Its session.
        cpu_seconds: The CPU time that it has used.
        waited_seconds: The CPU time of the children that it has reaped, and of those that these have reaped.
        threads: How many threads the process has.
        started: When it was started, in clock ticks since the machine started.
        ending: Whether it is ending (PF_EXITING of include/linux/sched.h); its memory may be gone already.
    """

    name: str
    state: str
    parent: int
    group: int
    session: int
    cpu_seconds: float
    waited_seconds: float
    threads: int
    started: int
    ending: bool


def read_stat(folder: str) -> Stat:
    """Read the line about a process, or a thread.

    Args:
        folder: Its folder in a procfs: ``/proc/PID``, or ``/proc/PID/task/TID``.

    Raises:
        OSError: It has been reaped, or the line cannot be read.
    """
    with open(f"{folder}/stat", "rb", buffering=0) as file:
        before, _, after = file.readall().decode(errors="backslashreplace").rpartition(")")
    # The manual page counts fields from 1. The state follows the name as the third. A name may contain brackets.
    state, parent, group, session, *others = after.split()
    flags, user, system, theirs, theirs_too, threads, started = (
        int(others[at - 7]) for at in (9, 14, 15, 16, 17, 20, 22)
    )
    ticks = os.sysconf("SC_CLK_TCK")
    own, waited = (user + system) / ticks, (theirs + theirs_too) / ticks
    return Stat(
        before.partition("(")[2], state, int(parent), int(group), int(session), own, waited, threads, started,
        bool(flags & 4),
    )  # fmt: skip


def pids(proc: str = "/proc") -> Iterable[int] | None:
    """All processes, the youngest first; None if no procfs shows this process itself.

    The youngest come first, because that is how a search catches a process that forks and ends again and again. A
    procfs lists them last.
    """
    if not sys.platform.startswith("linux"):
        import psutil

        return reversed(psutil.pids())
    at = depth(proc)
    if at == 0:
        return None
    shown = [name for name in reversed(os.listdir(proc)) if name.isdecimal()]
    if at == 1:
        return map(int, shown)
    return [int(numbers[at - 1]) for numbers in (_numbers(name, proc) for name in shown) if len(numbers) >= at]


def children(proc: str = "/proc") -> set[int]:
    """The children of all threads of this process, those included that have ended and have not been waited for.

    Raises:
        OSError: No procfs shows this process.
    """
    at = depth(proc)
    if at == 0:
        raise FileNotFoundError(errno.ENOENT, "no procfs shows this process", proc)
    own = os.readlink(f"{proc}/self")
    tasks = f"{proc}/{own}/task"
    if os.path.exists(f"{tasks}/{own}/children"):
        shown = [number for task in os.listdir(tasks) for number in line(f"{tasks}/{task}/children").split()]
    else:  # the kernel has no CONFIG_PROC_CHILDREN
        shown = [
            name for name in os.listdir(proc) if name.isdecimal() and line(f"{proc}/{name}/status", "PPid:") == own
        ]
    if at == 1:
        return {*map(int, shown)}
    return {int(numbers[at - 1]) for numbers in (_numbers(name, proc) for name in shown) if len(numbers) >= at}


def _numbers(name: str, proc: str) -> list[str]:
    """The numbers of a process in each PID namespace, from that of the procfs inwards."""
    return line(f"{proc}/{name}/status", "NSpid:").split()


def depth(proc: str = "/proc") -> int:
    """The place, from 1, of this namespace's numbers in the line NSpid; 0 if ``proc`` does not show this process."""
    status = f"{proc}/self/status"
    own = line(status, "NSpid:").split() or line(status, "Pid:").split()
    return len(own) if own and own[-1] == str(os.getpid()) else 0


def folder(pid: int, proc: str = "/proc") -> str:
    """The folder of a process in ``proc``; a path that does not exist if there is none or it cannot be found."""
    at = depth(proc)
    if at == 1:
        return f"{proc}/{pid}"
    nowhere = f"{proc}/-1"
    pidfd = open_pidfd(pid) if at else -1
    if pidfd < 0:
        return nowhere
    try:
        # In this file the kernel writes the process's number as this procfs shows it.
        return f"{proc}/{line(f'{proc}/self/fdinfo/{pidfd}', 'Pid:') or -1}"
    finally:
        os.close(pidfd)


def session(pid: int, proc: str = "/proc") -> int:
    """The session of a process, from getsid(2), or from /proc if a security module refuses that call.

    Raises:
        OSError: The process has ended, or both are refused.
    """
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return read_stat(folder(pid, proc)).session


def group(pid: int, proc: str = "/proc") -> int:
    """The process group of a process, found as in session()."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return read_stat(folder(pid, proc)).group


def has_ended(pid: int, proc: str = "/proc") -> bool:
    """Whether all threads of a process have ended, or it has been reaped."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except (AttributeError, OSError):
        pidfd = -1
    if pidfd >= 0:
        try:
            return wait(pidfd, 0)
        finally:
            os.close(pidfd)
    try:
        # If only the first thread has ended, the kernel already calls the whole process a zombie.
        stat = read_stat(folder(pid, proc))
        return stat.state in "ZX" and stat.threads <= 1
    except OSError:
        return is_gone(pid)  # without a procfs, a missing file says nothing


def is_gone(pid: int) -> bool:
    """Whether no process has this number, not even a zombie."""
    try:
        os.getsid(pid)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def line(path: str, start: str = "") -> str:
    """The rest of the first line that begins with ``start``; "" if there is none."""
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return next((line[len(start) :].strip() for line in file if line.startswith(start)), "")
    return ""


def open_pidfd(pid: int) -> int:
    """A pidfd of a process; -1 if there is none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def wait(pidfd: int, seconds: float) -> bool:
    """Wait up to ``seconds`` for a process to end; return whether it has."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(max(0.0, seconds) * 1000))
