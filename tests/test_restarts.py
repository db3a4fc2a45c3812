"""``launch(max_restarts=)``: what failed is started again, in every way of waiting, and ends when it is asked to."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rankspawn import Job, RanksFailedError, launch
from tests.support.processes import has_ended

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals of sessions")

PATIENCE = 60
# Rank 1 fails until attempt 2.
THIRD_TIME = 'echo $RANK:$TORCHELASTIC_RESTART_COUNT of $TORCHELASTIC_MAX_RESTARTS at $MASTER_PORT; test "$RANK" = 0 ||'
THIRD_TIME += " test $TORCHELASTIC_RESTART_COUNT = 2"
SHELL = ["/bin/sh", "-c"]


def test_started_again_until_it_is_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with launch([*SHELL, THIRD_TIME], 2, max_restarts=5, log_dir=tmp_path) as group:
        first = group.pids()
        assert group.wait(PATIENCE, check=True) == (0, 0)
        assert set(group.pids()).isdisjoint(first)
        assert group.files is not None and group.files[1].stdout == tmp_path / "attempt_2" / "1" / "stdout.log"
        assert (group.job.restart_count, group.job.max_restarts) == (2, 5)
        attempts = group.report()["attempts"]
    told = [(tmp_path / f"attempt_{n}" / "1" / "stdout.log").read_text().split() for n in range(3)]
    assert [words[:3] for words in told] == [[f"1:{n}", "of", "5"] for n in range(3)]
    assert len({words[4] for words in told}) == 3, "each attempt has a port of its own"
    assert [attempt["attempt"] for attempt in attempts] == [0, 1, 2]
    ends = [[(rank["exit"] or {}).get("status") for rank in attempt["ranks"]] for attempt in attempts]
    assert [end[1] for end in ends] == [1, 1, 0]
    assert [record.name for record in caplog.records] == ["rankspawn"] * 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert caplog.messages[1].startswith("rank 1 (pid ") and caplog.messages[1].endswith("\nrestart 2 of 5")


def test_the_last_failure_is_the_jobs(caplog: pytest.LogCaptureFixture) -> None:
    with launch([*SHELL, "exit 3"], 1, max_restarts=2) as group:
        with pytest.raises(RanksFailedError) as raised:
            group.wait(PATIENCE, check=True)
        assert raised.value.returncode == 3
        assert group.wait(PATIENCE) == (3,)
    assert len(caplog.records) == 2


def test_files_that_have_gone_are_not_pointed_at(caplog: pytest.LogCaptureFixture) -> None:
    with launch([*SHELL, "echo why >&2; exit 3"], 1, max_restarts=1, tee=io.StringIO()) as group:
        group.wait(PATIENCE)
    (message,) = caplog.messages
    assert "why" in message and "files are in" not in message


def test_a_port_that_was_given_is_kept(tmp_path: Path) -> None:
    with launch([*SHELL, THIRD_TIME], 2, max_restarts=2, log_dir=tmp_path, job=Job(2, 29517)) as group:
        assert group.wait(PATIENCE) == (0, 0)
        assert group.job.master_port == 29517


def test_in_asyncio_with_two_that_wait() -> None:
    async def both() -> list[tuple[int, ...]]:
        async with launch([*SHELL, THIRD_TIME], 2, max_restarts=2, tee=io.StringIO()) as group:

            async def wait() -> tuple[int, ...]:
                return await group

            return list(await asyncio.gather(wait(), wait()))

    assert asyncio.run(both()) == [(0, 0)] * 2


def test_two_threads_that_wait_restart_once() -> None:
    shown = io.StringIO()
    with launch([*SHELL, THIRD_TIME], 2, max_restarts=5, tee=shown) as group:
        threads = [threading.Thread(target=group.wait, args=[PATIENCE]) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert group.wait(PATIENCE) == (0, 0)
        for thread in threads:
            thread.join()
        assert group.job.restart_count == 2
    # Rank 0 may be ended before it writes.
    told = [line.removeprefix("[rank 1]:")[:3] for line in shown.getvalue().splitlines() if "[rank 1]:" in line]
    assert told == ["1:0", "1:1", "1:2"]


def test_who_is_asked_to_end_is_not_started_again() -> None:
    with launch([*SHELL, "sleep 60"], 2, max_restarts=5) as group:
        group.stop()
        assert group.wait(PATIENCE) == (-signal.SIGTERM,) * 2
        assert group.job.restart_count == 0


def test_a_stop_in_the_middle_of_a_restart_is_not_lost() -> None:
    def stop(started: object) -> None:
        if calls:
            group.stop()
        calls.append(started)

    calls: list[object] = []
    command = [*SHELL, "test $TORCHELASTIC_RESTART_COUNT = 0 && exit 1; exec sleep 60"]
    with launch(command, 1, max_restarts=5, progress=stop) as group:
        assert group.wait(PATIENCE) == (-signal.SIGTERM,)
        assert (len(calls), group.job.restart_count) == (2, 1)


def test_a_handler_that_closes_in_the_middle_of_a_restart() -> None:
    def interrupt(started: object) -> None:
        if calls:
            os.kill(os.getpid(), signal.SIGUSR1)
        calls.append(started)

    calls: list[object] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: group.close())
    try:
        command = [*SHELL, "test $TORCHELASTIC_RESTART_COUNT = 0 && exit 1; exec sleep 60"]
        group = launch(command, 1, max_restarts=5, progress=interrupt)
        assert group.wait(PATIENCE) == (-signal.SIGTERM,)
        assert group.is_closed and group.ranks[0].returncode == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_restart_that_cannot_be_made_is_raised_once(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nrm {program}\nexit 1\n")
    program.chmod(0o755)
    with launch([str(program)], 1, max_restarts=5) as group:
        with pytest.raises(FileNotFoundError, match="rank 0: "):
            group.wait(PATIENCE)
        assert group.poll() == (1,)
        assert group.wait(PATIENCE) == (1,)


def test_a_signal_in_the_middle_of_a_restart_ends_the_launcher() -> None:
    """``handle_signals``: the ranks of the new attempt are ended, too."""
    code = """
import os, signal, sys
from rankspawn import launch
def interrupt(started):
    if calls: os.kill(os.getpid(), signal.SIGTERM)
    calls.append(started)
calls = []
command = ["/bin/sh", "-c", "echo $$; test $TORCHELASTIC_RESTART_COUNT = 0 && exit 1; exec sleep 60"]
with launch(command, 1, max_restarts=5, handle_signals=True, progress=interrupt) as group:
    group.wait(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr
    for pid in map(int, done.stdout.split()):
        assert has_ended(pid)


def test_what_a_failed_attempt_left_behind_has_ended_before_the_next(tmp_path: Path) -> None:
    script = "trap '' TERM; sleep 60 & echo $! > $TORCHELASTIC_RESTART_COUNT; test $TORCHELASTIC_RESTART_COUNT = 1"
    with launch([*SHELL, script], 1, max_restarts=1, cwd=tmp_path, grace=0.1) as group:
        assert group.wait(PATIENCE) == (0,)
        assert [has_ended(int((tmp_path / name).read_text())) for name in ("0", "1")] == [True, False]
