"""The files of one attempt to run a job, in torchrun's layout, and the end of what a rank wrote, fit for a terminal.

LOGDIR/attempt_0/3/stdout.log
                   stderr.log
                   error.json     the rank's TORCHELASTIC_ERROR_FILE
"""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from .._frozen import Frozen

READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
"""Of files that are others' to make: who opens a FIFO so does not wait for its other end."""

# Control sequences (ECMA-48): colours and cursor moves, titles and links, and the short ones.
_SEQUENCES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")


class RankFiles(Frozen):
    """Where one rank writes. stdout, stderr: None where it has the launcher's own."""

    stdout: Path | None
    stderr: Path | None
    error: str


class LogFolder:
    """A new folder for the files of a job's ranks: in ``parent``, by torchrun's name for a job without --rdzv-id, or a
    temporary one, which is removed on leaving the ``with`` block unless ``keep`` has been set meanwhile.

    Raises OSError when none can be made.
    """

    def __init__(self, parent: str | None = None) -> None:
        import tempfile

        self.keep = parent is not None
        self.path = tempfile.mkdtemp(prefix="rankspawn-" if parent is None else "none_", dir=parent)

    def __enter__(self) -> LogFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.keep:
            import shutil

            shutil.rmtree(self.path, ignore_errors=True)


def rank_files(folder: str, nprocs: int, attempt: int = 0, *, streams: bool = True) -> list[RankFiles]:
    """Make ``folder/attempt_N/RANK`` for each rank. The files in it are made by the rank.

    streams: False makes no folders; the error files, by other names, are ``folder``'s own, which has to be there.

    Files that an earlier job left there are removed: who looks before a rank has made its own must find nothing.
    Raises OSError, which names the rank and the path.
    """
    attempt_folder = os.path.join(os.path.abspath(folder), f"attempt_{attempt}")
    if not streams:
        return [RankFiles(None, None, f"{attempt_folder}_{rank}.json") for rank in range(nprocs)]
    os.makedirs(attempt_folder, exist_ok=True)
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
    """The last ``count`` lines of a file, read from its last ``most_bytes`` bytes, as printable() makes them.

    Of a line that was written over ("\\r": a progress bar) it is the last state; empty lines at the end are left out.
    Raises OSError.
    """
    data, cut = read_regular(path, most_bytes, from_end=True)
    lines = data.rstrip(b"\r\n\0 \t").split(b"\n")
    if cut and len(lines) > 1:
        del lines[0]  # its beginning is not there
    texts = [line[last_state(line) :].strip(b"\r\0").decode(errors="backslashreplace") for line in lines[-count:]]
    return [printable(text).rstrip() for text in texts] if any(texts) else []


def read_regular(path: str | os.PathLike[str], most_bytes: int, *, from_end: bool = False) -> tuple[bytes, bool]:
    """The first ``most_bytes`` of a file, or the last, and whether that is not all.

    Raises OSError, also for what is no regular file: a rank may have put anything there.
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
    """Where the last state begins of a line that was written over ("\\r"), the one that a terminal shows; else 0."""
    return line.rfind(b"\r", 0, len(line.rstrip(b"\r"))) + 1


def printable(text: str) -> str:
    """``text`` without colours, its other control characters, but tabs, as Python escapes them: safe for a terminal."""
    text = _SEQUENCES.sub("", text)
    return "".join(one if one.isprintable() or one == "\t" else one.encode("unicode_escape").decode() for one in text)
