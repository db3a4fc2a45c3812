"""Starts many processes in one call of the engine, by several threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from _thread import allocate_lock as Lock
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from .arguments import candidates, command_and_program
from .ending import Stock, wait_status
from .engine import EXTENSION_ERROR, masks, mechanisms
from .popen import Popen

if EXTENSION_ERROR is None:
    from .. import _spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .._binding import Binding
    from .variables import RankVariables

# The limit on large machines: making a thread takes 10 to 20 us, and the kernel's list of processes has one lock.
_MOST_WORKERS = 16
_NO_STREAMS = (None, None, None)
_INHERITED = (-1, -1, -1)
_child_ends = itemgetter(0, 3, 5)  # of what _get_handles() returns: the child's end and the parent's of each stream


class RankProcess(Popen):
    """A Popen that is made first and started later, together with others.

    The standard class's ``__init__`` sets attributes that are the same for every rank. Here they are attributes of the
    class (see below).
    """

    _fresh_signals = True
    _leads_group = os.name == "posix"
    _given = _NO_STREAMS
    _ends = _INHERITED

    def __init__(self, command: Sequence[str], streams: tuple[Any, Any, Any], binding: Binding | None) -> None:
        self.args = command
        self._waitpid_lock = Lock()
        if binding is not None:
            self._binding = binding
        if streams != _NO_STREAMS:
            if subprocess.PIPE in streams:
                raise ValueError("a rank's stream cannot be PIPE: give it the end of a pipe")
            self._given = streams
            if os.name == "posix":
                try:
                    self._ends = _child_ends(self._get_handles(*streams))
                except BaseException:
                    self.let_go()
                    raise

    if hasattr(os, "waitid"):

        def _wait(self, timeout: float | None) -> int | None:
            if timeout is None and self._is_kept and self.returncode is None:
                if self._pidfd is None:
                    with self._waitpid_lock:
                        self._note_end(0)
                else:
                    self._note_end(0)  # without the lock, because the group needs it to reap the process
            return super()._wait(timeout)

        def _internal_poll(self, _deadstate: int | None = None, **more: Any) -> int | None:
            if self._is_kept and self.returncode is None and _deadstate is None:
                self._note_end(os.WNOHANG)
                if self._is_kept:
                    return self.returncode
            return super()._internal_poll(_deadstate, **more)  # type: ignore[misc, no-any-return]

        def _try_wait(self, wait_flags: int) -> tuple[int, int]:
            if self._is_kept:
                status = self._note_end(wait_flags)
                if self._is_kept:
                    return (0, 0) if status is None else (self.pid, status)
            return super()._try_wait(wait_flags)  # type: ignore[misc, no-any-return]

        def _note_end(self, options: int) -> int | None:
            """If it has ended, set its returncode, and return waitpid(2)'s status. Its group alone reaps it."""
            try:
                status = wait_status(self.pid, self._pidfd, options | os.WNOWAIT)
            except ChildProcessError:
                self._is_kept = False  # it has been reaped, by its group or by other code
                return None
            if status is None:
                return None
            self._handle_exitstatus(status)
            return status

    def start_alone(self, **keywords: Any) -> None:
        """Start it alone, as a usual Popen, with the same streams and binding."""
        stdin, stdout, stderr = self._given
        try:
            super().__init__(
                self.args, stdin=stdin, stdout=stdout, stderr=stderr, binding=self._binding,
                start_new_session=os.name == "posix", **keywords,
            )  # fmt: skip
        finally:
            self._opened_here = ()  # closed by Popen

    def for_template(self, cwd: Any, env: Any) -> tuple[list[Any], tuple[bytes | None, int, bytes | None], bool]:
        """What a template needs to fork it: its streams, its masks, and whether its binding is required."""
        command, program = command_and_program(self.args, None, False)
        sys.audit("subprocess.Popen", program, command, cwd, env)
        binding = self._binding
        encoded = (None, -1, None) if binding is None else masks(binding)
        return self._streams(*self._ends), encoded, binding is not None and binding.required

    def was_forked(self, outcome: tuple[int, int, int, int], cwd: Any) -> None:
        """Note that a template has forked it. Raises what Popen raises for a failed step; see _spawn.adopt()."""
        self.mechanism = "warm"
        self._closed_child_pipe_fds = True
        if not self._executed_ns:
            self._executed_ns = None  # a signal killed it in the middle of its steps
        self._check(*outcome, command_and_program(self.args, None, False)[1], cwd)

    def let_go(self) -> None:
        """Close the descriptors that were opened only for the start."""
        for fd in self._opened_here:
            os.close(fd)
        self._opened_here = ()


