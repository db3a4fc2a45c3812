"""``launch(handle_signals=True)``: SIGTERM and SIGHUP end the ranks, with their grace, and then this process.

One handler serves all such groups. It runs in the main thread, whatever that thread is doing: ``group.wait()``,
other Python code, an asyncio loop. It closes the groups at once, gives the signal its default action back,
and sends it to this process again.
"""

from __future__ import annotations

import os
import signal
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .group import RankGroup

_NAMES = ("SIGTERM", "SIGHUP")

_holds: list[SignalHold] = []
_owner = 0
_came: int | None = None


class SignalHold:
    """Holds both signals for one group, from before its first rank's start until close().

    A signal that comes while the group is being started or closed takes effect right after that.
    """

    def __init__(self) -> None:
        self._group: weakref.ref[RankGroup] | None = None

    @classmethod
    def take(cls) -> SignalHold:
        """Take those of the signals whose action is the default.

        Raises:
            ValueError: This is not the main thread, which alone has handlers in Python.
        """
        global _owner
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("handle_signals needs the main thread: Python runs handlers there")
        hold = cls()
        if _owner != os.getpid():
            _holds.clear()  # those of the process that this one is a forked copy of
            _owner = os.getpid()
        _holds.append(hold)
        for sig in _signals():
            if signal.getsignal(sig) is signal.SIG_DFL:
                signal.signal(sig, _on_signal)
        return hold

    def give(self, group: RankGroup) -> None:
        """Have the signals end ``group`` from now on. Does not return if one has come already."""
        self._group = weakref.ref(group)
        if _came is not None and not _is_between():
            _end_all(_came)

    def close(self) -> None:
        """Restore the default action, unless it was changed since. Does not return if a signal has come."""
        if os.getpid() != _owner or self not in _holds:
            return
        _holds.remove(self)
        if not _holds:
            for sig in _signals():
                # Only the main thread may do it. Elsewhere the handler does what the default action would.
                with suppress(ValueError):
                    if signal.getsignal(sig) is _on_signal:
                        signal.signal(sig, signal.SIG_DFL)
        if _came is not None and not _is_between():
            if threading.current_thread() is threading.main_thread():
                _end_all(_came)
            os.kill(_owner, _came)  # the main thread's handler does it

    @property
    def is_between(self) -> bool:
        """Whether the group is being started, restarted or closed, which no signal may interrupt."""
        if self._group is None:
            return True
        group = self._group()
        return group is None or group.is_closed or group.is_restarting


def _signals() -> list[int]:
    return [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


def _is_between() -> bool:
    return any(hold.is_between for hold in _holds)


def _on_signal(sig: int, frame: Any) -> None:
    global _came
    if os.getpid() != _owner or not _holds:
        _die(sig)
    _came = sig
    if not _is_between():
        _end_all(sig)


def _end_all(sig: int) -> None:
    """End all groups, all at the same time, and then this process."""
    groups = [group for hold in _holds.copy() if hold._group is not None and (group := hold._group()) is not None]
    try:
        for group in groups:
            with suppress(OSError):
                group.stop()
        for group in groups:
            # A killed process that does not end has been waited for, and no caller is there to catch the error.
            with suppress(OSError):
                group.close()
    except BaseException:
        # Ctrl-C ends the grace.
        for group in groups:
            with suppress(OSError):
                group.kill()
    finally:
        _die(sig)


def _die(sig: int) -> None:
    signal.signal(sig, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {sig})
    signal.raise_signal(sig)
    raise SystemExit(128 + sig)  # the first process of a container, which default actions do not end
