"""``Tee``: what the ranks print, shown in the launcher's own output while they run.

The ranks write to files, and the launcher follows the files. So nothing that happens here, a terminal that is stopped,
a pipe that nobody reads, the death of the launcher, slows a rank or loses a line of it: what is not shown is in the
file.

The files are looked at, 10 to 100 times a second, for their sizes; they are not watched by inotify(7). A watch makes
each small write of a rank half as dear again, has limits that all programs of a user share, and is Linux's alone.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import IO, TYPE_CHECKING, NamedTuple

from .logs import READ_FLAGS, last_state

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from types import TracebackType

    from .logs import RankFiles

_CHUNK = 1 << 16
"""Bytes read of one file before it is another's turn, and the longest line that is shown in one piece."""
_SOONEST, _LATEST = 0.01, 0.1  # seconds between two looks: after one that found something, after many that did not
_STATE_SECONDS = 10.0
_PIPE_BUF = getattr(select, "PIPE_BUF", 512)


class Source(NamedTuple):
    """A log file to follow: what ``rank`` writes to its stdout, or its stderr, is in ``path``."""

    rank: int
    path: str | os.PathLike[str]
    is_stderr: bool


def sources(files: Iterable[RankFiles], first_rank: int = 0) -> Iterator[Source]:
    """The log files of a machine's ranks. first_rank: the RANK of its local rank 0."""
    for number, of_rank in enumerate(files, first_rank):
        for path, is_stderr in ((of_rank.stdout, False), (of_rank.stderr, True)):
            if path is not None:
                yield Source(number, path, is_stderr)


