"""What is asked of the launcher by signals: bytes on a socket, for the loop that also waits for the ranks.

A launcher whose ranks die with it must not die of a signal that is meant for them. So each signal whose default action
is to end a process has a meaning here:

* SIGUSR1 and SIGUSR2 are handed on to the ranks, and the job goes on. --signals-to-handle takes them out of these.
* All others, real-time signals too, ask for the end of the job. After those that shells and schedulers send to end a
  command the launcher exits with 128 and the signal's number; of any other it dies itself when the ranks have ended.
* SIGTSTP, Ctrl-Z's, suspends the ranks and the launcher.
* SIGQUIT, Ctrl-\'s, has the launcher look at what the ranks do, as for a Java program; the job goes on.
  --signals-to-handle takes it out of this, and it asks for the end, too.

Left as they are: what was ignored when the launcher was started (nohup; Python itself ignores SIGPIPE and SIGXFSZ),
SIGKILL, and the signals of faults in the launcher's own code (SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGSYS, SIGTRAP).
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
    """The numbers of those of these signals that this system has."""
    return tuple([int(getattr(signal, name)) for name in names if hasattr(signal, name)])


# The ranks are told to end by the same signal, and the launcher exits with 128 and its number.
_ORDERS = _present("SIGINT", "SIGTERM")
# The ranks are told to end by the same signal, and the launcher dies of it.
_HANGUP = _present("SIGHUP")
# The ranks are told to end by SIGTERM, and the launcher dies of the signal. Where abort(3) raises SIGABRT in the
# launcher itself it takes the handler away again, and ends it.
_ENDS = _present(
    "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGXCPU", "SIGXFSZ", "SIGIO", "SIGPWR", "SIGSTKFLT", "SIGABRT", "SIGEMT"
) + (tuple(range(signal.SIGRTMIN, signal.SIGRTMAX + 1)) if hasattr(signal, "SIGRTMIN") else ())
_HANDED_ON = _present("SIGUSR1", "SIGUSR2")
_SUSPENDS = _present("SIGTSTP")
_LOOKS = _present("SIGQUIT")


class EndAsked(Exception):
    """A signal has come that asks for the end, before there was any rank.

    Args:
        sig: Its number.
    """

    def __init__(self, sig: int) -> None:
        super().__init__(sig)
        self.sig = sig


class Signals:
    """The signals that have come and have not been read.

    Args:
        reader: A socket, which does not block, that has the number of each signal as a byte.
        handled: The signals of --signals-to-handle.
    """

    def __init__(self, reader: socket.socket, handled: Collection[int] = ()) -> None:
        self._reader = reader
        self._handled = frozenset(handled)

    def fileno(self) -> int:
        """The descriptor that is readable when a signal has come."""
        return self._reader.fileno()

    def read(self, seconds: float = 0.0) -> bytes:
        """The numbers of the signals that have come since the last call, in order; waits ``seconds`` for the first."""
        try:
            self._reader.settimeout(seconds)  # 0.0 makes it non-blocking again
            return self._reader.recv(256)
        except (BlockingIOError, TimeoutError):  # the latter is socket.timeout
            return b""
        finally:
            self._reader.setblocking(False)

    def raise_for_end(self) -> None:
        """Raise EndAsked where a signal that asks for the end has come. It stays to be read.

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
        """Whether ``sig`` is the ranks' affair, and the job goes on."""
        return sig in _HANDED_ON and sig not in self._handled

    def asks_for_suspension(self, sig: int) -> bool:
        """Whether it is Ctrl-Z's."""
        return sig in _SUSPENDS

    def asks_for_stacks(self, sig: int) -> bool:
        """Whether it asks what the ranks do, and the job goes on."""
        return sig in _LOOKS and sig not in self._handled

    def asks_for_end(self, sig: int) -> bool:
        """Whether the ranks are told to end because of it, and the launcher with them."""
        return sig in (*_ORDERS, *_HANGUP, *_ENDS) or (sig in (*_HANDED_ON, *_LOOKS) and sig in self._handled)

    def for_ranks(self, sig: int) -> int:
        """The signal by which the ranks are told to end because of ``sig``."""
        return sig if sig in (*_ORDERS, *_HANGUP) or sig in self._handled else signal.SIGTERM


@contextmanager
def catch_signals(handled: Collection[int] = ()) -> Iterator[Signals]:
    """Have the signals that ask something of us read from what this gives, in place of their actions.

    They are unblocked, too: whoever started us may have blocked them, and then nobody could end us but by SIGKILL. The
    signals that end a process have their default action afterwards: the command's work is done. Those that are handed
    on are ignored then, because the ranks whom they were for have ended.

    Args:
        handled: The signals of --signals-to-handle.
    """
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    asking = (*_ORDERS, *_HANGUP, *_ENDS, *_HANDED_ON, *_SUSPENDS, *_LOOKS)
    caught = [sig for sig in asking if signal.getsignal(sig) is not signal.SIG_IGN]
    signals = Signals(reader, handled)
    # Whoever sends more signals than a socket holds has sent them before.
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


def status_of(sig: int) -> int:
    """The status of a launcher that ``sig`` has ended: 128 and its number, or negative where it is to die of it."""
    return 128 + sig if sig in (*_ORDERS, *_LOOKS) else -sig


def die_of(sig: int) -> None:
    """End this process by the signal, without a core file, so that its parent sees what ended it.

    Returns where the kernel does not let it die of that: the first process of a container (pid_namespaces(7)).
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
    """SIGTERM, or SIGRTMIN+2: the signal's name."""
    try:
        return signal.Signals(sig).name
    except ValueError:
        return f"SIGRTMIN+{sig - signal.SIGRTMIN}"


def parse_signals(text: str) -> frozenset[int]:
    """Read the value of --signals-to-handle: names of signals with commas between them, with or without SIG.

    Raises:
        ValueError: A name is no signal's, or a signal that is not handled at all.
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
