"""A started process is signalled, polled and waited for, by its pidfd where it has one."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import time
from _thread import get_ident
from typing import TYPE_CHECKING, Any

from .outcome import RefusedStep

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    # What the streams of a process that is no more than a Popen give, as those of the standard class do.
    AnyStr = TypeVar("AnyStr", str, bytes, default=bytes)
else:
    from typing import AnyStr

# The stock class under a name of ours: where a program sets subprocess.Popen to our class, that name is our own class.
Stock = subprocess.Popen

_P_PIDFD = getattr(os, "P_PIDFD", 3)
_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT if os.name == "posix" else 0
_PATIENCE = 1.0  # seconds, of which a thread that polls needs some microseconds


class Started(subprocess.Popen[AnyStr]):
    """``subprocess.Popen``, whose signals reach this process or none, and whose ``poll()`` sees every end."""

    # Other folders may use these private names of a Popen and no others (tests/test_imports.py holds it): _born,
    # _executed_ns, _leads_group, _refused; and of the standard class _child_created, _handle_exitstatus, _waitpid_lock.
    #
    # What most processes have, and what is replaced, never changed, in those that have something else. Each attribute
    # that is not set, and each call less, shows in the time of a start: it runs with caches that the child has emptied.
    _refused: tuple[RefusedStep, ...] = ()
    _pidfd: Any = None
    _executed_ns: int | None = None  # CLOCK_MONOTONIC when the engine had executed the program
    _born: float | None = None  # on Windows: not before this time, as time.time() has it
    _child_created: bool  # the standard class's
    _leads_group = False
    _is_kept = False  # a group's rank: its end can be seen here, and the group alone reaps it
    _waits_in = 0  # the thread that waits without a timeout, as threading.get_ident() has it

    @property
    def pidfd(self) -> int | None:
        """A descriptor of the process (pidfd_open(2)), owned by this object; None where there is none.

        It is closed with the last use of this object, and once the process was waited for, unless it leads a process
        group: send_signal_group() needs it then.
        """
        pidfd = self._pidfd  # once: another thread may be waiting for the process
        return None if pidfd is None else int(pidfd.fd)

    def send_signal_group(self, sig: int) -> None:
        """Signal the process group that this process leads; a group without members is no error.

        From Linux 6.9 on this is free of races, also when the leader has been waited for. Elsewhere the group is
        signalled only while the leader has not been waited for, since another group may have its number afterwards.

        Args:
            sig: the signal's number.

        Raises:
            ValueError: the process was not started as a leader (``start_new_session``, ``process_group=0``).
            ProcessLookupError: the leader has been waited for, and the system cannot address the group safely.
            PermissionError: no member may be signalled.
        """
        if not self._leads_group:
            raise ValueError("not a group leader: start it with start_new_session=True or process_group=0")
        pidfd = self._pidfd
        if pidfd is not None:
            refusal = pidfd.send_signal(sig, True)
            if refusal in (0, errno.ESRCH):
                return
            if refusal == errno.EPERM and self.returncode is not None and not self._is_kept:
                raise PermissionError(refusal, f"process group {self.pid}: {os.strerror(refusal)}")
        # A thread that holds the lock is inside waitpid: the leader is still there, or was a moment ago.
        held = self._waitpid_lock.acquire(blocking=False)  # type: ignore[attr-defined]
        try:
            if self.returncode is not None and not self._is_kept:
                raise ProcessLookupError(
                    errno.ESRCH,
                    f"process group {self.pid}: its leader has been waited for, and this system cannot address the"
                    " group by pidfd (Linux 6.9)",
                )
            os.killpg(self.pid, sig)
        finally:
            if held:
                self._waitpid_lock.release()  # type: ignore[attr-defined]

    def send_signal(self, sig: int) -> None:
        """As the standard class; but by pidfd, so that no other process can get the signal; and without reaping first.

        Another waiter (an event loop, another thread) can still collect the exit status.

        Args:
            sig: the signal's number.
        """
        pidfd = self._pidfd
        if self.returncode is not None:
            return
        # Another error: pidfds are refused (an old kernel, a seccomp profile), or kill(2) will fail with it again.
        # ESRCH: other code has reaped it, and the standard class finds out what is known of its end.
        if pidfd is None or pidfd.send_signal(sig) != 0:
            super().send_signal(sig)

    if os.name == "posix":

        def _handle_exitstatus(
            self,
            sts: int,
            *_: Any,
            _stop_signal: Any = os.WSTOPSIG,
            _to_exitcode: Any = os.waitstatus_to_exitcode,
        ) -> None:
            # Also called by __del__ at the end of the interpreter, when the names of this module may be gone.
            try:
                self.returncode = _to_exitcode(sts)
            except ValueError:  # it was stopped, and has not ended
                self.returncode = -_stop_signal(sts)
            if not self._leads_group:
                # A thread that waits on it holds a reference: the descriptor is closed after the last.
                self._pidfd = None

        def poll(self) -> int | None:
            """As the standard class; but it sees the end also while another thread waits for the process."""
            pidfd = self._pidfd
            if self.returncode is None and pidfd is not None:
                try:
                    if os.waitid(_P_PIDFD, pidfd.fd, _LOOK) is None:
                        return None
                except ChildProcessError:
                    pass  # it has been reaped
                except OSError:
                    return super().poll()  # Linux before 5.4 has no P_PIDFD
                # A thread that reaps the process holds the lock until the exit status is known. This may be a signal
                # handler that runs in the middle of such a wait, or poll, of its own thread: it must not wait for that.
                if self._waits_in != get_ident() and self._waitpid_lock.acquire(timeout=_PATIENCE):  # type: ignore[attr-defined]
                    self._waitpid_lock.release()  # type: ignore[attr-defined]
            return super().poll()

        def _wait(self, timeout: float | None) -> int | None:
            """As the standard class, but a wait with a timeout sleeps on the pidfd instead of polling."""
            while timeout is None and self.returncode is None:
                # The standard library's loop without its inner calls: right after an exit, with cold caches, they are a
                # measurable part of a short job.
                with self._waitpid_lock:  # type: ignore[attr-defined]
                    if self.returncode is not None:
                        break  # another thread waited
                    self._waits_in = get_ident()
                    try:
                        pid, status = os.waitpid(self.pid, 0)
                    except ChildProcessError:
                        pid, status = self.pid, 0  # other code has reaped it, and its status is lost
                    finally:
                        self._waits_in = 0
                    if pid == self.pid:
                        self._handle_exitstatus(status)
                        return self.returncode
            pidfd = self._pidfd
            if timeout is None or pidfd is None:
                return super()._wait(timeout)  # type: ignore[misc, no-any-return]
            until = time.monotonic() + timeout
            poller = select.poll()
            poller.register(pidfd.fd, select.POLLIN)
            while self._internal_poll() is None:  # type: ignore[attr-defined]
                remaining = until - time.monotonic()
                if remaining <= 0:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                # A day at a time: poll(2) counts milliseconds in an int, and a timeout may be infinite.
                if poller.poll(min(86400, remaining) * 1000) and self._waitpid_lock.locked():  # type: ignore[attr-defined]
                    # It has ended and another thread is about to reap it.
                    time.sleep(0.0001)
            return self.returncode
