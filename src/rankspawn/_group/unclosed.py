"""Groups that were not closed: they are killed when they are garbage-collected, or when the interpreter ends."""

from __future__ import annotations

import atexit
import errno
import os
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress

_open: weakref.WeakSet[Owned] = weakref.WeakSet()


class Owned:
    """The part of a RankGroup that knows which process owns it, and whether it has been closed."""

    _owner: int
    _is_over: bool

    def kill(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def pids(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _note_open(self) -> None:
        self._owner, self._is_over = os.getpid(), False
        _open.add(self)

    def _note_over(self) -> None:
        self._is_over = True
        _open.discard(self)

    def _check_owner(self) -> None:
        if self._owner != os.getpid():
            raise ChildProcessError(
                errno.ECHILD, f"the ranks are children of process {self._owner}, of which this is a forked copy"
            )

    def __del__(self, getpid: Callable[[], int] = os.getpid, warn: Callable[..., None] = warnings.warn) -> None:
        if getattr(self, "_is_over", True) or self._owner != getpid():
            return
        try:
            self.kill()
        finally:
            self.close()
            warn(f"a group of ranks was not closed: pids {self.pids()}", ResourceWarning, source=self)


@atexit.register
def _end_open_groups() -> None:
    """Close the groups that a daemon thread or a global variable still holds."""
    for group in [*_open]:
        with suppress(OSError):  # a process that does not end
            group.__del__()
