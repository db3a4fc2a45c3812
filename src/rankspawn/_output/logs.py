"""The files of one attempt to run a job, in torchrun's layout, and the end of what a rank wrote, fit for a terminal.

LOGDIR/attempt_0/3/stdout.log
                   stderr.log
                   error.json     the rank's TORCHELASTIC_ERROR_FILE
                 stacks.txt       what the ranks did before they were ended, if the launcher looked
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from .._frozen import Frozen
from .._public import public

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
"""For files of other programs: with O_NONBLOCK, open(2) of a FIFO does not wait for its other end."""

# Control sequences (ECMA-48): colours and cursor moves, titles and links, and the short ones.
_SEQUENCES = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])"


@public
class RankFiles(Frozen):
    """Where one rank writes.

    Attributes:
        stdout: Its log file of stdout; None where it has the launcher's own.
        stderr: Its log file of stderr; None where it has the launcher's own.
        error: Its TORCHELASTIC_ERROR_FILE.
    """

    stdout: Path | None
    stderr: Path | None
    error: str


class LogFolder:
    """A new folder for the files of a job's ranks.

    In ``parent`` it is named after the job and the time, "train-20261128-140311", and ``parent/latest`` is a link to
    the newest. Without ``parent`` it is a temporary folder, which leaving the ``with`` block removes, unless ``keep``
    has been set.

    Args:
        parent: The folder to make it in; None for a temporary folder.
        name: The beginning of its name in ``parent``.
        optional: Whether the job can do without it, because the system may have no place for temporary files.

    Attributes:
        path: The path of the folder; "" if an optional one could not be made.
        keep: Whether the folder stays when the ``with`` block is left.

    Raises:
        OSError: No folder can be made.
    """

    def __init__(self, parent: str | None = None, *, name: str = "job", optional: bool = False) -> None:
        self.keep, self.path = parent is not None, ""
        if parent is not None:
            self.path = _dated_folder(parent, name)
            return
        try:
            self.path = _temporary_folder()
        except OSError:
            if not optional:
                raise

    def __enter__(self) -> LogFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if self.path and not self.keep:
            _remove(self.path)


def _temporary_folder() -> str:
    """As tempfile.mkdtemp(), whose import would take milliseconds of each ``rankspawn run``."""
    if os.name != "posix" or "tempfile" in sys.modules:  # the program may have chosen a folder there
        import tempfile

        return tempfile.mkdtemp(prefix="rankspawn-")
    chosen = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    parents = [*filter(None, (*chosen, "/tmp", "/var/tmp", "/usr/tmp", os.curdir))]
    for parent in parents:
        try:
            path = os.path.join(os.path.abspath(parent), f"rankspawn-{os.urandom(6).hex()}")
            os.mkdir(path, 0o700)
        except OSError as error:
            failed = error
            continue
        try:
            with open(os.path.join(path, "trial"), "wb", buffering=0) as trial:
                trial.write(b"\n")  # a full disk takes folders, and no bytes
            os.unlink(trial.name)
            return path
        except OSError as error:
            _remove(path)
            failed = error
    raise OSError(failed.errno, f"no usable temporary folder among {', '.join(parents)}: {failed.strerror}")


def _remove(folder: str) -> None:
    """Remove a folder with all that is in it, as far as possible. No symbolic link is followed."""
    if not hasattr(os, "fwalk"):
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(OSError):
        for _, folders, files, fd in os.fwalk(folder, topdown=False):
            for name in (*folders, *files):
                with suppress(OSError):
                    is_folder = stat.S_ISDIR(os.lstat(name, dir_fd=fd).st_mode)  # not a link to one
                    (os.rmdir if is_folder else os.unlink)(name, dir_fd=fd)
        os.rmdir(folder)


def _dated_folder(parent: str, name: str) -> str:
    """Make a folder with a new name, and have ``parent/latest`` point to it."""
    base = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for count in range(1, 10_000):
        made = base if count == 1 else f"{base}-{count}"
        with suppress(FileExistsError):  # a job that began in the same second has it, perhaps on another machine
            os.mkdir(os.path.join(parent, made), 0o700)
            break
    else:
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), os.path.join(parent, base))
    latest = os.path.join(parent, "latest")
    if not os.path.lexists(latest) or os.path.islink(latest):
        new = os.path.join(parent, f".{made}")
        # A file system without links, or another user's link in a sticky folder: the launcher says where the files are,
        # too.
        with suppress(OSError):
            os.symlink(made, new)
            try:
                os.replace(new, latest)  # atomic: a reader finds the old link or the new one
            except OSError:
                os.unlink(new)
    return os.path.join(parent, made)


@contextmanager
def claimed(folder: str, attempt: int = 0) -> Iterator[None]:
    """Claim ``folder/attempt_N`` for one group while the block runs, so that no other group removes its files.

    The claim is a lock by flock(2) on the folder, which also ends when this process dies. If the file system or the
    platform has no such lock, nothing is claimed.

    Args:
        folder: The folder; it is made if it does not exist.
        attempt: The number of the attempt.

    Raises:
        OSError: EBUSY: another group, of any process on this machine, has claimed it.
    """
    path = os.path.join(os.path.abspath(folder), f"attempt_{attempt}")
    os.makedirs(path, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    fd = os.open(path, READ_FLAGS)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = "the ranks of another group write their logs here now; give each group a folder of its own"
            raise OSError(errno.EBUSY, told, path) from None
        except OSError:  # ENOLCK, EOPNOTSUPP: there are network file systems without locks
            pass
        yield
    finally:
        # Not by close(2) alone: a process that this one has forked has the descriptor, too, and with it the lock.
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def rank_files(folder: str, nprocs: int, attempt: int = 0, *, streams: bool = True) -> list[RankFiles]:
    """Make ``folder/attempt_N/RANK`` for each rank. The rank makes the files in it.

    It removes the files of an earlier job, so that no reader takes them for the rank's before the rank has made its
    own.

    Args:
        folder: The folder; it is made if it does not exist.
        nprocs: How many ranks.
        attempt: The number of the attempt, 0 for the first.
        streams: Whether ranks have log files. False makes no folders: the error files lie in ``folder``, which must
            exist.

    Raises:
        OSError: A folder cannot be made; the message names the rank, and ``filename`` is the path.
    """
    attempt_folder = os.path.join(os.path.abspath(folder), f"attempt_{attempt}")
    if not streams:
        return [RankFiles(None, None, f"{attempt_folder}_{rank}.json") for rank in range(nprocs)]
    from pathlib import Path

    os.makedirs(attempt_folder, exist_ok=True)
    with suppress(FileNotFoundError):
        os.unlink(f"{attempt_folder}/stacks.txt")
    made = []
    for rank in range(nprocs):
        path = f"{attempt_folder}/{rank}"
        try:
            try:
                os.mkdir(path)
            except FileExistsError:
                if not os.path.isdir(path):
                    raise
                for name in ("stdout.log", "stderr.log", "error.json"):
                    with suppress(FileNotFoundError):
                        os.unlink(f"{path}/{name}")
        except OSError as error:
            raise OSError(error.errno, f"logs of rank {rank}: {error.strerror}", error.filename) from None
        made.append(RankFiles(Path(f"{path}/stdout.log"), Path(f"{path}/stderr.log"), f"{path}/error.json"))
    return made


def last_lines(path: str | os.PathLike[str], count: int = 20, most_bytes: int = 1 << 16) -> list[str]:
    """The last lines of a file, each made printable.

    A line that was written over ("\\r": a progress bar) counts as its last state. Empty lines at the end are left out.

    Args:
        path: The path of a regular file.
        count: The most lines to return.
        most_bytes: How many bytes of the file's end to read.

    Raises:
        OSError: The file cannot be read.
    """
    data, cut = read_regular(path, most_bytes, from_end=True)
    lines = data.rstrip(b"\r\n\0 \t").split(b"\n")
    if cut and len(lines) > 1:
        del lines[0]  # the beginning of this line was not read
    texts = [line[last_state(line) :].strip(b"\r\0").decode(errors="backslashreplace") for line in lines[-count:]]
    return [printable(text).rstrip() for text in texts] if any(texts) else []


def read_regular(path: str | os.PathLike[str], most_bytes: int, *, from_end: bool = False) -> tuple[bytes, bool]:
    """The first ``most_bytes`` of a file, or with ``from_end`` the last, and whether the file has more.

    Raises OSError (EINVAL) also for a file that is not a regular one: a rank may have put anything there.
    """
    fd = os.open(path, READ_FLAGS)
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        cut = about.st_size > most_bytes
        if cut and from_end:
            os.lseek(fd, about.st_size - most_bytes, os.SEEK_SET)
        return os.read(fd, most_bytes), cut
    finally:
        os.close(fd)


def last_state(line: bytes) -> int:
    """Where the last state of a line that was written over ("\\r") begins, the one that a terminal shows; else 0."""
    return line.rfind(b"\r", 0, len(line.rstrip(b"\r"))) + 1


def printable(text: str) -> str:
    """``text`` made safe for a terminal: without colours, and with control characters other than tabs escaped."""
    text = re.sub(_SEQUENCES, "", text)
    return "".join(one if one.isprintable() or one == "\t" else one.encode("unicode_escape").decode() for one in text)
