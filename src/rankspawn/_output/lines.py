"""The lines that ranks write, for a program: read from their log files as these grow."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, NamedTuple

from .._public import public
from .follow import SOONEST, Followed, Sink

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .tee import Source

_LATEST = 0.1  # seconds between two looks when nothing has been written for a while


@public
class RankLine(NamedTuple):
    """One line that a rank has written.

    Attributes:
        rank: Its RANK, which counts the ranks of all machines.
        stream: "stdout" or "stderr".
        text: The line, without its newline. For a line that was written over ("\\r": a progress bar) it is the
            last state; a line longer than 64 KiB comes in pieces. A byte that is not UTF-8 is written as ``\\xff``.
    """

    rank: int
    stream: Literal["stdout", "stderr"]
    text: str


class LineReader:
    """Reads the log files of one attempt, each from its beginning, whole lines at a time. For any thread.

    Args:
        sources: The files. A file that does not exist yet is waited for.

    Attributes:
        due: When to look again, in seconds of time.monotonic().
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        nowhere = Sink(None)  # they are shown on no stream
        self._absent = [(source, Followed(os.fspath(source.path), b"", nowhere)) for source in sources]
        self._open: list[tuple[Source, Followed]] = []
        self._lock = threading.RLock()
        self._pause, self._ended = SOONEST, False
        self.due = 0.0

    def read(self) -> list[RankLine]:
        """The lines that have been written since the last look, at most 64 KiB of each file.

        After end() an empty list means that there are no more.

        Raises:
            OSError: A file cannot be read. The next look continues with the others.
        """
        found: list[RankLine] = []
        with self._lock:
            if not self._ended:
                self._open_new()
            for one in self._open.copy():
                source, followed = one
                try:
                    # lseek takes a fifth of the time of fstat.
                    if self._ended or os.lseek(followed.fd, 0, os.SEEK_END) != followed.seen:
                        text = followed.text(self._ended)
                    else:
                        continue
                except BaseException:
                    self._open.remove(one)
                    followed.close()
                    raise
                for line in text[:-1].split(b"\n") if text else ():
                    words = line.decode(errors="backslashreplace")
                    found.append(RankLine(source.rank, "stderr" if source.is_stderr else "stdout", words))
        self._pause = SOONEST if found else min(self._pause * 1.5, _LATEST)
        self.due = time.monotonic() + self._pause
        return found

    def end(self) -> None:
        """Note that the ranks have ended: open all files, because they may be removed, and wait for no others."""
        with self._lock:
            if not self._ended:
                self._open_new()
                self._ended = True

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._ended = True
            for _, followed in self._open:
                followed.close()
            self._open.clear()
            self._absent.clear()

    def _open_new(self) -> None:
        still: list[tuple[Source, Followed]] = []
        for source, followed in self._absent:
            is_open = False
            with suppress(OSError):  # there will be another try
                is_open = followed.open()
            (self._open if is_open else still).append((source, followed))
        self._absent = still
