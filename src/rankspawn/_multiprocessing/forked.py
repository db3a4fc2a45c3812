"""Binds a process of multiprocessing's fork server: this is what the process does first.

The server's fork reads two pickles from its pipe: the preparation data, by which it finds the program's main module,
and then what it is to run. It reads the first before it does anything else, and unpickling it calls ``_bind`` here.
The process has one thread at that moment, as every process has after a fork, so that all it will start is bound too.

Each such process imports this module unless the server has preloaded it, so it imports as little as possible.
"""

from __future__ import annotations

import errno
import operator
import os
import struct
from multiprocessing import forkserver, spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_MOST_FDS = 253  # the kernel takes no more in one message (SCM_MAX_FD, unix(7))

REPORT = struct.Struct("ii")
"""What the process reports: the errno of its sched_setaffinity and of its set_mempolicy, 0 where it was not refused."""


def run() -> NoReturn:
    """Be a process of a context "warm": the socket at stdin brings what to run, and its descriptors."""
    import socket
    import sys
    from multiprocessing import reduction, resource_tracker

    fd = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    with socket.socket(fileno=fd) as sock:
        tracker, *inherited = reduction.recvfds(sock, _MOST_FDS)
        resource_tracker._resource_tracker._fd = tracker  # type: ignore[attr-defined]
        forkserver._forkserver._inherited_fds = inherited  # type: ignore[attr-defined]
        reading, sentinel = os.dup(fd), os.dup(fd)
    sys.exit(spawn._main(reading, sentinel))


class _Call:
    """A call that unpickling makes; its result takes the place of this object."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


def binding(data: dict[str, Any], *arguments: Any) -> object:
    """Pickle preparation ``data`` so that the process that reads it binds itself; ``arguments`` as for ``_bind``."""
    # This module is imported for it, and the server of an older Python does not know the launcher's sys.path. Calls are
    # made in the order in which they stand, and the second answer is what the process gets.
    path = _Call(spawn.prepare, {"sys_path": data["sys_path"]})
    return _Call(operator.getitem, (path, _Call(_bind, data, *arguments)), 1)


def _bind(
    data: dict[str, Any], report: int, cpus: frozenset[int] | None, mode: int, nodes: bytes | None
) -> dict[str, Any]:
    """Bind this process, report the result to the launcher, and return the preparation data.

    report: which of the descriptors that came with the request the report is written to.
    mode, nodes: a memory policy, encoded for the engine; -1 where there is none.

    If a required binding is refused, the launcher ends the process, and sends it nothing to run.
    """
    affinity = 0 if cpus is None else _set_affinity(cpus)
    memory = 0 if mode == -1 else _set_mempolicy(mode, nodes)
    fd = forkserver.get_inherited_fds()[report]  # type: ignore[index]
    os.write(fd, REPORT.pack(affinity, memory))
    os.close(fd)
    return data


def _set_affinity(cpus: frozenset[int]) -> int:
    if not hasattr(os, "sched_setaffinity"):
        return errno.ENOTSUP
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        return error.errno or errno.EINVAL
    return 0 if cpus.issubset(os.sched_getaffinity(0)) else errno.ERANGE  # GRANTED_IN_PART of outcome.py


def _set_mempolicy(mode: int, nodes: bytes | None) -> int:
    try:
        import rankspawn._spawn as _spawn
    except ImportError:
        return errno.ENOTSUP
    return _spawn.set_mempolicy(mode, nodes)
