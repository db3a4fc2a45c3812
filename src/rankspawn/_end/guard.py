"""The guard: a small process that outlives the launcher, to end what the launcher could not.

When the launcher is killed with SIGKILL, death signals (PR_SET_PDEATHSIG) end its ranks, but the processes that the
ranks started live on as orphans. The guard then kills every member of the ranks' sessions and of the group's cgroup,
and removes the launcher's temporary folder and its note for ``rankspawn ps``.

It is a program of our own in C (csrc/guard), which lies beside the engine. A forked child that never returns to Python
would keep the launcher's memory, and fork(2) is slower the more of that there is; a child that shares the launcher's
memory dies with it when memory runs out. A program needs its own few pages only, and no interpreter: it works in frozen
programs and embedded interpreters. A mount that forbids executing it (noexec) also forbids loading the engine.

Why it is sound, from the first moment to the last:

 1. It is started before the first rank, by exec from our own engine: its cost is flat in the launcher's memory, and the
    launcher does not wait for it to come up. The pipe keeps the messages until the guard reads them.
 2. Each rank registers itself: between setsid and exec it writes its pid, which is its session's number, and the time
    to the pipe (one write of less than PIPE_BUF bytes: pipe(7)). So the pipe has every
    session of ours, except those of children that are about to write. These hold the pipe's write end, which closes
    with exec: at the end of the file all have registered.
 3. The guard sees the launcher's death by a pidfd that the launcher opened of itself and the guard inherited: it is
    readable from that death on, even if the launcher died before the guard's first instruction. The end of the pipe
    does not show that death: a forked copy of the launcher holds the pipe, too, and a launcher that closes all its
    descriptors does not.
 4. Numbers are used again. csrc/guard/sessions.c says how the guard knows which are still the ranks'. It wakes when a
    rank begins or ends, and then sleeps for 10 ms before it looks at all that has come.
 5. It has a session of its own (no terminal's signal, no signal to the launcher's group reaches it), / as its working
    directory, no descriptor of the launcher's but that of its temporary folder, and ignores SIGINT, SIGTERM and SIGHUP.
    It does not run in the group's cgroup.
 6. If the guard itself is killed, no rank and no launcher ends. The launcher sees it (Guard.process), and launch()
    warns.

A forked copy of the launcher may hold the pipe for days: after the launcher's death the guard waits for the end of the
file for ``patience`` seconds at most. A child is between clone and its registration for microseconds.

The guard cannot find a process that has called setsid itself; the group's cgroup holds it, where there is one.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from contextlib import suppress

from .._start.popen import Popen

PATIENCE_SECONDS = 10.0
NAME = "rankspawn-guard"


class Guard:
    """The launcher's half: the guard's process, and the write end of its pipe.

    Attributes:
        fd: Where each rank of the group writes its pid and the time, after setsid and before exec: a
            spawn_registration of csrc/spawn.h. Close-on-exec.
        process: The guard. Its pidfd is readable when it has ended before close(): the group is unguarded then.
    """

    def __init__(self, process: Popen, fd: int) -> None:
        self.process = process
        self.fd = fd
        self._launcher = os.getpid()
        self._was_told = False  # whether end_what_is_left() was called

    @staticmethod
    def why_not() -> str:
        """Say why there can be no guard here; empty where there can be one."""
        from .._start.engine import mechanisms, why_no_engine

        if not mechanisms():
            return f"a guard needs rankspawn's engine: {why_no_engine()}"
        path = _program()
        if not os.path.exists(path):
            return f"a guard needs the program {NAME}, which is not at {path}"
        if not os.access(path, os.X_OK):
            return f"a guard needs the program {path}, which may not be executed"
        return ""

    @classmethod
    def start(
        cls,
        cgroup: str | None = None,
        patience: float = PATIENCE_SECONDS,
        folder: str | os.PathLike[str] | None = None,
        note: str | None = None,
    ) -> Guard:
        """Start the guard of one group, before the group's first rank; does not wait for it to come up.

        Args:
            cgroup: The directory of the group's cgroup, which the guard ends and removes, too. It need not exist
                yet: it is made after the guard has started and removed before the guard closes, so it is never
                    unguarded.
            patience: How many seconds the guard stays at most after the launcher's death, while a member is left or a
                process holds the pipe open.
            folder: A temporary folder that the launcher has made, which the guard removes with all that is in it when
                the launcher has died and no member is left.
            note: The absolute path of a file that the launcher may make, which the guard removes when the launcher has
                died.

        Raises:
            OSError: ENOTSUP where this install has no guard; also all that Popen raises.
        """
        lack = cls.why_not()
        if lack:
            raise OSError(errno.ENOTSUP, lack)
        inherited: list[int] = []
        reading, writing = map(_above_stdio, os.pipe())
        try:
            inherited.append(reading)
            launcher = _own_pidfd()
            inherited += launcher
            opened = [] if folder is None else [_open_folder(folder)]
            inherited += opened
            process = Popen(
                [
                    NAME, str(os.getpid()), str(reading), *map(str, launcher or "-"), str(round(patience * 1000)),
                    *map(str, opened or "-"), "" if folder is None else os.path.abspath(folder), cgroup or "",
                    note or "",
                ],
                executable=_program(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
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
        """Issue a RuntimeWarning if the guard has ended before close()."""
        import warnings

        if self.fd < 0 or self._was_told:
            return
        warnings.warn(
            f"the guard (process {self.process.pid}) has ended: processes that the ranks started stay behind if this"
            " process is killed now",
            RuntimeWarning,
            stacklevel=2,
        )

    def end_what_is_left(self) -> None:
        """Have the guard end all that the ranks started, and wait until that is done. No rank starts afterwards.

        The guard knows the ranks' sessions even where other code has reaped the ranks. It leaves the temporary folder
        to the launcher.
        """
        self._was_told = True
        with suppress(BrokenPipeError):  # the guard has ended
            os.write(self.fd, struct.pack("=qii", 0, 0, 0))  # struct spawn_registration
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        """End the guard, which has nothing left to do once the group has ended. Harmless when done twice.

        A forked copy of the launcher only closes the descriptor, because the guard is not its child.
        """
        is_ours = os.getpid() == self._launcher
        if is_ours:
            try:
                self.process.kill()
            except PermissionError:  # this process has changed its user; the guard still reads the pipe
                self.end_what_is_left()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if is_ours:
            with suppress(subprocess.TimeoutExpired):  # in uninterruptible sleep, or frozen: it ends when it can
                self.process.wait(PATIENCE_SECONDS)
            self.process._pidfd = None  # a leader's stays open: send_signal_group() would need it


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


def _program() -> str:
    """Where the guard's program is: beside the engine."""
    from .. import _spawn

    return os.path.join(os.path.dirname(os.path.abspath(_spawn.__file__)), NAME)


def _open_folder(path: str | os.PathLike[str]) -> int:
    """A descriptor of the folder itself, so that no later folder of that name is removed."""
    return _above_stdio(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
