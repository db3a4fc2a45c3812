"""What the failure tests share: forked processes in which they break things, and a list of what was changed there."""

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

# A user who has no processes on any system: RLIMIT_NPROC counts the test's alone, and its kill(-1) reaches them alone.
NOBODY = 54321


def become(uid: int) -> None:
    """If we are root, become the user ``uid`` for good: without root's ids, groups and capabilities."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def fork(function: Callable[[], object]) -> int:
    """Run ``function`` in a forked process, which ends with status 0, or 1 after an exception; returns its pid.

    It is a fork and not a new interpreter, because another user may be unable to read the interpreter's files.
    """
    with warnings.catch_warnings():
        # Python 3.12 warns when a process with threads forks. Tests with threads take care of that themselves.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    except BaseException:
        # To the descriptor: pytest's sys.stderr may be in memory, and the fork's copy of that is lost.
        traceback.print_exc(file=sys.__stderr__)
    finally:
        # pytest's cleaning up must run in the parent only.
        os._exit(status)


def in_child(function: Callable[[], Answer]) -> Answer:
    """Run ``function`` in a forked process and return its answer; the changes that it makes (limits, ids, descriptors)
    end with that process."""
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
    """What conftest.py compares around every test, for launchers in processes without pytest."""
    from tests.conftest import _snapshot

    while True:
        try:
            return _snapshot()
        except (FileNotFoundError, ProcessLookupError):
            # A thread ended between the listing and the reading of /proc/self/task.
            continue


def changed_since(before: dict[str, object]) -> dict[str, str]:
    """The differences from ``before``, in words, after a time for threads and processes to end."""
    from tests.conftest import GRACE_SECONDS, _difference

    deadline = time.monotonic() + GRACE_SECONDS
    after = snapshot()
    while after != before and time.monotonic() < deadline:
        time.sleep(0.01)
        after = snapshot()
    return {name: _difference(before[name], after[name]) for name in before if before[name] != after[name]}
