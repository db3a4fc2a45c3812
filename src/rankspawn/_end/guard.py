"""The guard: a small process that outlives the launcher, to end what the launcher could not.

When the launcher is killed with SIGKILL, death signals (PR_SET_PDEATHSIG) end its ranks; what the ranks have started
lives on. The guard ends every member of the ranks' sessions then, and what is in the group's cgroup.

How it is sound, from the first moment to the last:

 1. It is started before the first rank, by exec from our own engine: its cost is flat in the launcher's memory, and the
    launcher does not wait for it to come up. What it has to know is in the pipe until it reads it.
 2. Each rank registers itself: between setsid and exec it writes its pid, which is its session's number, to the pipe
    (one write of less than PIPE_BUF bytes: pipe(7)). So no session of ours can exist that is not in the pipe, but those
    of children that are about to write; and these hold the pipe's write end, which closes with exec. At the end of the
    file all have registered.
 3. The launcher's death is seen by a pidfd that the launcher has opened of itself and the guard has inherited: it is
    readable from that death on, also when that was before the guard's first instruction. The pipe's end does not tell
    of it: a forked copy of the launcher holds the pipe, too, and a launcher that closes all its descriptors does not.
 4. Numbers are used again. A session's number is taken for as long as the session has a member, so the guard holds a
    pidfd of one member of each, a witness: the leader first. When it ends, another member takes its place; where there
    is none, the session is over, and its number forgotten. Between a witness's end and the look at the session are
    milliseconds, in which all other numbers would have to be used for this one to come again.
 5. It has a session of its own (no terminal's signal, no signal to the launcher's group reaches it), / as its folder,
    nothing of the launcher's open, and ignores SIGINT, SIGTERM and SIGHUP. It does not run in the group's cgroup.
 6. Killed itself, it ends no rank and no launcher; the launcher can see it (Guard.process), and launch() says it.

A forked copy of the launcher may hold the pipe for days: after the launcher's death the guard waits for the end of the
file for ``patience`` seconds at most. A child is between clone and its registration for microseconds.

What has called setsid itself is out of the guard's sight; the group's cgroup holds it, where there is one.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import time

from .sessions import kill_members, members

TYPE_CHECKING = False  # the guard's process loads this: see _sessions.py

if TYPE_CHECKING:
    from .._start.popen import Popen
    from .cgroup import GroupCgroup

PATIENCE_SECONDS = 10.0
_BLIND_POLL_MS = 100  # where there is no pidfd of the launcher

# -I: nothing of the user's environment or folders; -S: no site-packages, whose .pth files may import anything. The
# folder that this package is in comes last, so that nothing in it passes for the standard library.
_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from rankspawn._end.guard import main; main(*sys.argv[2:])"

_PID_BYTES = 4  # of a pid_t, "i" in the words of memoryview


class Guard:
    """The launcher's half: the guard's process, and the pipe's write end.

    fd: where each rank of the group writes its pid, a native int, after setsid and before exec. Close-on-exec.
    process: the guard. Its pidfd is readable when it has ended before close(): the group is unguarded then.
    """

    def __init__(self, process: Popen, fd: int) -> None:
        self.process = process
        self.fd = fd

    @classmethod
    def start(cls, cgroup: str | None = None, patience: float = PATIENCE_SECONDS) -> Guard:
        """Start the guard of one group, before the group's first rank; does not wait for it to come up.

        cgroup: the directory of the group's cgroup, which the guard ends and removes, too. It need not be there yet;
            made after the guard is started and removed before it is closed, it is never without one.
        patience: after the launcher's death, how many seconds the guard goes on, at most, while somebody is left or
            the pipe is held open.

        Raises OSError when there is no interpreter to run it with (a frozen program), or what Popen raises.
        """
        import subprocess  # these two not at import: the guard's own process has no use for them

        from .._start.popen import Popen

        if not sys.executable or getattr(sys, "frozen", False):
            raise OSError(errno.ENOTSUP, "a guard needs a Python interpreter: this program has none to start")
        folder = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        inherited: list[int] = []
        reading, writing = map(_above_stdio, os.pipe())
        try:
            inherited = [reading, *_own_pidfd()]
            numbers = ",".join(map(str, inherited))
            process = Popen(
                [sys.executable, "-I", "-S", "-B", "-c", _PROGRAM, folder, numbers, str(os.getpid()), str(patience)]
                + ([] if cgroup is None else [cgroup]),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                cwd="/", pass_fds=inherited, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(writing)
            raise
        finally:
            for fd in inherited:
                os.close(fd)
        return cls(process, writing)

    def warn_of_its_end(self) -> None:
        """Issue a RuntimeWarning: the guard has ended before close()."""
        import warnings

        warnings.warn(
            f"the guard (process {self.process.pid}) has ended: what the ranks have started stays behind if this"
            " process is killed now",
            RuntimeWarning,
            stacklevel=2,
        )

    def close(self) -> None:
        """End the guard, after the group has ended: there is nothing left for it to do. Closing again is harmless.

        A forked copy of the launcher, whose child it is not, lets go of the descriptor only.
        """
        from subprocess import TimeoutExpired

        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.process.kill()
        try:
            self.process.wait(PATIENCE_SECONDS)
        except TimeoutExpired:
            pass  # in uninterruptible sleep, over a file of its interpreter for example: it ends when it can


def _own_pidfd() -> list[int]:
    """A pidfd of this process; none before Linux 5.3, or in a Python that was built on an older one."""
    try:
        return [_above_stdio(os.pidfd_open(os.getpid()))]
    except (AttributeError, OSError):
        return []


def _above_stdio(fd: int) -> int:
    """The descriptor under a number above 2: a launcher may run without stdin, stdout or stderr."""
    if fd > 2:
        return fd
    import fcntl

    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


# ---- the guard's own process ----------------------------------------------------------------------------------------


def main(descriptors: str, launcher: str, patience: str, *cgroup: str) -> None:
    """What _PROGRAM runs. descriptors: the pipe's read end, and a pidfd of the launcher where there is one."""
    import resource  # Windows has none

    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a witness for each rank
    except (OSError, ValueError):
        pass  # fs.nr_open has been lowered below it; a session without a witness is guarded, too
    watch = _Watch(*map(int, descriptors.split(",")))
    watch.until_death_of(int(launcher))
    watch.end_all(time.monotonic() + float(patience), _open_cgroup(*cgroup) if cgroup else None)


