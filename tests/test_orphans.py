"""A command that is the first process of a container, or a subreaper, reaps what it has adopted while its job lasts."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from rankspawn._procfs import children
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.launchers import LAUNCHER, after, completed
from tests.support.orphans import AWAIT_REAPER, SUBREAPER
from tests.support.processes import eventually, has_ended

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux's kernel is asked who adopts")

IN_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child"]
# Rank 2 ends at once, and is kept until the end. Rank 0 leaves 50 orphans that end: the first of three is in a session
# of its parent's, the second leads one, and the third stays in the rank's. It waits until nobody has their numbers.
# Then it leaves one of each kind that lives.
RANK = (
    AWAIT_REAPER
    + """
rank = int(os.environ["RANK"])
if rank == 2:
    sys.exit(9)
reading, writing = os.pipe()
def leave(kind, lives):
    middle = os.fork()
    if middle:
        return os.waitpid(middle, 0)
    if kind == 0:
        os.setsid()
    if os.fork():
        os._exit(0)
    if kind == 1:
        os.setsid()
    os.write(writing, b"%d " % os.getpid())
    if lives:
        for fd in range(3):  # the test reads the output to its end
            os.close(fd)
        time.sleep(100)
    os._exit(0)
if rank == 0:
    for number in range(50):
        leave(number % 3, False)
    await_reaper(reading, 50)
    told = b""
    for kind in range(3):
        leave(kind, True)
        told += os.read(reading, 4096)
    with open(os.environ["LEFT"], "wb") as file:
        file.write(told)
sys.exit(7 * rank)
"""
)


def job(folder: Path, *options: str) -> list[str]:
    command = [*LAUNCHER, "run", "--nproc-per-node", "3", "--keep-going", "--report", str(folder / "report.json")]
    return [*command, *options, "--no-python", sys.executable, "-c", RANK]


@pytest.mark.parametrize("how", ["first", "first, with the old procfs", "subreaper", "subreaper, warm"])
def test_run_reaps_what_it_has_adopted(how: str, tmp_path: Path) -> None:
    if "subreaper" in how and EXTENSION_ERROR is not None:
        pytest.skip("this install has no extension, which asks whether this process is a subreaper")
    command = job(tmp_path, *(["--preload", "json"] if "warm" in how else []))
    if "first" in how:
        command = [*IN_NAMESPACE, *([] if "old" in how else ["--mount-proc"]), *command]
    else:
        command = after(SUBREAPER, command)
    done = completed(command, env={**os.environ, "LEFT": str(tmp_path / "left")}, start_new_session=True)
    if "unshare failed" in done.stderr or "unshare: " in done.stderr:
        pytest.skip(done.stderr)
    assert "were not reaped" not in done.stderr
    assert done.returncode in (7, 9), done.stderr  # of whichever was seen first
    (attempt,) = json.loads((tmp_path / "report.json").read_text())["attempts"]
    assert [rank["exit"]["returncode"] for rank in attempt["ranks"]] == [0, 7, 9]
    assert all(rank["rusage"] for rank in attempt["ranks"])
    if "subreaper" in how:
        in_a_session_of_its_parents, leader, in_the_ranks = map(int, (tmp_path / "left").read_text().split())
        assert has_ended(in_the_ranks)
        for pid in (in_a_session_of_its_parents, leader):
            assert not has_ended(pid)
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: has_ended(pid))


def test_children_are_found_where_the_kernel_does_not_list_them(tmp_path: Path) -> None:
    """CONFIG_PROC_CHILDREN is a choice of the kernel's; every procfs has the parents."""
    statuses = {os.getpid(): 1, 11: os.getpid(), 12: 11, 13: os.getpid()}
    for pid, parent in statuses.items():
        (tmp_path / str(pid) / "task" / str(pid)).mkdir(parents=True)
        (tmp_path / str(pid) / "status").write_text(f"Name:\tx\nPid:\t{pid}\nPPid:\t{parent}\nNSpid:\t{pid}\n")
    (tmp_path / "self").symlink_to(str(os.getpid()))
    assert children(str(tmp_path)) == {11, 13}


def test_children_are_asked_for_where_no_procfs_shows_this_process(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no procfs"):
        children(str(tmp_path))
