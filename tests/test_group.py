"""The rank group: all or nothing at the start, seen at once at the end, and nobody left (conftest's fixture looks)."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rankspawn import Binding, BindingError, RankGroup, launch
from rankspawn._launch import free_port


def start(command: list[str], nprocs: int = 3, **options: Any) -> RankGroup:
    return launch(command, nprocs, **options)


def test_ranks_are_seen_to_end_in_their_own_order() -> None:
    with start(["/bin/sh", "-c", "sleep 0.$((2 * RANK + 1)); exit $RANK"]) as group:
        ended: list[int] = []
        while group.running:
            ended += group.wait_any(30)
        assert ended == [0, 1, 2]
        assert group.returncodes == {0: 0, 1: 1, 2: 2}
        assert group.wait_any(0) == []


def test_waiting_has_an_end() -> None:
    with start(["/bin/sleep", "60"]) as group:
        assert group.wait_any(0.05) == []
        assert group.running == (0, 1, 2)
        group.send_signal(signal.SIGKILL)
        while group.running:
            group.wait_any(30)
    assert set(group.returncodes.values()) == {-signal.SIGKILL}


def test_what_a_rank_started_ends_with_the_group(tmp_path: Path) -> None:
    """Also when the rank itself ended long before, and well."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with start(["/bin/sh", "-c", f"sleep 60 > {fifo} &"], nprocs=1) as group:
        with fifo.open() as held:
            assert group.wait_any(30) == [0]
            group.close()
            assert held.read() == ""  # the end of the file: nobody has it open to write any more


def test_ranks_that_ignore_sigterm_are_killed() -> None:
    with start(["/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done"], nprocs=2) as group:
        time.sleep(0.2)
        group.terminate(grace=0.2)
        assert group.running == ()


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_all_or_nothing_when_a_binding_is_refused(broken: int) -> None:
    bindings: list[Binding | None] = [None] * 3
    bindings[broken] = Binding({5000})
    with pytest.raises(BindingError, match="5000"):
        start(["/bin/sleep", "60"], bindings=bindings)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_all_or_nothing_when_a_log_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "attempt_0").mkdir()
    (tmp_path / "attempt_0" / "2").write_text("in the way")
    with pytest.raises(FileExistsError):
        start(["/bin/sleep", "60"], log_dir=tmp_path)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_without_free_descriptors_nobody_is_left() -> None:
    """pidfds run out in the middle: ranks start without, until the group's own selector cannot be made."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, limits[1]))
        while True:
            try:
                held.append(os.dup(0))
            except OSError:
                break
        with pytest.raises(OSError, match="Too many open files"):
            start(["/bin/sleep", "60"], nprocs=4)
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_free_port_is_of_this_machine() -> None:
    assert 0 < free_port("127.0.0.1") < 65536
    with pytest.raises(OSError):
        free_port("192.0.2.1")
