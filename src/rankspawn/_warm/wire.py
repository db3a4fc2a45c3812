"""Messages with descriptors over the socket pair between the launcher and a template."""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

_HEADER = struct.Struct("=QI")  # the bytes of the text, and the number of descriptors
_MOST_FDS = 200  # in one piece: the kernel takes 253 (SCM_MAX_FD, unix(7))
_FLAGS = getattr(socket, "MSG_NOSIGNAL", 0)


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send a message. The receiver gets copies of the descriptors.

    Raises:
        OSError: The other end is closed, its process takes no more (TimeoutError), or a descriptor is not open.
    """
    text = json.dumps(message).encode()
    sock.sendall(_HEADER.pack(len(text), len(fds)), _FLAGS)
    for first in range(0, len(fds), _MOST_FDS):
        some = array.array("i", fds[first : first + _MOST_FDS])
        sock.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, some)], _FLAGS)
    sock.sendall(text, _FLAGS)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive a message and its descriptors, which are close-on-exec.

    Raises:
        EOFError: The other end is closed.
        OSError: TimeoutError, or not all descriptors arrived, because this process may not have so many.
    """
    size, count = _HEADER.unpack(_exactly(sock, _HEADER.size))
    fds: list[int] = []
    try:
        while len(fds) < count:
            fds += _some_fds(sock, min(_MOST_FDS, count - len(fds)))
        return json.loads(_exactly(sock, size)), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _some_fds(sock: socket.socket, count: int) -> list[int]:
    some = array.array("i")
    room = socket.CMSG_SPACE(count * some.itemsize)
    byte, parts, flags, _ = sock.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
    if not byte:
        raise EOFError
    for level, kind, data in parts:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            some.frombytes(data[: len(data) - len(data) % some.itemsize])
    if flags & socket.MSG_CTRUNC or len(some) != count:
        for fd in some:
            os.close(fd)
        raise OSError(f"{len(some)} of {count} descriptors arrived: RLIMIT_NOFILE is too low")
    return list(some)


def _exactly(sock: socket.socket, count: int) -> bytes:
    """Exactly ``count`` bytes: a stream may give them in pieces."""
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(min(1 << 20, count - len(data)))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
