"""A line on the terminal while many ranks start, or are waited for; nothing where there is no terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from ._binding import format_ids

if TYPE_CHECKING:
    from ._group import RankGroup

_SECONDS = 0.5  # what takes less needs no line


class Progress:
    """Shows one line on ``stream``, and wipes it out again."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._on = stream.isatty()
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
        self._show(f"{len(running)} of {len(group.ranks)} ranks still run ({format_ids(running)}); SIGKILL in {left} s")
        return _SECONDS

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        print(f"rankspawn: {text}", file=self._stream, flush=True)

    def clear(self) -> None:
        """Wipe the line out."""
        if self._shown:
            self._shown = False
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _show(self, text: str) -> None:
        self._shown = True
        self._stream.write(f"\r\x1b[Krankspawn: {text[:100]}")
        self._stream.flush()