def _open_cgroup(path: str) -> GroupCgroup | None:
    from .cgroup import GroupCgroup  # most groups have none

    try:
        return GroupCgroup(path)
    except OSError:
        return None  # it was removed, or never made; and whatever else there is, the sessions come first


class _Watch:
    """The sessions of the group, kept up to date by what descriptors tell."""

    def __init__(self, pipe: int, launcher: int = -1) -> None:
        self._sessions: set[int] = set()
        self._witnesses: dict[int, int] = {}  # pidfd -> session
        self._pipe, self._launcher = pipe, launcher
        self._all_registered = False
        self._poller = select.poll()
        for fd in (pipe, launcher):
            if fd >= 0:
                self._poller.register(fd, select.POLLIN)
        os.set_blocking(pipe, False)

    def until_death_of(self, launcher: int) -> None:
        """Return when the launcher, of this number, has died."""
        while True:
            ready = {fd for fd, _ in self._poller.poll(_BLIND_POLL_MS if self._launcher < 0 else None)}
            if self._launcher in ready:
                return
            # Without a pidfd. 0 is a launcher in an outer PID namespace, of which this tells nothing.
            if self._launcher < 0 and os.getppid() not in (launcher, 0):
                return
            if self._pipe in ready:
                self._read()
            self._renew({self._dismiss(pidfd) for pidfd in ready & self._witnesses.keys()})

    def end_all(self, until: float, cgroup: GroupCgroup | None) -> None:
        """End everybody, until nobody is left and nobody more can come, or that moment has come."""
        while True:
            self._read()
            if cgroup is not None:
                try:
                    cgroup.kill()
                except OSError:
                    cgroup = None  # refused, by a mount that is read-only now for example: the sessions are left
            left = max(0.0, until - time.monotonic())
            if not kill_members(self._sessions, min(1.0, left)):
                self._sessions.clear()
                if self._all_registered:
                    break
                _wait_readable(self._pipe, left)
            if not left:
                break
        if cgroup is not None and cgroup.wait_empty(until - time.monotonic()):
            cgroup.remove()

    def _read(self) -> None:
        """Take what has been registered."""
        unseen = set()
        while not self._all_registered:
            try:
                told = os.read(self._pipe, 1024 * _PID_BYTES)
            except BlockingIOError:
                break
            if not told:
                self._all_registered = True
                self._poller.unregister(self._pipe)
            for pid in memoryview(told).cast("i"):
                self._sessions.add(pid)
                if not self._appoint(pid, pid):
                    unseen.add(pid)
        self._renew(unseen)

    def _appoint(self, pid: int, session: int) -> bool:
        """Make a process the witness of its session; whether that could be done."""
        try:
            pidfd = os.pidfd_open(pid)
        except (AttributeError, OSError):
            return False
        try:
            if os.getsid(pid) == session:
                self._poller.register(pidfd, select.POLLIN)
                self._witnesses[pidfd] = session
                return True
        except ProcessLookupError:
            pass
        os.close(pidfd)
        return False

    def _dismiss(self, pidfd: int) -> int:
        """Let go of a witness that has ended; its session."""
        self._poller.unregister(pidfd)
        os.close(pidfd)
        return self._witnesses.pop(pidfd)

    def _renew(self, sessions: set[int]) -> None:
        """Find new witnesses for these sessions, and forget those in which nobody is left."""
        found = members(sessions) if sessions else {}
        self._sessions -= sessions - set(found.values())
        for pid, session in found.items():
            if session in sessions and self._appoint(pid, session):
                sessions.remove(session)


def _wait_readable(fd: int, seconds: float) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.poll(seconds * 1000)
