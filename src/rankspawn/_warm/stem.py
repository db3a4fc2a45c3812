"""One template, as the launcher sees it: a process that forks ranks, which are the launcher's children."""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .. import _spawn
from .._binding import Binding
from .._end.ranks import end_ranks
from .._ids import format_ids
from .._start.crew import RankProcess, start_by_engine
from .._start.variables import RankVariables
from .adoption import adopting
from .command import PythonCommand, first_folder
from .wire import receive, send

if TYPE_CHECKING:
    from .._output.form import TemplateReport

# A template that has imported needs only milliseconds for each of these.
_ANSWER_SECONDS = 60.0
_KILL_SECONDS = 10.0
_LOOK_SECONDS = 0.1

# The importer finds this very package, wherever it is, without an entry in sys.path.
_PROGRAM = (
    "import sys, importlib.util as u;"
    "s = u.spec_from_file_location('rankspawn', {0!r} + '/__init__.py', submodule_search_locations=[{0!r}]);"
    "m = sys.modules['rankspawn'] = u.module_from_spec(s); s.loader.exec_module(m);"
    "from rankspawn._warm.importer import run; run()"
)


class Stem:
    """A template: first its importer, then, after ``adopt()``, the process that forks ranks.

    Attributes:
        pid: The pid of the stem; before ``adopt()``, that of the importer.
        env: The environment of the imports.
        prepared: What ``imports.prepare`` returned; empty before.
        seconds: How long it took until it was ready.
        was_ready: Whether ranks could ever be forked from it.
        refused: Why no rank can be forked from it; None while ranks can.
        forked: How many ranks have been forked from it.
    """

    def __init__(
        self,
        command: PythonCommand,
        modules: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        binding: Binding | None,
        cgroup: int | None,
        guard: int,
        lasts: bool,
    ) -> None:
        self._lasts = lasts
        self.env, self.binding = dict(env), binding
        self.prepared: dict[str, Any] = {}
        self.seconds, self.was_ready = 0.0, False
        self.refused: str | None = None
        self.forked = 0
        self._began = time.monotonic()
        self._pidfd: Any = None
        self._owner = os.getpid()
        self._socket, theirs = socket.socketpair()
        self.importer: RankProcess | None = None
        try:
            program = _PROGRAM.format(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
            with theirs:
                output = _output()
                importer = RankProcess(
                    [command.python, *command.flags, "-c", program],
                    (theirs, output, output), binding,
                )  # fmt: skip
                self.importer = importer
                start_by_engine(
                    [importer], RankVariables(env, [{}]), cwd=cwd, die_with_parent=True, cgroup=cgroup, guard=guard,
                    progress=None,
                )  # fmt: skip
                importer.let_go()
            self.pid = importer.pid
            send(self._socket, {"modules": list(modules), "folder": first_folder(command, cwd)})
        except OSError as error:
            self.close()
            raise OSError(error.errno, f"the importer: {os.strerror(error.errno or 0)}") from error
        except BaseException:
            self.close()
            raise

    @property
    def works(self) -> bool:
        """Whether ranks can be forked from it."""
        return self.refused is None and self._pidfd is not None

    def adopt(self, seconds: float, interrupt: Callable[[], object] | None = None) -> None:
        """Wait until it has imported and is ready. If that fails, ``refused`` says why, and the process has ended.

        Args:
            seconds: How long the imports may take, from the start on.
            interrupt: A function, called ten times a second during the imports. If it raises, the process and the call
                end.
        """
        try:
            if interrupt is not None:
                while not _wait_for(self._socket.fileno(), _LOOK_SECONDS) and self._left(seconds) > 0:
                    interrupt()
            self._adopt(seconds)
        except (EOFError, OSError, subprocess.TimeoutExpired) as error:
            self.refused = self.refused or _why(error, seconds)
        finally:
            if not self.works:
                self.close()

    def _left(self, seconds: float) -> float:
        return max(0.0, self._began + seconds - time.monotonic())

    def _adopt(self, seconds: float) -> None:
        self._socket.settimeout(max(0.001, self._left(seconds)))
        told, _ = receive(self._socket)
        self.prepared = told["prepared"]
        self.refused = self.prepared.get("refused")
        if self.refused is not None:
            return
        self._socket.settimeout(_ANSWER_SECONDS)
        assert self.importer is not None
        with adopting(self.importer) as known:
            send(self._socket, {"fork": True})
            self.pid = known.pid = receive(self._socket)[0]["stem"]
            self.importer.wait(_ANSWER_SECONDS)
            self._pidfd = _spawn.Pidfd(os.pidfd_open(self.pid))
        self.importer = None
        send(self._socket, {**_adopted(), "lasts": self._lasts})
        self.refused = receive(self._socket)[0]["refused"]
        self.seconds, self.was_ready = time.monotonic() - self._began, self.refused is None

    def fork(self, request: dict[str, Any], fds: Sequence[int], ranks: Sequence[RankProcess]) -> dict[int, Any]:
        """Fork ranks, and give each to its owner. Returns when the ranks have taken their steps.

        Args:
            request: The request for importer.py. This function adds its first two descriptors.
            fds: The descriptors that the request refers to.
            ranks: The owners of the ranks.

        Returns:
            By index in ``ranks``, what ``_spawn.spawn`` would return. A missing rank was not started: the template has
            ended, and ``refused`` says so.
        """
        size = len(ranks) * _spawn.RESULT_BYTES
        memory = _shared_memory()
        reading, done = os.pipe()
        started: dict[int, Any] = {}
        try:
            os.ftruncate(memory, size)
            with mmap.mmap(memory, size) as results:
                try:
                    try:
                        self._socket.settimeout(_ANSWER_SECONDS)
                        send(self._socket, request, [memory, done, *fds])
                    finally:
                        os.close(done)
                    receive(self._socket)
                except (EOFError, OSError) as error:
                    self.refused = _why(error, _ANSWER_SECONDS, "was forking ranks")
                except BaseException:
                    self.refused = "its last request was interrupted"
                    raise
                finally:
                    if self.refused is not None:
                        self.close()
                    # No more ranks are made. The end of the process also closes the pipe.
                    _wait_for(reading, None)
                    for place, rank in enumerate(ranks):
                        outcome = _spawn.adopt(rank, results, place)
                        if outcome is not None:
                            started[place] = outcome
        finally:
            os.close(memory)
            os.close(reading)
        self.forked += len(started)
        return started

    def edited(self) -> list[str]:
        """The files of modules that have changed since they were imported."""
        found = []
        for path, modified in self.prepared.get("files", {}).items():
            with suppress(OSError):
                if os.stat(path).st_mtime_ns != modified:
                    found.append(path)
        return found

    def is_alive(self) -> bool:
        """Whether the process still runs. If it has ended, reap it and say so in ``refused``."""
        if self.works and self._ended(0):
            self.refused = "the template has ended"
            self.close()
        return self.works

    def _ended(self, seconds: float) -> bool:
        return _wait_for(self._pidfd.fd, seconds)

    def report(self) -> TemplateReport:
        """Describe it and what it has done, as plain data."""
        cpus = None if self.binding is None else self.binding.cpus
        return {
            "pid": self.pid,
            "seconds": self.seconds,
            "modules": self.prepared.get("modules", {}),
            "failed": self.prepared.get("failed", {}),
            "environment_read": self.prepared.get("environment_read", {}),
            "cpus": None if cpus is None else format_ids(cpus),
            "ranks": self.forked,
            "refused": self.refused,
        }

    def close(self) -> None:
        """End the process. Ranks that were forked from it run on. Harmless when done twice.

        A forked copy of the launcher only closes its copy of the socket.
        """
        self._socket.close()
        importer, pidfd = self.importer, self._pidfd
        self.importer = self._pidfd = None
        if self._owner != os.getpid():
            return
        if importer is not None:
            importer.let_go()
            end_ranks([importer])
        if pidfd is not None:
            pidfd.send_signal(signal.SIGKILL)
            self._pidfd = pidfd
            self._ended(_KILL_SECONDS)
            self._pidfd = None
            with suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)


def _adopted(descriptors: str = "/proc/self/fd", threads: str = "/proc/self/task") -> dict[str, Any]:
    return {"launcher": os.getpid(), "descriptors": descriptors, "threads": threads}


def _shared_memory() -> int:
    """A descriptor of new memory that several processes can map."""
    try:
        return os.memfd_create("rankspawn", os.MFD_CLOEXEC)
    except AttributeError:  # this Python was built for a C library older than 2.27
        import tempfile

        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())


def _wait_for(fd: int, seconds: float | None) -> bool:
    """Wait until a descriptor is readable or at its end. Returns whether it is. Its number may be above FD_SETSIZE."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(None if seconds is None else seconds * 1000))


def _output() -> int:
    """Where the importer writes: this process's stderr, because stdout may be data."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2


def _why(error: BaseException, seconds: float, when: str = "imported") -> str:
    if isinstance(error, TimeoutError):
        return f"the template did not answer within {seconds:g} seconds while it {when}"
    if isinstance(error, (EOFError, ConnectionError)):
        return f"the template ended while it {when}"
    return f"the template failed while it {when}: {error}"
