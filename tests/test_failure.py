"""Why a job failed: error files in every shape that torch writes, and in none, and the text that tells of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankspawn import Popen, launch
from rankspawn._output.failure import (
    Failure,
    LastLines,
    describe,
    describe_interruption,
    duration,
    failures,
    first_failure,
    how_it_ended,
    read_last_lines,
)
from rankspawn._output.logs import RankFiles, rank_files
from rankspawn._output.recorded import RecordedError, pass_on, read_error_file
from rankspawn._output.words import place_in

TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 1, in main\nRuntimeError: boom\n'


def recorded(message: str = "RuntimeError: boom", callstack: str = TRACEBACK, timestamp: object = "1700000000") -> str:
    """An error file as torch's ErrorHandler.record_exception writes it."""
    extra = {"py_callstack": callstack, "timestamp": timestamp}
    return json.dumps({"message": {"message": message, "extraInfo": extra}})


def in_file(folder: Path, text: str) -> RecordedError | None:
    path = folder / "error.json"
    path.write_text(text)
    return read_error_file(path)


def test_an_exception(tmp_path: Path) -> None:
    text = recorded()
    assert in_file(tmp_path, text) == RecordedError("RuntimeError: boom", TRACEBACK, 1700000000.0, text)


@pytest.mark.parametrize(
    ("text", "message", "when"),
    [
        ('{"message": "out of luck"}', "out of luck", None),
        ('{"message": "out of luck", "timestamp": 1700000000}', "out of luck", 1700000000.0),
        ('{"message": {"message": "m", "errorCode": 3}}', "m", None),
        ('{"message": {"message": "m", "extraInfo": {"timestamp": 1700000000.5}}}', "m", 1700000000.5),
        ('{"message": {"message": {"code": 3}, "extraInfo": null}}', '{"code": 3}', None),
        ('{"message": {"message": "m", "extraInfo": {"timestamp": "yesterday"}}}', "m", None),
        ('{"message": {"message": "m", "extraInfo": {"timestamp": 1e999}}}', "m", None),
        ('{"message": {"message": "m", "extraInfo": {"timestamp": NaN}}}', "m", None),
        ('{"message": {"message": "m", "extraInfo": {"timestamp": -1}}}', "m", None),
        (f'{{"message": {{"message": "m", "extraInfo": {{"timestamp": {"9" * 1000}}}}}}}', "m", None),
    ],
)
def test_other_shapes(tmp_path: Path, text: str, message: str, when: float | None) -> None:
    assert in_file(tmp_path, text) == RecordedError(message, "", when, text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        (recorded()[:-20], "is not JSON: Unterminated string"),
        ("[" * 100_000, "is not JSON: "),
        ("[1, 2]", "has no message"),
        ('{"messages": "m"}', "has no message"),
        ('{"message": null}', "has no message"),
        (recorded(callstack="x" * (2 << 20)), "is larger than 1 MiB"),
    ],
)
def test_a_file_that_makes_no_sense_is_said(tmp_path: Path, text: str, problem: str) -> None:
    error = in_file(tmp_path, text)
    assert error is not None
    assert error.problem.startswith(problem)
    assert (error.message, error.traceback, error.time) == ("", "", None)
    assert text.startswith(error.raw)
    assert len(error.raw) <= 1 << 20


def test_bytes_that_are_no_utf_8(tmp_path: Path) -> None:
    (tmp_path / "error.json").write_bytes(b'{"message": "caf\xe9"}')
    error = read_error_file(tmp_path / "error.json")
    assert error is not None
    assert error.problem.startswith("is not JSON: ")  # it is read as \xe9, which is no escape of JSON's


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    assert read_error_file(tmp_path / "none") is None
    os.mkfifo(tmp_path / "fifo")
    error = read_error_file(tmp_path / "fifo")
    assert error is not None
    assert error.problem == "cannot be read: not a regular file"


