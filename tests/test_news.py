"""A wait must not sleep if the event that it would wait for was seen just before the sleep.

A wait first decides what to wait for, and then sleeps. In between, another thread or a signal handler may call poll().
That call takes the event (a rank's end, or the bell of stop()), but does not act on it. The number Watch.news changes
with each such event, so the wait can see that it must not sleep.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankspawn import RankGroup, launch
from rankspawn._group import ending as _ending
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.processes import eventually, has_ended
from tests.test_group import KILLED, SLEEPING, TERMINATED, Waiter, stubborn

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only a wait for pidfds sleeps long"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
]


async def in_a_loop(group: RankGroup) -> tuple[int, ...]:
    return await group


def wait_for_each(group: RankGroup) -> tuple[int | None, ...]:
    while group.wait_any():
        pass
    return group.poll()


# For each way to wait: the function that waits; the last method of the group that it calls before it sleeps; and the
# number of that call.
WAYS: dict[str, tuple[Callable[[RankGroup], object], str, int]] = {
    "wait": (RankGroup.wait, "_due", 1),
    "await": (lambda group: asyncio.run(in_a_loop(group)), "_due", 2),
    "wait_any": (wait_for_each, "_look_for_hang", 1),
}


def in_another_thread(look: Callable[[], object]) -> None:
    assert not isinstance(Waiter(look).come_to_an_end(), BaseException)


def in_a_signal_handler(look: Callable[[], object]) -> None:
    look()


every_way = pytest.mark.parametrize("way", WAYS)
everywhere = pytest.mark.parametrize("somewhere", [in_another_thread, in_a_signal_handler])


def answer_of(way: str, group: RankGroup, what: Callable[[], object]) -> object:
    """What a wait returns, if ``what`` happens just before its first sleep."""
    wait, name, call = WAYS[way]
    eventually(lambda: group.poll() and group._deaths is not None)  # until then no sleep is long
    method, calls = getattr(group, name), []

    def last(*arguments: Any) -> Any:
        answer = method(*arguments)
        calls.append(name)
        if len(calls) == call:
            what()
        return answer

    setattr(group, name, last)
    return Waiter(lambda: wait(group)).come_to_an_end()


def kill(group: RankGroup, *numbers: int) -> None:
    for number in numbers:
        os.kill(group.ranks[number].pid, signal.SIGKILL)
    eventually(lambda: all(has_ended(group.ranks[number].pid) for number in numbers))


@every_way
@everywhere
def test_the_last_end(way: str, somewhere: Callable[[Callable[[], object]], None]) -> None:
    with launch(SLEEPING, 2) as group:

        def seen() -> None:
            kill(group, 0, 1)
            somewhere(group.poll)

        assert answer_of(way, group, seen) == (KILLED, KILLED)


@pytest.mark.parametrize("way", ["wait", "await"])
@everywhere
def test_a_failure_that_ends_the_others(way: str, somewhere: Callable[[Callable[[], object]], None]) -> None:
    with launch(SLEEPING, 3) as group:

        def seen() -> None:
            kill(group, 1)
            somewhere(group.poll)

        assert answer_of(way, group, seen) == (TERMINATED, KILLED, TERMINATED)


@every_way
@everywhere
def test_a_stop_whose_bell_was_heard(
    way: str, somewhere: Callable[[Callable[[], object]], None], tmp_path: Path
) -> None:
    with stubborn(tmp_path) as group:

        def asked() -> None:
            somewhere(lambda: group.stop(grace=0))
            somewhere(group.poll)

        assert answer_of(way, group, asked) == (KILLED, KILLED)


@everywhere
def test_the_end_of_killed_ranks(
    somewhere: Callable[[Callable[[], object]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ending, "KILL_SECONDS", 100_000.0)
    with launch(SLEEPING, 2) as group:
        eventually(lambda: group.poll() and group._deaths is not None)
        monkeypatch.setattr(group._watch, "look_seldom", lambda end: None)  # it may have seen all
        look, looks = group._look, []

        def seen_before(*arguments: Any) -> Any:
            if not looks:
                looks.append(eventually(lambda: all(has_ended(pid) for pid in group.pids())))
                somewhere(lambda: look(0))
            return look(*arguments)

        group._look = seen_before  # type: ignore[method-assign]
        Waiter(group.kill).come_to_an_end()
        assert group.poll() == (KILLED, KILLED)
