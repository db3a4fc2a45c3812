"""Python frames of another process, by the standard library of Python 3.14 and 3.15.

``_remote_debugging`` is what ``python -m asyncio pstree`` and ``python -m profiling.sampling dump`` are built on. It
reads the other process's memory (process_vm_readv(2)) and does not stop it. If Yama lets a process look only at its own
descendants, this works for the launcher, while a program that it starts (py-spy) is refused. The other
process must run the same minor version.
"""

from __future__ import annotations

import sys
from typing import Any

from .facts import Frame


def can_read(minor: int) -> bool:
    """Whether this interpreter can read the frames of a process that runs Python 3.``minor``."""
    return minor == sys.version_info[1] and _unwinder() is not None


def frames_of(pid: int) -> dict[int, tuple[Frame, ...]]:
    """The Python frames of a process that runs this interpreter's version, by the number of the thread.

    Raises:
        PermissionError: This process may not look into that one.
        OSError: The process has ended.
        RuntimeError: The memory does not make sense: the process starts or ends, or was changing it.
    """
    unwinder: Any = _unwinder()
    found = unwinder(pid, all_threads=True).get_stack_trace()
    # 3.15 lists interpreters, each with its threads; 3.14 the threads.
    threads = [thread for one in found for thread in getattr(one, "threads", (one,))]
    return {thread.thread_id: tuple([_frame(one) for one in thread.frame_info]) for thread in threads}


def _unwinder() -> Any:
    try:
        import _remote_debugging  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    return getattr(_remote_debugging, "RemoteUnwinder", None)


def _frame(found: Any) -> Frame:
    location = getattr(found, "location", None)
    line = getattr(found, "lineno", 0) if location is None else location.lineno
    return Frame(found.funcname, found.filename, line or 0)
