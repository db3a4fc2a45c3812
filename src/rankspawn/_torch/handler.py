"""``SubprocessHandler``: torch.distributed.elastic's handler of one rank, over our Popen. It never imports torch."""

from __future__ import annotations

import os
import signal
import sys
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any

from .._binding import AffinityMode
from .._public import public
from .._start.arguments import callers_environment, variable
from .._start.engine import bind_process, bind_thread
from .._start.outcome import BindingError
from .._start.popen import Popen

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping

    from .._binding import Binding, MemoryMode, MemoryPolicy
    from .._start.outcome import RefusedStep
    from .numa_options import NumaOptions

_ON_WINDOWS = sys.platform == "win32"


def warn(text: str, *values: object) -> None:
    import logging  # not at import: it is as expensive as all the rest of this package

    logging.getLogger("rankspawn").warning(text, *values)


def warn_of_refused(local_rank: int, refused: tuple[RefusedStep, ...]) -> None:
    for step in refused:
        warn("local rank %d runs without %s", local_rank, step)


def _default_signal() -> signal.Signals:
    return signal.CTRL_C_EVENT if _ON_WINDOWS else signal.SIGTERM  # type: ignore[attr-defined, no-any-return, unused-ignore]


@public
class SubprocessHandler:
    """One rank: its process, its log files, its binding. The rank leads a session of its own.

    Args:
        entrypoint: The program.
        args: Its arguments, each converted by ``str()``.
        env: Variables added to ``os.environ`` for the rank.
        stdout: The path of a log file, which is created or truncated; None or "" inherits this process's stdout.
        stderr: As ``stdout``. If both have the same path, the file is opened once.
        local_rank_id: The rank on this machine; with ``numa_options`` also the index of its device.
        numa_options: How to bind it: rankspawn's or torch's NumaOptions, or None.

    Attributes:
        proc: The process, a Popen unless a subclass starts another.
        local_rank_id: The rank on this machine.

    Raises:
        PlacementError: This machine cannot satisfy ``numa_options``, and no fallback was asked for.
        BindingError: The system refuses the binding, and no fallback was asked for.
        OSError: The start fails, as for Popen, which may raise other errors, too.
    """

    proc: subprocess.Popen[Any]
    local_rank_id: int
    _die_with_parent = False

    def __init__(
        self,
        entrypoint: str,
        args: tuple[Any, ...],
        env: dict[str, str],
        stdout: str | None,
        stderr: str | None,
        local_rank_id: int,
        numa_options: NumaOptions | None = None,
    ) -> None:
        self._log_paths = (stdout or None, stderr or None)
        self._log_files: dict[str, IO[str]] = {}
        self.local_rank_id = local_rank_id
        self._binding = binding_for(local_rank_id, numa_options, env)
        command = (entrypoint, *map(str, args))
        # Dropped when the start fails, so that what a subclass opened is closed.
        try:
            self.proc, refused = self._start(command, {**callers_environment(), **env})
        except BaseException:
            self._close_logs()
            raise
        if isinstance(self.proc, Popen):
            # The system may have refused the same step for the thread that started the rank.
            refused = tuple(dict.fromkeys((*refused, *self.proc.binding_report.refused)))
        warn_of_refused(local_rank_id, refused)

    @property
    def _stdout(self) -> IO[str] | None:
        """The log file, as torch opens it, for subclasses that start the rank themselves. Else the rank opens it."""
        return self._log_file(self._log_paths[0])

    @property
    def _stderr(self) -> IO[str] | None:
        return self._log_file(self._log_paths[1])

    def _log_file(self, path: str | None) -> IO[str] | None:
        if path is None:
            return None
        if path not in self._log_files:
            # The rank may be writing already: its log must not be truncated under it.
            mode = "a" if hasattr(self, "proc") else "w"
            self._log_files[path] = open(path, mode)
        return self._log_files[path]

    def _close_logs(self) -> None:
        for file in self._log_files.values():
            file.close()

    def _start(
        self, command: tuple[str, ...], env: dict[str, str]
    ) -> tuple[subprocess.Popen[Any], tuple[RefusedStep, ...]]:
        """Start the process. Returns it, and the refused steps of the thread that was bound to start it."""
        if type(self)._popen is SubprocessHandler._popen or self._binding is None:
            return self._popen(command, env), ()
        # A subclass starts the process in its own way. So a new thread is bound and starts it: the process inherits
        # mask and policy of that thread, and those of the caller stay untouched.
        if hasattr(os, "sched_setaffinity"):
            from .._start.without import in_thread

            binding = self._binding
            refused, process = in_thread(lambda: (bind_thread(binding), self._popen(command, env)))
            return process, refused
        process = self._popen(command, env)
        try:
            return process, bind_process(process.pid, self._binding)
        except BindingError:
            process.kill()
            process.wait()
            raise

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[Any]:
        """Start the rank. Subclasses may override it; the binding applies all the same."""
        stdout, stderr = map(_as_path, self._log_paths)
        own_session: Any = {} if _ON_WINDOWS else {"start_new_session": True}
        return Popen(
            args,
            env=env,
            stdout=stdout,
            stderr=stderr,
            binding=self._binding,
            die_with_parent=self._die_with_parent,
            **own_session,
        )

    def close(self, death_sig: signal.Signals | None = None) -> None:
        """Signal the rank's process group, SIGTERM unless ``death_sig`` is given, and close the log files.

        On Windows the rank itself gets the signal, CTRL_C_EVENT by default. A group without members is no error, so
        closing twice is harmless.

        Args:
            death_sig: The signal; None is the default.
        """
        sig = death_sig or _default_signal()
        try:
            if _ON_WINDOWS:
                self.proc.send_signal(sig)
            elif isinstance(self.proc, Popen) and self.proc._leads_group:
                self.proc.send_signal_group(sig)
            elif self.proc.returncode is None:
                # A subclass started it, and it was not waited for, so the number is still its own.
                os.killpg(self.proc.pid, sig)
        except ProcessLookupError:
            pass
        finally:
            self._close_logs()


