"""What ranks write, line by line: for a function, a loop, and one in asyncio, with failures, restarts and ends."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankspawn import RankGroup, RankLine, RanksFailedError, launch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals of sessions")

PATIENCE = 60
TALK = ["/bin/sh", "-c", "echo one; echo two >&2; sleep 0.05; echo three $RANK; printf four"]


def of(rank: int, lines: list[RankLine]) -> list[tuple[str, str]]:
    return [(line.stream, line.text) for line in lines if line.rank == rank]


def in_a_loop(group: RankGroup) -> list[RankLine]:
    return list(group.lines())


def in_asyncio(group: RankGroup) -> list[RankLine]:
    async def collected() -> list[RankLine]:
        return [line async for line in group.lines()]

    async def limited() -> list[RankLine]:
        return await asyncio.wait_for(collected(), PATIENCE)

    return asyncio.run(limited())


LOOPS = pytest.mark.parametrize("read", [in_a_loop, in_asyncio])
Read = Callable[[RankGroup], list[RankLine]]


@LOOPS
def test_lines_come_in_the_order_of_each_stream_and_to_the_last(read: Read) -> None:
    with launch(TALK, 3, capture_output=True) as group:
        lines = read(group)
        assert group.wait(PATIENCE) == (0, 0, 0)
    for rank in range(3):
        own = of(rank, lines)
        assert [text for stream, text in own if stream == "stdout"] == ["one", f"three {rank}", "four"]
        assert [text for stream, text in own if stream == "stderr"] == ["two"]


@LOOPS
def test_a_line_comes_while_the_rank_runs(read: Read, tmp_path: Path) -> None:
    """The rank ends when somebody has read its first line."""
    script = "echo ready; while ! [ -e answer ]; do sleep 0.01; done; echo done"
    with launch(["/bin/sh", "-c", script], 1, log_dir=tmp_path / "logs", cwd=tmp_path) as group:
        if read is in_a_loop:
            lines = []
            for line in group.lines():
                lines.append(line)
                (tmp_path / "answer").touch()
        else:

            async def answer() -> list[RankLine]:
                found = []
                async for line in group.lines():
                    found.append(line)
                    (tmp_path / "answer").touch()
                return found

            lines = asyncio.run(answer())
    assert lines == [RankLine(0, "stdout", "ready"), RankLine(0, "stdout", "done")]


@LOOPS
def test_a_failure_ends_the_others_and_the_loop(read: Read) -> None:
    script = 'echo $RANK; test "$RANK" = 0 && exec sleep 60; exit 3'
    with launch(["/bin/sh", "-c", script], 2, capture_output=True) as group:
        assert of(1, read(group)) == [("stdout", "1")]
        assert group.returncodes[1] == 3
        with pytest.raises(RanksFailedError, match=r"its stdout ends with:\n    1"):
            group.check()


@LOOPS
def test_lines_of_all_attempts(read: Read) -> None:
    script = "echo $TORCHELASTIC_RESTART_COUNT; printf last; test $TORCHELASTIC_RESTART_COUNT = 2"
    with launch(["/bin/sh", "-c", script], 1, capture_output=True, max_restarts=2) as group:
        assert [line.text for line in read(group)] == ["0", "last", "1", "last", "2", "last"]


@LOOPS
def test_a_loop_that_begins_late_has_all_lines_and_so_has_the_next(read: Read) -> None:
    with launch(TALK, 1, capture_output=True) as group:
        group.wait(PATIENCE)
        assert len(read(group)) == len(in_a_loop(group)) == 4


def test_a_loop_that_is_left_leaves_the_ranks() -> None:
    with launch(["/bin/sh", "-c", "echo hi; exec sleep 60"], 1, capture_output=True) as group:
        for line in group.lines():
            assert line.text == "hi"
            break
        assert group.poll() == (None,)


def test_many_lines() -> None:
    with launch(["/bin/sh", "-c", "seq 100000; printf '\\377\\n'"], 2, capture_output=True) as group:
        lines = in_a_loop(group)
    wanted = [("stdout", str(number)) for number in range(1, 100001)] + [("stdout", "\\xff")]
    assert of(0, lines) == of(1, lines) == wanted


def test_without_files_there_are_no_lines() -> None:
    with launch(["/bin/true"], 1) as group:
        with pytest.raises(ValueError, match="launch them with capture_output=True"):
            group.lines()


@LOOPS
def test_lines_after_the_end_need_files_that_last(read: Read, tmp_path: Path) -> None:
    with launch(TALK, 1, log_dir=tmp_path) as group:
        group.wait(PATIENCE)
    assert len(read(group)) == 4
    with launch(TALK, 1, capture_output=True) as group:
        group.wait(PATIENCE)
        begun = group.lines()
    for after in (read, lambda _: list(begun)):
        with pytest.raises(ValueError, match="the group is closed, and its temporary log files are gone"):
            after(group)


# ---- on_line ---------------------------------------------------------------------------------------------------------


def test_a_function_is_called_by_who_waits() -> None:
    lines: list[RankLine] = []
    threads = set()

    def note(line: RankLine) -> None:
        lines.append(line)
        threads.add(threading.get_ident())

    with launch(TALK, 2, on_line=note) as group:
        group.wait(PATIENCE)
        assert len(lines) == 8
    assert threads == {threading.get_ident()}
    assert of(1, lines)[-2:] == [("stdout", "three 1"), ("stdout", "four")]


def test_a_function_is_called_by_await_while_others_run() -> None:
    async def job() -> list[str]:
        lines: list[str] = []
        async with launch(TALK, 1, on_line=lambda line: lines.append(line.text)) as group:
            await group
        return lines

    assert sorted(asyncio.run(job())) == ["four", "one", "three 0", "two"]


def test_a_line_wakes_who_waits(tmp_path: Path) -> None:
    """The rank ends because of what the function does with its first line."""
    script = "echo ready; while ! [ -e answer ]; do sleep 0.01; done"
    command = ["/bin/sh", "-c", script]
    with launch(command, 1, on_line=lambda line: (tmp_path / "answer").touch(), cwd=tmp_path) as group:
        assert group.wait(PATIENCE) == (0,)


def test_what_was_written_before_the_group_is_closed_is_handed_over(tmp_path: Path) -> None:
    lines: list[str] = []
    script = "echo written; touch there; exec sleep 60"
    with launch(["/bin/sh", "-c", script], 1, on_line=lambda line: lines.append(line.text), cwd=tmp_path):
        while not (tmp_path / "there").exists():
            pass
    assert lines == ["written"]


@pytest.mark.parametrize("where", ["wait", "close"])
def test_what_the_function_raises_is_raised_and_nothing_is_left(where: str, tmp_path: Path) -> None:
    def refuse(line: RankLine) -> None:
        raise RuntimeError(line.text)

    with pytest.raises(RuntimeError, match=r"^no$"):
        with launch(["/bin/sh", "-c", "echo no; touch there; exec sleep 60"], 1, on_line=refuse, cwd=tmp_path) as group:
            while not (tmp_path / "there").exists():
                pass
            if where == "wait":
                group.wait(PATIENCE)
    assert group.ranks[0].returncode is not None


def test_lines_of_all_attempts_are_handed_over() -> None:
    lines: list[str] = []
    script = "printf $TORCHELASTIC_RESTART_COUNT; test $TORCHELASTIC_RESTART_COUNT = 2"
    options: dict[str, Any] = {"max_restarts": 2, "on_line": lambda line: lines.append(line.text)}
    with launch(["/bin/sh", "-c", script], 1, **options) as group:
        group.wait(PATIENCE, check=True)
    assert lines == ["0", "1", "2"]


def test_a_function_that_is_none() -> None:
    with pytest.raises(TypeError, match=r"^on_line: expected a function that takes a RankLine, got 'print'$"):
        launch(["/bin/true"], 1, on_line="print")  # type: ignore[arg-type]


def test_no_folder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with launch(TALK, 1, capture_output=True) as group:
        assert len(os.listdir(tmp_path)) == 1
        group.wait(PATIENCE)
    assert os.listdir(tmp_path) == []
