"""What the failure tests share: processes of their own to break things in, and what such a process has changed."""

from __future__ import annotations

import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Answer = TypeVar("Answer")

# A user that no system has processes of: RLIMIT_NPROC counts them, and a kill by it reaches nobody else.
NOBODY = 54321


def become(uid: int) -> None:
    """Give up root, if we are root, for good: all ids, all groups, all capabilities."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def fork(function: Callable[[], object]) -> int:
    """Run ``function`` in a forked process, which ends with status 0, or 1 after an exception; returns its pid.

    A fork and not a new interpreter: another user may not be able to read this one's files.
    """
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside threads. A test that has some is careful by itself.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        # By descriptor: what pytest keeps of sys.stderr in memory ends with this copy of it.
        traceback.print_exc(file=sys.__stderr__)
    finally:
        # pytest's own cleaning up belongs to the parent alone.
        os._exit(status)


def in_child(function: Callable[[], Answer]) -> Answer:
    """The answer of ``function`` run in a forked process; what it changes (limits, ids, descriptors) ends with it."""
    reading, writing = os.pipe()

    def answer() -> None:
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(function(), pipe)

    pid = fork(answer)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, "the forked half of the test failed: its traceback is in the captured output"
    found: Any = pickle.loads(sent)
    return found  # type: ignore[no-any-return]


def snapshot() -> dict[str, object]:
    """What conftest.py compares around every test, of this process, for launchers that pytest does not run in."""
    from tests.conftest import _snapshot

    while True:
        try:
            return _snapshot()
        except (FileNotFoundError, ProcessLookupError):
            # A thread ended between the listing and the reading of /proc/self/task.
            continue


def changed_since(before: dict[str, object]) -> dict[str, str]:
    """What is not as it was, in words, once what was told to end had its time."""
    from tests.conftest import GRACE_SECONDS, _difference

    deadline = time.monotonic() + GRACE_SECONDS
    after = snapshot()
    while after != before and time.monotonic() < deadline:
        time.sleep(0.01)
        after = snapshot()
    return {name: _difference(before[name], after[name]) for name in before if before[name] != after[name]}
