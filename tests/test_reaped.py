"""What ranks have started ends with them also where somebody else waits for the ranks: the user, or other code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from rankspawn import RankGroup, launch
from rankspawn._end import way as _way
from rankspawn._end import without
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.processes import PATIENCE, eventually, has_ended, state
from tests.support.state import in_child

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
]


@pytest.fixture(autouse=True, params=["engine", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with the engine's C and with Python."""
    if request.param == "python":
        monkeypatch.setattr(_way, "way", without)
    return str(request.param)


# A rank that ends, and leaves a process of a group of its own in its session, which says its number.
LEAVING = """
import os, signal, sys
mine = os.getpid()
if os.fork() == 0:
    os.setpgid(0, 0)
    while os.getppid() == mine: pass
    {}
    with open(f"new.{{os.environ['RANK']}}", "w") as file: file.write(str(os.getpid()))
    os.rename(f"new.{{os.environ['RANK']}}", f"left.{{os.environ['RANK']}}")
    while True: signal.pause()
sys.exit(int(os.environ["RANK"]) + 3)
"""

# The same, executed without any variable.
WITHOUT_VARIABLES = """
import os
if os.fork() == 0:
    os.setpgid(0, 0)
    with open("new", "w") as file: file.write(str(os.getpid()))
    os.rename("new", "left." + os.environ["RANK"])
    os.execve("/bin/sleep", ["sleep", "1000"], {})
"""


def leaving(also: str = "") -> list[str]:
    return [sys.executable, "-I", "-S", "-c", LEAVING.format(also)]


def left(folder: Path, count: int) -> list[int]:
    """The processes that ranks have left, when all have said their numbers."""
    eventually(lambda: len([*folder.glob("left.*")]) == count)
    return [int(path.read_text()) for path in sorted(folder.glob("left.*"))]


def all_end(pids: Iterable[int]) -> bool:
    """For the group, a process has ended when the kernel ends it: it does nothing more, and is there for a moment."""
    eventually(lambda: all(map(has_ended, pids)))
    return True


def wait(rank: subprocess.Popen[bytes]) -> int | None:
    return rank.wait()


def wait_for_a_time(rank: subprocess.Popen[bytes]) -> int | None:
    return rank.wait(PATIENCE)


def poll(rank: subprocess.Popen[bytes]) -> int | None:
    eventually(lambda: rank.poll() is not None)
    return rank.poll()


def wait_without_pidfd(rank: subprocess.Popen[bytes]) -> int | None:
    rank._pidfd = None  # type: ignore[attr-defined]
    return rank.wait()


def wait_for_a_time_without_pidfd(rank: subprocess.Popen[bytes]) -> int | None:
    rank._pidfd = None  # type: ignore[attr-defined]
    return rank.wait(PATIENCE)


# ---- the user waits for a rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "see",
    [wait, wait_for_a_time, poll, wait_without_pidfd, wait_for_a_time_without_pidfd],
    ids=lambda see: see.__name__,
)
def test_the_group_reaps_a_rank_that_was_waited_for(
    see: Callable[[subprocess.Popen[bytes]], int | None], tmp_path: Path
) -> None:
    with launch(leaving(), 2, cwd=tmp_path, keep_going=True, guard=False) as group:
        assert [see(rank) for rank in group.ranks] == [3, 4]
        assert [rank.returncode for rank in group.ranks] == [3, 4]
        assert [state(pid) for pid in group.pids()] == ["Z", "Z"]
        pids = left(tmp_path, 2)
        assert not any(map(has_ended, pids))
        assert group.wait(PATIENCE) == (3, 4)
    assert all(map(has_ended, [*pids, *group.pids()]))
    assert [rank.wait() for rank in group.ranks] == [rank.poll() for rank in group.ranks] == [3, 4]
    assert all(rank["rusage"] for rank in group.report()["attempts"][0]["ranks"])


def test_a_wait_for_a_rank_that_runs() -> None:
    with launch(["/bin/sleep", "1000"], 1) as group:
        (rank,) = group.ranks
        assert rank.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            rank.wait(0.01)
        waiting = threading.Thread(target=rank.wait)
        waiting.start()
        rank.send_signal(signal.SIGINT)
        waiting.join(PATIENCE)
        assert rank.returncode == -signal.SIGINT and state(rank.pid) == "Z"
        rank.send_signal_group(0)


# ---- other code reaps it --------------------------------------------------------------------------------------------

ENDS: dict[str, Callable[[RankGroup], object]] = {
    "close": RankGroup.close,
    "kill": RankGroup.kill,
    "terminate": RankGroup.terminate,
}