class Tee:
    """Shows what ranks print, from one thread for all of them.

    sources: the files; one that is not there yet is waited for. ranks: show these only; None shows all.
    prefix: put before each line; ``{rank}`` is the rank's number.
    out, err: where lines of the ranks' stdout and stderr go: a descriptor or a text stream; None for sys.stdout and
        sys.stderr. A text stream on descriptor 1 or 2 is written to by that number: the lock of its buffer would be
        held while a terminal is stopped, and whoever prints would hang.

    Whole lines are shown, in the order in which a rank wrote them to one stream. Bytes go through as they are. A line
    longer than 64 KiB is shown in pieces, each as a line of its own. Of a line that is written over ("\\r": a progress
    bar) the last state is shown, when the line ends and every 10 seconds. A last line without a newline is given one.

    No line is torn by what others write to the same descriptor if they, too, write whole lines at once, of at most
    PIPE_BUF (4096) bytes: ``sys.stderr.write("a line\\n")``. With PYTHONUNBUFFERED print() writes word by word.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        *,
        ranks: Collection[int] | None = None,
        prefix: str = "[rank {rank}]:",
        out: int | IO[str] | None = None,
        err: int | IO[str] | None = None,
    ) -> None:
        self._out = _Sink(sys.stdout if out is None else out)
        self._err = _Sink(sys.stderr if err is None else err)
        self._followed = [
            _Followed(os.fspath(path), prefix.format(rank=rank).encode(), self._err if is_stderr else self._out)
            for rank, path, is_stderr in sources
            if ranks is None or rank in ranks
        ]
        self._absent, self._open = list(self._followed), list[_Followed]()
        self._finishing = self._stopped = self._complete = False
        self._thread: threading.Thread | None = None
        self._bell: IO[bytes] | None = None

    def start(self) -> Tee:
        """Start to show. Raises RuntimeError or OSError when no thread, or no descriptor, can be had."""
        reader, writer = os.pipe()
        # Each end is closed by its only user: a bell that was closed elsewhere might be another file's number by now.
        heard, self._bell = open(reader, "rb", buffering=0), open(writer, "wb", buffering=0)
        self._thread = threading.Thread(target=self._run, args=[heard], name="rankspawn-tee", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._thread = None
            self._bell.close()
            heard.close()
            raise
        return self

    def finish(self, timeout: float = 5.0) -> tuple[str, ...]:
        """Show the rest of every file, up to its size of now, in about ``timeout`` seconds at most. The last call.

        It is for when the ranks have ended. The paths returned are of files that have more than could be shown, because
        nobody reads what the launcher prints; it is said on ``err`` as well, unless that is what nobody reads.
        """
        if self._thread is None or self._bell is None:
            return ()
        self._finishing = True
        with suppress(BrokenPipeError):  # the thread has ended: nobody reads any more
            self._bell.write(b".")
        try:
            self._thread.join(timeout)
        finally:
            self._stopped = True
            self._bell.close()
        # A thread that is inside a write to a terminal ends when the terminal goes on, and nobody waits for that.
        self._thread.join(0.2)
        self._thread = None
        rest = () if self._complete else tuple(followed.path for followed in self._followed if followed.has_more())
        if rest:
            more = f" and {len(rest) - 4} more" if len(rest) > 4 else ""
            self._say(f"not all of the output could be shown; the rest is in {', '.join(rest[:4])}{more}")
            with suppress(OSError, ValueError):
                while self._err.pending and self._err.is_ready():
                    self._err.write()
        return rest

    def __enter__(self) -> Tee:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def _run(self, heard: IO[bytes]) -> None:
        if hasattr(signal, "pthread_sigmask"):
            # Signals are for the program's own threads; and SIGPIPE is an errno here, whatever it is set to there.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        pause, look_at = _SOONEST, 0.0
        last = False
        try:
            while not self._stopped:
                if self._finishing and not last:
                    last = True
                    self._look(last)
                elif not last and time.monotonic() >= look_at:
                    pause = _SOONEST if self._look(last) else min(pause * 1.5, _LATEST)
                    look_at = time.monotonic() + pause
                self._fill(self._out, last)
                self._fill(self._err, last)
                if last and not self._out.pending and not self._err.pending:
                    self._complete = True
                    break
                self._write(heard, 1.0 if last else look_at - time.monotonic())
        finally:
            heard.close()
            for followed in self._followed:
                followed.close()

    def _look(self, last: bool) -> bool:
        """Queue the files that have grown, at ``last`` all; whether there are any."""
        self._absent = [followed for followed in self._absent if self._is_absent(followed)]
        try:
            # lseek takes a fifth of the time of fstat.
            grown = [one for one in self._open if last or os.lseek(one.fd, 0, os.SEEK_END) != one.seen]
        except OSError:
            grown = self._open  # reading it says which it is
        for followed in grown:
            if not followed.queued:
                followed.queued = True
                followed.sink.unread.append(followed)
        return bool(grown)

    def _is_absent(self, followed: _Followed) -> bool:
        if followed.sink.dead:
            return False
        try:
            followed.fd = os.open(followed.path, READ_FLAGS)
        except FileNotFoundError:
            return True
        except OSError as error:
            self._drop(followed, error)
        else:
            self._open.append(followed)
        return False

    def _fill(self, sink: _Sink, last: bool) -> None:
        """Give ``sink`` the next lines to write, if it has none: a chunk of each file in turn."""
        while not sink.pending and sink.unread:
            followed = sink.unread.popleft()
            followed.queued = False
            try:
                text = followed.text(last)
            except OSError as error:
                self._drop(followed, error)
                continue
            if text:
                sink.pending, sink.source = text, followed
                followed.queued = True
                sink.unread.append(followed)

    def _write(self, heard: IO[bytes], seconds: float) -> None:
        """Write a piece to whoever takes one; sleep while nobody does, until the bell rings or the time is over."""
        busy = [sink for sink in (self._out, self._err) if sink.pending]
        if hasattr(select, "poll"):
            poller = select.poll()
            poller.register(heard, select.POLLIN)
            for sink in busy:
                if sink.fd is None:
                    seconds = 0.0
                else:
                    poller.register(sink.fd, select.POLLOUT)
            # Any event but none is a reason to try: write(2) says what is wrong better than poll(2).
            events = dict(poller.poll(max(0.0, seconds) * 1000))
            if heard.fileno() in events:
                heard.read(64)
            busy = [sink for sink in busy if sink.fd is None or sink.fd in events]
        elif not busy:
            time.sleep(min(max(0.0, seconds), _SOONEST))
        for sink in busy:
            try:
                sink.write()
            except (OSError, ValueError) as error:  # ValueError: a text stream that was closed
                sink.close()
                self._open = [one for one in self._open if one.sink is not sink]
                if sink is self._out:
                    reason = getattr(error, "strerror", None) or error
                    self._say(f"stdout: {reason}; what ranks write there is no longer shown")

    def _drop(self, followed: _Followed, error: OSError) -> None:
        self._open = [one for one in self._open if one is not followed]
        followed.dropped = True
        self._say(f"what is written to {followed.path} cannot be shown: {error.strerror}")

    def _say(self, note: str) -> None:
        self._err.append(f"rankspawn: {note}\n".encode(errors="backslashreplace"))


class _Sink:
    """Where lines go: a descriptor, which is written to when it takes something, or a text stream, which may block."""

    def __init__(self, target: int | IO[str] | None) -> None:
        self.fd = target if isinstance(target, int) else None
        self.stream = None if isinstance(target, int) else target
        self.dead = target is None
        self.pending = b""  # whole lines
        self._written = 0  # bytes of them
        self.source: _Followed | None = None  # where they are from
        self.unread: deque[_Followed] = deque()
        if self.stream is not None:
            with suppress(OSError, ValueError, AttributeError):  # in memory, closed
                number = self.stream.fileno()
                self.fd = number if number in (1, 2) else None

    def append(self, text: bytes) -> None:
        if not self.dead:
            self.pending += text

    def is_ready(self) -> bool:
        """Whether a write will not wait, as far as can be known."""
        if self.fd is None or not hasattr(select, "poll"):
            return True
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        return bool(poller.poll(0))

    def write(self) -> None:
        """Write a piece of what is pending: whole lines, as many as a pipe takes at once."""
        if self.fd is not None:
            most = self._written + _PIPE_BUF
            end = self.pending.rfind(b"\n", self._written, most) + 1 or most
            try:
                self._written += os.write(self.fd, memoryview(self.pending)[self._written : end])
            except BlockingIOError:  # somebody's O_NONBLOCK, and poll(2) did not know
                time.sleep(_SOONEST)
        elif self.stream is not None:
            self.stream.write(self.pending.decode(errors="replace"))
            self.stream.flush()
            self._written = len(self.pending)
        if self._written == len(self.pending):
            self.pending, self._written = b"", 0
            if self.source is not None:
                self.source.shown = self.source.position
                self.source = None

    def close(self) -> None:
        self.dead = True
        self.pending = b""
        self.unread.clear()


class _Followed:
    """A log file, and how far it has been shown."""

    def __init__(self, path: str, prefix: bytes, sink: _Sink) -> None:
        self.path, self.sink = path, sink
        self.queued = self.dropped = False
        self.position = 0  # of the first line that was not handed on
        self.shown = 0  # up to here it was written
        self._prefix = prefix
        self.fd = -1
        self.seen = 0  # how far it was read
        self._end = sys.maxsize  # what is behind that is not shown
        self._rewritten = False
        self._next_state = 0.0

    def text(self, last: bool) -> bytes:
        """The next whole lines, as they are to be shown; empty when there are none.

        From the first ``last`` call on the file is as long as it is then: what a process of the rank that was left
        behind goes on to write has no end.
        """
        if last and self._end == sys.maxsize:
            self._end = os.lseek(self.fd, 0, os.SEEK_END)
        while data := self._read():
            if end := data.rfind(b"\n") + 1:
                self.position += end
                return self._lines(data[: end - 1])
            state = last_state(data)
            if len(data) == _CHUNK:
                # Earlier states of a line are passed over; a line that has none is cut.
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
                self._next_state = time.monotonic() + _STATE_SECONDS
                self.position += state  # not past it: it is shown once more when the line ends
                return self._lines(data)
        return b""

    def has_more(self) -> bool:
        """Whether the file has something that was not shown and could have been."""
        if self.dropped or self.sink.dead:
            return False
        with suppress(OSError):
            return os.stat(self.path).st_size > self.shown
        return False

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _read(self) -> bytes:
        if os.lseek(self.fd, 0, os.SEEK_END) < self.position:
            self.position, self._rewritten = 0, True
        if self._rewritten and hasattr(os, "SEEK_DATA"):
            # A writer without O_APPEND goes on where it was: what was cut away before it is a hole.
            with suppress(OSError):
                self.position = os.lseek(self.fd, self.position, os.SEEK_DATA)
        os.lseek(self.fd, self.position, os.SEEK_SET)
        data = os.read(self.fd, max(0, min(_CHUNK, self._end - self.position)))
        self.seen = self.position + len(data)
        if self._rewritten:
            text = data.lstrip(b"\0")
            self.position += len(data) - len(text)
            return text
        return data

    def _lines(self, text: bytes) -> bytes:
        """``text``, which is lines but for the last newline, each with the prefix."""
        if b"\r" in text:
            text = b"\n".join([line[last_state(line) :].rstrip(b"\r") for line in text.split(b"\n")])
        return self._prefix + text.replace(b"\n", b"\n" + self._prefix) + b"\n"


def _whole_characters(data: bytes) -> int:
    """The length of ``data`` without the beginning of a character of UTF-8 at its end."""
    for back in (1, 2, 3):
        byte = data[-back]
        if byte >= 0xC0:
            return len(data) - (back if back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else 0)
        if byte < 0x80:
            break
    return len(data)
