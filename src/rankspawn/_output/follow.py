"""A log file, read as it grows, and the stream on which its lines are shown."""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import time
from collections import deque
from contextlib import suppress
from typing import IO, TYPE_CHECKING

from .console import encoded, write, write_bytes
from .logs import READ_FLAGS, last_state

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK = 1 << 16
"""Bytes to read from one file before the next one, and the longest line that is shown in one piece."""
SOONEST = 0.01  # seconds between two looks at files that grow
PIPE_BUF = getattr(select, "PIPE_BUF", 512)
"""PIPE_BUF: a pipe takes so many bytes of a write in one piece, and poll(2) finds room for them: pipe(7)."""

RETRY = 0.1
"""Seconds until the next try of a file or a stream that failed."""
_STATE_SECONDS = 10.0  # between two states of a progress bar in a file or a pipe, which keep them all
_STATE_SECONDS_ON_TERMINAL = 1.0
_GONE = (errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN, errno.ENXIO, errno.ENODEV)


class Sink:
    """Where lines go: a descriptor, which is written to when poll(2) says so, or a text stream, which may block.

    Attributes:
        fd: The descriptor; None for a text stream that is not the process's stdout or stderr.
        stream: The text stream; None for a descriptor.
        dead: Whether the stream is gone, and nothing more is written.
        failing: Why the last write failed although the stream is still there; "" if it succeeded. There will be another
            try.
        state_seconds: Seconds between two states of a progress bar.
        pending: Whole lines that are still to be written.
        source: The file that ``pending`` comes from.
        unread: The files that have grown and are to be read.
    """

    def __init__(self, target: int | IO[str] | None) -> None:
        self.fd = target if isinstance(target, int) else None
        self.stream = None if isinstance(target, int) else target
        self.dead = target is None
        self.failing = ""
        self.pending = b""
        self._written = 0  # bytes of pending
        self.source: Followed | None = None
        self.unread: deque[Followed] = deque()
        if self.stream is not None:
            with suppress(OSError, ValueError, AttributeError):  # a stream in memory, or a closed one
                number = self.stream.fileno()
                self.fd = number if number in (1, 2) else None
        on_terminal = self.fd is not None and os.isatty(self.fd)
        self.state_seconds = _STATE_SECONDS_ON_TERMINAL if on_terminal else _STATE_SECONDS

    def append(self, text: bytes) -> None:
        if not self.dead:
            self.pending += text

    def is_ready(self) -> bool:
        """Whether a write will not block, as far as can be known."""
        if self.fd is None or not hasattr(select, "poll"):
            return True
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        return bool(poller.poll(0))

    def write(self) -> None:
        """Write as many pending whole lines as fit in PIPE_BUF bytes.

        Raises OSError, and ValueError for a text stream that is closed.
        """
        if self.fd is not None:
            most = self._written + PIPE_BUF
            end = self.pending.rfind(b"\n", self._written, most) + 1 or most
            try:
                self._written += os.write(self.fd, memoryview(self.pending)[self._written : end])
            except BlockingIOError:  # another process set O_NONBLOCK, and the room that poll(2) saw is gone
                time.sleep(SOONEST)
        elif self.stream is not None:
            self.stream.write(_readable(self.pending, self.stream))
            self.stream.flush()
            self._written = len(self.pending)
        self.failing = ""
        if self._written == len(self.pending):
            self.pending, self._written = b"", 0
            if self.source is not None:
                self.source.shown = self.source.position
                self.source = None

    def note(self, error: OSError | ValueError) -> bool:
        """Note that a write has failed. Returns whether the stream is gone, so that no other write can succeed.

        A full disk, a quota and a file server that does not answer do not end the stream: the pending lines wait, and
        are written later.
        """
        if isinstance(error, OSError):
            gone = error.errno in _GONE or (error.errno == errno.EIO and not _is_regular(self.fd))  # EIO: hung up
        else:
            gone = getattr(self.stream, "closed", False)
        self.failing = "" if gone else str(getattr(error, "strerror", None) or error)
        if gone:
            self.close()
        return gone

    def hand_over(self) -> None:
        """Leave the pending lines to the console's thread, which may block on them: this is the last call."""
        text, self.pending = self.pending[self._written :], b""
        if self.fd is not None:
            write_bytes(self.fd, text)
        elif self.stream is not None:
            write(_readable(text, self.stream), self.stream)

    def close(self) -> None:
        self.dead = True
        self.pending = b""
        self.unread.clear()


