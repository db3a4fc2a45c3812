"""Writes the launcher's lines to stderr in their order, and never waits long for it.

A stopped terminal (Ctrl-S), a pager and a pipe whose reader sleeps block every writer, and poll(2) cannot promise that
a write will not block: ranks write there, too, and take the room that poll saw. So a thread writes. The caller waits a
moment for it, so that the line precedes what the ranks write afterwards. The thread ends when everything is written.

Python's own stream is not used: the lock of its buffer would be held while the write blocks, and the interpreter could
not end.
"""

from __future__ import annotations

import _thread
import atexit
import codecs
import io
import os
import signal
import sys
import time
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import IO

_LENIENT = "rankspawn.lenient"  # a name for codecs.register_error()
_MOMENT = 0.02  # seconds that the caller waits for its line
_PATIENCE = 2.0  # seconds that the end of the process waits for a reader who takes nothing
_MOST = 256  # texts that wait to be written; beyond that, only their number is written
_AGAIN = 0.05  # seconds between two attempts where a descriptor has O_NONBLOCK


def say(text: str) -> None:
    """Print a line to stderr, or several in one piece, after the name of this program."""
    write(f"rankspawn: {text}\n")


def say_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception, in place of the interpreter's sys.excepthook."""
    import traceback

    write("".join(traceback.format_exception(kind, error, trace)))


def write(text: str, stream: IO[str] | None = None) -> None:
    """Write ``text`` to ``stream``, sys.stderr if left out. If no reader takes it, it is written later or never.

    A stream that is not this process's stdout or stderr (one in memory) is written to at once.
    """
    stream = sys.stderr if stream is None else stream
    if stream is None:  # the process was started without it
        return
    fd = descriptor(stream)
    try:
        if fd is None:
            encoding = getattr(stream, "encoding", None)
            stream.write(encoded(text, encoding).decode(encoding, "surrogateescape") if encoding else text)
            stream.flush()
        else:
            _writer.add(fd, encoded(text, getattr(stream, "encoding", None)))
    except (OSError, ValueError):  # the reader has gone, or the stream is closed
        return


def encoded(text: str, encoding: str | None) -> bytes:
    """``text`` as bytes for a stream, whatever is in it.

    A character that stands for a byte of a file's name (PEP 383) becomes that byte again, as when a rank writes the
    name. Other characters that the encoding lacks are written "\\xe9".
    """
    encoding = encoding or "utf-8"
    try:
        return text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        named = ("surrogateescape" if "\udc80" <= one <= "\udcff" else "backslashreplace" for one in text)
        return b"".join(one.encode(encoding, errors) for one, errors in zip(text, named, strict=True))


def lenient(stream: IO[str] | None) -> None:
    """Have print() to a stream write what encoded() makes of a text, instead of a UnicodeEncodeError."""
    if isinstance(stream, io.TextIOWrapper):
        codecs.register_error(_LENIENT, _without_error)
        stream.reconfigure(errors=_LENIENT)


def _without_error(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return encoded(error.object[error.start : error.end], error.encoding), error.end


def write_bytes(fd: int, data: bytes) -> None:
    """As write(), to a descriptor."""
    _writer.add(fd, data)


def is_stuck() -> bool:
    """Whether a text waits to be written because no reader takes it."""
    return _writer.stuck


def flush() -> None:
    """Wait until everything is written, or until the reader has taken nothing for 2 seconds.

    The end of the interpreter calls it; execve(2) and a signal that kills the process do not.
    """
    _writer.flush(_PATIENCE)


def descriptor(stream: IO[str] | None) -> int | None:
    """The number of a stream that is this process's stdout or stderr, and may be written to by that number."""
    if stream is None or sys.platform == "win32":  # its console takes text, not bytes
        return None
    try:
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):  # a stream in memory, or a closed one
        return None
    return number if number in (1, 2) else None


class _Writer:
    """Texts that wait, and the thread that writes them. There is no thread while no text waits.

    The methods may interrupt each other in one thread: garbage collection may run a destructor that warns. So nothing
    here waits for a lock that its own thread may hold.
    """

    def __init__(self) -> None:
        self.stuck = False
        self._texts: deque[tuple[int, bytes]] = deque()
        self._left_out = 0
        self._busy = _thread.allocate_lock()  # held by the thread that writes, from before its start
        self._written = 0  # how many pieces
        self._registered = False

    def add(self, fd: int, data: bytes) -> None:
        if len(self._texts) >= _MOST:
            self._left_out += 1
            return
        if not self._registered:
            self._registered = True
            atexit.register(flush)
        self._texts.append((fd, data))
        self._start()
        if not self.stuck and not self._idle(_MOMENT):
            self.stuck = True

    def flush(self, patience: float) -> None:
        written = -1
        while written != self._written:
            written = self._written
            if self._idle(patience):
                return

    def _idle(self, seconds: float) -> bool:
        """Wait until nothing is being written; False after ``seconds``."""
        if not self._busy.acquire(timeout=seconds):
            return False
        self._busy.release()
        self._start()  # for a text that was added while this thread held the lock
        return True

    def _start(self) -> None:
        if self._texts and self._busy.acquire(blocking=False):
            try:
                _thread.start_new_thread(self._run, ())
            except RuntimeError:  # no thread can be made, so no rank runs either: a write may block
                self._write_all()

    def _run(self) -> None:
        if hasattr(signal, "pthread_sigmask"):
            # With SIGTTOU blocked a background job may write to its terminal, and is not stopped: credentials(7). The
            # others are an errno, whatever their actions.
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU, signal.SIGPIPE, signal.SIGXFSZ))
        self._write_all()

    def _write_all(self) -> None:
        while True:
            while self._texts:
                self._write(*self._texts[0])
                self._texts.popleft()
                self.stuck = False
                if self._left_out:
                    left_out, self._left_out = self._left_out, 0
                    self._texts.append((2, f"rankspawn: {left_out} messages are left out here\n".encode()))
            self._busy.release()
            if not self._texts or not self._busy.acquire(blocking=False):
                return

    def _write(self, fd: int, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:  # another process has set O_NONBLOCK on what it shares with us
                time.sleep(_AGAIN)
            except OSError:  # the reader has gone; the job continues
                return
            self._written += 1


_writer = _Writer()