def test_the_first_is_who_recorded_first() -> None:
    """Rank 2 raised first and took long to end. Rank 0 lost its connection to it, failed, and was seen to end first."""
    early = RecordedError("m", "", 100.0, "")
    late = RecordedError("m", "", 103.0, "")
    failures = [Failure(0, 1, 102.5), Failure(1, 1, 104.0, error=late), Failure(2, 1, 105.0, error=early)]
    assert first_failure(failures).rank == 2
    assert first_failure(failures[:2]).rank == 0


def test_who_ended_by_the_launchers_own_signal_is_not_the_first() -> None:
    term, kill = frozenset({signal.SIGTERM}), frozenset({signal.SIGTERM, signal.SIGKILL})
    killed, as_a_shell = Failure(0, -signal.SIGKILL, 100.0, sent=kill), Failure(1, 143, 100.0, sent=term)
    failed = Failure(2, 1, 105.0, sent=term)  # it may have failed before the signal came
    assert first_failure([killed, as_a_shell, failed]) is failed
    assert first_failure([killed, Failure(1, -signal.SIGKILL, 105.0)]).rank == 1  # another's SIGKILL
    assert first_failure([killed, as_a_shell]) is killed
    # It raised, hung on its way out, and was killed because another had failed meanwhile.
    raised = Failure(3, -signal.SIGKILL, 130.0, error=RecordedError("m", "", 99.0, ""), sent=kill)
    assert first_failure([killed, failed, raised]) is raised


def test_the_launchers_own_sigkill_is_not_said_to_be_the_kernels() -> None:
    kill = frozenset({signal.SIGTERM, signal.SIGKILL})
    told = describe(Failure(0, -signal.SIGKILL, 0, pid=7, sent=kill), [Failure(1, -signal.SIGKILL, 0, sent=kill)])
    assert told == "rank 0 (pid 7) was killed by this launcher's SIGKILL\n  others: 1 killed by SIGKILL\n"
    assert "memory runs out" in describe(Failure(0, -signal.SIGKILL, 0, sent=frozenset({signal.SIGTERM})))


@pytest.mark.skipif(sys.platform != "linux", reason="sends signals to sessions")
def test_a_group_knows_whom_it_has_signalled(tmp_path: Path) -> None:
    script = (
        "[ $RANK = 0 ] && while ! [ -e 1 -a -e 2 ]; do sleep 0.01; done && exit 3\n"
        "[ $RANK = 1 ] && trap '' TERM; : > $RANK; while :; do sleep 0.1; done"
    )
    with launch(["/bin/sh", "-c", script], 3, grace=0.3, cwd=tmp_path) as group:
        assert group.wait(60) == (3, -signal.SIGKILL, -signal.SIGTERM)
        sent = {failure.rank: failure.sent for failure in group.failures()}
    assert list(sent) == [0, 1, 2]
    assert sent == {0: set(), 1: {signal.SIGTERM, signal.SIGKILL}, 2: {signal.SIGTERM}}


@pytest.mark.parametrize(
    ("killed", "seconds", "words"),
    [
        ({4, 5}, 30.04, "interrupted; 2 ranks had to be killed after 30 s: 4-5"),
        ({6}, 0.5, "interrupted; 1 rank had to be killed after 0.5 s: 6"),
        ({4, 6}, 0.01, "interrupted; 2 ranks had to be killed after 0 s: 4,6"),
    ],
)
def test_an_interruption_in_words(killed: set[int], seconds: float, words: str) -> None:
    assert describe_interruption(killed, seconds) == words


def test_within_a_second_the_first_is_who_was_seen_first() -> None:
    """torch records whole seconds: 100 may mean 100.9."""
    error = RecordedError("m", "", 100.0, "")
    assert first_failure([Failure(0, 1, 100.7, error=error), Failure(1, -9, 100.2)]).rank == 1
    assert first_failure([Failure(0, 1, 100.1, error=error), Failure(1, -9, 100.2)]).rank == 0


