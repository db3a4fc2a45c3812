"""Which ranks have the launcher's stdin, and that the others have /dev/null."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launchers import LAUNCHER, SAY, TIMEOUT, completed, environment_here, in_ranks, said

pytestmark = pytest.mark.skipif(os.name != "posix", reason="asks which file stdin is")

READ = SAY + "say([os.path.samestat(os.fstat(0), os.stat(os.devnull)), sys.stdin.read()])\n"
NOTHING = [True, ""]
THREE = ["--nproc-per-node", "3"]
FIRST_OF_TWO = ["--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", "29517"]
SECOND_OF_TWO = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", "29517"]


@pytest.mark.parametrize(
    ("options", "reader", "ranks"),
    [
        ([], 0, range(3)),
        (["--stdin", "0"], 0, range(3)),
        (["--stdin", "2"], 2, range(3)),
        (["--stdin=none"], None, range(3)),
        (FIRST_OF_TWO, 0, range(3)),
        (SECOND_OF_TWO, None, range(3, 6)),
        ([*SECOND_OF_TWO, "--stdin", "4"], 4, range(3, 6)),
        ([*FIRST_OF_TWO, "--stdin", "4"], None, range(3)),
        (["--tee"], 0, range(3)),
        (["--warm"], 0, range(3)),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, list) else "",
)
def test_one_rank_reads_what_the_launcher_is_given(
    options: list[str], reader: int | None, ranks: range, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(READ)
    done = completed([*LAUNCHER, "run", *THREE, *options, "script.py"], input="two\nlines\n", cwd=tmp_path)
    output = (
        "\n".join(line.partition(":")[2] for line in done.stdout.splitlines()) if "--tee" in options else done.stdout
    )
    expected = {rank: [False, "two\nlines\n"] if rank == reader else NOTHING for rank in ranks}
    assert (done.returncode, said(output)) == (0, expected)


def test_all_ranks_share_it_where_that_is_asked_for() -> None:
    told = said(completed(in_ranks(READ, *THREE, "--stdin", "all"), input="a\nb\n").stdout)
    assert [one[0] for one in told.values()] == [False] * 3
    assert sorted("".join(one[1] for one in told.values())) == sorted("a\nb\n"), "what one reads no other sees"


@pytest.mark.parametrize("mechanism", ["clone", "posix_spawn", "subprocess"])
def test_by_each_mechanism(mechanism: str) -> None:
    done = completed(in_ranks(READ, *THREE), input="line", env=environment_here(RANKSPAWN_MECHANISM=mechanism))
    assert said(done.stdout) == {0: [False, "line"], 1: NOTHING, 2: NOTHING}


def test_a_restart_keeps_it() -> None:
    line = SAY + (
        "attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "text = os.read(0, 2).decode()\n"
        "say([attempt, text])\n"
        "sys.exit(attempt < 2 and bool(text))\n"
    )
    for command in ([], ["--stdin", "1"]):
        reader = len(command) // 2
        done = completed(in_ranks(line, "--nproc-per-node", "2", "--max-restarts", "2", *command), input="a\nb\nc\n")
        heard = [said(one) for one in done.stdout.splitlines()]
        assert [one[reader] for one in heard if reader in one] == [[0, "a\n"], [1, "b\n"], [2, "c\n"]]


def test_a_terminal_is_rank_0s() -> None:
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(
            in_ranks(SAY + "say([os.isatty(0), os.isatty(0) and input()])\n", *THREE),
            stdin=theirs, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            os.write(ours, b"continue\n")
            output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        os.close(ours)
        os.close(theirs)
    assert said(output) == {0: [True, "continue"], 1: [False, False], 2: [False, False]}


def test_a_rank_that_the_job_has_not() -> None:
    for words, message in (
        (["--stdin", "3"], "--stdin 3: the job has 3 ranks, counted from 0"),
        (["--stdin", "first"], "expected all, none or the number of a rank, got 'first'"),
        (["--stdin", "-1"], "argument --stdin"),
    ):
        done = completed(in_ranks("", *THREE, *words))
        assert (done.returncode, done.stdout) == (2, "") and message in done.stderr.splitlines()[-1]


def test_a_script_from_stdin_is_for_one_rank() -> None:
    done = completed([*LAUNCHER, "run", *THREE, "-"], input="print('here')")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("SCRIPT - is read from stdin, which only one rank can read: pass a file\n")


LAUNCH = """
import sys
from rankspawn import Job, launch
job = Job(2, 29517, nnodes=2, node_rank=1)
with launch([sys.executable, "-c", sys.argv[1]], 2, job=job, {0}) as group:
    sys.exit(any(group.wait()))
"""


@pytest.mark.parametrize(
    ("keyword", "told"),
    [
        ("stdin='none'", {2: NOTHING, 3: NOTHING}),
        ("stdin=3", {2: NOTHING, 3: [False, "line"]}),
        ("stdin=0", {2: NOTHING, 3: NOTHING}),
    ],
)
def test_launch_does_the_same(keyword: str, told: dict[int, object]) -> None:
    done = completed([sys.executable, "-c", LAUNCH.format(keyword), READ], input="line")
    assert (done.returncode, said(done.stdout)) == (0, told)


def test_launch_lets_all_inherit_it_as_subprocess_does() -> None:
    done = completed([sys.executable, "-c", LAUNCH.format(""), SAY + "say(os.fstat(0).st_ino)\n"], input="")
    told = said(done.stdout)
    assert done.returncode == 0 and told[2] == told[3] != os.stat(os.devnull).st_ino
