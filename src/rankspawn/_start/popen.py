"""``Popen``: ``subprocess.Popen`` whose child is started by rankspawn's engine, bound from its first instruction on.

One method is overridden for the start, ``_execute_child``; most of the standard class is inherited. What an override of
it must do itself is what CPython's own does: the audit event, the search of the child's PATH, ``pid`` and
``_child_created``, closing the child's pipe ends, and errors with the class and file name of the standard library.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .._binding import Binding
from .._public import public
from .arguments import candidates, cgroup_descriptor, command_and_program, is_fifo, is_path
from .engine import EXTENSION_ERROR, bind_process, masks, mechanisms, why_no_engine
from .outcome import BindingError, BindingReport, RefusedStep

if EXTENSION_ERROR is None:
    from .. import _spawn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# The stock class under a name of ours: where a program sets subprocess.Popen to our class, that name is ourselves.
_Stock = subprocess.Popen

# What 3.10 passes, and what 3.11 appended. A new Python that changes the list must fail here, at import, and not
# start processes with the arguments in the wrong places.
_SEAM = (
    "self args executable preexec_fn close_fds pass_fds cwd env startupinfo creationflags shell p2cread p2cwrite"
    " c2pread c2pwrite errread errwrite restore_signals gid gids uid umask start_new_session process_group"
).split()
_seam = _SEAM
if os.name == "posix":
    _code = _Stock._execute_child.__code__  # type: ignore[attr-defined]
    _seam = list(_code.co_varnames[: _code.co_argcount])
    if _seam not in (_SEAM, _SEAM[:-1]):
        raise ImportError(
            f"rankspawn does not know this subprocess.Popen ({_code.co_filename}): its _execute_child takes {_seam};"
            " a newer rankspawn is needed, or subprocess was patched first"
        )

_READ, _WRITE = os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC

_NO_HANDLES = (-1,) * 6
_STREAMS = ("stdin", "stdout", "stderr")


@public
class Popen(_Stock):  # type: ignore[type-arg]
    """``subprocess.Popen``, with four things more.

    binding: a Binding that the process is born with, or None.
    die_with_parent: the process gets SIGKILL when this one ends, however it ends (PR_SET_PDEATHSIG, prctl(2)). A
        program that is set-user-ID or has file capabilities clears that.
    cgroup: the directory of a cgroup v2, or a descriptor of it, that the process is born in.
    stdin, stdout, stderr: also an os.PathLike, which the child opens (stdin to read; the others are created or
        truncated, as ``open(path, "w")`` would). The same path for stdout and stderr is opened once.

    Raises BindingError when the system refuses a binding that is ``required``; ValueError when ``preexec_fn`` is given
    beside any of the first three; else what ``subprocess.Popen`` raises.
    """

    mechanism: str | None = None
    """What started the process: "clone", "posix_spawn", or "subprocess" for the standard library's own code."""

    # Other rooms may use these private names of a Popen and no others (tests/test_imports.py holds it): _pidfd, _born,
    # _executed_ns, _leads_group, _refused; and of the standard class _child_created, _waitpid_lock, _handle_exitstatus.
    #
    # What most processes have, and what is replaced, never changed, in those that have something else. Each attribute
    # that is not set, and each call less, shows in the time of a start: it runs with caches that the child has emptied.
    _binding: Binding | None = None
    _die_with_parent = False
    _cgroup: str | os.PathLike[str] | int | None = None
    _refused: tuple[RefusedStep, ...] = ()
    _pidfd: Any = None
    _executed_ns: int | None = None  # CLOCK_MONOTONIC when the engine had executed the program
    _born: float | None = None  # on Windows: not before this time, as time.time() has it
    _child_created: bool  # the standard class's
    _leads_group = False
    _opened_by_child: dict[int, tuple[str, int]] = {}  # noqa: RUF012
    _opened_here: tuple[int, ...] = ()

    def __init__(
        self,
        *args: Any,
        binding: Binding | None = None,
        die_with_parent: bool = False,
        cgroup: str | os.PathLike[str] | int | None = None,
        **kwargs: Any,
    ) -> None:
        if binding is not None and not isinstance(binding, Binding):
            raise TypeError(f"binding must be a Binding, not {type(binding).__name__}")
        if binding is not None:
            self._binding = binding
        if die_with_parent:
            self._die_with_parent = True
        if cgroup is not None:
            self._cgroup = cgroup
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            if self._child_created and self.returncode is None:
                # A signal handler raised after the start (Ctrl-C): the caller gets no object to end the child by.
                self.kill()
                self.wait()
            raise
        finally:
            if self._opened_here:
                for fd in self._opened_here:
                    os.close(fd)

    @property
    def pidfd(self) -> int | None:
        """A descriptor of the process (pidfd_open(2)), owned by this object; None where there is none.

        It is closed with the last use of this object, and once the process was waited for, unless it leads a process
        group: send_signal_group() needs it then.
        """
        pidfd = self._pidfd  # once: another thread may be waiting for the process
        return None if pidfd is None else int(pidfd.fd)

    @property
    def binding_report(self) -> BindingReport:
        """What was asked, what was refused and, read on demand, what the process has."""
        return BindingReport(self._binding, self._refused, self.pid)

    def send_signal_group(self, sig: int) -> None:
        """Signal the process group that this process leads; nothing is done when nobody is left in it.

        From Linux 6.9 on this is free of races, also when the leader has been waited for. Elsewhere the group is
        signalled only while the leader has not been waited for, since its number may be another's afterwards.

        Raises ValueError when the process was not started as a leader (``start_new_session``, ``process_group=0``);
        ProcessLookupError when the leader has been waited for and the system cannot address the group safely;
        PermissionError when no member may be signalled.
        """
        if not self._leads_group:
            raise ValueError("not a group leader: start it with start_new_session=True or process_group=0")
        pidfd = self._pidfd
        if pidfd is not None:
            refusal = pidfd.send_signal(sig, True)
            if refusal in (0, errno.ESRCH):
                return
            if refusal == errno.EPERM and self.returncode is not None:
                raise PermissionError(refusal, f"process group {self.pid}: {os.strerror(refusal)}")
        # A thread that holds the lock is inside waitpid: the leader is still there, or was a moment ago.
        held = self._waitpid_lock.acquire(blocking=False)  # type: ignore[attr-defined]
        try:
            if self.returncode is not None:
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
        """As the standard class, but by pidfd: the process is signalled, or nobody."""
        pidfd = self._pidfd
        self.poll()
        if self.returncode is not None:
            return
        # Any other refusal is one of pidfds (an old kernel, a seccomp profile), or will be said again.
        if pidfd is None or pidfd.send_signal(sig) not in (0, errno.ESRCH):
            super().send_signal(sig)

    def _get_handles(self, stdin: Any, stdout: Any, stderr: Any) -> tuple[Any, ...]:
        """As the standard class, but on POSIX paths and DEVNULL are left for the child to open.

        A descriptor opened here would have the lowest free number; where thousands are open, that makes the child copy
        a table of thousands.
        """
        if stdin is stdout is stderr is None:
            return _NO_HANDLES
        opened: dict[int, tuple[str, int]] = {}
        streams = [stdin, stdout, stderr]
        for number, stream in enumerate(streams):
            if stream is None:
                continue
            if is_path(stream):
                path, flags = os.path.abspath(stream), _WRITE if number else _READ
                if is_fifo(path):
                    # Opening one waits for its other end. Here a signal can end that; in the child it could not.
                    streams[number] = os.open(path, flags)
                    self._opened_here += (streams[number],)
                    continue
                opened[number] = (path, flags)
            elif stream == subprocess.DEVNULL and os.name == "posix":
                opened[number] = (os.devnull, os.O_RDWR)
            else:
                continue
            streams[number] = None
        if 1 in opened and (stderr == subprocess.STDOUT or opened[1] == opened.get(2)):
            opened[2] = ("", 0)  # no path: what stdout is
            streams[2] = None
        if os.name == "posix":
            self._opened_by_child = opened
            return super()._get_handles(*streams)  # type: ignore[misc, no-any-return]
        with _opened_here(opened) as fds:
            return super()._get_handles(*(fds.get(i, s) for i, s in enumerate(streams)))  # type: ignore[misc, no-any-return]

    if os.name == "posix":

        def _execute_child(  # type: ignore[no-untyped-def]
            self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
            p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
            start_new_session, process_group=-1,
        ):  # fmt: skip
            self._leads_group = bool(start_new_session) or process_group == 0
            if preexec_fn is None and (tried := mechanisms()):
                command, program = command_and_program(args, executable, shell)
                sys.audit("subprocess.Popen", program, command, cwd, env)
                streams = self._streams(p2cread, c2pwrite, errwrite)
                kept = tuple(sorted(map(int, set(pass_fds)))) if pass_fds else ()
                binding = self._binding
                cpu_mask, mem_mode, node_mask = (None, -1, None) if binding is None else masks(binding)
                cgroup, opened = (-1, False) if self._cgroup is None else cgroup_descriptor(self._cgroup)
                try:
                    for mechanism in tried:
                        outcome = _spawn.spawn(
                            self, command, candidates(program, env), env, cwd, streams, (p2cwrite, c2pread, errread),
                            kept, close_fds, restore_signals, start_new_session, process_group,
                            gid, gids, uid, umask, cpu_mask, mem_mode, node_mask, binding is None or binding.required,
                            signal.SIGKILL if self._die_with_parent else 0, cgroup, mechanism,
                        )  # fmt: skip
                        if outcome is not None:
                            self.mechanism = "clone" if mechanism == _spawn.CLONE else "posix_spawn"
                            if outcome is not _spawn.ALL_DONE:
                                self._check(*outcome, program, cwd)
                            if p2cread != -1 or c2pwrite != -1 or errwrite != -1:
                                self._close_pipe_fds(  # type: ignore[attr-defined]
                                    p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
                                )
                            self._closed_child_pipe_fds = True
                            return
                finally:
                    if opened:
                        os.close(cgroup)
            seam = [
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
                start_new_session, process_group,
            ]  # fmt: skip
            self._execute_by_subprocess(seam[: len(_seam) - 1], preexec_fn)

    else:

        def _execute_child(self, *seam: Any) -> None:  # type: ignore[misc]
            self._born = time.time()
            self._execute_by_subprocess(list(seam))

    def _streams(self, p2cread: int, c2pwrite: int, errwrite: int) -> list[int | tuple[str, int]]:
        """The child's three streams as the engine takes them."""
        if p2cread < -1 or c2pwrite < -1 or errwrite < -1:
            # Below the standard library's "none" are numbers that mean something to the engine.
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        streams: list[int | tuple[str, int]] = [p2cread, c2pwrite, errwrite]
        for number, (path, flags) in self._opened_by_child.items():
            streams[number] = (path, flags) if path else _spawn.SAME_AS_STDOUT
        return streams

    def _check(self, step: int, error: int, affinity_error: int, mempolicy_error: int, program: Any, cwd: Any) -> None:
        """Raise what subprocess would for a step that failed; write down the optional ones that were refused."""
        if step:
            raise self._error(_spawn.STEP_NAMES[step], error, program, cwd)
        if affinity_error or mempolicy_error:
            steps = (("sched_setaffinity", affinity_error), ("set_mempolicy", mempolicy_error))
            self._refused = tuple(RefusedStep(name, code) for name, code in steps if code)

    def _error(self, step: str, code: int, program: Any, cwd: Any) -> OSError:
        if self._binding is not None and step in ("sched_setaffinity", "set_mempolicy"):
            return BindingError.refused(step, code, self._binding)
        if step == "execve":
            return OSError(code, os.strerror(code), program)
        if step == "chdir":
            return OSError(code, os.strerror(code), cwd)
        number = _STREAMS.index(step) if step in _STREAMS else -1
        if number in self._opened_by_child:
            return OSError(code, os.strerror(code), self._opened_by_child[number][0])
        return OSError(code, f"{step}: {os.strerror(code)}")

    def _execute_by_subprocess(self, seam: list[Any], preexec_fn: object = None) -> None:
        """The standard library's own path, and for a binding what psutil can do to a process that runs already."""
        wanted = self._die_with_parent or self._cgroup is not None
        if preexec_fn is not None and (wanted or self._binding is not None):
            raise ValueError("preexec_fn cannot be used beside binding, die_with_parent or cgroup")
        if wanted:
            raise OSError(errno.ENOTSUP, f"die_with_parent and cgroup need rankspawn's engine: {why_no_engine()}")
        binding = self._binding
        if binding is not None and binding.memory is not None and binding.required:
            needs = f"it needs rankspawn's engine: {why_no_engine()}"
            raise BindingError.refused("set_mempolicy", errno.ENOTSUP, binding, needs)
        with _opened_here(self._opened_by_child) as fds:
            for number, fd in fds.items():
                seam[_SEAM.index(("p2cread", "c2pwrite", "errwrite")[number]) - 1] = fd
            super()._execute_child(*seam)  # type: ignore[misc]
        self.mechanism = "subprocess"
        if binding is not None:
            self._refused = bind_process(self.pid, binding)

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

        def _wait(self, timeout: float | None) -> int | None:
            """As the standard class, but a wait with a timeout sleeps on the pidfd instead of polling."""
            while timeout is None and self.returncode is None:
                # The standard library's loop without its inner calls: right after an exit, with cold caches, they are a
                # measurable part of a short job.
                with self._waitpid_lock:  # type: ignore[attr-defined]
                    if self.returncode is not None:
                        break  # another thread waited
                    try:
                        pid, status = os.waitpid(self.pid, 0)
                    except ChildProcessError:
                        pid, status = self.pid, 0  # reaped behind our back: nobody can know its status
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


@contextmanager
def _opened_here(opened: Mapping[int, tuple[str, int]]) -> Iterator[dict[int, int]]:
    """The streams that the child would have opened, opened in this process for as long as the start takes."""
    fds: dict[int, int] = {}
    try:
        for number, (path, flags) in opened.items():
            fds[number] = os.open(path, flags, 0o666) if path else fds[1]
        yield fds
    finally:
        for fd in set(fds.values()):
            os.close(fd)
