"""torch elastic's own classes, with their ranks started and watched by ours. Importing this module imports torch."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed.elastic.agent.server.local_elastic_agent as agents
import torch.distributed.elastic.multiprocessing.api as contexts

from ._crew import start_ranks
from ._engine import mechanisms
from ._handler import SubprocessHandler, binding_for
from ._watch import Watch

if TYPE_CHECKING:
    from ._numa_options import NumaOptions
    from ._popen import Popen

_SIBLINGS_SECONDS = 0.1
"""Once a rank has failed, how long the others may take to fail by themselves. What broke one has often broken all, and
a rank that the agent ends may not have said why. It is torch's default interval between two looks."""
_NO_PAUSE = 1e-9  # seconds; torch wants more than none

default_numa_options: NumaOptions | None = None
"""For launches that name none themselves; rankspawn.torchrun.install() sets it."""


class Worker(SubprocessHandler):
    """A rank of an elastic agent. It dies with the agent, however the agent ends."""

    _die_with_parent = sys.platform == "linux" and bool(mechanisms())

    @classmethod
    def started(cls, process: Popen, local_rank_id: int, stdout: str, stderr: str) -> Worker:
        """The handler of a rank that start_ranks has started."""
        handler = cls.__new__(cls)
        handler.proc = process
        handler.local_rank_id = local_rank_id
        handler._log_paths = (stdout or None, stderr or None)
        handler._log_files = {}
        handler._tell_refused()
        return handler


def get_subprocess_handler(
    entrypoint: str,
    args: tuple[Any, ...],
    env: dict[str, str],
    stdout: str,
    stderr: str,
    local_rank_id: int,
    numa_options: NumaOptions | None = None,
) -> Worker:
    """A rank, with torch's signature: for contexts of others, who derive from torch's."""
    return Worker(entrypoint, args, env, stdout, stderr, local_rank_id, numa_options or default_numa_options)


class SubprocessContext(contexts.SubprocessContext):  # type: ignore[misc]
    """torch's, but its ranks are started by one call, all or none, and waiting for them is sleeping on their pidfds."""

    subprocess_handlers: dict[int, SubprocessHandler]
    _watch: Watch | None = None

    def _start(self) -> None:
        if self.subprocess_handlers:
            super()._start()  # which raises
        options = getattr(self, "_numa_options", None) or default_numa_options  # torch before 2.9 has none
        numbers = range(self.nprocs)
        logs = [(self.stdouts[number], self.stderrs[number]) for number in numbers]
        ranks: list[Popen] = []
        start_ranks(
            ranks,
            [(self.entrypoint, *map(str, self.args[number])) for number in numbers],
            env=None,
            rank_env=[self.envs[number] for number in numbers],
            bindings=[binding_for(number, options, self.envs[number]) for number in numbers],
            streams=[(None, Path(out) if out else None, Path(err) if err else None) for out, err in logs],
            die_with_parent=Worker._die_with_parent,
        )
        self.subprocess_handlers = {number: Worker.started(ranks[number], number, *logs[number]) for number in numbers}
        self._watch = Watch(ranks)

    def wait(self, timeout: float = -1, period: float = 1) -> Any:
        end = time.monotonic() + timeout
        while not (result := self._poll()):
            left = period if timeout < 0 else min(period, end - time.monotonic())
            if left <= 0:
                break
            self.rest(left)
        return result

    def rest(self, seconds: float) -> None:
        """Sleep ``seconds``, or until every rank has ended; once one has failed, only so long that others can, too."""
        end = time.monotonic() + seconds
        watch = self._watch
        while watch is not None and watch.running and (left := end - time.monotonic()) > 0:
            if any(watch.returncodes[number] for number in watch.look(left)):
                end = min(end, time.monotonic() + _SIBLINGS_SECONDS)

    def _close(self, death_sig: Any, timeout: int = 30) -> None:
        if self._failures:
            # torch signals the groups of ranks that run. What a failed rank has left behind is told to end as well.
            for handler in self.subprocess_handlers.values():
                if handler.proc.poll() is not None:
                    handler.close(death_sig)
        super()._close(death_sig, timeout)
        if self._watch is not None:
            self._watch.close()
            self._watch = None


class LocalElasticAgent(agents.LocalElasticAgent):  # type: ignore[misc]
    """torch's, but the pause between two looks at the ranks is over when they have ended.

    torch's loop sleeps for the interval of its spec and calls ``_monitor_workers``, which agents define for themselves:
    the pause is taken from the loop and made there.
    """

    def __init__(self, spec: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(replace(spec, monitor_interval=_NO_PAUSE), *args, **kwargs)
        self._pause = spec.monitor_interval

    def _monitor_workers(self, worker_group: Any) -> Any:
        rest = getattr(self._pcontext, "rest", time.sleep)  # contexts of others have none
        rest(self._pause)
        return super()._monitor_workers(worker_group)
