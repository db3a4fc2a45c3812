"""The end of ranks: their groups signalled, their sessions killed, they themselves reaped; and who stays, and why."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from .deadline import left, passed, until
from .processes import ProcessTree
from .reap import is_unreaped, reap, status
from .sessions import describe_stuck, kill_members, members

if TYPE_CHECKING:
    from .._start.popen import Popen

SIGKILL = signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM

KILL_SECONDS = 10.0
"""How long a killed process may take to be gone; one in uninterruptible sleep may never be."""

_MOST_NAMES = 20


def signal_groups(ranks: Iterable[Popen], *signals: int) -> None:
    """Signal the process group of each rank; nothing where nobody is left in it.

    Windows has no groups: there a rank and what descends from it are signalled, also when the rank has ended.

    Raises PermissionError, when all others have been signalled, if one may not be.
    """
    refused = None
    tree = None if os.name == "posix" else ProcessTree()
    for rank in ranks:
        for sig in signals:
            try:
                if tree is None:
                    rank.send_signal_group(sig)
                else:
                    _signal_tree(rank, tree, sig)
            except ProcessLookupError:
                continue
            except PermissionError as error:
                refused = error
    if refused is not None:
        raise refused


def _signal_tree(rank: Popen, tree: ProcessTree, sig: int) -> None:
    import psutil

    below = tree.descendants(rank.pid, rank._born)
    rank.send_signal(sig)
    for process in below:
        with suppress(psutil.Error):
            process.send_signal(sig)


def living(ranks: Iterable[Popen]) -> tuple[dict[int, int] | None, bool]:
    """Who lives in the sessions of these ranks, which have all been seen to end (pid -> session; None on a system
    without sessions), and whether one of them is in the process group of a rank. Once there is nobody, nobody comes."""
    if not hasattr(os, "getpgid"):
        return None, False
    pids = {rank.pid for rank in ranks if is_unreaped(rank)}
    found = members(pids, pids) if pids else {}
    for pid, session in found.items():
        with suppress(ProcessLookupError):
            if os.getpgid(pid) == session:
                return found, True
    return found, False


def kill_sessions(
    ranks: Mapping[int, Popen], ended: Mapping[int, int], seconds: float, found: dict[int, int] | None = None
) -> dict[int, str]:
    """Kill what is left in the sessions of ``ranks``, by number; who does not end, by pid, and whose it is.

    ended: the returncodes of those that have been seen to end. found: as for kill_members().
    """
    unreaped = {}
    for number, rank in ranks.items():
        if is_unreaped(rank):
            unreaped[rank.pid] = number
            if number in ended:
                # Its number is its own until it is reaped. And to look at processes takes a free descriptor.
                rank._pidfd = None
        else:
            # Somebody has waited for it: its number may be another's, and only the kernel can tell (Linux 6.9).
            reap(rank, ended.get(number))
            with suppress(PermissionError):
                signal_groups([rank], SIGKILL)
    zombies = {pid for pid, number in unreaped.items() if number in ended}
    stuck = kill_members(unreaped.keys(), seconds, zombies, found) if unreaped else {}
    return {pid: f"rank {unreaped[session]}" for pid, session in stuck.items()}


def end_ranks(ranks: list[Popen]) -> None:
    """Kill those that were started, with their sessions, and reap them; who does not end stays in the list."""
    started = {number: rank for number, rank in enumerate(ranks) if rank._child_created and rank.returncode is None}
    with suppress(PermissionError):
        signal_groups(started.values(), SIGKILL)
    ended: dict[int, int] = {}
    end = until(KILL_SECONDS)
    for number, rank in started.items():
        # No selector here: there may be no descriptor left, which may be why they are ended.
        while (code := status(rank)) is None and not passed(end):
            time.sleep(0.001)
        if code is not None:
            ended[number] = code
    kill_sessions(started, ended, 1.0 + (left(end) or 0))
    for number, rank in started.items():
        reap(rank, ended.get(number))
    ranks[:] = [rank for rank in started.values() if rank.returncode is None]


def name_running(running: Sequence[int], count: int) -> str:
    """For the error: which ranks still run, of how many."""
    if not running:
        return "the ranks have ended, and what they have started still runs"
    some = ", ".join(map(str, running[:_MOST_NAMES])) + (", ..." if len(running) > _MOST_NAMES else "")
    return f"{len(running)} of {count} ranks still run: {some}"


def name_stuck(stuck: Mapping[int, str]) -> str:
    """For the error: who survives SIGKILL, and why."""
    told = [f"{whose}: {describe_stuck(pid)}" for pid, whose in list(stuck.items())[:_MOST_NAMES]]
    return "; ".join(told) + (f"; and {len(stuck) - len(told)} more" if len(stuck) > len(told) else "")
