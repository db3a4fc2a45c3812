"""The examples, run as their docstrings say."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pages import compare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the launcher binds its ranks")

EXAMPLES = Path(__file__).parent.parent / "examples"
RING = str(EXAMPLES / "ring_allreduce.py")
TIMEOUT = 60.0


def completed(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=env)


def launch(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    options = ["--nproc-per-node", str(ranks), "--numa-binding", "node"]
    return completed([sys.executable, "-m", "rankspawn", "run", *options, *command])


def table(output: str) -> list[dict[str, str]]:
    """The rows of the table that ends at the first empty line. Names and cells contain single spaces only."""
    lines = output.partition("\n\n")[0].splitlines()
    header, *rows = [re.split(r" {2,}", line.strip()) for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ring(ranks: int) -> None:
    done = launch(ranks, RING)
    assert (done.returncode, done.stderr) == (0, "")
    rows = table(done.stdout)
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(ranks)]
    assert len({row["pid"] for row in rows}) == ranks
    for row in rows:
        assert row["pid"] == row["session"]
        assert re.fullmatch(r"[\d,-]+", row["CPUs"])
        assert re.fullmatch(r"[\d,]+", row["us to first line"])
    assert re.fullmatch(
        rf"all-reduce of 1,000,000 doubles over {ranks} ranks: \d+ ms, the sum is exact", last_line(done)
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("elements", [0, 1, 7, 100_003])
def test_ring_with_chunks_of_all_sizes(elements: int) -> None:
    done = launch(3, RING, "--elements", str(elements))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"of {elements:,} doubles" in last_line(done) and "the sum is exact" in last_line(done)


def test_ring_alone_and_without_a_launcher() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", RING, "--elements", "10"],
        capture_output=True, text=True, timeout=TIMEOUT, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = table(done.stdout)
    assert (row["rank"], row["us to first line"]) == ("0", "-")


def test_ring_whose_ranks_are_missing_says_which() -> None:
    done = completed([sys.executable, RING, "--timeout", "0.2"], RANK="0", WORLD_SIZE="3", MASTER_PORT="0")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"rank 0: ranks \[1, 2\] did not come to 127.0.0.1:\d+: timed out\n", done.stderr)


def test_ring_whose_rank_0_is_missing_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # without listen(), so that nothing listens at this port
        port = str(taken.getsockname()[1])
        done = completed([sys.executable, RING, "--timeout", "0.2"], RANK="1", WORLD_SIZE="2", MASTER_PORT=port)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"rank 1: rank 0 is not at 127.0.0.1:{port}") and "refused" in done.stderr


def test_ring_whose_port_is_taken_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = completed([sys.executable, RING], RANK="0", WORLD_SIZE="2", MASTER_PORT=port)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"rank 0: cannot listen at 127.0.0.1:{port}") and "in use" in done.stderr


def test_ring_that_loses_a_rank_ends() -> None:
    # Rank 1 ends before it meets the others, and the launcher stops these, long before their own timeout.
    code = "import os, runpy, sys\nif os.environ['RANK'] == '1': sys.exit(7)\n"
    code += f"runpy.run_path({RING!r}, run_name='__main__')"
    done = launch(3, "--no-python", sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (7, "")
    assert re.search(r"^rankspawn: rank 1 \(pid \d+\) exited with status 7$", done.stderr, re.MULTILINE)


def test_ddp_digits_says_what_it_needs() -> None:
    # -S: the interpreter has no packages.
    done = completed([sys.executable, "-I", "-S", str(EXAMPLES / "ddp_digits.py")])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "pip install torch scikit-learn" in done.stderr


# ---- the guide's programs --------------------------------------------------------------------------------------------

PAGE = (EXAMPLES.parent / "docs" / "guide" / "programs.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"{literalinclude} \.\./\.\./examples/(\w+)\.py\n.*?```text\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("name", "printed"), PROGRAMS, ids=[name for name, _ in PROGRAMS])
def test_program_prints_what_the_guide_says(name: str, printed: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == (9 if name == "pipeline" else 0), done.stdout
    compare(printed, done.stdout)


def test_every_program_of_the_guide_is_run() -> None:
    others = {"ddp_digits", "ring_allreduce"}
    assert {name for name, _ in PROGRAMS} == {path.stem for path in EXAMPLES.glob("*.py")} - others
    assert len(PROGRAMS) == 8