def test_of_ranks_that_were_seen_to_end_together_the_first_in_order_is_the_first() -> None:
    with Popen(["/bin/false"]) as rank:
        rank.wait(60)
    seen = dict.fromkeys(reversed(range(64)), time.monotonic_ns())
    assert [one.rank for one in failures([rank] * 64, dict.fromkeys(seen, 1), seen, None)] == [63, *range(63)]


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (0, "exited with status 0"),
        (1, "exited with status 1"),
        (127, "exited with status 127"),
        (128, "exited with status 128"),
        (137, "exited with status 137 (as a shell whose command SIGKILL killed)"),
        (255, "exited with status 255"),
        (-signal.SIGTERM, "was killed by SIGTERM"),
        (-signal.SIGSEGV, "was killed by SIGSEGV (the signal of an invalid memory access)"),
        (-signal.SIGRTMIN - 1, f"was killed by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_words(returncode: int, words: str) -> None:
    assert how_it_ended(returncode) == words


def test_words_for_a_real_shell() -> None:
    status = subprocess.run(["/bin/sh", "-c", "sh -c 'kill -9 $$'; exit $?"], check=False).returncode
    assert "SIGKILL" in how_it_ended(status)


def ran(folder: Path, script: str, error: str | None = None) -> Failure:
    """Run ``script`` as a rank, with ``error`` as its error file; its failure."""
    (files,) = rank_files(str(folder), 1)
    with Popen(["/bin/sh", "-c", script], stdout=files.stdout, stderr=files.stderr) as rank:
        rank.wait(60)
    if error is not None:
        Path(files.error).write_text(error)
    error_file, output = read_error_file(files.error), read_last_lines(files)
    return Failure(
        0, rank.returncode, time.time(), rank.pid, "cpus 0-3, memory bind:0", files, error_file, output=output
    )


def test_told_from_its_stderr(tmp_path: Path) -> None:
    failure = ran(tmp_path, "echo out; for i in 1 2 3 4; do echo line $i >&2; done; kill -9 $$")
    others = [Failure(3, -15, 0.0), Failure(1, -15, 0.0), Failure(2, -15, 0.0), Failure(5, 1, 0.0)]
    assert describe(failure, others, lines=3) == (
        f"rank 0 (pid {failure.pid}) was killed by SIGKILL (anyone may send it; the kernel does when memory runs out,"
        " and says so in its log)\n"
        "  it was bound to cpus 0-3, memory bind:0\n"
        "  its stderr ends with:\n"
        "    line 2\n"
        "    line 3\n"
        "    line 4\n"
        f"  its files are in {tmp_path}/attempt_0/0\n"
        "  others: 1-3 killed by SIGTERM; 5 exit status 1\n"
    )


def traceback(message: str, line: int = 88, path: str = "/home/ann/train.py") -> LastLines:
    """What the interpreter writes at the end, when the call of the user's code has raised in a package."""
    return LastLines(
        "stderr",
        (
            "Traceback (most recent call last):",
            f'  File "{path}", line {line}, in step',
            "    all_reduce(x)",
            '  File "/usr/lib/python3.12/site-packages/torch/distributed.py", line 2810, in all_reduce',
            message,
        ),
    )


def test_ranks_that_failed_by_the_same_cause_are_one_line() -> None:
    boom = [
        Failure(rank, 1, 0.0, why="RuntimeError: boom", output=traceback("RuntimeError: boom")) for rank in range(8)
    ]
    elsewhere = boom[3].replace(output=traceback("RuntimeError: boom", 90))
    shell = Failure(8, 127, 0.0, why="127 is the status of a shell", output=LastLines("stderr", ()))
    ours = Failure(9, -signal.SIGTERM, 0.0, sent=frozenset({signal.SIGTERM}), why="this launcher has sent it")
    told = describe(boom[0], [*boom[1:3], elsewhere, *boom[4:], shell, ours, Failure(10, 3, 0.0)], lines=1)
    assert told.splitlines()[-4:] == [
        "  ranks 1-2,4-7: RuntimeError: boom (train.py:88)",
        "  rank 3: RuntimeError: boom (train.py:90)",
        "  rank 8: exit status 127: 127 is the status of a shell",
        "  others: 9 killed by SIGTERM; 10 exit status 3",
    ]
    many = [Failure(rank, 1, 0.0, why=f"ValueError: {rank}") for rank in range(20)]
    assert describe(Failure(20, 1, 0.0), many).splitlines()[-2:] == [
        "  rank 7: ValueError: 7",
        "  ranks 8-19: other causes",
    ]


def test_what_is_shown_above_is_not_told_again(tmp_path: Path) -> None:
    output = traceback("RuntimeError: boom")
    failure = Failure(2, 1, 0.0, why="RuntimeError: boom", output=output)
    assert describe(failure, shown="[rank 2]:") == (
        "rank 2 exited with status 1\n"
        "  why: RuntimeError: boom (train.py:88)\n"
        "  what it wrote to stderr is shown above, behind [rank 2]:\n"
    )
    # A recorded error is told by its message alone, if its traceback stands above, too.
    files = RankFiles(None, None, str(tmp_path / "error.json"))
    error = RecordedError("RuntimeError: boom", "\n".join(output.lines), None, "")
    told = describe(failure.replace(files=files, error=error), shown="[rank 2]:")
    assert "it recorded: RuntimeError: boom\n" in told and "Traceback" not in told
    hidden = RecordedError("RuntimeError: boom", "Traceback (most recent call last):\nRuntimeError: other", None, "")
    assert "    RuntimeError: other\n" in describe(failure.replace(files=files, error=hidden), shown="[rank 2]:")
    # What it wrote to stdout alone goes elsewhere, perhaps.
    told = describe(failure.replace(why="", output=LastLines("stdout", ("last words",))), shown="[rank 2]:")
    assert "  its stdout ends with:\n    last words\n" in told


def test_when_it_ended_and_after_what_time() -> None:
    told = describe(Failure(0, 1, 1700000000.0, lasted=3725.4))
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1700000000))
    assert told == f"rank 0 exited with status 1\n  it ended at {when}, after 1 h 2 min\n"
    assert [duration(one) for one in (0.04, 12.34, 59.94, 192.4)] == ["0 s", "12.3 s", "59.9 s", "3 min 12 s"]


