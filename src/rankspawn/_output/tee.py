"""``Tee``: shows what the ranks print in the launcher's own output while they run.

The ranks write to files, and the launcher reads the files as they grow. So nothing that happens here (a stopped
terminal, a pipe without a reader, the death of the launcher) slows a rank or loses one of its lines: a line that was
not shown is in the file.

The launcher reads the sizes of the files 10 to 100 times a second. It does not use inotify(7): a watch makes each small
write of a rank half as expensive again, its limits are shared by all programs of a user, and only Linux has it.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, NamedTuple

from .follow import RETRY, SOONEST, Followed, Sink

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from types import TracebackType

    from .logs import LogFolder, RankFiles

PREFIX = "[rank {rank}]:"

_LATEST = 0.1  # seconds between two looks when nothing has been written for a while
_HURRIED = 0.5  # seconds to show the rest once the user wants the end


class Source(NamedTuple):
    """A log file to show.

    Attributes:
        rank: The rank whose file it is; the prefix shows its number.
        path: Of the file.
        is_stderr: Whether it has what the rank writes to its stderr; False for stdout.
    """

    rank: int
    path: str | os.PathLike[str]
    is_stderr: bool


def sources(files: Iterable[RankFiles], first_rank: int = 0) -> Iterator[Source]:
    """The log files of a machine's ranks, of which ``first_rank`` is the RANK of local rank 0."""
    for number, of_rank in enumerate(files, first_rank):
        for path, is_stderr in ((of_rank.stdout, False), (of_rank.stderr, True)):
            if path is not None:
                yield Source(number, path, is_stderr)


@contextmanager
def show(
    files: Iterable[RankFiles],
    first_rank: int = 0,
    local_ranks: Collection[int] | None = None,
    folder: LogFolder | None = None,
    interrupt: int | Callable[[], bool] | None = None,
    *,
    out: IO[str] | None = None,
    err: IO[str] | None = None,
    prefix: str | Callable[[int, bool], str] = PREFIX,
) -> Iterator[Tee]:
    """Show what the ranks write for as long as the block runs, and the rest when it ends. Gives the Tee.

    Args:
        files: Where the ranks write, by local rank.
        first_rank: The RANK of local rank 0.
        local_ranks: Show these alone; None shows all.
        folder: The temporary folder of the files. It is kept if something in it could not be shown, also because an
            exception ended the wait.
        interrupt: A descriptor; once it is readable, the wait for readers ends. Or a function that returns whether to
            end the wait, called ten times a second.
        out: As for Tee, like the two below.
        err: Where lines of their stderr go.
        prefix: The prefix of each line, as for Tee.

    Raises:
        RuntimeError, OSError: As ``Tee.start``.
    """
    ranks = None if local_ranks is None else {first_rank + rank for rank in local_ranks}
    tee = Tee(sources(files, first_rank), ranks=ranks, prefix=prefix, out=out, err=err).start()
    try:
        yield tee
    finally:
        wanted = folder is not None and folder.keep
        if folder is not None:
            folder.keep = True  # whatever interrupts the next line, and how often
        try:
            tee.finish(interrupt=interrupt)
        finally:
            if folder is not None:
                folder.keep = wanted or bool(tee.unshown)


