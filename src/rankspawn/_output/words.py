"""Why a rank has failed, in its own words: the exception that it recorded or wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recorded import RecordedError

# The last line of a traceback: the class, with its module, and the message.
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:: .*)?")
_FRAME = re.compile(r' *File "(?P<path>.*)", line (?P<line>\d+)')
# Files that are not the user's code: installed packages, the standard library, and the interpreter's own modules.
_LIBRARY = re.compile(r"<frozen |.*[/\\](?:(?:site|dist)-packages|python3\.\d+t?)[/\\]")

_SHELLS = {
    126: "126 usually means that a shell or wrapper (env, timeout, numactl) could not execute its command",
    127: "127 usually means that a shell or wrapper (env, timeout, numactl) did not find its command",
}
# What the loaders of glibc and of musl say before they end a program with 127.
_LOADER = re.compile(r".*error while loading shared libraries: .*|Error loading shared library .*")


def why_by_words(returncode: int, error: RecordedError | None, lines: Sequence[str]) -> str:
    """The cause in one line; "" if neither the error nor the lines show it.

    Args:
        returncode: As ``Popen.returncode``.
        error: What it recorded.
        lines: The end of what it wrote.
    """
    if error is not None and not error.problem and error.message.strip():
        return error.message.strip().splitlines()[0]
    if returncode == 127 and (said := next(filter(_LOADER.fullmatch, lines), "")):
        return said.strip()
    if returncode in _SHELLS:
        return _SHELLS[returncode] + (f": {lines[-1].strip()}" if lines else "")
    return _exception_in(lines) if returncode > 0 else ""


def place_in(lines: Sequence[str]) -> str:
    """The last call in the last traceback, "train.py:88", if possible one of the user's own code; "" without one.

    Args:
        lines: The end of what a rank wrote, or a traceback.
    """
    place = ""
    for line in reversed(lines):
        if frame := _FRAME.match(line):
            here = f"{os.path.basename(frame['path'])}:{frame['line']}"
            if not _LIBRARY.match(frame["path"]):
                return here
            place = place or here
        elif place and line.startswith("Traceback "):
            break
    return place


def _exception_in(lines: Sequence[str]) -> str:
    """The last line of the last traceback."""
    for number in range(len(lines) - 1, -1, -1):
        if _FRAME.match(lines[number]):
            return next((line for line in lines[number + 1 :] if _EXCEPTION.fullmatch(line)), "")
    return ""