@pytest.mark.parametrize(
    ("lines", "place"),
    [
        ((), ""),
        (("RuntimeError: boom",), ""),
        (('  File "a/train.py", line 3, in <module>', "    f()", "ValueError: no"), "train.py:3"),
        (('  File "/x/lib/python3.12/json/decoder.py", line 355, in raw_decode', "ValueError: no"), "decoder.py:355"),
        (
            (
                '  File "old.py", line 1, in f',
                "Traceback (most recent call last):",
                '  File "<frozen runpy>", line 8, in _run',
            ),
            "<frozen runpy>:8",
        ),
    ],
)
def test_the_place_of_an_exception(lines: tuple[str, ...], place: str) -> None:
    assert place_in(lines) == place


def test_files_that_will_be_gone_are_not_pointed_at(tmp_path: Path) -> None:
    told = describe(ran(tmp_path, "echo out; exit 3"), kept=False)
    assert "    out\n" in told
    assert str(tmp_path) not in told


def test_told_from_its_stdout_when_stderr_is_empty(tmp_path: Path) -> None:
    told = describe(ran(tmp_path, "echo out; exit 3"))
    assert "  its stdout ends with:\n    out\n" in told
    assert "stderr" not in told


def test_told_of_a_rank_that_said_nothing(tmp_path: Path) -> None:
    assert "  it wrote nothing\n" in describe(ran(tmp_path, "exit 3"))


def test_told_without_files() -> None:
    assert describe(Failure(7, 2, 0.0)) == "rank 7 exited with status 2\n"


