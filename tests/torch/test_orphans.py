"""``rankspawn torchrun`` as the first process of a container, or as a subreaper, reaps what its workers have left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankspawn._end.orphans import of_other_sessions
from tests.support.launchers import after
from tests.support.orphans import AWAIT_REAPER, SUBREAPER
from tests.support.processes import PATIENCE

pytest.importorskip("torch.distributed.run", reason="torch is not installed")

# Rank 0 leaves orphans that end at once, in its own process group and in one of their own, and waits until nobody has
# their numbers. Rank 1 ends at once: its status is not lost.
RANK = (
    AWAIT_REAPER
    + """
if os.environ["RANK"] == "1":
    sys.exit(0)
reading, writing = os.pipe()
for number in range(20):
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            if number % 2:
                os.setpgid(0, 0)
            os.write(writing, b"%d " % os.getpid())
        os._exit(0)
    os.waitpid(middle, 0)
await_reaper(reading, 20)
"""
)


@pytest.mark.parametrize("how", ["first", "subreaper"])
@pytest.mark.parametrize("interval", ["0.1", "600"])
def test_torchrun_reaps_what_it_has_adopted(how: str, interval: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RANK)
    command = [sys.executable, "-m", "rankspawn.torchrun", "--nproc-per-node", "2", "--monitor-interval", interval]
    command.append(str(tmp_path / "script.py"))
    if how == "first":
        command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *command]
    else:
        command = after(SUBREAPER, command)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, start_new_session=True)
    if "unshare: " in done.stderr or "unshare failed" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr


def test_what_a_program_has_started_itself_is_no_orphan() -> None:
    same = subprocess.Popen(["sleep", "100"])
    leader = subprocess.Popen(["sleep", "100"], start_new_session=True)
    group = subprocess.Popen(["sleep", "100"], preexec_fn=os.setpgrp)
    try:
        assert of_other_sessions({same.pid, leader.pid, group.pid}) == set()
    finally:
        for process in (same, leader, group):
            process.kill()
            process.wait()
    assert of_other_sessions({same.pid}) == set()
