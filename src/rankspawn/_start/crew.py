"""Many processes started in one call of the engine, by as many threads as make it faster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from .arguments import candidates, command_and_program
from .ending import Stock
from .engine import EXTENSION_ERROR, masks, mechanisms
from .popen import _SEAM, Popen

if EXTENSION_ERROR is None:
    from .. import _spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .._binding import Binding

# A bound for large machines: a thread takes 10 to 20 us to make, and the kernel's list of processes has one lock.
_MOST_WORKERS = 16
_NO_STREAMS = (None, None, None)
_child_ends = itemgetter(*(_SEAM.index(name) - 1 for name in ("p2cread", "c2pwrite", "errwrite")))


class RankProcess(Popen):
    """A Popen that is made first, and started later, beside others."""

    _seam: tuple[Any, ...] = ()
    _fresh_signals = True

    def __init__(
        self,
        command: Sequence[str],
        streams: tuple[Any, Any, Any],
        cwd: Any,
        env: Mapping[str, str] | None,
        binding: Binding | None,
        *,
        die_with_parent: bool = False,
        cgroup: int | None = None,
    ) -> None:
        if streams != _NO_STREAMS and subprocess.PIPE in streams:
            raise ValueError("a rank's stream cannot be PIPE: give it the end of a pipe")
        if binding is not None:
            self._binding = binding
        if die_with_parent:
            self._die_with_parent = True
        if cgroup is not None:
            self._cgroup = cgroup
        # Popen's __init__ would close, when it returns, descriptors that the rank needs open until it has started.
        try:
            Stock.__init__(
                self,
                command,
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                cwd=cwd,
                env=env,
                start_new_session=os.name == "posix",
            )
        except BaseException:
            self.let_go()
            raise

    def _execute_child(self, *seam: Any) -> None:
        """The standard class calls this when all is ready for the start; the start itself is made later."""
        self._seam = seam
        self._leads_group = os.name == "posix"

    def start_alone(self) -> None:
        """Start it alone, as any Popen."""
        super()._execute_child(*self._seam)  # type: ignore[no-untyped-call]

    def let_go(self) -> None:
        """Close what was opened only for the start."""
        for fd in self._opened_here:
            os.close(fd)
        self._opened_here = ()


def start_by_engine(
    ranks: list[RankProcess],
    *,
    env: Mapping[str, str] | None,
    rank_env: Sequence[Mapping[str, str]],
    cwd: str | os.PathLike[str] | None,
    die_with_parent: bool,
    cgroup: int | None,
    guard: int,
    progress: Callable[[Callable[[], int]], object] | None,
) -> None:
    """Start those of ``ranks`` that the engine can start; the others are left as they are. See start_ranks()."""
    death_signal = signal.SIGKILL if die_with_parent else 0
    crew = _spawn.Crew(len(ranks), env, cwd, True, death_signal, -1 if cgroup is None else cgroup, guard)
    _enlist(crew, ranks, rank_env)
    if progress is not None:
        progress(crew.started)
    _run(crew, ranks)


def _enlist(crew: _spawn.Crew, ranks: list[RankProcess], rank_env: Sequence[Mapping[str, str]]) -> None:
    known: dict[bytes, tuple[str | bytes, ...]] = {}
    for number, (rank, own) in enumerate(zip(ranks, rank_env, strict=True)):
        seam, binding = rank._seam, rank._binding
        args, cwd, env = seam[0], seam[5], seam[6]
        try:
            command, program = command_and_program(args, None, False)
            sys.audit("subprocess.Popen", program, command, cwd, env)
            name, shares_path = os.fsencode(program), "PATH" not in own
            found = known.get(name) if shares_path else None
            if found is None:
                found = candidates(program, env)
                if shares_path:
                    known[name] = found
            cpu_mask, mem_mode, node_mask = (None, -1, None) if binding is None else masks(binding)
            crew.add(
                rank, command, found, own, rank._streams(*_child_ends(seam)),
                cpu_mask, mem_mode, node_mask, binding is None or binding.required,
            )  # fmt: skip
        except Exception as error:
            name_rank(error, number)
            raise


def _run(crew: _spawn.Crew, ranks: list[RankProcess]) -> None:
    """Start what each mechanism can start. Ranks that every mechanism declines are left as they are."""
    for mechanism in mechanisms():
        said = crew.run(mechanism, _workers(len(ranks)))
        name = "clone" if mechanism == _spawn.CLONE else "posix_spawn"
        for rank in ranks:
            if rank.mechanism is None and rank._child_created:
                rank.mechanism = name
                rank._closed_child_pipe_fds = True
        left = False
        for number, outcome in said:
            if outcome is None:
                left = True
                continue
            rank = ranks[number]
            try:
                rank._check(*outcome, rank._seam[0][0], rank._seam[5])
            except OSError as error:
                name_rank(error, number)
                raise
        if not left:
            return


def _workers(count: int) -> int:
    """How many threads start ``count`` ranks: two for each CPU that this one may use, or one where there is but one.

    A thread sleeps from its clone until the child has executed, and a CPU with two has the next start ready meanwhile.
    Measured on 2 CPUs, one per CPU took 2 to 5 % longer and three were no better; on one CPU a second took 4 % longer.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, 2 * cpus if cpus > 1 else 1, _MOST_WORKERS)


def name_rank(error: Exception, number: int) -> None:
    """Put the rank in front of the error's text."""
    error.rank = number  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.strerror is not None:
        error.strerror = f"rank {number}: {error.strerror}"
        error.args = (error.errno, error.strerror)
    elif len(error.args) == 1:
        error.args = (f"rank {number}: {error.args[0]}",)
