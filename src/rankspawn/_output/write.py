"""Writes the launcher's files: no reader sees half of a file, and a sleeping reader cannot block the launcher."""

from __future__ import annotations

import errno
import json
import os
import select
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from .follow import PIPE_BUF

if TYPE_CHECKING:
    from .form import GroupReport

_SECONDS = 5.0  # how long a pipe's reader may take no byte; ``Tee.finish`` waits as long
_AGAIN = 0.05  # seconds between two attempts to open a FIFO
# The errors of a file that may be written but not replaced: its folder is not ours, or it is a mount point.
_NOT_REPLACED = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.EROFS)


def write_report(report: GroupReport, path: str | os.PathLike[str], interrupt: int | None = None) -> None:
    """Write ``report`` as JSON, as write_text() does."""
    write_text(json.dumps(report, indent=1) + "\n", path, interrupt)


def write_text(text: str, path: str | os.PathLike[str], interrupt: int | None = None) -> None:
    """Write a file so that no reader sees half of it, and so that the old content survives a failure.

    The text is written to a new file beside ``path``, which then replaces it. A file that may be written but not
    replaced (its folder is read-only, it is a mount point) is overwritten. A path that is not a regular file
    (/dev/stdout, a FIFO, a symbolic link) is written to; its reader may pause for 5 seconds at most.

    Args:
        text: The text, written as UTF-8.
        path: The path of the file.
        interrupt: A descriptor; once it is readable, the call does not wait for a reader.

    Raises:
        OSError: Of the class that open() would raise, with ``path`` as its filename; TimeoutError if no reader reads.
    """
    path, data = os.fspath(path), text.encode()
    try:
        if not is_special(path):
            try:
                _put_in_place(path, data)
                return
            except OSError as error:
                if error.errno not in _NOT_REPLACED or not os.path.lexists(path):
                    raise
        _write_to(path, data, interrupt)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def is_special(path: str) -> bool:
    """Whether ``path`` is there and is neither file nor folder: write_text() writes to it, and does not replace it."""
    with suppress(FileNotFoundError):
        return stat.S_IFMT(os.lstat(path).st_mode) not in (stat.S_IFREG, stat.S_IFDIR)
    return False


def _put_in_place(path: str, data: bytes) -> None:
    """Write a new file beside ``path``, and put it in its place. A killed launcher leaves the new file: no other one
    takes its name."""
    beside = os.path.join(os.path.dirname(path), f".rankspawn-{os.urandom(8).hex()}.new")
    with open(beside, "xb") as file:
        try:
            file.write(data)
            file.close()
            os.replace(beside, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside)
            raise


def _write_to(path: str, data: bytes, interrupt: int | None) -> None:
    """Write to the existing file, as long as it takes bytes."""
    fd = _opened(path, interrupt)
    try:
        left, deadline = memoryview(data), time.monotonic() + _SECONDS
        while left:
            if not _takes(fd, interrupt) or time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"nobody reads it; {len(left)} of {len(data)} bytes are missing")
            try:
                left = left[os.write(fd, left[:PIPE_BUF]) :]
            except BlockingIOError:  # another writer took the room that poll(2) saw
                time.sleep(_AGAIN)
            else:
                deadline = time.monotonic() + _SECONDS
    finally:
        os.close(fd)


def _opened(path: str, interrupt: int | None) -> int:
    """Open the existing file. With O_NONBLOCK, open(2) fails with ENXIO for a FIFO that has no reader."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            return os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(path).st_mode):
                raise
        if time.monotonic() > deadline or not _pause(interrupt):
            raise TimeoutError(errno.ETIMEDOUT, "nobody reads it")


def _takes(fd: int, interrupt: int | None) -> bool:
    """Wait until ``fd`` takes bytes; False after ``_SECONDS``, or once ``interrupt`` is readable."""
    if not hasattr(select, "poll"):
        return True
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    if interrupt is not None:
        poller.register(interrupt, select.POLLIN)
    return fd in dict(poller.poll(_SECONDS * 1000))


def _pause(interrupt: int | None) -> bool:
    """Sleep for a moment; False once ``interrupt`` is readable."""
    ready, _, _ = select.select([] if interrupt is None else [interrupt], [], [], _AGAIN)
    return not ready
