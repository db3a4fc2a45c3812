"""Orphans that this process has adopted: as the first process of a container, or as a subreaper (prctl(2)).

The kernel gives a process whose parent has ended to the first process of the PID namespace, or to a subreaper on the
way there. One that ends stays a zombie until its new parent waits for it, and holds its number. This is for commands,
whose children are all known: a program that uses the library may have children of its own, which it waits for itself.

Each orphan is waited for by its number. Whoever waits for any child, as tini and dumb-init do, would take the statuses
of ranks, too; and waitid(2) of any child, with WNOWAIT, does not get past the first rank that has ended and is kept.
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
"""How often adopted processes are looked at: nothing but SIGCHLD says that one has ended."""


class Orphans:
    """The adopted children of this process, which are reaped when they have ended. It starts no thread.

    Args:
        own: Says which children have an owner, who waits for them. No child is started while reap() runs.
    """

    def __init__(self, own: Callable[[], Set[int]]) -> None:
        self._own = own
        self._next = time.monotonic() if adopts() else None

    def left(self) -> float | None:
        """In how many seconds reap() has something to do; None where this process adopts nobody."""
        return None if self._next is None else max(0.0, self._next - time.monotonic())

    def reap(self) -> None:
        """Reap the adopted children that have ended, once in LOOK_SECONDS."""
        if self._next is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_SECONDS
        with suppress(OSError):  # no procfs shows this process
            for pid in children() - self._own():
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


def adopts() -> bool:
    """Whether the kernel gives orphans to this process."""
    if os.getpid() == 1:
        return True
    if EXTENSION_ERROR is not None:
        return False
    from .. import _spawn

    return _spawn.is_subreaper()