def test_what_was_recorded_is_told_once(tmp_path: Path) -> None:
    """The interpreter prints the recorded traceback, too: it is left out of the log's end, and later lines are not."""
    script = "cat >&2 <<'END'\nwarning\n" + TRACEBACK + "later\nEND\nexit 1"
    told = describe(ran(tmp_path, script, recorded()))
    assert told.splitlines()[2:-1] == [
        time.strftime("  it recorded, at %Y-%m-%d %H:%M:%S: RuntimeError: boom", time.localtime(1700000000)),
        "    Traceback (most recent call last):",
        '      File "train.py", line 1, in main',
        "    RuntimeError: boom",
        "  its stderr ends with:",
        "    later",
    ]
    told = describe(ran(tmp_path, script.replace("later\n", ""), recorded()))
    assert "stderr" not in told
    assert told.count("RuntimeError: boom") == 2


def test_a_long_traceback_is_cut_at_its_beginning(tmp_path: Path) -> None:
    told = describe(ran(tmp_path, "exit 1", recorded(callstack="\n".join(map(str, range(100))))), lines=5)
    assert "    ... (95 lines)\n    95\n    96\n    97\n    98\n    99\n" in told


def test_a_message_without_a_traceback(tmp_path: Path) -> None:
    told = describe(ran(tmp_path, "exit 1", '{"message": "first\\nsecond"}'))
    assert "  it recorded: first\n    second\n" in told


def test_an_error_file_that_makes_no_sense_is_told(tmp_path: Path) -> None:
    told = describe(ran(tmp_path, "echo why >&2; exit 1", "{"))
    assert f"  its error file {tmp_path}/attempt_0/0/error.json is not JSON: " in told
    assert "    why\n" in told


def test_nothing_that_is_told_moves_the_cursor(tmp_path: Path) -> None:
    escapes = "\x1b[2J\x1b]0;title\x07\x1b[31mred\x1b[0m \b\x9b1A"
    told = describe(ran(tmp_path, f"printf '%s' '{escapes}' >&2; exit 1", recorded(escapes, escapes + "\nx" * 3)))
    assert told.replace("\n", "").isprintable()
    assert "red" in told


def test_lines_without_end(tmp_path: Path) -> None:
    told = describe(ran(tmp_path, "head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1", recorded("m" * 100_000)))
    assert max(map(len, told.splitlines())) < 400


def test_a_log_that_cannot_be_read(tmp_path: Path) -> None:
    files = RankFiles(tmp_path, tmp_path, str(tmp_path / "none"))
    told = describe(Failure(0, 1, 0.0, files=files, output=read_last_lines(files)))
    assert f"  its stderr cannot be read: not a regular file: {tmp_path}\n" in told


def test_passed_on_as_torchrun_does(tmp_path: Path) -> None:
    target = tmp_path / "reply"
    for text in recorded(), '{"message": "plain"}':
        error = in_file(tmp_path, text)
        assert error is not None
        pass_on(error, -9, target)
        expected = json.loads(text)
        if isinstance(expected["message"], dict):
            expected["message"]["errorCode"] = -9
        assert json.loads(target.read_text()) == expected


def test_what_the_others_did_is_passed_on(tmp_path: Path) -> None:
    error = in_file(tmp_path, recorded())
    assert error is not None
    pass_on(error, 1, tmp_path / "reply", "rank 1: in all_reduce, train.py:88")
    extra = json.loads((tmp_path / "reply").read_text())["message"]["extraInfo"]
    assert extra == {**json.loads(recorded())["message"]["extraInfo"], "others": "rank 1: in all_reduce, train.py:88"}


def test_what_makes_no_sense_is_not_passed_on(tmp_path: Path) -> None:
    error = in_file(tmp_path, "{")
    assert error is not None
    pass_on(error, 1, tmp_path / "reply")
    assert not (tmp_path / "reply").exists()
