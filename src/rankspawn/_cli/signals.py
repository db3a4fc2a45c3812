"""What is asked of the launcher by signals: bytes on a socket, for the loop that also waits for the ranks."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._group.group import RankGroup

_ASKING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGTSTP")


@contextmanager
def signals_as_bytes() -> Iterator[socket.socket]:
    """A socket from which the number of each signal that asks something of us can be read, in place of its action.

    A signal that was ignored when we were started (nohup) stays ignored. The others end the process afterwards, without
    a traceback: the command's work is done.
    """
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    asking = [getattr(signal, name) for name in _ASKING if hasattr(signal, name)]
    caught = [sig for sig in asking if signal.getsignal(sig) is not signal.SIG_IGN]
    # Whoever sends more signals than a socket holds has sent them before.
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        for sig in caught:
            signal.signal(sig, lambda *_: None)
        yield reader
    finally:
        for sig in caught:
            signal.signal(sig, signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        reader.close()
        writer.close()


def read_signals(signals: socket.socket) -> bytes:
    """The numbers of the signals that have come since the last call, in order."""
    try:
        return signals.recv(256)
    except BlockingIOError:
        return b""


def asks_for_suspension(sig: int) -> bool:
    """Whether it is Ctrl-Z's."""
    return sig == getattr(signal, "SIGTSTP", None)


def suspend(group: RankGroup) -> None:
    """Stop the ranks and this process, until a shell continues it, and them with it.

    The ranks get SIGSTOP: SIGTSTP would do nothing in a session that no shell controls (credentials(7)). For the same
    reason this process gets SIGTSTP: where nobody could continue it, it is not stopped, and the ranks go on at once.
    """
    with suppress(PermissionError):
        group.send_signal(signal.SIGSTOP)
    action = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTSTP)
    # Here, when the shell has continued us.
    signal.signal(signal.SIGTSTP, action)
    with suppress(PermissionError):
        group.send_signal(signal.SIGCONT)
