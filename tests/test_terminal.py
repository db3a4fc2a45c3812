"""What the launcher shows on a terminal: colours, and the line of the job's state. Pipes and CI get neither."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from rankspawn._cli.colours import _number, coloured_prefix, has_colours
from rankspawn._place.colours import colour
from tests.support.launchers import SAY, completed, environment_here, in_ranks
from tests.support.terminals import PLAIN, on_terminal

pytestmark = pytest.mark.skipif(os.name != "posix", reason="terminals are asked for")

TWO = ["--nproc-per-node", "2"]
BOTH = "import os, sys\nprint('out')\nsys.stdout.flush()\nprint('err', file=sys.stderr)\n"
WAITS = SAY + (
    "rank = os.environ['RANK']\n"
    "open(sys.argv[1] + rank, 'w')\n"
    "while not os.path.exists(sys.argv[2] + rank): time.sleep(0.02)\n"
)


# ---- colours --------------------------------------------------------------------------------------------------------


def test_each_rank_has_the_colour_of_the_pictures_and_a_failure_is_red() -> None:
    code = BOTH + "if os.environ['RANK'] == '1': raise ValueError('no')\n"
    with on_terminal(in_ranks(code, *TWO, "--tee", "--keep-going")) as (terminal, _):
        shown = terminal.shows(r"(?s)^.*shown above.*\n")[0]
    for rank, number in ((0, 178), (1, 74)):
        for word in ("out", "err"):
            assert f"\x1b[38;5;{number}m[rank {rank}]:\x1b[0m{word}\r\n" in shown
    assert re.search(r"rankspawn: \x1b\[1;31mrank 1 \(pid \d+\) exited with status 1\x1b\[0m\r\n", shown)
    assert "\x1b[1;31m  why: ValueError: no (<string>:5)\x1b[0m\r\n" in shown


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
    ids=["plain", "FORCE_COLOR", "NO_COLOR"],
)
def test_a_pipe_has_colours_where_they_are_forced(variables: dict[str, str], coloured: bool, tmp_path: Path) -> None:
    filters = ["--duplicate-stdout-filters", "out", "--log-dir", str(tmp_path)]
    command = in_ranks(BOTH + "sys.exit(3)", *TWO, "--tee", *filters)
    done = completed(command, env=environment_here(**PLAIN) | variables)
    assert done.returncode == 3
    assert ("\x1b[" in done.stdout, "\x1b[1;31m" in done.stderr) == (coloured, coloured)
    assert b"\x1b" not in (tmp_path / "latest/attempt_0/filtered_stdout.log").read_bytes()


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_terminal_without_colours(variables: dict[str, str]) -> None:
    with on_terminal(in_ranks(BOTH + "sys.exit(3)", "--tee"), **variables) as (terminal, _):
        assert "\x1b" not in terminal.shows(r"(?s)^.*exited with status 3.*\n")[0]


def test_one_stream_has_colours_and_the_other_has_not(tmp_path: Path) -> None:
    command = shlex.join(in_ranks(BOTH, "--tee"))
    with on_terminal(["/bin/sh", "-c", f"{command} > {tmp_path}/out"]) as (terminal, _):
        terminal.shows(r"\x1b\[38;5;178m\[rank 0\]:\x1b\[0merr\r\n")
    assert (tmp_path / "out").read_text() == "[rank 0]:out\n"


def test_colours_of_ranks_are_apart() -> None:
    assert len({_number(rank) for rank in range(16)}) == 16
    assert _number(16) == _number(0)
    assert colour(0) == "#e69f00" and _number(0) == 178  # d7af00


def test_no_prefix_has_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured_prefix(lambda _: "")(0, True) == "" and has_colours(1)


# ---- the line of state ----------------------------------------------------------------------------------------------


def test_a_line_says_how_many_ranks_run_and_goes(tmp_path: Path) -> None:
    command = [*in_ranks(WAITS, *TWO, "--log-dir", str(tmp_path / "logs")), str(tmp_path / "up"), str(tmp_path / "go")]
    with on_terminal(command) as (terminal, _):
        terminal.shows(r"rankspawn: logs in \S+\r\n")
        terminal.shows(r"^\r\x1b\[Krankspawn: \d+ s: 2 ranks running")
        terminal.shows(r"^\r\x1b\[Krankspawn: \d+ s: 2 ranks running")
        (tmp_path / "go0").touch()
        terminal.shows(r"\r\x1b\[Krankspawn: \d+ s: 1 of 2 ranks running, 1 ended")
        (tmp_path / "go1").touch()
        terminal.shows(r"^(\r\x1b\[Krankspawn: [^\r]*)*\r\x1b\[K$")


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        (["--log-dir", "logs"], {"CI": "true"}),
        (["--log-dir", "logs"], {"TERM": "dumb"}),
        (["--log-dir", "logs", "--tee"], {}),
        ([], {}),
    ],
    ids=["CI", "dumb", "tee", "no logs"],
)
def test_no_line_of_state(options: list[str], variables: dict[str, str], tmp_path: Path) -> None:
    command = in_ranks("import time\ntime.sleep(1.5)\nraise SystemExit(3)", *options)
    shell = ["/bin/sh", "-c", f"cd {tmp_path} && {shlex.join(command)}"]
    with on_terminal(shell, NO_COLOR="1", **variables) as (terminal, _):
        shown = terminal.shows(r"(?s)^.*exited with status 3.*\n")[0]
    assert "\x1b" not in shown and "running" not in shown


def test_no_line_of_state_in_a_pipe(tmp_path: Path) -> None:
    done = completed(in_ranks("import time\ntime.sleep(1.5)", "--log-dir", str(tmp_path)), env=environment_here())
    assert re.fullmatch(r"rankspawn: logs in \S+\n", done.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="uses a shell with job control")
def test_a_job_in_the_background_does_not_draw_over_the_shell(tmp_path: Path) -> None:
    command = [*in_ranks(WAITS, "--log-dir", str(tmp_path / "logs")), str(tmp_path / "up"), str(tmp_path / "go")]
    with on_terminal(["/bin/sh", "-i"], PS1="ready> ", ENV="") as (terminal, _):
        terminal.shows("ready> ")
        terminal.types(f"{shlex.join(command)} &\n")
        terminal.shows("logs in")
        terminal.types("sleep 2; echo sl''ept\n")
        assert "running" not in terminal.shows("(?s)^.*slept\r\n")[0]
        terminal.types("fg\n")
        terminal.shows(r"\r\x1b\[Krankspawn: \d+ s: 1 rank running")
        (tmp_path / "go0").touch()
        terminal.shows("ready> ")
        terminal.types("exit\n")
