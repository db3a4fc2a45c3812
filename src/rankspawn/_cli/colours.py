"""Colours on a terminal: each rank has the colour that it has in the pictures, and failures are red."""

from __future__ import annotations

import os
import sys

from .._place.colours import colour

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_LEVELS = (0, 95, 135, 175, 215, 255)
"""The values of red, green and blue in the 216 colours that a terminal has after its first 16."""
_RANKS = 16  # the darker colours of the pictures cannot be read on black
_RED, _PLAIN = "\x1b[1;31m", "\x1b[0m"


def has_colours(fd: int) -> bool:
    """Whether text for a descriptor may have colours: on a terminal, or with FORCE_COLOR, but never with NO_COLOR."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and os.isatty(fd)


def coloured_prefix(prefix: Callable[[int], str]) -> Callable[[int, bool], str]:
    """Make a function of a RANK and of whether the stream is stderr. It returns the prefix, in the rank's colour."""

    def in_colour(rank: int, is_stderr: bool) -> str:
        text = prefix(rank)
        return f"\x1b[38;5;{_number(rank)}m{text}{_PLAIN}" if text and has_colours(2 if is_stderr else 1) else text

    return in_colour


def red(text: str) -> str:
    """Colour a failure report for stderr, if colours are on: its first line, and the line with the cause."""
    if sys.stderr is None or not has_colours(2):
        return text
    first, *more = text.split("\n")
    rest = [f"{_RED}{line}{_PLAIN}" if line.startswith("  why: ") else line for line in more]
    return "\n".join([f"{_RED}{first}{_PLAIN}", *rest])


def _number(rank: int) -> int:
    """The terminal's number of the colour that is nearest to the rank's."""
    digits = colour(rank % _RANKS)[1:]
    red, green, blue = (min(range(6), key=lambda level: abs(_LEVELS[level] - part)) for part in bytes.fromhex(digits))
    return 16 + 36 * red + 6 * green + blue
