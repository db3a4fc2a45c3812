"""The end of one rank: looked at without reaping it, and collected."""

from __future__ import annotations

import errno
import os
import struct
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .._start.popen import Popen

# The kernel's include/uapi/linux/pidfd.h: the fields "mask" and "exit_code" of struct pidfd_info, and how to ask.
_PIDFD_INFO = struct.Struct("=Q52xi")
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_GET_INFO = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(0xFF, 11, struct pidfd_info)


def status(rank: Popen) -> int | None:
    """How a rank has ended, as a returncode, without reaping it; None while it runs."""
    if rank.returncode is not None or not hasattr(os, "waitid"):
        return rank.poll()
    try:
        ended = wait_without_reaping(rank)
    except ChildProcessError:
        # Other code has reaped it. Not poll(), because it would wait for the process that has the number now.
        lock = rank._waitpid_lock  # type: ignore[attr-defined]
        if lock.acquire(blocking=False):
            if rank.returncode is None:
                rank._handle_exitstatus(0 if rank.pidfd is None else _status_of_reaped(rank.pidfd))
            lock.release()
        return rank.returncode
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def wait_without_reaping(rank: Popen) -> os.waitid_result | None:
    """How a rank has ended; None while it runs. By its pidfd where that can be: a number may be another child's by now.

    Raises:
        ChildProcessError: Other code has reaped it.
    """
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    pidfd = rank._pidfd  # the object: another thread may let go of it, and its descriptor would be closed
    if pidfd is not None and hasattr(os, "P_PIDFD"):
        try:
            return os.waitid(os.P_PIDFD, pidfd.fd, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:  # before Linux 5.4
                raise
    return os.waitid(os.P_PID, rank.pid, flags)


def is_unreaped(rank: Popen) -> bool:
    """Whether a rank's number is still its own: it runs, or is a zombie that nobody has waited for."""
    if rank.returncode is not None:
        return False
    if hasattr(os, "waitid"):
        try:
            wait_without_reaping(rank)
        except ChildProcessError:
            return False
    return True


def reap(rank: Popen, returncode: int | None) -> tuple[Any, bool] | None:
    """Collect a rank if it has ended.

    Args:
        rank: The rank.
        returncode: What it was seen to end with.

    Returns:
        What it used (resource.struct_rusage), and whether it dumped core. None where it runs, where somebody else has
        collected it, or where wait4(2) cannot be called.
    """
    # At the end of the interpreter wait4 reaps, and then fails to import the type of what it returns. In a
    # free-threaded build, a group's finalizer may run that late.
    if not hasattr(os, "wait4") or sys.is_finalizing():
        rank.poll()
        return None
    lock = rank._waitpid_lock  # type: ignore[attr-defined]
    # A thread that waits for it holds the lock, and is about to collect it if it has ended.
    if rank.returncode is not None or not lock.acquire(timeout=0.1):
        return None
    try:
        if rank.returncode is None:
            if rank.pidfd is not None:
                wait_without_reaping(rank)  # which raises where its number is another child's by now
            pid, status, usage = os.wait4(rank.pid, os.WNOHANG)
            if pid:
                rank._handle_exitstatus(status)
                return usage, os.WCOREDUMP(status)
    except ChildProcessError:
        rank.returncode = returncode or 0
    finally:
        lock.release()
    return None


def _status_of_reaped(pidfd: int) -> int:
    """The status of a process that other code has reaped, as from waitpid(2).

    Before Linux 6.15 it is lost: 0 then, as in the standard class.
    """
    import fcntl

    info = bytearray(_PIDFD_INFO.size)
    _PIDFD_INFO.pack_into(info, 0, _PIDFD_INFO_EXIT, 0)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return 0
    known, status = _PIDFD_INFO.unpack(info)
    return int(status) if known & _PIDFD_INFO_EXIT else 0
