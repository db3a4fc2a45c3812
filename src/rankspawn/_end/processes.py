"""Other processes as psutil sees them: the descendants of a rank, and what a rank uses now."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


class ProcessTree:
    """Who started whom: one look at all processes of the machine, taken when it is first needed.

    psutil's own ``children()`` takes such a look at every call, so once for each rank, and it finds nothing below a
    process that has ended.
    """

    @cached_property
    def _started_by(self) -> dict[int, list[tuple[psutil.Process, float]]]:
        """By the number of the parent: processes that have not ended, and when they were created."""
        import psutil

        children: dict[int, list[tuple[psutil.Process, float]]] = {}
        for pid in psutil.pids():
            try:
                process = psutil.Process(pid)
                with process.oneshot():
                    if process.status() != psutil.STATUS_ZOMBIE:
                        children.setdefault(process.ppid(), []).append((process, process.create_time()))
            except psutil.Error:
                continue  # it ended meanwhile, or we may not read it
        return children

    def descendants(self, pid: int, born: float | None = None) -> list[psutil.Process]:
        """The processes that ``pid`` started, and those that these started, parents first; not those that have ended.

        A process is no child of a younger one: the number of an ended parent may belong to another process
        by now. psutil's methods that signal check by the time of creation, too, that the number is still the
        process's own. The number of ``pid`` itself must be held meanwhile: by a Popen that has not been waited for, or
        on Windows by one that exists.

        Args:
            pid: The number of the process.
            born: When it was created, as ``psutil.Process.create_time`` gives it; None asks psutil, and finds nothing
                below a process that has ended. It helps where orphans keep the number of their parent (Windows).
        """
        import psutil

        if born is None:
            try:
                born = psutil.Process(pid).create_time()
            except psutil.NoSuchProcess:
                return []
        found: dict[int, psutil.Process] = {}
        parents = [(pid, born)]
        for parent, since in parents:
            for process, created in self._started_by.get(parent, ()):
                if created >= since and process.pid not in found:
                    found[process.pid] = process
                    parents.append((process.pid, created))
        return list(found.values())
