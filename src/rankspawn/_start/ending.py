"""Signals, polls and waits for a started process, by its pidfd if it has one."""

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

    from .._spawn import Pidfd

    # The type that the streams of a Popen give; bytes by default, as in the standard class.
    AnyStr = TypeVar("AnyStr", str, bytes, default=bytes)
else:
    from typing import AnyStr

# The standard class under our own name, because a program may set subprocess.Popen to our class.
Stock = subprocess.Popen

_P_PIDFD = getattr(os, "P_PIDFD", 3)
_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT if os.name == "posix" else 0
_PATIENCE = 1.0  # seconds; a thread that polls needs a few microseconds


def wait_status(pid: int, pidfd: Pidfd | None, options: int) -> int | None:
    """waitid(2) for the end of a child: by its pidfd, or by its number without one and before Linux 5.4.

    Args:
        pid: The child's number.
        pidfd: The object, because another thread may let go of it, and its descriptor would be closed.
        options: Flags of waitid(2) besides WEXITED.

    Returns:
        The status as from waitpid(2); None if the child runs.

    Raises:
        ChildProcessError: It has been reaped.
    """
    options |= os.WEXITED
    try:
        if pidfd is None:
            raise OSError(errno.EINVAL, "")
        ended = os.waitid(_P_PIDFD, pidfd.fd, options)
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 5.4
            raise
        ended = os.waitid(os.P_PID, pid, options)
    if ended is None:
        return None
    if ended.si_code == os.CLD_EXITED:
        return (ended.si_status & 0xFF) << 8
    return int(ended.si_status) | (0x80 if ended.si_code == os.CLD_DUMPED else 0)


class Started(subprocess.Popen[AnyStr]):
    """``subprocess.Popen``, but its signals never reach another process, and its ``poll()`` sees every end."""

    # Other folders may use these private names of a Popen and no others (tests/test_imports.py holds it): _born,
    # _executed_ns, _leads_group, _refused; and of the standard class _child_created, _handle_exitstatus, _waitpid_lock.
    #
    # Defaults that most processes share. A process that differs replaces the value, and never changes it in place. Each
    # attribute that is not set, and each call less, shortens a start, because the child has emptied the CPU's caches.
    _refused: tuple[RefusedStep, ...] = ()
    _pidfd: Any = None
    _executed_ns: int | None = None  # CLOCK_MONOTONIC at which the program was executed
    _born: float | None = None  # on Windows: a time.time() at or before its birth
    _child_created: bool  # the standard class's
    _leads_group = False
    _is_kept = False  # a group's rank: only the group reaps it, but its end can be seen here
    _waits_in = 0  # the thread (threading.get_ident()) that waits without a timeout

    @property
    def pidfd(self) -> int | None:
        """A descriptor of the process (pidfd_open(2)), owned by this object; None where there is none.

        It stays open until the process is reaped. If the process leads a process group, it stays open until this object
        is freed, because send_signal_group() needs it.
        """
        pidfd = self._pidfd  # read once, because another thread may reap the process meanwhile
        return None if pidfd is None else int(pidfd.fd)

    def send_signal_group(self, sig: int) -> None:
        """Signal the process group that this process leads. A group without members is no error.

        Since Linux 6.9 this is free of races, even after the leader was reaped. Elsewhere it signals the group only
        until the leader is reaped, because another group may get its number afterwards.

        Args:
            sig: The signal's number.

        Raises:
            ValueError: The process was not started as a leader (``start_new_session``, ``process_group=0``).
            ProcessLookupError: The leader was reaped, and the system cannot address the group safely.
            PermissionError: This process may signal no member of the group.
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
        # A thread that holds the lock is inside waitpid, so the leader exists, or did a moment ago.
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
        """As in the standard class, but by pidfd, so that no other process can get the signal.

        Nor does it reap the process first, so another waiter (an event loop, a thread) can still collect its status.

        Args:
            sig: The signal's number.
        """
        pidfd = self._pidfd
        if self.returncode is not None:
            return
        # After an error the standard class tries. The system may refuse pidfds (an old kernel, a seccomp profile). If
        # not, kill(2) fails with the same error. After ESRCH (other code has reaped it) it looks for the status.
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
            # __del__ calls it, too, at the end of the interpreter, when the names of this module may be gone.
            try:
                self.returncode = _to_exitcode(sts)
            except ValueError:  # the process was stopped and has not ended
                self.returncode = -_stop_signal(sts)
            if not self._leads_group:
                # A thread that waits on it holds a reference. The descriptor is closed with the last one.
                self._pidfd = None

        def poll(self) -> int | None:
            """As in the standard class, but it sees the end even while another thread waits for the process."""
            pidfd = self._pidfd
            if self.returncode is None and pidfd is not None:
                try:
                    if os.waitid(_P_PIDFD, pidfd.fd, _LOOK) is None:
                        return None
                except ChildProcessError:
                    pass  # somebody has reaped it
                except OSError:
                    return super().poll()  # Linux before 5.4 has no P_PIDFD
                # A thread that reaps the process holds the lock until it has the exit status. But this call may come
                # from a signal handler in the middle of its own thread's wait or poll, and must not wait for that.
                if self._waits_in != get_ident() and self._waitpid_lock.acquire(timeout=_PATIENCE):  # type: ignore[attr-defined]
                    self._waitpid_lock.release()  # type: ignore[attr-defined]
            return super().poll()

        def _wait(self, timeout: float | None) -> int | None:
            """As in the standard class, but a wait with a timeout sleeps on the pidfd instead of polling."""
            while timeout is None and self.returncode is None:
                # The standard library's loop without its inner calls. Right after an exit, with cold caches, they take
                # a measurable part of a short job.
                with self._waitpid_lock:  # type: ignore[attr-defined]
                    if self.returncode is not None:
                        break  # another thread waited
                    self._waits_in = get_ident()
                    try:
                        pid, status = os.waitpid(self.pid, 0)
                    except ChildProcessError:
                        pid, status = self.pid, 0  # other code has reaped it, so its status is lost
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
                # A day at a time, because poll(2) counts milliseconds in an int, and a timeout may be infinite.
                if poller.poll(min(86400, remaining) * 1000) and self._waitpid_lock.locked():  # type: ignore[attr-defined]
                    # It has ended and another thread is about to reap it.
                    time.sleep(0.0001)
            return self.returncode
