"""Deadlines, in seconds of time.monotonic(); None is never."""

from __future__ import annotations

import time


def until(timeout: float | None) -> float | None:
    """The end of a timeout, in seconds of time.monotonic(); None is never, here and in the three functions below."""
    return None if timeout is None else time.monotonic() + timeout


def left(end: float | None) -> float | None:
    """The seconds until then, 0 when it has passed."""
    return None if end is None else max(0.0, end - time.monotonic())


def passed(end: float | None) -> bool:
    """Whether the deadline has come."""
    return end is not None and time.monotonic() >= end


def sooner(one: float | None, other: float | None) -> float | None:
    """The earlier of two."""
    return other if one is None else one if other is None else min(one, other)
