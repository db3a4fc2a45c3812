"""What an agent does before torch ends its ranks: it looks at what they do, and gives all their processes the grace."""

from __future__ import annotations

import logging
import signal
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from .._end.deadline import passed, until
from .._end.ranks import living, signal_ranks
from .._end.reap import reap, returncodes, unreaped
from .._end.sessions import signal_members
from .._end.watch import POLL_SECONDS
from .._ids import format_ids
from .._start.crew import RankProcess

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

_log = logging.getLogger(__name__)


def look_at_others(
    alive: Mapping[int, subprocess.Popen[bytes]],
    failed: Iterable[int],
    envs: Mapping[int, Mapping[str, str]],
    path: Path,
) -> None:
    """Log what the running ranks do, before they are ended because others have failed.

    Args:
        alive: The running ranks, by local rank.
        failed: The local ranks that have failed.
        envs: The variables of each rank.
        path: The file that the stacks are added to.
    """
    if not alive:
        return
    from .._stacks.take import add_to, take

    numbers = format_ids(int(envs[number]["RANK"]) for number in failed)
    found = take({rank.pid: int(envs[number]["RANK"]) for number, rank in alive.items()}, f"rank {numbers} has failed")
    add_to(path, found)
    _log.error("rank %s has failed; what the others did then: %s", numbers, found.folded)
    for note in found.notes:
        _log.error("%s", note)


@contextmanager
def grace_for_all(
    processes: Iterable[object], death_sig: int, seconds: float, pause: Callable[[float], float]
) -> Iterator[None]:
    """Let all that ranks have started end, too, while the block ends the ranks.

    torch signals the ranks' process groups, and waits for the ranks alone. But a shell may end before its program, and
    timeout(1) puts a program into a process group of its own. So the rest of the ranks' sessions is signalled here.
    The ranks are reaped only when their sessions are empty or the grace is over. Until a rank is reaped, no other
    session can get its number, so no foreign process is signalled.

    Args:
        processes: The ranks. One that torch has reaped, because it ended by itself, is left out.
        death_sig: The signal.
        seconds: The grace.
        pause: Takes the seconds until the next look, and returns how long to sleep.
    """
    ranks = [one for one in processes if isinstance(one, RankProcess) and one.returncode is None]
    for rank in ranks:
        rank._is_kept = True
    ended = [rank for rank, code in zip(ranks, returncodes(ranks), strict=True) if code is not None]
    end = until(seconds)
    try:
        with suppress(PermissionError):  # all others were signalled
            signal_ranks(ended, death_sig, signal.SIGCONT)
        signal_members({rank.pid for rank in unreaped(ranks)}, (death_sig, signal.SIGCONT))
        yield
        while living(ranks) and not passed(end):
            time.sleep(pause(POLL_SECONDS))
    finally:
        reap(dict(enumerate(ranks)), {})