class Followed:
    """A log file, and how far it has been shown.

    Attributes:
        path: Of the file.
        sink: Where its lines go.
        queued: Whether it is among the sink's unread files.
        failing: Why it could not be read; "" if it could. There will be another try.
        position: Where the first line begins that the sink does not have.
        shown: Up to here the file has been written to the sink.
        fd: The open file, -1 where it is not open.
        seen: Up to here the file has been read.
    """

    def __init__(self, path: str, prefix: bytes, sink: Sink, words: Sequence[bytes] = ()) -> None:
        self.path, self.sink = path, sink
        self.queued = False
        self.failing = ""
        self.position = 0
        self.shown = 0
        self._prefix, self._words = prefix, words
        self.fd = -1
        self.seen = 0
        self._end = sys.maxsize  # nothing is shown from here on
        self._rewritten = False
        self._next_state = 0.0

    def text(self, last: bool) -> bytes:
        """The next whole lines, as they will be shown; empty if there are none. See ``_text``."""
        while True:
            before = self.position
            text = self._text(last)
            if text or self.position == before:
                return text

    def _text(self, last: bool) -> bytes:
        """The next whole lines, as they will be shown; empty if there are none, or none with the words.

        Args:
            last: Show the rest even without its newline, because no more is waited for. The first such call fixes the
                file's size, because an orphan of the rank may write for ever.

        Raises:
            OSError: The file cannot be read.
        """
        if last and self._end == sys.maxsize:
            self._end = os.lseek(self.fd, 0, os.SEEK_END)
        while data := self._read():
            if end := data.rfind(b"\n") + 1:
                self.position += end
                return self._lines(data[: end - 1])
            state = last_state(data)
            if len(data) == CHUNK:
                # Earlier states of a line are skipped; a line that has none is cut.
                end = state or _whole_characters(data)
                self.position += end
                if not state:
                    return self._lines(data[:end])
            elif last:
                self.position += len(data)
                return self._lines(data)
            else:
                if not state or time.monotonic() < self._next_state:
                    break
                self._next_state = time.monotonic() + self.sink.state_seconds
                self.position += state  # not past the state: it is shown once more when the line ends
                return self._lines(data)
        return b""

    def has_more(self) -> bool:
        """Whether the file has more than was shown."""
        if self.sink.dead:
            return False
        if self.failing:
            return True
        with suppress(OSError):
            return os.stat(self.path).st_size > self.shown
        return False

    def open(self) -> bool:
        """Open the file; False if it is missing or cannot be read yet.

        Raises:
            OSError: It cannot be opened.
        """
        # A file that is not regular is not opened a second time, because a FIFO's writer would notice.
        if self.failing and not stat.S_ISREG(os.stat(self.path).st_mode):
            return False
        try:
            self.fd = os.open(self.path, READ_FLAGS)
        except FileNotFoundError:
            return False
        if not _is_regular(self.fd):
            self.close()
            raise OSError(errno.EINVAL, "not a regular file", self.path)
        self.failing = ""
        return True

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _read(self) -> bytes:
        if os.lseek(self.fd, 0, os.SEEK_END) < self.position:
            self.position, self._rewritten = 0, True
        if self._rewritten and hasattr(os, "SEEK_DATA"):
            # A writer without O_APPEND keeps its position: after a truncation the file begins with a hole.
            with suppress(OSError):
                self.position = os.lseek(self.fd, self.position, os.SEEK_DATA)
        os.lseek(self.fd, self.position, os.SEEK_SET)
        data = os.read(self.fd, max(0, min(CHUNK, self._end - self.position)))
        self.seen = self.position + len(data)
        if self._rewritten:
            text = data.lstrip(b"\0")
            self.position += len(data) - len(text)
            return text
        return data

    def _lines(self, text: bytes) -> bytes:
        """``text`` (lines, without the last newline) with the prefix before each line, and with the last newline."""
        if b"\r" in text:
            text = b"\n".join([line[last_state(line) :].rstrip(b"\r") for line in text.split(b"\n")])
        if self._words:
            lines = [line for line in text.split(b"\n") if any(word in line for word in self._words)]
            if not lines:
                return b""
            text = b"\n".join(lines)
        return self._prefix + text.replace(b"\n", b"\n" + self._prefix) + b"\n"


def _readable(data: bytes, stream: IO[str]) -> str:
    """``data`` as text that ``stream`` can encode; a stream in memory takes all."""
    text = data.decode(errors="replace")
    encoding = getattr(stream, "encoding", None)
    return encoded(text, encoding).decode(encoding) if encoding else text


def _is_regular(fd: int | None) -> bool:
    try:
        return fd is not None and stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        return False


def _whole_characters(data: bytes) -> int:
    """The length of ``data`` without an incomplete UTF-8 character at its end."""
    for back in (1, 2, 3):
        byte = data[-back]
        if byte >= 0xC0:
            return len(data) - (back if back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else 0)
        if byte < 0x80:
            break
    return len(data)
