"""Many ranks in one call: each gets its own, all start or none does, and threads come and go unseen."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from rankspawn import Binding, Popen
from rankspawn._crew import start_ranks

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")

PATIENCE = 60.0
FOREVER = ["/bin/sleep", "1000"]
NO_STREAMS = (None, None, None)


def start(commands: list[list[str]], **keywords: Any) -> list[Popen]:
    """The ranks of ``commands``; what is not in ``keywords`` is as if nobody had asked for it."""
    count = len(commands)
    settings = {
        "env": None,
        "rank_env": [{}] * count,
        "bindings": [None] * count,
        "streams": [NO_STREAMS] * count,
        **keywords,
    }
    ranks: list[Popen] = []
    try:
        start_ranks(ranks, commands, **settings)
    except BaseException:
        assert ranks == []
        raise
    return ranks


def ended(ranks: list[Popen]) -> list[int]:
    return [rank.wait(timeout=PATIENCE) for rank in ranks]


def test_each_rank_is_its_own(tmp_path: Path) -> None:
    """Command, environment, binding, streams and session of each of many, in rank order."""
    count, cpus = 40, sorted(os.sched_getaffinity(0))
    code = "import json, os, sys; json.dump([sys.argv[1], os.environ['RANK'], os.getsid(0), os.getpid(), "
    code += "sorted(os.sched_getaffinity(0)), sys.stdin.read()], sys.stdout); sys.stderr.write(sys.argv[1])"
    for number in range(count):
        (tmp_path / f"{number}.in").write_text(f"for {number}")
    ranks = start(
        [[sys.executable, "-S", "-c", code, f"argument {number}"] for number in range(count)],
        rank_env=[{"RANK": str(number)} for number in range(count)],
        bindings=[Binding({cpus[number % len(cpus)]}) for number in range(count)],
        streams=[tuple(tmp_path / f"{number}.{end}" for end in ("in", "out", "err")) for number in range(count)],
    )
    assert ended(ranks) == [0] * count
    for number, rank in enumerate(ranks):
        assert isinstance(rank, Popen) and rank.args[-1] == f"argument {number}"
        told = json.loads((tmp_path / f"{number}.out").read_text())
        expected = [f"argument {number}", str(number), rank.pid, rank.pid, [cpus[number % len(cpus)]], f"for {number}"]
        assert told == expected
        assert (tmp_path / f"{number}.err").read_text() == f"argument {number}"


@pytest.mark.parametrize("broken", [0, 7, 15])
def test_nobody_is_left_of_a_missing_program(broken: int) -> None:
    commands = [FOREVER] * 16
    commands[broken] = ["/no/such/program"]
    with pytest.raises(FileNotFoundError) as caught:
        start(commands)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "/no/such/program")
    assert str(caught.value) == f"[Errno 2] rank {broken}: No such file or directory: '/no/such/program'"
    assert caught.value.rank == broken  # type: ignore[attr-defined]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