@public
def get_subprocess_handler(
    entrypoint: str,
    args: tuple[Any, ...],
    env: dict[str, str],
    stdout: str,
    stderr: str,
    local_rank_id: int,
    numa_options: NumaOptions | None = None,
) -> SubprocessHandler:
    """Start a rank. The signature is torch's.

    Args:
        entrypoint: The program.
        args: The program's arguments.
        env: Variables added to ``os.environ``.
        stdout: The path of a log file, or "".
        stderr: As ``stdout``.
        local_rank_id: The rank on this machine.
        numa_options: How to bind it, or None.

    Returns:
        The SubprocessHandler of the running rank.

    Raises:
        PlacementError: As for SubprocessHandler, whose other errors it raises, too.
    """
    return SubprocessHandler(
        entrypoint=entrypoint,
        args=args,
        env=env,
        stdout=stdout,
        stderr=stderr,
        local_rank_id=local_rank_id,
        numa_options=numa_options,
    )


def binding_for(local_rank: int, options: NumaOptions | None, env: Mapping[str, str]) -> Binding | None:
    """The binding of one rank; torch's own NumaOptions has the first two attributes of ours."""
    if options is None:
        return None
    # Where there are no devices to count, ranks are dealt over the nodes; LOCAL_WORLD_SIZE is the number of ranks.
    told = variable(env, "LOCAL_WORLD_SIZE") or ""
    nprocs = int(told) if told.isdecimal() and int(told) > local_rank else None
    # Not at import: programs that only start processes need none of it.
    from .._binding import PlacementError
    from .._place.visible import VARIABLES

    fall_back = options.should_fall_back_if_binding_fails
    inherited = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
    visible = tuple(map(os.environ.get, VARIABLES))
    mode, memory = AffinityMode(options.affinity_mode), getattr(options, "memory_policy", None)
    try:
        binding, notes = _plan(local_rank, nprocs, mode, memory, fall_back, inherited, visible)
    except PlacementError as error:
        if not fall_back:
            raise
        # As text, because a log record that keeps the error keeps its frames, and so this handler and its descriptors.
        warn("local rank %d starts unbound: %s", local_rank, str(error))
        return None
    for note in notes:
        warn("local rank %d: %s", local_rank, note)
    return binding


@lru_cache(maxsize=1024)
def _plan(
    local_rank: int,
    nprocs: int | None,
    mode: AffinityMode,
    memory: MemoryMode | MemoryPolicy | None,
    fall_back: bool,
    inherited: frozenset[int],
    visible: tuple[str | None, ...],
) -> tuple[Binding, tuple[str, ...]]:
    """One rank's binding and the warning about it, cached by everything that they depend on.

    The machine itself is read once for each inherited mask, because reading it for each rank takes longer than its
    start.
    """
    from .._place.plan import plan
    from .._place.topology import Topology

    (rank,) = plan(
        Topology.read(), mode, gpu_index=local_rank, nprocs=nprocs, memory_policy=memory, required=not fall_back
    )
    return rank.binding, rank.notes


def _as_path(path: str | None) -> os.PathLike[str] | None:
    from pathlib import Path  # not at import: it is the most expensive import that this module could need

    return None if path is None else Path(os.fsdecode(path))
