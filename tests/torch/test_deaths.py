"""What the agent knows of a rank that died of a signal, and torch's text of it, where torch has a hook (2.14)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import writable_cgroups

pytest.importorskip("torch.distributed.elastic.multiprocessing.errors", reason="torch is not installed")

# The agent's context, and what is known of its ranks afterwards, with torch's text where torch asks for it.
CONTEXT = """
import sys
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, errors
from rankspawn import torchrun

torchrun.install()
from rankspawn._torch import deaths, elastic

scripts = sys.argv[1:]
numbers = range(len(scripts))
args, envs = {i: ("-c", script) for i, script in enumerate(scripts)}, {i: {} for i in numbers}
context = elastic.SubprocessContext("c", "sh", args, envs, DefaultLogsSpecs())
context.start()
result = context.wait(60)
assert result is not None and result.is_failed()
for number in sorted(result.failures):
    failure = result.failures[number]
    said = deaths._known.get(failure.message)
    print(number, said)
    if hasattr(errors.get_error_handler(), "maybe_enrich_signal_failure_message") and failure.exitcode < 0:
        text = errors.ChildFailedError("name", {number: failure}).format_msg()
        assert f"Signal {-failure.exitcode} " in text and f": {said}" in text, text
"""


def told(*scripts: str, folder: Path | None = None) -> list[str]:
    """By rank, what is known of its death; a launcher in this cgroup."""
    command = [sys.executable, "-c", CONTEXT, *scripts]
    if folder is not None:
        command = ["sh", "-c", f'echo $$ > {folder}/cgroup.procs; exec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line.partition(" ")[2] for line in done.stdout.splitlines()]


def test_signals() -> None:
    """Of each rank: what the kernel knows of it, or that the agent has ended it."""
    first, ended = told("kill -9 $$", "exec sleep 60")
    assert "out-of-memory kill was counted in its cgroup" in first or first == "None"  # by what this machine counts
    assert ended == "sent by the agent"
    assert told("exit 3", "exec sleep 60") == ["None", "sent by the agent"]


def test_a_limit(tmp_path: Path) -> None:
    (said,) = told(f"ulimit -f 1; exec dd if=/dev/zero of={tmp_path}/file bs=4096 count=1 status=none")
    assert "(ulimit -f)" in said


def test_the_report_says_why_as_well(tmp_path: Path) -> None:
    script = f"ulimit -f 1; exec dd if=/dev/zero of={tmp_path}/file bs=4096 count=1 status=none"
    command = [sys.executable, "-m", "rankspawn.torchrun", "--report", str(tmp_path / "report.json"), "--no-python"]
    done = subprocess.run([*command, "sh", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    (attempt,) = json.loads((tmp_path / "report.json").read_text())["attempts"]
    assert "(ulimit -f)" in attempt["ranks"][0]["exit"]["why"]


def test_the_kernel_for_want_of_memory() -> None:
    """In a real cgroup whose limit the rank exceeds."""
    for kind, controller in (("cgroup", "memory"), ("cgroup2", "")):
        for root in writable_cgroups(kind, controller):
            if kind == "cgroup2" and "memory" not in (root / "cgroup.subtree_control").read_text():
                continue
            folder = root / f"rankspawn-test-{os.getpid()}"
            folder.mkdir()
            try:
                (folder / ("memory.limit_in_bytes" if controller else "memory.max")).write_text(str(1 << 30))
                rank = f"exec {sys.executable} -c 'held = bytearray(2 << 30)'"
                (said,) = told(rank, folder=folder)
            finally:
                folder.rmdir()
            assert "out of memory" in said or "at its limit" in said
            return
    pytest.skip("no cgroup with the memory controller can be made here")
