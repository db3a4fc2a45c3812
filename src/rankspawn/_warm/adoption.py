"""This process adopts the child of its child: a subreaper for a moment (PR_SET_CHILD_SUBREAPER, prctl(2)).

In that moment it also adopts any other orphan below it. If this program did not start that orphan, it runs on, and is
reaped when it ends, so that no zombie is left.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from .. import _spawn
from .._procfs import children, read_stat

if TYPE_CHECKING:
    from .._start.popen import Popen

_KILL_SECONDS = 10.0

# The flag is the whole process's.
_lock = threading.Lock()


class Adopted:
    """The process to adopt.

    Attributes:
        pid: Its number; 0 while that is not known.
    """

    pid = 0


@contextmanager
def adopting(parent: Popen) -> Iterator[Adopted]:
    """Adopt a child of ``parent``, which ends in the ``with`` block. After an exception neither is left.

    Args:
        parent: A child of this process. It leads a session, and the process to adopt is in that session, too.

    Yields:
        An object in which the block notes the pid of the process to adopt.
    """
    known = Adopted()
    with _lock:
        began = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
        before = children()
        was = _spawn.set_subreaper(True)
        try:
            try:
                yield known
            except BaseException:
                _end_both(parent, before)
                raise
        finally:
            if not was:
                _spawn.set_subreaper(False)
            _reap_later([pid for pid in children() - before - {known.pid} if _birth(pid) < began - 1])


def _end_both(parent: Popen, before: set[int]) -> None:
    with suppress(ProcessLookupError):
        parent.send_signal_group(9)
    with suppress(subprocess.TimeoutExpired):
        parent.wait(_KILL_SECONDS)
    for pid in children() - before:
        with suppress(ProcessLookupError, ChildProcessError):
            if os.getsid(pid) == parent.pid:
                os.waitpid(pid, 0)


def _birth(pid: int, proc: str = "/proc") -> float:
    """When a process was started, in clock ticks since the machine's start; never, for one that is gone."""
    try:
        return read_stat(f"{proc}/{pid}").started
    except OSError:
        return float("inf")


def _reap_later(strangers: list[int]) -> None:
    """Reap adopted processes that this program did not start, when they end."""

    def reap(pid: int) -> None:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)

    for pid in strangers:
        threading.Thread(target=reap, args=(pid,), name="rankspawn-reaper", daemon=True).start()
