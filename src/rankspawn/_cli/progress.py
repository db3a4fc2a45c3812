"""What the command prints while ranks run: lines that stay, and one line of state that it redraws."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._ids import format_ids
from .._output.console import is_stuck, say, write

if TYPE_CHECKING:
    from typing import TextIO

    from .._group.group import RankGroup

__all__ = ["Progress", "say"]

_SECONDS = 0.5  # what takes less time needs no line


class Progress:
    """One line on a terminal: how many ranks have started, run and ended, and which the launcher waits for.

    It shows the line only if stderr is a terminal, this process is in its foreground, and the variable CI is not set.

    Args:
        on: Whether the line may be shown, because nobody else writes to the terminal meanwhile.
        first_rank: The RANK of local rank 0.
    """

    def __init__(self, on: bool, first_rank: int = 0) -> None:
        self._first_rank = first_rank
        self._on = on and _is_redrawn(sys.stderr)
        self._shown = False
        self._began = time.monotonic()

    @contextmanager
    def starting(self, nprocs: int) -> Iterator[Callable[[Callable[[], int]], object] | None]:
        """Show how many ranks have started while the block runs; yields the argument ``progress`` of ``launch``."""
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

    def state(self, group: RankGroup) -> float | None:
        """Show how many ranks run, or, after the launcher has asked them to end, which still run.

        Returns:
            In how many seconds to call it again; None if there is nothing to show.
        """
        running, kill_at = group.running, group.kill_at
        if not self._on or not running:
            self.clear()
            return None
        if kill_at is None:
            return self._running(len(running), len(group.ranks))
        left = max(0, round(kill_at - time.monotonic()))
        which = format_ids({self._first_rank + rank for rank in running})
        self._show(f"{len(running)} of {len(group.ranks)} ranks still run, SIGKILL in {left} s: {which}")
        return _SECONDS

    def _running(self, count: int, nprocs: int) -> float:
        elapsed = time.monotonic() - self._began
        if elapsed < _SECONDS:
            return _SECONDS - elapsed
        from .._output.failure import duration

        ranks = f"{nprocs} rank{'s' if nprocs > 1 else ''}"
        state = f"{ranks} running" if count == nprocs else f"{count} of {ranks} running, {nprocs - count} ended"
        self._show(f"{duration(int(elapsed))}: {state}")
        return 1.0 - elapsed % 1

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        say(text)

    def clear(self) -> None:
        """Wipe the line out."""
        if self._shown:
            self._shown = False
            write("\r\x1b[K")

    def _show(self, text: str) -> None:
        if not _is_in_foreground():
            self._shown = False  # the line is a shell's now
        elif not is_stuck():  # else a terminal that was stopped would later show all old counts one after the other
            self._shown = True
            write(f"\r\x1b[Krankspawn: {text[:68]}")


def _is_redrawn(stream: TextIO | None) -> bool:
    """Whether a line on this stream can be wiped out again."""
    if stream is None or not stream.isatty():
        return False
    return not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def _is_in_foreground() -> bool:
    """Whether this process may draw on its terminal. In the background it may not, because the shell draws there."""
    if not hasattr(os, "tcgetpgrp"):
        return True
    try:
        return os.tcgetpgrp(2) == os.getpgrp()
    except OSError:  # it is not this process's controlling terminal
        return True
