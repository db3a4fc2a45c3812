"""The port that torch's rendezvous finds for the ranks, held as long as the agent runs."""

from __future__ import annotations

import socket
import sys
import threading

from .._group.port import hold_port

_held: dict[int, socket.socket] = {}
"""The ports that agents have announced for their ranks, by the thread of the agent."""


def get_free_port() -> int:
    """Find a port for rank 0, and hold it as long as this thread's agent runs, or until the agent wants another."""
    held = hold_port()
    port = int(held.getsockname()[1])
    release_port()
    _held[threading.get_ident()] = held
    if sys.platform != "linux":  # other systems cannot listen on a held port
        release_port()
    return port


def release_port() -> None:
    """Release the port of this thread's agent, if it has one."""
    if held := _held.pop(threading.get_ident(), None):
        held.close()
