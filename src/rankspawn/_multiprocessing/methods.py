"""Starts the processes of a context in multiprocessing's two ways, each with a binding.

Both classes override only the standard library's ``_launch``, which does the whole start. Polling, waiting and the
child's side are the standard library's own.
"""

from __future__ import annotations

import errno
import io
import os
import socket
from contextlib import suppress
from multiprocessing import (
    forkserver,
    popen_fork,
    popen_forkserver,
    popen_spawn_posix,
    resource_tracker,
    spawn,
    util,
)
from multiprocessing.connection import wait
from multiprocessing.context import reduction, set_spawning_popen  # type: ignore[attr-defined]
from typing import Any

from .._binding import Binding
from .._place.glance import homes
from .._start.crew import RankProcess
from .._start.engine import EXTENSION_ERROR, masks
from .._start.outcome import BindingError, RefusedStep
from .._start.popen import Popen
from .._start.variables import RankVariables
from . import forked

if EXTENSION_ERROR is None:
    from .. import _spawn

# What the two launches call or override, with its parameters in 3.10 to 3.15. These are private: a new Python that
# changes one must fail here, with its name, and not in a process that is half started.
_SEAMS = {
    "popen_fork.Popen.__init__": "self process_obj",
    "popen_fork.Popen._send_signal": "self sig",
    "popen_spawn_posix.Popen._launch": "self process_obj",
    "popen_forkserver.Popen._launch": "self process_obj",
    "spawn.get_preparation_data": "name",
    "spawn.get_command_line": "",
    "spawn.spawn_main": "pipe_handle parent_pid tracker_fd",
    "spawn.prepare": "data",
    "spawn._main": "fd parent_sentinel",
    "forkserver.connect_to_new_process": "self fds",
    "forkserver.get_inherited_fds": "self",
    "forkserver.read_signed": "fd",
    "resource_tracker.getfd": "self",
    "set_spawning_popen": "popen",
}


def _check_seams() -> None:
    for name, parameters in _SEAMS.items():
        first, *attributes = name.split(".")
        found = globals()[first]
        for attribute in attributes:
            found = getattr(found, attribute, None)
        code = getattr(found, "__code__", None)
        takes = None if code is None else " ".join(code.co_varnames[: code.co_argcount])
        if takes != parameters:
            raise ImportError(
                f"rankspawn does not know this multiprocessing ({util.__file__}): {name} takes {takes!r} and not"
                f" {parameters!r}; a newer rankspawn is needed, or multiprocessing was patched first"
            )


_check_seams()


class _Child(Popen):
    """A process that multiprocessing waits for. This object only starts it."""

    def __del__(self, *_: Any, **__: Any) -> None:
        # subprocess would warn about a process that still runs, and wait for it later.
        pass


class _Rank(RankProcess):
    """As _Child, but forked from a template if possible."""

    def __del__(self, *_: Any, **__: Any) -> None:
        pass


# What a template forks need not find this package in sys.path, nor does it where it is executed.
_PROGRAM = (
    "import importlib.util as u; s = u.spec_from_file_location('rankspawn._multiprocessing.forked', {!r});"
    " m = u.module_from_spec(s); s.loader.exec_module(m); m.run()"
)


class _BoundPopen(popen_fork.Popen):
    """What the methods share: a place in the context, and signals that reach this very process or no process."""

    returncode: int | None = None
    refused: tuple[RefusedStep, ...] = ()
    late = False
    _pidfd: Any = None
    _fds: list[int]

    def __init__(self, context: Any, process_obj: Any) -> None:
        self._die_with_parent: bool = context._die_with_parent
        self.binding: Binding | None = context._place(self, process_obj)
        try:
            super().__init__(process_obj)
        except BaseException:
            context._leave(self)
            raise

    def _send_signal(self, sig: int) -> None:
        # As in rankspawn.Popen: another error means that pidfds are refused, or kill(2) fails with it again.
        if self.returncode is None and (self._pidfd is None or self._pidfd.send_signal(sig) not in (0, errno.ESRCH)):
            super()._send_signal(sig)  # type: ignore[misc]

    def _abandon(self) -> None:
        """The start has failed: end the process, wait for its end, and let go of it."""
        self.kill()
        self.poll(0)
        self.close()

    def _pickled(self, *objects: Any) -> bytes:
        """``objects`` one after the other, as the child reads them; what they pass on is noted for the child."""
        stream = io.BytesIO()
        set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            for one in objects:
                reduction.dump(one, stream)
        finally:
            set_spawning_popen(None)
        return stream.getvalue()


class SpawnPopen(_BoundPopen, popen_spawn_posix.Popen):
    """A fresh interpreter, born bound."""

    def _launch(self, process_obj: Any) -> None:
        tracker_fd: Any = resource_tracker.getfd()
        data = self._pickled(spawn.get_preparation_data(process_obj._name), process_obj)
        child_r, parent_w = os.pipe()
        passed, kept = [child_r], [parent_w]
        try:
            parent_r, child_w = os.pipe()
            passed.append(child_w)
            kept.append(parent_r)
            process = _Child(
                spawn.get_command_line(tracker_fd=tracker_fd, pipe_handle=child_r),
                executable=spawn.get_executable(),
                pass_fds=(*self._fds, tracker_fd, *passed),
                restore_signals=False,
                binding=self.binding,
                die_with_parent=self._die_with_parent,
            )
        except BaseException:
            _close(*kept)
            raise
        finally:
            _close(*passed)
        self.pid, self._pidfd, self.refused = process.pid, process._pidfd, process._refused
        self.late = process.binding_report.late
        if self._pidfd is None:
            self.sentinel = parent_r
        else:
            # A pidfd shows that the process has ended. A pipe would not, because a grandchild may hold its other end.
            self.sentinel = self._pidfd.fd
            os.close(kept.pop())
        self.finalizer = util.Finalize(self, _close, kept)
        try:
            _write(parent_w, data)
        except BaseException:
            self._abandon()
            raise


