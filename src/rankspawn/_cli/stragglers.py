"""Ranks that still run long after another ended with status 0. --wait ends them; without it a line names them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .._ids import format_ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._group.group import RankGroup

LONG = 60.0
"""Seconds until a line names them. Uneven work and a last checkpoint take less; a job that hangs takes more."""


class Stragglers:
    """Notices that a rank of this machine has ended with status 0 while others still run.

    Args:
        group: The ranks of an attempt.
        first_rank: The RANK of its local rank 0.
        wait: The seconds of --wait; None if the user did not give it.
        stacks: Whether to look at what the other ranks do before they are ended.
    """

    def __init__(self, group: RankGroup, first_rank: int, wait: float | None, *, stacks: bool) -> None:
        self._group, self._first_rank, self._stacks = group, first_rank, stacks
        self._ends, self._seconds = wait is not None, LONG if wait is None else wait
        self._first: tuple[int, float] | None = None  # that ended with status 0, and when
        self._said = False

    def left(self) -> float | None:
        """In how many seconds act() has something to do; None if there is nothing to wait for."""
        group = self._group
        if self._said or group.stopping or not group.running:
            return None
        if self._first is None:
            well = next((rank for rank, code in group.returncodes.items() if code == 0), None)
            if well is None:
                return None
            self._first = well, time.monotonic()
        return max(0.0, self._first[1] + self._seconds - time.monotonic())

    def act(self, say: Callable[[str], object]) -> bool:
        """When it is time, name the ranks that still run, once.

        Args:
            say: Prints a line.

        Returns:
            Whether the caller must end them now.
        """
        if self.left() != 0.0 or self._first is None:
            return False
        self._said = True
        running = self._group.running
        which = format_ids([self._first_rank + rank for rank in running])
        still = f"{len(running)} ranks still run" if len(running) > 1 else "1 rank still runs"
        what = "ending what still runs (--wait)" if self._ends else "--wait SECONDS would end what still runs"
        first = self._first_rank + self._first[0]
        say(f"rank {first} ended with status 0 {self._seconds:g} s ago, and {still}: {which}; {what}")
        if self._ends and self._stacks:
            self._group.dump(because="--wait")
        return self._ends