class Tee:
    """Shows what ranks print, from one thread for all of them.

    Whole lines are shown, in the order in which a rank wrote them to one stream. Bytes are not changed. A line longer
    than 64 KiB is shown in pieces, each as a line of its own. A line that is written over ("\\r": a progress bar)
    shows its last state when it ends, and until then every 10 seconds, on a terminal every second. A last line without
    a newline gets one.

    Other writers to the same descriptor tear no line if they, too, write whole lines at once, of at most PIPE_BUF
    (4096) bytes: ``sys.stderr.write("a line\\n")``. With PYTHONUNBUFFERED print() writes word by word.

    Args:
        sources: The files. A file that does not exist yet is waited for.
        ranks: Show these ranks only; None shows all.
        prefix: Put before each line; ``{rank}`` is the rank's number. Or a function of that number, and of whether the
            line is from stderr.
        out: Where lines of the ranks' stdout go: a descriptor or a text stream; None for sys.stdout. A text stream on
            descriptor 1 or 2 is written to by that number: a write to the stream would hold the lock of its buffer
            while a terminal is stopped, and every thread that prints would hang.
        err: The same for their stderr; None for sys.stderr.
        words: Show only lines that contain one of these; empty shows all lines.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        *,
        ranks: Collection[int] | None = None,
        prefix: str | Callable[[int, bool], str] = PREFIX,
        out: int | IO[str] | None = None,
        err: int | IO[str] | None = None,
        words: Sequence[str] = (),
    ) -> None:
        self._out = Sink(sys.stdout if out is None else out)
        self._err = Sink(sys.stderr if err is None else err)
        self._followed = [
            Followed(
                os.fspath(path),
                (prefix.format(rank=rank) if isinstance(prefix, str) else prefix(rank, is_stderr)).encode(
                    errors="surrogateescape"
                ),
                self._err if is_stderr else self._out,
                [word.encode(errors="surrogateescape") for word in words],
            )
            for rank, path, is_stderr in sources
            if ranks is None or rank in ranks
        ]
        self._absent, self._open = list(self._followed), list[Followed]()
        self._finishing = self._stopped = self._complete = False
        self._retry_at = 0.0  # when a stream that failed is written to again
        self._thread: threading.Thread | None = None
        self._bell: IO[bytes] | None = None

    def start(self) -> Tee:
        """Start to show. Raises RuntimeError or OSError if no thread or no descriptor can be had."""
        reader, writer = os.pipe()
        # Each end is closed by its only user: closed by another, its number might be another file's when it is used.
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

    def finish(self, timeout: float = 5.0, *, interrupt: int | Callable[[], bool] | None = None) -> tuple[str, ...]:
        """Show the rest of every file, up to its present size. The last call, for when the ranks have ended.

        Args:
            timeout: Seconds after which it gives up if no reader takes what the launcher prints.
            interrupt: As for show(): the call gives up half a second later.

        Returns:
            ``unshown``. The call also writes it to ``err``, even if an exception interrupts the wait.
        """
        if self._thread is None or self._bell is None:
            return ()
        thread, self._thread = self._thread, None
        self._finishing = True
        with suppress(BrokenPipeError):  # the thread has ended, and with it the reader
            self._bell.write(b".")
        try:
            self._wait(thread, timeout, interrupt)
        finally:
            self._stopped = True
            self._bell.close()
            # A thread that is inside a write to a stopped terminal ends when the terminal continues: not waited for.
            thread.join(0.2)
            if unshown := self.unshown:
                more = f" and {len(unshown) - 4} more" if len(unshown) > 4 else ""
                self._say(f"not all of the output could be shown; the rest is in {', '.join(unshown[:4])}{more}")
                if not thread.is_alive() or self._err.is_ready():
                    self._err.hand_over()
        return unshown

    @property
    def unshown(self) -> tuple[str, ...]:
        """The paths of the files that have more than was shown."""
        return () if self._complete else tuple(one.path for one in self._followed if one.has_more())

    def has_shown(self, path: str | os.PathLike[str]) -> bool:
        """Whether everything that is in a file was shown, on a stream that is still there."""
        return any(one.path == os.fspath(path) and not one.sink.dead and not one.has_more() for one in self._followed)

    def __enter__(self) -> Tee:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def _wait(self, thread: threading.Thread, timeout: float, interrupt: int | Callable[[], bool] | None) -> None:
        """Wait for the end of ``thread``. It closes its end of the bell then, which poll(2) reports as POLLERR."""
        if callable(interrupt):
            until = time.monotonic() + timeout
            while thread.is_alive() and time.monotonic() < until:
                if interrupt():
                    return thread.join(_HURRIED)
                thread.join(0.1)
            return None
        if interrupt is None or self._bell is None or not hasattr(select, "poll"):
            thread.join(timeout)
            return
        poller = select.poll()
        poller.register(self._bell, 0)
        poller.register(interrupt, select.POLLIN)
        if self._bell.fileno() not in dict(poller.poll(timeout * 1000)):
            thread.join(_HURRIED)

    def _run(self, heard: IO[bytes]) -> None:
        if hasattr(signal, "pthread_sigmask"):
            # Signals go to the program's own threads. Blocked here, SIGPIPE is an errno, whatever its action.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        pause, look_at = SOONEST, 0.0
        last, give_up_at = False, 0.0
        try:
            while not self._stopped:
                if self._finishing and not last:
                    last, give_up_at = True, time.monotonic() + _HURRIED
                    look_at = time.monotonic() + RETRY
                    self._look(last)
                elif last and self._failing and time.monotonic() >= look_at:
                    look_at = time.monotonic() + RETRY
                    self._look(last)
                elif not last and time.monotonic() >= look_at:
                    pause = SOONEST if self._look(last) else min(pause * 1.5, _LATEST)
                    look_at = time.monotonic() + pause
                self._fill(self._out, last)
                self._fill(self._err, last)
                waiting = [sink for sink in (self._out, self._err) if sink.pending]
                if last and not waiting and not self._failing:
                    self._complete = True
                    break
                if last and all(sink.failing for sink in waiting) and time.monotonic() >= give_up_at:
                    break
                self._write(heard, RETRY if last else look_at - time.monotonic())
        finally:
            heard.close()
            for followed in self._followed:
                followed.close()

    def _look(self, last: bool) -> bool:
        """Queue the files that have grown, or with ``last`` all files. Returns whether there are any."""
        self._absent = [followed for followed in self._absent if self._is_absent(followed)]
        try:
            # lseek takes a fifth of the time of fstat.
            grown = [one for one in self._open if last or os.lseek(one.fd, 0, os.SEEK_END) != one.seen]
        except OSError:
            grown = self._open  # reading them finds the file that fails
        for followed in grown:
            if not followed.queued:
                followed.queued = True
                followed.sink.unread.append(followed)
        return bool(grown)

    @property
    def _failing(self) -> bool:
        """Whether a file is there that could not be read."""
        return any(followed.failing and not followed.sink.dead for followed in self._absent)

    def _is_absent(self, followed: Followed) -> bool:
        if followed.sink.dead:
            return False
        try:
            if not followed.open():
                return True
        except OSError as error:
            self._note(followed, error)
            return True
        self._open.append(followed)
        return False

    def _fill(self, sink: Sink, last: bool) -> None:
        """Give ``sink`` the next lines if it has none to write: a chunk of each file in turn."""
        while not sink.pending and sink.unread:
            followed = sink.unread.popleft()
            followed.queued = False
            try:
                text = followed.text(last)
            except OSError as error:
                self._open = [one for one in self._open if one is not followed]
                followed.close()
                self._note(followed, error)
                self._absent.append(followed)
                continue
            if text:
                sink.pending, sink.source = text, followed
                followed.queued = True
                sink.unread.append(followed)

    def _write(self, heard: IO[bytes], seconds: float) -> None:
        """Write a piece to each sink that takes one; else sleep until one does, the bell rings or ``seconds`` pass."""
        busy = [sink for sink in (self._out, self._err) if sink.pending]
        if any(sink.failing for sink in busy):
            # poll(2) says that a full disk takes a write: not more often than this.
            busy = [sink for sink in busy if not sink.failing or time.monotonic() >= self._retry_at]
            seconds = min(seconds, RETRY)
        if hasattr(select, "poll"):
            poller = select.poll()
            poller.register(heard, select.POLLIN)
            for sink in busy:
                if sink.fd is None:
                    seconds = 0.0
                else:
                    poller.register(sink.fd, select.POLLOUT)
            # Any event is a reason to try: write(2) says better than poll(2) what is wrong.
            events = dict(poller.poll(max(0.0, seconds) * 1000))
            if heard.fileno() in events:
                heard.read(64)
            busy = [sink for sink in busy if sink.fd is None or sink.fd in events]
        elif not busy:
            time.sleep(min(max(0.0, seconds), SOONEST))
        for sink in busy:
            try:
                sink.write()
            except (OSError, ValueError) as error:  # ValueError: a text stream that was closed
                self._note_failed(sink, error)

    def _note_failed(self, sink: Sink, error: OSError | ValueError) -> None:
        """Say once that a stream is gone, or that it failed for now."""
        was_failing, reason = sink.failing, getattr(error, "strerror", None) or error
        if sink.note(error):
            self._open = [one for one in self._open if one.sink is not sink]
            if sink is self._out:
                self._say(f"stdout: {reason}; what ranks write there is no longer shown")
            return
        self._retry_at = time.monotonic() + RETRY
        if sink is self._out and not was_failing:
            self._say(f"stdout: {reason}; what ranks write there is shown when that is over")

    def _note(self, followed: Followed, error: OSError) -> None:
        """Say once that a file cannot be read. There will be another try."""
        if not followed.failing:
            self._say(f"what is written to {followed.path} cannot be shown: {error.strerror}")
        followed.failing = error.strerror or str(error)

    def _say(self, note: str) -> None:
        self._err.append(f"rankspawn: {note}\n".encode(errors="backslashreplace"))