class ForkServerPopen(_BoundPopen, popen_forkserver.Popen):
    """A fork of the server, which binds itself before it reads what it is to run."""

    def _launch(self, process_obj: Any) -> None:
        binding = self.binding
        if binding is None:
            super()._launch(process_obj)  # type: ignore[misc]
            return
        reading, writing = os.pipe()
        with open(reading, "rb", 0) as report:
            with open(writing, "wb", 0):  # the child's end: by the time this one is closed, the child has its copy
                number = self.duplicate_for_child(writing)
                data = spawn.get_preparation_data(process_obj._name)
                how = masks(binding)[1:] if EXTENSION_ERROR is None else (-1 if binding.memory is None else 0, None)
                preparation = forked.binding(data, number, binding.cpus, *how)
                first, second = self._pickled(preparation), self._pickled(process_obj)
                self.sentinel, parent_w = forkserver.connect_to_new_process(self._fds)
            self.finalizer = util.Finalize(self, _close, (parent_w, self.sentinel))
            try:
                self.pid = forkserver.read_signed(self.sentinel)
                pidfd = _open_pidfd(self.pid)
                with suppress(BrokenPipeError):  # It has ended: _read_report raises for that.
                    _write(parent_w, first)
                self._read_report(report)
                self._pidfd = pidfd  # The process has answered since, so the pidfd is its own.
                if self.refused and binding.required:
                    self._abandon()
                    raise BindingError.refused(self.refused[0].step, self.refused[0].errno, binding)
                _write(parent_w, second)
            except BaseException:
                self.close()  # The process reads the end of the pipe.
                raise

    def _read_report(self, report: Any) -> None:
        # Where another process holds the child's end (a fork of another thread), its death does not end the pipe.
        answer = report.read(forked.REPORT.size) if report in wait([report, self.sentinel]) else b""
        if len(answer) != forked.REPORT.size:
            raise EOFError("the process ended before it was bound: see what it wrote to stderr")
        steps = zip(("sched_setaffinity", "set_mempolicy"), forked.REPORT.unpack(answer), strict=True)
        self.refused = tuple(RefusedStep(step, code) for step, code in steps if code)


class WarmPopen(_BoundPopen):
    """A fork of a template. It is this process's child all the same."""

    DupFd = popen_forkserver._DupFd

    def __init__(self, context: Any, process_obj: Any) -> None:
        self._fds = []
        self._template = context.template()
        super().__init__(context, process_obj)

    def duplicate_for_child(self, fd: int) -> int:
        """The index of ``fd`` among the descriptors that the process gets."""
        self._fds.append(fd)
        return len(self._fds) - 1

    def _launch(self, process_obj: Any) -> None:
        tracker = resource_tracker.getfd()
        data = self._pickled(spawn.get_preparation_data(process_obj._name), process_obj)
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = self._started(theirs)
            self.pid, self._pidfd, self.refused = process.pid, process._pidfd, process._refused
            self.late = process.binding_report.late
            kept = ours.dup().detach()  # the process sees by it when this one ends
            self.sentinel = kept if self._pidfd is None else self._pidfd.fd
            self.finalizer = util.Finalize(self, _close, (kept,))
            try:
                reduction.sendfds(ours, [tracker, *self._fds])
                ours.sendall(data)
            except BaseException:
                self._abandon()
                raise

    def _started(self, theirs: socket.socket) -> _Rank:
        program = _PROGRAM.format(forked.__file__)
        flags = util._args_from_interpreter_flags()  # type: ignore[attr-defined]
        command = [os.fsdecode(spawn.get_executable()), *flags, "-c", program, "--multiprocessing-fork"]
        process = _Rank(command, (theirs, None, None), self.binding)
        cpus = None if self.binding is None else self.binding.cpus
        left = self._template.start(
            [process], RankVariables(None, [{}]), cwd=None, die_with_parent=self._die_with_parent, cgroup=None,
            guard=-1, homes=homes([cpus]),
        )  # fmt: skip
        process.let_go()
        if left:
            process.start_alone(die_with_parent=self._die_with_parent)
        return process


POPEN = {"spawn": SpawnPopen, "forkserver": ForkServerPopen, "warm": WarmPopen}


def _write(fd: int, data: bytes) -> None:
    with open(fd, "wb", closefd=False) as pipe:
        pipe.write(data)


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _open_pidfd(pid: int) -> Any:
    """A pidfd of the process that has this number now; None if there is none."""
    if EXTENSION_ERROR is not None or not hasattr(os, "pidfd_open"):
        return None
    try:
        return _spawn.Pidfd(os.pidfd_open(pid))
    except OSError:
        return None
