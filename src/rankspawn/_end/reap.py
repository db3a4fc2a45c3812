"""How ranks ended: looks at it without reaping them, and reaps them."""

from __future__ import annotations

import os
import struct
import sys
from typing import TYPE_CHECKING, Any

from . import way as _way

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .._start.popen import Popen

# The kernel's include/uapi/linux/pidfd.h: the fields "mask" and "exit_code" of struct pidfd_info, and how to ask.
_PIDFD_INFO = struct.Struct("=Q52xi")
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_GET_INFO = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(0xFF, 11, struct pidfd_info)

_REAPED = -1  # way's word for a rank that other code has reaped


def returncodes(ranks: Sequence[Popen]) -> list[int | None]:
    """How ranks have ended, without reaping them; None of one that runs."""
    if not hasattr(os, "waitid"):
        return [rank.poll() for rank in ranks]
    unknown = [rank for rank in ranks if rank.returncode is None]
    seen = iter(_way.way.look(unknown))
    return [_returncode(rank, next(seen)) if rank.returncode is None else rank.returncode for rank in ranks]


def _returncode(rank: Popen, status: int | None) -> int | None:
    if status != _REAPED:
        return None if status is None else os.waitstatus_to_exitcode(status)
    # Other code has reaped it. Not poll(), because it would wait for the process that has the number now.
    lock = rank._waitpid_lock  # type: ignore[attr-defined]
    if lock.acquire(blocking=False):
        if rank.returncode is None:
            rank._handle_exitstatus(0 if rank.pidfd is None else _status_of_reaped(rank.pidfd))
        rank._is_kept = False
        lock.release()
    return rank.returncode


def is_reaped(rank: Popen) -> bool:
    """Whether other code is known to have reaped it, so that its number may be another process's."""
    return rank.returncode is not None and not rank._is_kept


def unreaped(ranks: Iterable[Popen]) -> list[Popen]:
    """The ranks whose numbers are still their own: they run, or are zombies that no code has reaped."""
    own = [rank for rank in ranks if not is_reaped(rank)]
    if not hasattr(os, "waitid"):
        return own
    return [rank for rank, status in zip(own, _way.way.look(own), strict=True) if status != _REAPED]


def reap(ranks: Mapping[int, Popen], ended: Mapping[int, int]) -> dict[int, tuple[Any, bool]]:
    """Collect the ranks that have ended.

    Args:
        ranks: The ranks, by number.
        ended: The returncodes that they were seen to end with.

    Returns:
        By number, what a rank used (the fields of resource.struct_rusage), and whether it dumped core. A rank is
        missing if it runs, if other code has reaped it, or if wait4(2) cannot be called.
    """
    # At the end of the interpreter wait4 reaps, and then fails to import the type of what it returns. In a
    # free-threaded build, a group's finalizer may run that late.
    if not hasattr(os, "wait4") or sys.is_finalizing():
        for rank in ranks.values():
            rank.poll()
        return {}
    found: dict[int, tuple[Any, bool]] = {}
    held: dict[int, Popen] = {}
    try:
        for number, rank in ranks.items():
            # A thread that waits for it holds the lock, and is about to collect it if it has ended.
            if not is_reaped(rank) and rank._waitpid_lock.acquire(timeout=0.1):  # type: ignore[attr-defined]
                held[number] = rank
        own = {number: rank for number, rank in held.items() if not is_reaped(rank)}
        for (number, rank), (status, usage) in zip(own.items(), _way.way.collect([*own.values()]), strict=True):
            if status == _REAPED:
                rank._is_kept = False
                if rank.returncode is None:
                    rank.returncode = ended.get(number, 0)
            elif status is not None:
                rank._handle_exitstatus(status)
                rank._is_kept = False
                found[number] = usage, os.WCOREDUMP(status)
    finally:
        for rank in held.values():
            rank._waitpid_lock.release()  # type: ignore[attr-defined]
    return found


def _status_of_reaped(pidfd: int) -> int:
    """The status of a process that other code has reaped, as from waitpid(2).

    Before Linux 6.15 the kernel does not keep it: the status is 0 then, as in the standard class.
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
