"""The group's own cgroup: one write kills every process in it, in whatever session.

Everything here is cgroup v2's (the kernel's Documentation/admin-guide/cgroup-v2.rst, cgroups(7)). No controller is
enabled: the cgroup holds processes together, and limits nothing that the one above it does not.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time

TYPE_CHECKING = False  # typing's own costs more than this module

if TYPE_CHECKING:
    from collections.abc import Iterator

_DELEGATION = (
    "it must be delegated: its owner lets you make directories in it and write its cgroup.procs, and you run in it or"
    " below the same one (systemd-run --user --scope -p Delegate=yes COMMAND runs COMMAND in such a cgroup)"
)


def new_name() -> str:
    """A unique name for a directory: launchers in two PID namespaces may have the same number."""
    return f"rankspawn-{os.getpid()}-{os.urandom(4).hex()}"


class GroupCgroup:
    """A cgroup v2 that is ours, by its directory.

    Attributes:
        path: The directory.
        fd: A descriptor of it (O_PATH), for CLONE_INTO_CGROUP; -1 once it was closed, by close() or remove().
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    @classmethod
    def make(cls, parent: str | os.PathLike[str], name: str | None = None) -> GroupCgroup:
        """Make a cgroup in ``parent``, the directory of a delegated cgroup v2.

        Args:
            parent: That directory.
            name: Of the new one; a unique one if left out. A guard has to know it, because the guard
                starts before the directory is made, and so misses no moment of its life.

        Raises:
            OSError: ``parent`` is no cgroup v2, is not delegated to this user, or is of a kind that has no place for
                processes (``cgroup.type``). It says what to do.
        """
        parent = os.path.abspath(parent)
        if not os.path.exists(os.path.join(parent, "cgroup.controllers")):
            # Version 1 has no such file; no version's directory is without cgroup.procs.
            what = "a cgroup of version 1" if os.path.exists(os.path.join(parent, "cgroup.procs")) else "no cgroup"
            code = errno.EINVAL if os.path.isdir(parent) else errno.ENOENT
            raise OSError(code, f"expected a directory of cgroup v2, got {what} ({os.strerror(code)})", parent)
        path = os.path.join(parent, new_name() if name is None else name)
        _make_directory(path)
        try:
            kind = _read(path, "cgroup.type").strip()
            if kind not in ("domain", "domain threaded"):
                raise OSError(
                    errno.EOPNOTSUPP, f"a cgroup made here cannot hold processes: its cgroup.type is {kind!r}", parent
                )
            if not os.access(os.path.join(path, "cgroup.procs"), os.W_OK):
                raise OSError(errno.EACCES, f"cgroup.procs cannot be written: {_DELEGATION}", parent)
            return cls(path)
        except BaseException:
            os.rmdir(path)
            raise

    def kill(self) -> None:
        """Send SIGKILL to every process in it and below it, also to those that are being forked."""
        try:
            _write(self.path, "cgroup.kill", "1")
        except FileNotFoundError:  # before Linux 5.14
            self._kill_each()

    def wait_empty(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until no process is in it or below it; return whether that is so.

        The kernel wakes the wait. A zombie does not count.
        """
        return self._wait_for("populated 0", timeout)

    def remove(self) -> None:
        """Remove the directories that the ranks made in it, and then itself. Harmless when done twice.

        Raises:
            OSError: EBUSY: a process is in one of them.
        """
        self.close()
        for path in _below(self.path):
            try:
                os.rmdir(path)
            except FileNotFoundError:
                continue

    def close(self) -> None:
        """Close the descriptor. The directory stays. Harmless when done twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def pids(self) -> list[int]:
        """The processes in it and below it."""
        found: list[int] = []
        for path in _below(self.path):
            try:
                found += map(int, _read(path, "cgroup.procs").split())
            except OSError:
                continue  # removed since; or threaded (EOPNOTSUPP): the cgroup above lists its processes
        return found

    def _kill_each(self) -> None:
        """Kill as kill() does, without cgroup.kill: freeze first, so that no process forks and no pid is reused."""
        try:
            _write(self.path, "cgroup.freeze", "1")
            self._wait_for("frozen 1", 1.0)
        except FileNotFoundError:  # before Linux 5.2
            pass
        while pids := self.pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if self._wait_for("populated 0", 0.1):
                break

    def _wait_for(self, line: str, timeout: float) -> bool:
        until = time.monotonic() + timeout
        try:
            events = os.open(os.path.join(self.path, "cgroup.events"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True  # it was removed
        try:
            poller = select.poll()
            poller.register(events, select.POLLPRI)
            while line not in os.pread(events, 4096, 0).decode().splitlines():
                left = until - time.monotonic()
                if left <= 0:
                    return False
                poller.poll(left * 1000)
            return True
        finally:
            os.close(events)


def _make_directory(path: str) -> None:
    parent = os.path.dirname(path)
    try:
        os.mkdir(path)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OSError(error.errno, f"{os.strerror(error.errno)}: {_DELEGATION}", parent) from None
        if error.errno == errno.EAGAIN:
            limits = "raise cgroup.max.descendants or cgroup.max.depth of this cgroup or of one above it"
            raise OSError(error.errno, f"no more cgroups may be made in it: {limits}", parent) from None
        raise


def _below(path: str) -> Iterator[str]:
    """The directory and those in it, the innermost first."""
    try:
        with os.scandir(path) as entries:
            folders = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    for folder in folders:
        yield from _below(folder)
    yield path


def _read(path: str, name: str) -> str:
    with open(os.path.join(path, name)) as file:
        return file.read()


def _write(path: str, name: str, text: str) -> None:
    # Not open(..., "w"): with O_CREAT, a file that is not there fails with another error than ENOENT.
    fd = os.open(os.path.join(path, name), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
