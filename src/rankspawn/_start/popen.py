"""``Popen``: ``subprocess.Popen``, but rankspawn's engine starts the child, bound from its first instruction.

For the start it overrides one method, ``_execute_child``, and inherits most of the standard class. As CPython's own
method does, the override must raise the audit event, search the child's PATH, set ``pid`` and ``_child_created``, close
the child's pipe ends, and raise errors with the class and file name of the standard library.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .._binding import Binding
from .._public import public
from .arguments import candidates, cgroup_descriptor, command_and_program, is_fifo, is_path
from .ending import AnyStr, Started, Stock
from .engine import EXTENSION_ERROR, masks, mechanisms, why_no_engine
from .outcome import BindingError, BindingReport, RefusedStep

if EXTENSION_ERROR is None:
    from .. import _spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from typing import IO, Literal, TypeAlias, overload

    AnyPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
    Command: TypeAlias = AnyPath | Sequence[AnyPath]
    Stream: TypeAlias = int | IO[Any] | os.PathLike[str] | None
    Variables: TypeAlias = Mapping[bytes, AnyPath] | Mapping[str, AnyPath]
    if sys.version_info >= (3, 11):
        ProcessGroup: TypeAlias = int | None
    else:
        ProcessGroup: TypeAlias = None

# Python 3.10 passes all but the last; 3.11 appended that. A new Python that changes the list must fail here, at import,
# because it would start processes with the arguments in the wrong places.
_SEAM = (
    "self args executable preexec_fn close_fds pass_fds cwd env startupinfo creationflags shell p2cread p2cwrite"
    " c2pread c2pwrite errread errwrite restore_signals gid gids uid umask start_new_session process_group"
).split()
_seam = _SEAM
if os.name == "posix":
    _code = Stock._execute_child.__code__  # type: ignore[attr-defined]
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
class Popen(Started[AnyStr]):
    """``subprocess.Popen``, with four additions: a binding, a death signal, a cgroup, and paths for streams.

    Args:
        args: As for ``subprocess.Popen``, like every argument that is not named here, in the same order.
        stdin: Also an os.PathLike, which the child opens to read.
        stdout: Also an os.PathLike, which the child creates or truncates, as ``open(path, "w")`` would.
        stderr: As ``stdout``. If both have the same path, the child opens it once.
        binding: A Binding that the process is born with, or None.
        die_with_parent: The process gets SIGKILL when this one ends, however it ends (PR_SET_PDEATHSIG, prctl(2)). A
            program that is set-user-ID or has file capabilities clears that.
        cgroup: The cgroup v2 that the process is born in: its directory, or a descriptor of it.

    Attributes:
        mechanism: What started the process: "clone", "posix_spawn", or "subprocess" for the standard library's code;
            "warm" for a rank that was forked from a ``Template``.

    Raises:
        BindingError: The system refuses a binding that is ``required``.
        ValueError: ``preexec_fn`` is given beside ``binding``, ``die_with_parent`` or ``cgroup``.
        OSError: As ``subprocess.Popen`` raises it, like its other errors.
    """

    mechanism: str | None = None
    # Most processes do not set these either: see Started.
    _binding: Binding | None = None
    _die_with_parent = False
    _cgroup: str | os.PathLike[str] | int | None = None
    _late = False  # whether the CPU mask was set after the start
    _fresh_signals = False  # an empty signal mask, and default actions except for an ignored SIGHUP
    _opened_by_child: dict[int, tuple[str, int]] = {}  # noqa: RUF012
    _opened_here: tuple[int, ...] = ()

    if TYPE_CHECKING:  # generic in the type of its streams, with typeshed's overloads of the standard class

        @overload
        def __init__(
            self: Popen[str], args: Command, bufsize: int = -1, executable: AnyPath | None = None,
            stdin: Stream = None, stdout: Stream = None, stderr: Stream = None,
            preexec_fn: Callable[[], object] | None = None, close_fds: bool = True, shell: bool = False,
            cwd: AnyPath | None = None, env: Variables | None = None, universal_newlines: bool | None = None,
            startupinfo: Any = None, creationflags: int = 0, restore_signals: bool = True,
            start_new_session: bool = False, pass_fds: Collection[int] = (), *, text: bool | None = None,
            encoding: str, errors: str | None = None, user: str | int | None = None,
            group: str | int | None = None, extra_groups: Iterable[str | int] | None = None, umask: int = -1,
            pipesize: int = -1, process_group: ProcessGroup = None, binding: Binding | None = None,
            die_with_parent: bool = False, cgroup: str | os.PathLike[str] | int | None = None,
        ) -> None: ...  # fmt: skip
        @overload
        def __init__(
            self: Popen[str], args: Command, bufsize: int = -1, executable: AnyPath | None = None,
            stdin: Stream = None, stdout: Stream = None, stderr: Stream = None,
            preexec_fn: Callable[[], object] | None = None, close_fds: bool = True, shell: bool = False,
            cwd: AnyPath | None = None, env: Variables | None = None, universal_newlines: bool | None = None,
            startupinfo: Any = None, creationflags: int = 0, restore_signals: bool = True,
            start_new_session: bool = False, pass_fds: Collection[int] = (), *, text: bool | None = None,
            encoding: str | None = None, errors: str, user: str | int | None = None,
            group: str | int | None = None, extra_groups: Iterable[str | int] | None = None, umask: int = -1,
            pipesize: int = -1, process_group: ProcessGroup = None, binding: Binding | None = None,
            die_with_parent: bool = False, cgroup: str | os.PathLike[str] | int | None = None,
        ) -> None: ...  # fmt: skip
        @overload
        def __init__(
            self: Popen[str], args: Command, bufsize: int = -1, executable: AnyPath | None = None,
            stdin: Stream = None, stdout: Stream = None, stderr: Stream = None,
            preexec_fn: Callable[[], object] | None = None, close_fds: bool = True, shell: bool = False,
            cwd: AnyPath | None = None, env: Variables | None = None, *, universal_newlines: Literal[True],
            startupinfo: Any = None, creationflags: int = 0, restore_signals: bool = True,
            start_new_session: bool = False, pass_fds: Collection[int] = (), text: bool | None = None,
            encoding: str | None = None, errors: str | None = None, user: str | int | None = None,
            group: str | int | None = None, extra_groups: Iterable[str | int] | None = None, umask: int = -1,
            pipesize: int = -1, process_group: ProcessGroup = None, binding: Binding | None = None,
            die_with_parent: bool = False, cgroup: str | os.PathLike[str] | int | None = None,
        ) -> None: ...  # fmt: skip
        @overload
        def __init__(
            self: Popen[str], args: Command, bufsize: int = -1, executable: AnyPath | None = None,
            stdin: Stream = None, stdout: Stream = None, stderr: Stream = None,
            preexec_fn: Callable[[], object] | None = None, close_fds: bool = True, shell: bool = False,
            cwd: AnyPath | None = None, env: Variables | None = None, universal_newlines: bool | None = None,
            startupinfo: Any = None, creationflags: int = 0, restore_signals: bool = True,
            start_new_session: bool = False, pass_fds: Collection[int] = (), *, text: Literal[True],
            encoding: str | None = None, errors: str | None = None, user: str | int | None = None,
            group: str | int | None = None, extra_groups: Iterable[str | int] | None = None, umask: int = -1,
            pipesize: int = -1, process_group: ProcessGroup = None, binding: Binding | None = None,
            die_with_parent: bool = False, cgroup: str | os.PathLike[str] | int | None = None,
        ) -> None: ...  # fmt: skip
        @overload
        def __init__(
            self: Popen[bytes], args: Command, bufsize: int = -1, executable: AnyPath | None = None,
            stdin: Stream = None, stdout: Stream = None, stderr: Stream = None,
            preexec_fn: Callable[[], object] | None = None, close_fds: bool = True, shell: bool = False,
            cwd: AnyPath | None = None, env: Variables | None = None, universal_newlines: Literal[False] | None = None,
            startupinfo: Any = None, creationflags: int = 0, restore_signals: bool = True,
            start_new_session: bool = False, pass_fds: Collection[int] = (), *, text: Literal[False] | None = None,
            encoding: None = None, errors: None = None, user: str | int | None = None,
            group: str | int | None = None, extra_groups: Iterable[str | int] | None = None, umask: int = -1,
            pipesize: int = -1, process_group: ProcessGroup = None, binding: Binding | None = None,
            die_with_parent: bool = False, cgroup: str | os.PathLike[str] | int | None = None,
        ) -> None: ...  # fmt: skip
        @overload
        def __init__(
            self: Popen[Any], args: Command, bufsize: int = -1, executable: AnyPath | None = None,
            stdin: Stream = None, stdout: Stream = None, stderr: Stream = None,
            preexec_fn: Callable[[], object] | None = None, close_fds: bool = True, shell: bool = False,
            cwd: AnyPath | None = None, env: Variables | None = None, universal_newlines: bool | None = None,
            startupinfo: Any = None, creationflags: int = 0, restore_signals: bool = True,
            start_new_session: bool = False, pass_fds: Collection[int] = (), *, text: bool | None = None,
            encoding: str | None = None, errors: str | None = None, user: str | int | None = None,
            group: str | int | None = None, extra_groups: Iterable[str | int] | None = None, umask: int = -1,
            pipesize: int = -1, process_group: ProcessGroup = None, binding: Binding | None = None,
            die_with_parent: bool = False, cgroup: str | os.PathLike[str] | int | None = None,
        ) -> None: ...  # fmt: skip

    def __init__(
        self,
        *args: Any,
        binding: Binding | None = None,
        die_with_parent: bool = False,
        cgroup: str | os.PathLike[str] | int | None = None,
        **kwargs: Any,
    ) -> None:
        if binding is not None and not isinstance(binding, Binding):
            raise TypeError(f"binding: expected a Binding or None, got {binding!r}")
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
                # A signal handler raised after the start (Ctrl-C), so the caller gets no object to end the child with.
                self.kill()
                self.wait()
            raise
        finally:
            if self._opened_here:
                for fd in self._opened_here:
                    os.close(fd)

    @property
    def binding_report(self) -> BindingReport:
        """The requested binding, the refused steps and, read on demand, the mask and policy of the process."""
        return BindingReport(self._binding, self._refused, self.pid, self._late)

    def _get_handles(self, stdin: Any, stdout: Any, stderr: Any) -> tuple[Any, ...]:
        """As in the standard class, but on POSIX the child opens paths and DEVNULL.

        A descriptor opened here would get the lowest free number. With thousands of open files, the child would then
        have to copy a table of thousands.
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
                    # open(2) of a FIFO waits for its other end. A signal can interrupt it here, but not in the child.
                    streams[number] = os.open(path, flags)
                    self._opened_here += (streams[number],)
                    continue
                opened[number] = (path, flags)
            elif stream == subprocess.DEVNULL and os.name == "posix":
                opened[number] = (os.devnull, os.O_RDWR)
            else:
                continue
            streams[number] = None
        if 1 in opened and (stderr == subprocess.STDOUT or (2 in opened and _same(opened[1], opened[2]))):
            opened[2] = ("", 0)  # no path: the same file as stdout
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
                            signal.SIGKILL if self._die_with_parent else 0, cgroup, self._fresh_signals,
                            mechanism,
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
        """The child's three streams, encoded for the engine."""
        if p2cread < -1 or c2pwrite < -1 or errwrite < -1:
            # -1 is the standard library's "none". Lower numbers would have a meaning for the engine.
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        streams: list[int | tuple[str, int]] = [p2cread, c2pwrite, errwrite]
        for number, (path, flags) in self._opened_by_child.items():
            streams[number] = (path, flags) if path else _spawn.SAME_AS_STDOUT
        return streams

    def _check(self, step: int, error: int, affinity_error: int, mempolicy_error: int, program: Any, cwd: Any) -> None:
        """Raise what subprocess would for a failed step; record the optional steps that the system refused."""
        if step:
            raise self._error(_spawn.STEP_NAMES[step], error, program, cwd)
        if affinity_error or mempolicy_error:
            steps = (("sched_setaffinity", affinity_error), ("set_mempolicy", mempolicy_error))
            self._refused = tuple(RefusedStep(name, code) for name, code in steps if code)

    def _error(self, step: str, code: int, program: Any, cwd: Any) -> OSError:
        if self._binding is not None and step in ("sched_setaffinity", "set_mempolicy"):
            return BindingError.refused(step, code, self._binding)
        if step == "execve":
            return _noted(OSError(code, os.strerror(code), program), program, cwd)
        if step == "chdir":
            return OSError(code, os.strerror(code), cwd)
        number = _STREAMS.index(step) if step in _STREAMS else -1
        if number in self._opened_by_child:
            return OSError(code, os.strerror(code), self._opened_by_child[number][0])
        return OSError(code, f"{step}: {os.strerror(code)}")

    def _execute_by_subprocess(self, seam: list[Any], preexec_fn: object = None) -> None:
        """Start by the standard library's code, with the part of the binding that works without the engine."""
        wanted = self._die_with_parent or self._cgroup is not None
        if preexec_fn is not None and (wanted or self._binding is not None):
            raise ValueError("preexec_fn cannot be used beside binding, die_with_parent or cgroup")
        if wanted:
            raise OSError(errno.ENOTSUP, f"die_with_parent and cgroup need rankspawn's engine: {why_no_engine()}")
        binding = self._binding
        if binding is not None and binding.memory is not None and binding.required:
            needs = f"it needs rankspawn's engine: {why_no_engine()}"
            raise BindingError.refused("set_mempolicy", errno.ENOTSUP, binding, needs)
        from .without import fresh_signals, start_bound  # not at import: few starts need it

        if self._fresh_signals:
            seam[_SEAM.index("preexec_fn") - 1] = fresh_signals()
        execute = super()._execute_child  # type: ignore[misc]
        with _opened_here(self._opened_by_child) as fds:
            for number, fd in fds.items():
                seam[_SEAM.index(("p2cread", "c2pwrite", "errwrite")[number]) - 1] = fd
            if binding is None:
                execute(*seam)
            else:
                self._refused, self._late = start_bound(binding, lambda: (execute(*seam), self.pid)[1])
        self.mechanism = "subprocess"


