"""What the command says while ranks run: lines that stay, and one on the terminal that is wiped out again."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._ids import format_ids
from .._output.console import is_stuck, say, write

if TYPE_CHECKING:
    from .._group.group import RankGroup

__all__ = ["Progress", "say"]

_SECONDS = 0.5  # anything that takes less time needs no line


class Progress:
    """One line on a terminal while many ranks start, or are waited for. It shows nothing where stderr is no terminal.

    Args:
        on: Whether nobody else writes to the terminal meanwhile, and the line may be shown.
        first_rank: The RANK of local rank 0.
    """

    def __init__(self, on: bool, first_rank: int = 0) -> None:
        self._first_rank = first_rank
        self._on = on and sys.stderr is not None and sys.stderr.isatty()
        self._shown = False

    @contextmanager
    def starting(self, nprocs: int) -> Iterator[Callable[[Callable[[], int]], object] | None]:
        """Show how many ranks have started for as long as the block runs; gives the ``progress`` of ``launch``."""
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
        """Show which ranks still run after they have been told to end; in how many seconds to call again."""
        running, kill_at = group.running, group.kill_at
        if not self._on or kill_at is None or not running:
            self.clear()
            return None
        left = max(0, round(kill_at - time.monotonic()))
        which = format_ids({self._first_rank + rank for rank in running})
        self._show(f"{len(running)} of {len(group.ranks)} ranks still run, SIGKILL in {left} s: {which}")
        return _SECONDS

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
        if not is_stuck():  # else old counts would be shown one after the other when the terminal goes on
            self._shown = True
            write(f"\r\x1b[Krankspawn: {text[:68]}")
