"""What the command says while ranks run: lines that stay, and one on the terminal that is wiped out again."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._ids import format_ids

if TYPE_CHECKING:
    from .._group.group import RankGroup

_SECONDS = 0.5  # what takes less needs no line


def say(text: str) -> None:
    """Print a line to stderr, or several: by one write, so that none of a rank's comes in between."""
    _write(f"rankspawn: {text}\n")


def _write(text: str) -> None:
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        # Nobody reads it, and the job goes on. What is still in the stream's buffer must not fail once more when the
        # interpreter ends: that would be its exit status.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")


class Progress:
    """One line while many ranks start, or are waited for. It is for a terminal that nobody else writes to meanwhile.

    on: whether that is so but for the terminal, which is asked for here. first_rank: the RANK of local rank 0.
    """

    def __init__(self, on: bool, first_rank: int = 0) -> None:
        self._first_rank = first_rank
        self._on = on and sys.stderr is not None and sys.stderr.isatty()
        self._shown = False

    @contextmanager
    def starting(self, nprocs: int) -> Iterator[Callable[[Callable[[], int]], object] | None]:
        """For as long as the ranks start; gives ``launch`` its ``progress``."""
        if not self._on:
            yield None
            return
        over = threading.Event()
        threads: list[threading.Thread] = []

        def show(started: Callable[[], int]) -> None:
            while not over.wait(_SECONDS):
                self._show(f"{started()} of {nprocs} ranks started")

        def follow(started: Callable[[], int]) -> None:
            threads.append(threading.Thread(target=show, args=[started], name="rankspawn-progress", daemon=True))
            threads[0].start()

        try:
            yield follow
        finally:
            over.set()
            for thread in threads:
                thread.join()
            self.clear()

    def ending(self, group: RankGroup) -> float | None:
        """Show who is still waited for when the ranks have been told to end; in how many seconds to call again."""
        running, kill_at = group.running, group.kill_at
        if not self._on or kill_at is None or not running:
            self.clear()
            return None
        left = max(0, round(kill_at - time.monotonic()))
        which = format_ids({self._first_rank + rank for rank in running})
        self._show(f"{len(running)} of {len(group.ranks)} ranks still run, SIGKILL in {left} s: {which}")
        return _SECONDS

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        say(text)

    def clear(self) -> None:
        """Wipe the line out."""
        if self._shown:
            self._shown = False
            _write("\r\x1b[K")

    def _show(self, text: str) -> None:
        self._shown = True
        _write(f"\r\x1b[Krankspawn: {text[:68]}")