def _noted(error: OSError, program: str | bytes, cwd: str | bytes | None) -> OSError:
    """Note what an error of execve leaves unsaid; its text stays that of subprocess. Python has notes since 3.11.

    Nothing is noted about a name without a slash, because the child may look it up in another PATH.
    """
    path = os.fsdecode(program)
    if "/" in path and hasattr(error, "add_note"):
        from .unexecuted import why_unexecuted

        if why := why_unexecuted(error, os.path.join(os.fsdecode(cwd), path) if cwd else path):
            error.add_note(why.strip(" ()"))
    return error


def _same(one: tuple[Any, int], other: tuple[Any, int]) -> bool:
    """Whether two streams open alike. Paths may be text or bytes, which `python -bb` forbids to compare."""
    return (os.fsencode(one[0]), one[1]) == (os.fsencode(other[0]), other[1])


@contextmanager
def _opened_here(opened: Mapping[int, tuple[str, int]]) -> Iterator[dict[int, int]]:
    """Open, in this process and during the start, the streams that the child would have opened."""
    fds: dict[int, int] = {}
    try:
        for number, (path, flags) in opened.items():
            fds[number] = os.open(path, flags, 0o666) if path else fds[1]
        yield fds
    finally:
        for fd in set(fds.values()):
            os.close(fd)
