"""A launcher's note of its job for ``rankspawn ps``: a file that only this user may read, while the job runs.

The folder is in XDG_RUNTIME_DIR, which is this user's alone and is removed with the session; without it nothing is
noted. If the launcher is killed, its guard removes the file. Each file has the launcher's pid and the time of its start
in its name, so that a reader sees that it is stale, if there was no guard, and removes it. A line is a rank's pid and
its CPUs, "4711 0-3".
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from .._ids import format_ids
from .._procfs import read_stat

if TYPE_CHECKING:
    from .._start.popen import Popen


def folder() -> str | None:
    """The folder of this user's notes; None if there is no place for it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "rankspawn") if runtime and os.path.isabs(runtime) else None


def own_note(proc: str = "/proc") -> str | None:
    """The path of this process's note, whether or not it makes one; None if there is no place for it."""
    place = folder()
    return None if place is None else os.path.join(place, f"{os.getpid()}-{_started(os.getpid(), proc)}")


@contextmanager
def noted(ranks: Sequence[Popen], proc: str = "/proc") -> Iterator[None]:
    """Note the CPUs that ranks should have, as long as the block runs. Leaves out what cannot be noted.

    Args:
        ranks: The processes.
        proc: Where procfs is mounted.
    """
    path = own_note(proc)
    if path is not None:
        with suppress(OSError):
            _make(os.path.dirname(path))
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                file.writelines(f"{rank.pid} {_cpus(rank)}\n" for rank in ranks)
    try:
        yield
    finally:
        if path is not None:
            with suppress(OSError):
                os.unlink(path)


def read_noted(proc: str = "/proc") -> dict[int, str | None]:
    """The CPUs that ranks of this user's launchers should have, by pid. Removes stale notes."""
    found: dict[int, str | None] = {}
    place = folder()
    try:
        names = [] if place is None else os.listdir(place)
    except OSError:
        return {}
    for name in names:
        path = os.path.join(place or "", name)
        pid, _, started = name.partition("-")
        with suppress(OSError, ValueError):
            if _started(int(pid), proc) != started:
                os.unlink(path)
                continue
            with open(path, encoding="utf-8") as file:
                for rank, _, cpus in (line.rstrip("\n").partition(" ") for line in file):
                    found[int(rank)] = cpus or None
    return found


def _make(place: str) -> None:
    """Make the folder. Raises OSError if it is not this user's alone."""
    try:
        os.mkdir(place, 0o700)
    except FileExistsError:
        about = os.lstat(place)
        if about.st_uid != os.geteuid() or about.st_mode & 0o077:
            raise


def _cpus(rank: Popen) -> str:
    asked = rank.binding_report.requested
    return "" if asked is None or asked.cpus is None else format_ids(asked.cpus)


def _started(pid: int, proc: str) -> str:
    """When a process was started, in ticks since the machine started; "" if there is no such process."""
    try:
        return str(read_stat(f"{proc}/{pid}").started)
    except OSError:
        return ""