def _attributes_of_stock() -> dict[str, Any]:
    """The attributes that the standard class's __init__ sets without pipes, except its arguments and its lock.

    A real instance provides them, because another Python may have others. They must be constants, because all ranks
    share them.
    """

    class Asked(Stock):  # type: ignore[type-arg]
        def _execute_child(self, *_: Any) -> None:
            self._closed_child_pipe_fds = True  # as every start leaves it

    given = vars(Asked(["-"], start_new_session=os.name == "posix"))
    del given["args"], given["_waitpid_lock"]
    for name, value in given.items():
        if type(value) not in (type(None), bool, int, float, str):
            raise ImportError(
                f"rankspawn does not know this subprocess.Popen ({Stock.__init__.__code__.co_filename}): it has an"
                f" attribute {name} of type {type(value).__name__}; a newer rankspawn is needed"
            )
    return given


for _name, _value in _attributes_of_stock().items():
    setattr(RankProcess, _name, _value)


def start_by_engine(
    ranks: list[RankProcess],
    variables: RankVariables,
    *,
    cwd: str | os.PathLike[str] | None,
    die_with_parent: bool,
    cgroup: int | None,
    guard: int,
    progress: Callable[[Callable[[], int]], object] | None,
) -> bool:
    """Start those of ``ranks`` that the engine can start; return whether these are all. See start_ranks()."""
    crew = _spawn.Crew(
        len(ranks), variables.env, variables.shared, variables.numbered, cwd, True,
        signal.SIGKILL if die_with_parent else 0, -1 if cgroup is None else cgroup, guard,
    )  # fmt: skip
    _enlist(crew, ranks, variables, cwd)
    if progress is not None:
        progress(crew.started)
    return _run(crew, ranks, cwd)


def _enlist(crew: _spawn.Crew, ranks: list[RankProcess], variables: RankVariables, cwd: Any) -> None:
    known: dict[bytes, tuple[str | bytes, ...]] = {}
    last: Any = None  # the arguments that were encoded last
    for number, (rank, own) in enumerate(zip(ranks, variables.own, strict=True)):
        args, binding, env = rank.args, rank._binding, variables.of(number)
        try:
            if args is not last:
                command, program = command_and_program(args, None, False)
                found, last = None, args
            sys.audit("subprocess.Popen", program, command, cwd, env)
            if "PATH" in own:
                found, last = candidates(program, env), None
            elif found is None:
                name = os.fsencode(program)
                found = known.get(name)
                if found is None:
                    found = known[name] = candidates(program, env)
            cpu_mask, mem_mode, node_mask = (None, -1, None) if binding is None else masks(binding)
            crew.add(
                rank, command, found, own, _INHERITED if rank._given is _NO_STREAMS else rank._streams(*rank._ends),
                cpu_mask, mem_mode, node_mask, binding is None or binding.required,
            )  # fmt: skip
        except Exception as error:
            name_rank(error, number)
            raise


def _run(crew: _spawn.Crew, ranks: list[RankProcess], cwd: Any) -> bool:
    """Let each mechanism start what it can; return whether all ranks have started. The others stay untouched."""
    for mechanism in mechanisms():
        name = "clone" if mechanism == _spawn.CLONE else "posix_spawn"
        said = crew.run(mechanism, name, _workers(len(ranks)))
        left = False
        for number, outcome in said:
            if outcome is None:
                left = True
                continue
            rank = ranks[number]
            try:
                rank._check(*outcome, command_and_program(rank.args, None, False)[1], cwd)
            except OSError as error:
                name_rank(error, number)
                raise
        if not left:
            return True
    return False


def _workers(count: int) -> int:
    """How many threads start ``count`` ranks: two for each CPU that this thread may use, but one if it has one CPU.

    A thread sleeps from its clone until the child has executed. With two threads, a CPU prepares the next start
    meanwhile. Measured on 2 CPUs, one thread for each CPU took 2 to 5 % longer, and three were no better. On one CPU, a
    second thread took 4 % longer.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, 2 * cpus if cpus > 1 else 1, _MOST_WORKERS)


def name_rank(error: Exception, number: int) -> None:
    """Put the rank in front of the error's text, and replace a rank that is already there."""
    before = f"rank {getattr(error, 'rank', None)}: "
    error.rank = number  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.strerror is not None:
        error.strerror = f"rank {number}: {error.strerror.removeprefix(before)}"
        error.args = (error.errno, error.strerror)
    elif len(error.args) == 1:
        error.args = (f"rank {number}: {str(error.args[0]).removeprefix(before)}",)
