"""Ranks that go on when another has ended with status 0: named after a minute, ended where --wait says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launchers import SAY, completed, in_ranks, launched, with_grace

pytestmark = pytest.mark.skipif(os.name != "posix", reason="ranks are ended by signals")

THREE = ["--stdin", "1", "--nproc-per-node", "3"]
# Rank 1 has done its work at the end of stdin. The others sleep for longer than a test may take.
HANGS = SAY + "say('ready')\nif os.environ['RANK'] != '1': time.sleep(120)\nsys.stdin.read()\n"
NAMED = "rankspawn: rank 1 ended with status 0 0.2 s ago, and 2 ranks still run: 0,2; "


def ended_well(command: list[str]) -> tuple[int, str]:
    """The status of a launcher whose rank 1 ends when all ranks are ready, and what it says."""
    with launched(command, stdin=subprocess.PIPE) as job:
        job.hear(3)
        assert job.process.stdin is not None
        job.process.stdin.close()
        return job.end(), job.stderr.read()


def test_they_are_ended_after_the_seconds_that_were_given() -> None:
    status, told = ended_well(in_ranks(HANGS, *THREE, "--wait", "0.2", "--no-stacks"))
    assert status == 143
    assert re.fullmatch(
        re.escape(NAMED) + r"ending what still runs \(--wait\)\n"
        r"rankspawn: rank [02] \(pid \d+\) was killed by this launcher's SIGTERM\n"
        r"(  .*\n)*  others: [02] killed by SIGTERM\n",
        told,
    ), told


@pytest.mark.skipif(sys.platform != "linux", reason="looks by /proc")
def test_what_they_do_is_looked_at_before() -> None:
    status, told = ended_well(in_ranks(HANGS, *THREE, "--wait=0.2"))
    assert status == 143 and re.search(r"^rankspawn: --wait: 2 ranks \(0,2\): ", told, re.MULTILINE), told


def test_one_that_ends_well_when_it_is_told_to_has_not_failed() -> None:
    code = SAY + (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "say('ready')\n"
        "if os.environ['RANK'] == '1': time.sleep(120)\n"
        "os.read(0, 1)\n"
    )
    with launched(in_ranks(code, "--nproc-per-node", "2", "--wait", "0.2"), stdin=subprocess.PIPE) as job:
        job.hear(2)
        assert job.process.stdin is not None
        job.process.stdin.close()  # rank 0 has done its work
        assert job.end() == 0
        assert job.stderr.readline().endswith("1 rank still runs: 1; ending what still runs (--wait)\n")


def test_one_that_does_not_end_is_killed_in_time() -> None:
    code = SAY + (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay('ready')\nif os.environ['RANK'] == '0': time.sleep(120)\n"
        "os.read(0, 1)\n"
    )
    command = with_grace(0.2, in_ranks(code, "--nproc-per-node", "2", "--wait", "0.2", "--stdin", "1"))
    with launched(command, stdin=subprocess.PIPE) as job:
        job.hear(2)
        assert job.process.stdin is not None
        job.process.stdin.close()
        assert job.end() == 137
        assert "the grace period is over: killing" in job.stderr.read()


def test_it_is_a_failure_after_which_all_are_started_again(tmp_path: Path) -> None:
    code = SAY + (
        "from pathlib import Path\n"
        "rank, attempt = os.environ['RANK'], int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "if attempt == 0 and rank == '1': time.sleep(120)\n"
        "Path(str(attempt) + rank).touch()\n"
        "while attempt and not (Path('10').exists() and Path('11').exists()): time.sleep(0.01)\n"
        "os._exit(0)\n"  # both at once
    )
    command = in_ranks(code, "--nproc-per-node", "2", "--wait", "2", "--max-restarts", "1")
    done = completed(command, cwd=tmp_path)
    assert done.returncode == 0 and "rankspawn: restart 1 of 1\n" in done.stderr


def test_a_failure_is_told_as_ever() -> None:
    code = SAY + "if os.environ['RANK'] == '1': sys.exit(3)\nif os.environ['RANK'] == '2': time.sleep(120)\n"
    done = completed(in_ranks(code, "--nproc-per-node", "3", "--wait", "100"))
    assert done.returncode == 3 and "ended with status 0" not in done.stderr


def test_a_time_that_is_none() -> None:
    for word in ("0", "-1", "soon"):
        done = completed(in_ranks("", f"--wait={word}"))
        assert done.returncode == 2 and "expected a number of seconds" in done.stderr.splitlines()[-1]


# rankspawn run, with a minute that is shorter.
SOON = """
import sys
from rankspawn._cli import stragglers
from rankspawn._cli.main import main
stragglers.LONG = 0.2
sys.exit(main(sys.argv[1:]))
"""


def test_without_the_option_they_are_named_once_and_run_on() -> None:
    code = SAY + "say('ready')\nif os.environ['RANK'] != '1': time.sleep(1)\nsys.stdin.read()\n"
    command = in_ranks(code, *THREE)
    status, told = ended_well([sys.executable, "-c", SOON, *command[command.index("run") :]])
    assert (status, told) == (0, f"{NAMED}--wait SECONDS would end what still runs\n")