@pytest.mark.parametrize("guard", [False, True], ids=["unguarded", "guarded"])
@pytest.mark.parametrize("end", ENDS)
def test_what_a_rank_has_left_that_other_code_has_reaped(end: str, guard: bool, tmp_path: Path) -> None:
    def run() -> list[object]:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with launch(leaving(), 2, cwd=tmp_path, keep_going=True, guard=guard) as group:
            group.wait(PATIENCE)
            pids = left(tmp_path, 2)
            assert not any(map(has_ended, pids)) and all(map(has_ended, group.pids()))
            ENDS[end](group)
            ended = all_end(pids)
        return [ended, [str(one.message) for one in warned]]

    with warnings.catch_warnings(record=True) as warned:
        assert in_child(run) == [True, []]


def test_a_group_that_nobody_closes(tmp_path: Path) -> None:
    def run() -> bool:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        group = launch(leaving(), 1, cwd=tmp_path, keep_going=True, guard=False)
        group.wait(PATIENCE)
        pids = left(tmp_path, 1)
        with pytest.warns(ResourceWarning):
            del group
        return all_end(pids)

    assert in_child(run)


def test_it_is_told_to_end_and_has_the_grace(tmp_path: Path) -> None:
    """A third rank runs, so that stop() has somebody to tell."""
    save = "signal.signal(signal.SIGTERM, lambda *_: (open('saved.' + os.environ['RANK'], 'w'), sys.exit()))"
    code = "import os, signal\nif os.environ['RANK'] == '2': signal.pause()\n" + LEAVING.format(save)

    def run() -> list[object]:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        command = [sys.executable, "-I", "-S", "-c", code]
        with launch(command, 3, cwd=tmp_path, keep_going=True, guard=False, grace=PATIENCE) as group:
            while len(group.returncodes) < 2:
                group.wait_any(PATIENCE)
            pids = left(tmp_path, 2)
            group.stop()
            group.wait(PATIENCE)
            saved = sorted(path.name for path in tmp_path.glob("saved.*"))
        return [all_end(pids), *saved]

    assert in_child(run) == [True, "saved.0", "saved.1"]


@pytest.mark.parametrize("guard", [False, True], ids=["unguarded", "guarded"])
def test_what_cannot_be_told_from_a_strangers_is_named(guard: bool, tmp_path: Path) -> None:
    def run() -> list[object]:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            command = [sys.executable, "-I", "-S", "-c", WITHOUT_VARIABLES]
            with launch(command, 1, cwd=tmp_path, keep_going=True, guard=guard) as group:
                group.wait(PATIENCE)
                (pid,) = left(tmp_path, 1)
                eventually(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")
        lives = not has_ended(pid)
        if lives:
            os.kill(pid, signal.SIGKILL)
        return [lives, [str(one.message).rpartition(": rank ")[2] for one in warned], f"0: process {pid} (sleep)"]

    lives, warned, named = in_child(run)
    assert (lives, warned) == ((False, []) if guard else (True, [named]))


def test_no_stranger_is_ended_that_has_the_number(tmp_path: Path) -> None:
    """The stranger leads a session, and has one more process in it. In one run its leader has ended, too."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(last, os.W_OK):
        pytest.skip("the next process's number cannot be chosen here")
    code = "import os, sys, time; pid = os.fork(); print(pid or '', flush=True) if pid else time.sleep(1000)"

    def run(leads: bool) -> list[object]:
        command = [sys.executable, "-I", "-S", "-c", code + ("; time.sleep(1000)" if leads else "")]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with launch(["/bin/true"], 1, guard=False) as group:
                group.wait_any(PATIENCE)
                (number,) = group.pids()
                os.waitpid(number, 0)
                last.write_text(str(number - 1))
                stranger = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
                assert stranger.stdout is not None
                below = int(stranger.stdout.readline())
                if not leads:
                    stranger.wait()
        time.sleep(0.1)
        alive = not has_ended(below) and (not leads or stranger.poll() is None)
        for pid in (below, stranger.pid):
            if not has_ended(pid):
                os.kill(pid, signal.SIGKILL)
        stranger.communicate()
        return [stranger.pid == number, alive, len(warned)]

    for leads in (True, False):
        for _ in range(20):
            taken, alive, warned = in_child(lambda: run(leads))  # noqa: B023
            assert alive
            if taken:
                assert warned == (0 if leads else 1)
                break
        else:
            pytest.skip("another process took the number each time")
