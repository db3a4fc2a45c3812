"""The end of ranks: they and their sessions are signalled and killed, and they are reaped; what remains, and why."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from .deadline import left, passed, until
from .processes import ProcessTree
from .reap import is_unreaped, reap, status
from .sessions import describe_stuck, kill_members, members, signal_members

if TYPE_CHECKING:
    from typing import TypeAlias

    from .._start.popen import Popen

SIGKILL = signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM

KILL_SECONDS = 10.0
"""How long a killed process may take to end; one in uninterruptible sleep may never end."""

_MOST_NAMES = 20


SignalTo: TypeAlias = Literal["rank", "group", "session"]
"""Who is meant by a rank: the process itself, its process group, or everybody in its session."""


def signal_ranks(ranks: Sequence[Popen], *signals: int, to: SignalTo = "session", told: SignalTo | None = None) -> None:
    """Signal ranks, also those that have ended: their children may run. A rank without processes is no error.

    A process group is signalled as one, by the pidfd of its leader; the other members of a session are then found, once
    for all ranks, and signalled one by one. Windows has neither: there, "group" and "session" are a rank and its
    descendants, also when the rank has ended.

    Args:
        ranks: The ranks, none of which has been reaped by the group. One that somebody else has reaped is signalled
            only where the kernel can tell whose its number is.
        *signals: What each process gets, in this order.
        to: Which processes of each rank.
        told: Which of them to skip, because they have had the signals before.

    Raises:
        PermissionError: A rank may not be signalled. All others have been.
    """
    refused = None
    tree = None if os.name == "posix" else ProcessTree()
    for rank in ranks if told is None or tree is not None else ():
        for sig in signals:
            try:
                if tree is not None:
                    _signal_tree(rank, tree, sig, to, told)
                elif to == "rank":
                    _signal_leader(rank, sig)
                else:
                    rank.send_signal_group(sig)
            except ProcessLookupError:
                continue
            except PermissionError as error:
                refused = error
    if to == "session" and tree is None:
        # A session's number is its own until its leader is reaped.
        signal_members({rank.pid for rank in ranks if is_unreaped(rank)}, signals, groups=told == "rank")
    if refused is not None:
        raise refused


def _signal_leader(rank: Popen, sig: int) -> None:
    """Signal the rank's process alone. Popen's own send_signal would reap it."""
    pidfd = rank._pidfd
    if pidfd is not None and (refusal := pidfd.send_signal(sig)) in (0, errno.ESRCH, errno.EPERM):
        if refusal == errno.EPERM:
            raise PermissionError(refusal, f"process {rank.pid}: {os.strerror(refusal)}")
    elif is_unreaped(rank):
        os.kill(rank.pid, sig)


def _signal_tree(rank: Popen, tree: ProcessTree, sig: int, to: SignalTo, told: SignalTo | None) -> None:
    import psutil

    below = tree.descendants(rank.pid, rank._born) if to != "rank" and told != "group" else []
    if told is None:
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
    pids = {rank.pid for rank in ranks if is_unreaped(rank)}
    return members(pids, pids) if pids else {}


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
        The processes that do not end: pid -> whose it is.
    """
    unreaped = {}
    for number, rank in ranks.items():
        if is_unreaped(rank):
            unreaped[rank.pid] = number
            if number in ended:
                # Its number is its own until it is reaped. The search for members needs a free descriptor.
                rank._pidfd = None
        else:
            # Other code has reaped it: another process may have its number, and only the kernel can tell (Linux 6.9).
            reap(rank, ended.get(number))
            with suppress(PermissionError):
                signal_ranks([rank], SIGKILL, to="group")
    zombies = {pid for pid, number in unreaped.items() if number in ended}
    stuck = kill_members(unreaped.keys(), seconds, zombies, found) if unreaped else {}
    return {pid: f"rank {unreaped[session]}" for pid, session in stuck.items()}


def end_ranks(ranks: list[Popen]) -> None:
    """Kill those that were started, with their sessions, and reap them; those that do not end stay in the list."""
    started = {number: rank for number, rank in enumerate(ranks) if rank._child_created and rank.returncode is None}
    with suppress(PermissionError):
        signal_ranks([*started.values()], SIGKILL, to="group")
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
    """For the error: which processes survive SIGKILL, and why."""
    told = [f"{whose}: {describe_stuck(pid)}" for pid, whose in list(stuck.items())[:_MOST_NAMES]]
    return "; ".join(told) + (f"; and {len(stuck) - len(told)} more" if len(stuck) > len(told) else "")
