"""The group's own cgroup: it is made, filled, emptied by one write and removed; and the errors where it cannot be
made."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankspawn import Popen
from rankspawn._end import cgroup as _cgroup
from rankspawn._end.cgroup import GroupCgroup
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.processes import PATIENCE, has_ended, new_cgroup, writable_cgroups
from tests.support.state import NOBODY, become, in_child

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="cgroups are Linux's")

needs_engine = pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def parent() -> Iterator[Path]:
    with new_cgroup() as folder:
        yield folder


@pytest.fixture
def group(parent: Path) -> Iterator[GroupCgroup]:
    made = GroupCgroup.make(parent)
    yield made
    made.close()


# Three processes that are not in one session: the rank, which ignores SIGTERM, SIGINT and SIGHUP; its child, in a
# cgroup that the rank has made below; and a grandchild whose parent had called setsid before the second fork.
ESCAPING = """
import os, signal, sys
for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(sig, signal.SIG_IGN)
own = next(line[3:].strip() for line in open("/proc/self/cgroup") if line.startswith("0::"))
below = os.path.join(sys.argv[1], os.path.basename(own), "below", "deeper")
os.makedirs(below)
def told():
    os.write(1, b"%d\\n" % os.getpid())
    while True: signal.pause()
if os.fork() == 0:
    with open(below + "/cgroup.procs", "w") as procs: procs.write("0")
    told()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: told()
    os._exit(0)
told()
"""


def escaping(group: GroupCgroup) -> tuple[subprocess.Popen[str], list[int]]:
    """A rank that runs ESCAPING and is born in the group's cgroup, and the pids of the three processes."""
    rank = Popen(
        [sys.executable, "-I", "-S", "-c", ESCAPING, os.path.dirname(group.path)],
        cgroup=group.fd, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert rank.stdout is not None
    return rank, [int(rank.stdout.readline()) for _ in range(3)]


def test_made_with_a_name_of_its_own(parent: Path) -> None:
    """One launcher may have two groups, and two launchers in two PID namespaces may have the same pid."""
    groups = [GroupCgroup.make(parent), GroupCgroup.make(str(parent)), GroupCgroup.make(parent, "named")]
    assert {os.path.dirname(group.path) for group in groups} == {str(parent)}
    names = {os.path.basename(group.path) for group in groups}
    assert len(names) == 3 and "named" in names
    assert all(name.startswith(f"rankspawn-{os.getpid()}-") for name in names - {"named"})
    assert all(os.path.samestat(os.stat(group.path), os.fstat(group.fd)) for group in groups)
    assert not any(os.get_inheritable(group.fd) for group in groups)
    for group in groups:
        group.remove()
        group.remove()
    assert [path for path in parent.iterdir() if path.is_dir()] == []


@needs_engine
@pytest.mark.parametrize("lacking", ["", "cgroup.kill", "cgroup.kill cgroup.freeze"])
def test_everybody_in_it_is_ended(group: GroupCgroup, lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one write to cgroup.kill; one by one, as before Linux 5.14; and without the freezer, as before Linux 5.2."""
    write = _cgroup._write

    def write_unless_lacking(path: str, name: str, text: str) -> None:
        if name in lacking:
            raise FileNotFoundError
        write(path, name, text)

    monkeypatch.setattr(_cgroup, "_write", write_unless_lacking)
    rank, pids = escaping(group)
    assert sorted(group.pids()) == sorted(pids)
    assert not group.wait_empty(0.01)
    group.kill()
    assert group.wait_empty(PATIENCE)
    assert all(map(has_ended, pids))
    # The rank is a zombie now; zombies do not keep a cgroup from being removed.
    group.remove()
    assert not os.path.exists(group.path)
    assert rank.communicate()[0] == "" and rank.returncode == -signal.SIGKILL


@needs_engine
def test_it_is_not_removed_while_somebody_is_in_it(group: GroupCgroup) -> None:
    rank, _ = escaping(group)
    with pytest.raises(OSError) as caught:
        group.remove()
    assert caught.value.errno == errno.EBUSY
    group.kill()
    assert group.wait_empty(PATIENCE)
    group.remove()
    rank.communicate()


@needs_engine
def test_the_end_of_the_last_wakes_who_waits(group: GroupCgroup) -> None:
    """The wait uses almost no CPU time, because it asks the kernel once when it begins, and once after each change."""
    rank, _ = escaping(group)
    waiting = threading.Thread(target=lambda: answers.append((group.wait_empty(PATIENCE), time.thread_time())))
    answers: list[tuple[bool, float]] = []
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    group.kill()
    waiting.join(PATIENCE)
    rank.communicate()
    ((empty, cpu),) = answers
    assert empty and cpu < 0.01
    group.remove()


def test_one_that_somebody_else_has_removed(group: GroupCgroup) -> None:
    os.rmdir(group.path)
    group.kill()
    assert group.wait_empty(0)
    group.remove()
    with pytest.raises(FileNotFoundError):
        GroupCgroup(group.path)


# ---- where none can be made -----------------------------------------------------------------------------------------


def refusal(parent: Path) -> tuple[int | None, str]:
    with pytest.raises(OSError) as caught:
        GroupCgroup.make(parent)
    assert caught.value.filename == str(parent)
    return caught.value.errno, str(caught.value)


def test_in_what_is_no_cgroup(tmp_path: Path) -> None:
    code, text = refusal(tmp_path)
    assert code == errno.EINVAL and "expected a directory of cgroup v2, got no cgroup" in text
    code, text = refusal(tmp_path / "missing")
    assert code == errno.ENOENT


def test_in_a_cgroup_of_version_1() -> None:
    roots = writable_cgroups("cgroup")
    if not roots:
        pytest.skip("no cgroup v1 is mounted that we may write to")
    code, text = refusal(roots[0])
    assert code == errno.EINVAL and "version 1" in text


@needs_root
def test_in_one_that_was_not_delegated(parent: Path) -> None:
    def as_nobody() -> tuple[int | None, str]:
        become(NOBODY)
        return refusal(parent)

    code, text = in_child(as_nobody)
    assert code == errno.EACCES and "delegated" in text and "Delegate=yes" in text


@needs_engine
@needs_root
def test_in_one_that_was_delegated(parent: Path) -> None:
    """As systemd delegates it: the user owns the directory and the three files, and the user's launcher runs in it."""
    for name in ("", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
        os.chown(parent / name, NOBODY, NOBODY)

    def as_nobody() -> list[object]:
        (parent / "cgroup.procs").write_text("0")
        become(NOBODY)
        group = GroupCgroup.make(parent)
        rank = Popen(["/bin/sleep", "1000"], cgroup=group.fd, start_new_session=True)
        found = group.pids() == [rank.pid]
        group.kill()
        empty = group.wait_empty(PATIENCE)
        group.remove()
        return [found, empty, rank.wait(), os.path.exists(group.path)]

    assert in_child(as_nobody) == [True, True, -signal.SIGKILL, False]


def test_in_a_threaded_one(parent: Path) -> None:
    """A cgroup made in a threaded one is of type "domain invalid", which can hold no process."""
    threaded = parent / "threaded"
    threaded.mkdir()
    (threaded / "cgroup.type").write_text("threaded")
    code, text = refusal(threaded)
    assert code == errno.EOPNOTSUPP and "domain invalid" in text
    assert [path for path in threaded.iterdir() if path.is_dir()] == []


def test_in_one_that_is_full(parent: Path) -> None:
    (parent / "cgroup.max.descendants").write_text("0")
    code, text = refusal(parent)
    assert code == errno.EAGAIN and "cgroup.max.descendants" in text
