"""What a rank uses now, by psutil."""

from __future__ import annotations

from typing import TypedDict


class Usage(TypedDict):
    """What one process uses now, without its children.

    Attributes:
        user: CPU seconds in user mode since it was started.
        system: CPU seconds in the kernel since it was started.
        rss: Resident bytes.
        threads: How many it has.
    """

    user: float
    system: float
    rss: int
    threads: int


def usage_now(pid: int) -> Usage | None:
    """What process ``pid`` uses; None if it has ended, reaped or not, or if the system does not show it."""
    import psutil

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            cpu, memory, threads = process.cpu_times(), process.memory_info(), process.num_threads()
    except psutil.Error:
        return None
    return {"user": cpu.user, "system": cpu.system, "rss": memory.rss, "threads": threads}
