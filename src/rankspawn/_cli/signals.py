"""The launcher's signals, as bytes on a socket, for the loop that also waits for the ranks.

The ranks die with the launcher, so the launcher must not die of a signal that is meant for them. Each signal whose
default action ends a process has a meaning here:

* SIGUSR1 and SIGUSR2: the launcher passes them to the ranks, and the job keeps running. A signal that
  --signals-to-handle names ends the job instead.
* SIGTSTP (Ctrl-Z) suspends the ranks and the launcher.
* SIGQUIT (Ctrl-\\) makes the launcher look at what the ranks do, as in Java, and the job keeps running. If
  --signals-to-handle names it, it ends the job instead.
* All other signals, real-time signals too, end the job. If shells and schedulers use the signal to end a command, the
  launcher exits with 128 + the signal's number. Of any other signal it dies itself when the ranks have ended.

The launcher leaves three kinds of signals alone: those that were ignored when it started (by nohup; Python itself
ignores SIGPIPE and SIGXFSZ), SIGKILL, and the signals of faults in its own code (SIGSEGV, SIGBUS, SIGFPE, SIGILL,
SIGSYS, SIGTRAP).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._group.group import RankGroup


def _present(*names: str) -> tuple[int, ...]:
    """The numbers of those signals that this system has."""
    return tuple([int(getattr(signal, name)) for name in names if hasattr(signal, name)])


# The ranks get the same signal, and the launcher exits with 128 + its number.
_ORDERS = _present("SIGINT", "SIGTERM")
# The ranks get the same signal, and the launcher dies of it.
_HANGUP = _present("SIGHUP")
# The ranks get SIGTERM, and the launcher dies of the signal itself. If abort(3) raises SIGABRT in the launcher, it
# removes the handler and ends the launcher.
_ENDS = _present(
    "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGXCPU", "SIGXFSZ", "SIGIO", "SIGPWR", "SIGSTKFLT", "SIGABRT", "SIGEMT"
) + (tuple(range(signal.SIGRTMIN, signal.SIGRTMAX + 1)) if hasattr(signal, "SIGRTMIN") else ())
_HANDED_ON = _present("SIGUSR1", "SIGUSR2")
_SUSPENDS = _present("SIGTSTP")
_LOOKS = _present("SIGQUIT")


class EndAsked(Exception):
    """A signal that ends the job came before there was any rank.

    Args:
        sig: Its number.
    """

    def __init__(self, sig: int) -> None:
        super().__init__(sig)
        self.sig = sig


class Signals:
    """The signals that have arrived and that nobody has read yet.

    Args:
        reader: A non-blocking socket that has the number of each signal as a byte.
        handled: The signals of --signals-to-handle.
    """

    def __init__(self, reader: socket.socket, handled: Collection[int] = ()) -> None:
        self._reader = reader
        self._handled = frozenset(handled)

    def fileno(self) -> int:
        """The descriptor, which is readable when a signal has arrived."""
        return self._reader.fileno()

    def read(self, seconds: float = 0.0) -> bytes:
        """Return the signals since the last call, in order, a byte each; wait up to ``seconds`` for the first."""
        try:
            self._reader.settimeout(seconds)  # 0.0 makes it non-blocking again
            return self._reader.recv(256)
        except (BlockingIOError, TimeoutError):  # the latter is socket.timeout
            return b""
        finally:
            self._reader.setblocking(False)

    def raise_for_end(self) -> None:
        """Raise EndAsked if a signal that ends the job has arrived. read() will still return it.

        Raises:
            EndAsked: There is such a signal.
        """
        try:
            came = self._reader.recv(256, socket.MSG_PEEK)
        except BlockingIOError:
            return
        for sig in filter(self.asks_for_end, came):
            raise EndAsked(sig)

    def hands_on(self, sig: int) -> bool:
        """Whether the launcher passes ``sig`` to the ranks, and the job keeps running."""
        return sig in _HANDED_ON and sig not in self._handled

    def asks_for_suspension(self, sig: int) -> bool:
        """Whether ``sig`` suspends the job (Ctrl-Z)."""
        return sig in _SUSPENDS

    def asks_for_stacks(self, sig: int) -> bool:
        """Whether ``sig`` makes the launcher look at what the ranks do, and the job keeps running."""
        return sig in _LOOKS and sig not in self._handled

    def asks_for_end(self, sig: int) -> bool:
        """Whether ``sig`` ends the ranks and the launcher."""
        return sig in (*_ORDERS, *_HANGUP, *_ENDS) or (sig in (*_HANDED_ON, *_LOOKS) and sig in self._handled)

    def for_ranks(self, sig: int) -> int:
        """The signal that the launcher sends to the ranks when ``sig`` ends the job."""
        return sig if sig in (*_ORDERS, *_HANGUP) or sig in self._handled else signal.SIGTERM


@contextmanager
def catch_signals(handled: Collection[int] = ()) -> Iterator[Signals]:
    """Catch the launcher's signals while the block runs; yields the object that reads them.

    This also unblocks them. If the parent had blocked them, only SIGKILL could end this process. Afterwards, signals
    that end a process have their default action, because the command's work is done. Signals for the ranks are ignored
    then, because the ranks have ended.

    Args:
        handled: The signals of --signals-to-handle.
    """
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    asking = (*_ORDERS, *_HANGUP, *_ENDS, *_HANDED_ON, *_SUSPENDS, *_LOOKS)
    caught = [sig for sig in asking if signal.getsignal(sig) is not signal.SIG_IGN]
    signals = Signals(reader, handled)
    # A signal that the full socket cannot hold is in it already, many times.
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        for sig in caught:
            signal.signal(sig, lambda *_: None)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, caught)
        yield signals
    finally:
        for sig in caught:
            signal.signal(sig, signal.SIG_IGN if signals.hands_on(sig) else signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        reader.close()
        writer.close()


def suspend(group: RankGroup) -> None:
    """Stop the ranks and this process until a shell continues this process, which then continues the ranks.

    The ranks get SIGSTOP, because SIGTSTP does nothing in a session that no shell controls (credentials(7)). For the
    same reason this process gets SIGTSTP: if no shell could continue it, it does not stop, and the ranks continue at
    once.
    """
    with suppress(PermissionError):
        group.send_signal(signal.SIGSTOP)
    action = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTSTP)
    # The shell has continued this process.
    signal.signal(signal.SIGTSTP, action)
    with suppress(PermissionError):
        group.send_signal(signal.SIGCONT)


def status_of(sig: int) -> int:
    """The status of a launcher that ``sig`` ended: 128 + its number, or negative if the launcher must die of it."""
    return 128 + sig if sig in (*_ORDERS, *_LOOKS) else -sig


def die_of(sig: int) -> None:
    """End this process by the signal, without a core file, so that its parent sees the signal in its status.

    It returns if the kernel ignores the signal, as for the first process of a container (pid_namespaces(7)).
    """
    from .._output.console import flush

    flush()
    with suppress(OSError, ValueError):
        if sys.stdout is not None:
            sys.stdout.flush()
    if os.name == "posix":
        import resource

        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [sig])
    signal.signal(sig, signal.SIG_DFL)
    os.kill(os.getpid(), sig)


def name_of(sig: int) -> str:
    """Return the signal's name: "SIGTERM", or "SIGRTMIN+2"."""
    try:
        return signal.Signals(sig).name
    except ValueError:
        return f"SIGRTMIN+{sig - signal.SIGRTMIN}"


def parse_signals(text: str) -> frozenset[int]:
    """Read the value of --signals-to-handle: names of signals, with or without SIG, separated by commas.

    Raises:
        ValueError: This system has no such signal, or the launcher cannot handle it.
    """
    found = set()
    for word in filter(None, (word.strip().upper() for word in text.split(","))):
        name = word if word.startswith("SIG") else f"SIG{word}"
        sig = getattr(signal, name, None)
        if not isinstance(sig, signal.Signals):
            raise ValueError(f"this system has no signal {word}")
        if sig not in (*_ORDERS, *_HANGUP, *_ENDS, *_HANDED_ON, *_LOOKS):
            raise ValueError(f"the launcher cannot handle {name}")
        found.add(int(sig))
    return frozenset(found)
