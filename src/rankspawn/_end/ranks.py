"""Ends ranks: signals and kills them and their sessions, reaps them, and says what remains and why."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from . import way as _way
from .deadline import left, passed, until
from .processes import ProcessTree
from .reap import is_reaped, reap, returncodes, unreaped
from .sessions import describe_stuck, kill_members, members, signal_members

if TYPE_CHECKING:
    from typing import TypeAlias

    from .._start.popen import Popen

SIGKILL = signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM

KILL_SECONDS = 10.0
"""How long a killed process may take to end; one in uninterruptible sleep may never end."""

_MOST_NAMES = 20

# How many free ones the search for members needs.
_SEARCH_DESCRIPTORS = 2


SignalTo: TypeAlias = Literal["rank", "group", "session"]
"""Who is meant by a rank: the process itself, its process group, or everybody in its session."""


def signal_ranks(ranks: Sequence[Popen], *signals: int, to: SignalTo = "session", told: SignalTo | None = None) -> None:
    """Signal ranks, also those that have ended, because their children may run. A rank without processes is no error.

    A process group is signalled as one, by the pidfd of its leader; the other members of a session are then found, once
    for all ranks, and signalled one by one. Windows has neither: there, "group" and "session" are a rank and its
    descendants, also when the rank has ended.

    Args:
        ranks: The ranks, none of which has been reaped by the group. A rank that other code has reaped is
            signalled only if the kernel knows whose its number is.
        *signals: What each process gets, in this order.
        to: Which processes of each rank.
        told: Which of them to skip, because they already had the signals.

    Raises:
        PermissionError: A rank may not be signalled. All others have been.
    """
    refused: list[int] = []
    if os.name != "posix":
        _signal_trees(ranks, signals, to, told)
    elif told is None and to == "rank":
        refused = [rank.pid for rank in ranks if not _signal_leader(rank, signals)]
    elif told is None:
        refused = _way.way.signal_groups(ranks, signals)
    if to == "session" and os.name == "posix":
        # A session's number is its own until its leader is reaped.
        signal_members({rank.pid for rank in unreaped(ranks)}, signals, groups=told == "rank")
    if refused:
        raise PermissionError(errno.EPERM, f"process {refused[0]}: {os.strerror(errno.EPERM)}")


def _signal_leader(rank: Popen, signals: Sequence[int]) -> bool:
    """Signal the rank's process alone; return whether that is allowed. Popen's own send_signal would reap it."""
    for sig in signals:
        pidfd = rank._pidfd
        refusal = errno.ENOSYS if pidfd is None else pidfd.send_signal(sig)
        if refusal == errno.EPERM:
            return False
        if refusal not in (0, errno.ESRCH) and unreaped([rank]):
            try:
                os.kill(rank.pid, sig)
            except ProcessLookupError:
                continue
            except PermissionError:
                return False
    return True


def _signal_trees(ranks: Sequence[Popen], signals: Sequence[int], to: SignalTo, told: SignalTo | None) -> None:
    import psutil

    tree = ProcessTree()
    for rank in ranks:
        for sig in signals:
            below = tree.descendants(rank.pid, rank._born) if to != "rank" and told != "group" else []
            if told is None:
                with suppress(ProcessLookupError):
                    rank.send_signal(sig)
            for process in below:
                with suppress(psutil.Error):
                    process.send_signal(sig)


def living(ranks: Iterable[Popen]) -> dict[int, int] | None:
    """The living members of the ranks' sessions, without the ranks: pid -> session. None on a system without sessions.

    An empty session cannot gain members: once all ranks have ended and no member is found, the sessions stay empty.
    """
    if not hasattr(os, "getpgid"):
        return None
    pids = {rank.pid for rank in unreaped(ranks)}
    return members(pids, pids) if pids else {}


def nobody_lives(ranks: Iterable[Popen], ended: Iterable[Popen]) -> bool:
    """Whether the ranks' sessions certainly have no living member; by one search, and without a look at the ranks.

    Args:
        ranks: The ranks.
        ended: Those that have been seen to end.
    """
    return bool(_way.way.are_empty({rank.pid for rank in ranks}, {rank.pid for rank in ended}))


def kill_sessions(
    ranks: Mapping[int, Popen], ended: Mapping[int, int], seconds: float, found: dict[int, int] | None = None
) -> dict[int, str]:
    """Kill what is left in the sessions of ranks.

    Args:
        ranks: The ranks, by number.
        ended: The returncodes of those that have been seen to end.
        seconds: How long it may take.
        found: As for kill_members().

    Returns:
        The processes that do not end: pid -> the rank that they belong to.
    """
    zombies = [rank for number, rank in ranks.items() if number in ended]
    freed = 0
    for rank in reversed(zombies):
        if freed < _SEARCH_DESCRIPTORS and unreaped([rank]):
            rank._pidfd = None  # its number is its own until it is reaped
            freed += 1
    if found is None and not any(map(is_reaped, ranks.values())):
        with suppress(PermissionError):
            signal_ranks([*ranks.values()], SIGKILL, to="group")
        if nobody_lives(ranks.values(), zombies):
            return {}
    own = {rank.pid for rank in unreaped(ranks.values())}
    numbers = {rank.pid: number for number, rank in ranks.items() if rank.pid in own}
    others = {number: rank for number, rank in ranks.items() if rank.pid not in own}
    if others:
        # Other code has reaped them: other processes may have their numbers, and only the kernel can tell (Linux 6.9).
        reap(others, ended)
        with suppress(PermissionError):
            signal_ranks([*others.values()], SIGKILL, to="group")
    stuck = kill_members(own, seconds, own.intersection(rank.pid for rank in zombies), found) if own else {}
    return {pid: f"rank {numbers[session]}" for pid, session in stuck.items()}


def end_ranks(ranks: list[Popen]) -> None:
    """Kill those that were started, with their sessions, and reap them; those that do not end stay in the list."""
    started = {number: rank for number, rank in enumerate(ranks) if rank._child_created and rank.returncode is None}
    with suppress(PermissionError):
        signal_ranks([*started.values()], SIGKILL, to="group")
    end = until(KILL_SECONDS)
    while True:
        codes = zip(started, returncodes([*started.values()]), strict=True)
        ended = {number: code for number, code in codes if code is not None}
        if len(ended) == len(started) or passed(end):
            break
        time.sleep(0.001)  # no selector: there may be no descriptor left, which may be why they are ended
    kill_sessions(started, ended, 1.0 + (left(end) or 0))
    reap(started, ended)
    ranks[:] = [rank for rank in started.values() if rank.returncode is None]


def name_running(running: Sequence[int], count: int) -> str:
    """For the error: which ranks still run, of how many."""
    if not running:
        return "the ranks have ended, but processes that they started still run"
    some = ", ".join(map(str, running[:_MOST_NAMES])) + (", ..." if len(running) > _MOST_NAMES else "")
    return f"{len(running)} of {count} ranks still run: {some}"


def name_stuck(stuck: Mapping[int, str]) -> str:
    """For the error: which processes survive SIGKILL, and why."""
    told = [f"{whose}: {describe_stuck(pid)}" for pid, whose in list(stuck.items())[:_MOST_NAMES]]
    return "; ".join(told) + (f"; and {len(stuck) - len(told)} more" if len(stuck) > len(told) else "")
