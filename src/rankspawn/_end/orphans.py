"""Orphans that this process has adopted: as the first process of a container, or as a subreaper (prctl(2)).

If a process's parent ends, the kernel gives the process to the first process of the PID namespace, or to a subreaper on
the way there. When such an orphan ends, it stays a zombie, and keeps its number, until its new parent waits for it.
Only commands use this, because they know all their children. A program that uses the library may have other children,
for which it waits itself.

reap() waits for each orphan by its number. A wait for any child, as in tini and dumb-init, would also take the statuses
of ranks. waitid(2) of any child, with WNOWAIT, does not get past the first rank that has ended and is kept.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from .._procfs import children
from .._start.engine import EXTENSION_ERROR

TYPE_CHECKING = False  # typing's own costs more than this module

if TYPE_CHECKING:
    from collections.abc import Callable, Set

LOOK_SECONDS = 1.0
"""Seconds between two looks at adopted processes, because only SIGCHLD would say that one has ended."""


class Orphans:
    """Reaps the adopted children of this process when they have ended. It starts no thread.

    Args:
        adopted: A function that takes the numbers of all children, and returns those for which no other code waits. No
            child is started while reap() runs.
    """

    def __init__(self, adopted: Callable[[Set[int]], Set[int]]) -> None:
        self._adopted = adopted
        self._next = time.monotonic() if adopts() else None

    def left(self) -> float | None:
        """Seconds until reap() has something to do; None if this process adopts no orphans."""
        return None if self._next is None else max(0.0, self._next - time.monotonic())

    def reap(self) -> None:
        """Reap the adopted children that have ended, once in LOOK_SECONDS."""
        if self._next is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_SECONDS
        with suppress(OSError):  # no procfs shows this process
            for pid in self._adopted(children()):
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


def of_other_sessions(children: Set[int]) -> set[int]:
    """The children that are in a session that neither they nor this process lead or share.

    A process that this one has started itself is in the same session, or leads one of its own. So these are orphans,
    for a command that does not know all its children, because a library starts some. Orphans that called setsid are not
    among them.
    """
    found, own = set(), os.getsid(0)
    for pid in children:
        with suppress(OSError):  # it has been reaped; or getsid(2) is refused
            if os.getsid(pid) not in (own, pid):
                found.add(pid)
    return found


def adopts() -> bool:
    """Whether the kernel gives orphans to this process."""
    if os.getpid() == 1:
        return True
    if EXTENSION_ERROR is not None:
        return False
    from .. import _spawn

    return _spawn.is_subreaper()
