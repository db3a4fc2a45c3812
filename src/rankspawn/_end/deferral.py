"""Protects a part of a program from signal handlers in Python. It imports nothing of ours."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # whose functions look up no names of handlers
import os
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_open: list[Deferral] = []


def has_deferred() -> bool:
    """Whether a signal has come whose handler waits for the end of a Deferral: a second Ctrl-C shortens a wait
    inside such a block."""
    return any(one._came for one in _open)


class Deferral:
    """A ``with`` block that delays signal handlers, and what they raise (as Ctrl-C's does), until it is over.

    Python runs handlers in the main thread, between any two of its instructions. An exception there would leave an
    open file without an owner, or a process alive that was about to be ended. In other threads the block does nothing.

    Args:
        ring: The stand-in handler calls it when a signal has come, to wake a sleep of the block.
    """

    def __init__(self, ring: Callable[[], object] | None = None) -> None:
        self._ring = ring
        self._handlers: dict[int, Any] = {}
        self._came: dict[int, FrameType | None] = {}
        self._replaced: list[int] = []
        self._process = 0

    def __enter__(self) -> Deferral:
        if threading.get_ident() == threading.main_thread().ident:
            self._process = os.getpid()
            _open.append(self)
            try:
                # SIGINT is among the first: from then on nothing interrupts this, where a program has no other handler.
                for sig in range(1, _signal.NSIG):
                    if callable(handler := _signal.getsignal(sig)):
                        self._handlers[sig] = handler
                        self._replaced.append(sig)
                        _signal.signal(sig, self._note)
            except ValueError:
                self._replaced.clear()  # not the main interpreter, which alone has handlers
            except BaseException:
                self._restore()
                _open.remove(self)
                raise
        return self

    def deliver(self) -> None:
        """Handle the signals that have come. If a handler raises, the others stay for later."""
        while self._came:
            sig, frame = self._came.popitem()
            self._handlers[sig](sig, frame)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self in _open:
            _open.remove(self)
        self._deliver_all()

    def _deliver_all(self) -> None:
        try:
            self.deliver()
        finally:
            if self._came:
                self._deliver_all()

    def _restore(self) -> None:
        # A handler may raise in the middle, because its signal has it back.
        try:
            while self._replaced:
                sig = self._replaced[-1]
                if _signal.getsignal(sig) == self._note:
                    _signal.signal(sig, self._handlers[sig])
                del self._replaced[-1]
        finally:
            if self._replaced:
                self._restore()

    def _note(self, sig: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked copy, which the block is not about
            self._handlers[sig](sig, frame)
        else:
            self._came[sig] = frame
        if self._ring is not None:
            self._ring()
