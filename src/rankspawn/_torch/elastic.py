"""torch elastic's classes, with rankspawn starting and watching their ranks. Importing this module imports torch."""

from __future__ import annotations

import functools
import logging
import math
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from inspect import signature
from multiprocessing import connection, context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed.elastic.agent.server.local_elastic_agent as agents
import torch.distributed.elastic.multiprocessing.api as contexts
import torch.distributed.elastic.multiprocessing.subprocess_handler as handlers

from .._binding import AffinityMode
from .._end.deaths import Deaths
from .._end.reap import returncodes
from .._end.watch import Watch
from .._group.order import hold
from .._group.start import start_ranks
from .._multiprocessing.context import get_context
from .._start.engine import bind_thread, mechanisms
from .._start.popen import Popen
from .._start.without import in_thread
from . import deaths
from .deaths import get_error_handler as get_error_handler
from .ending import grace_for_all, look_at_others
from .extras import Extras
from .handed_out import get_free_port as get_free_port
from .handed_out import release_port
from .handler import SubprocessHandler, binding_for, warn_of_refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._binding import Binding
    from .._end.cgroup import GroupCgroup
    from .._end.guard import Guard
    from .numa_options import NumaOptions

_log = logging.getLogger(__name__)
_SIBLINGS_SECONDS = 0.1
"""Seconds that the others have to end by themselves after a failure. The same cause often breaks all ranks, and a
rank that the agent ends is reported with the agent's signal instead of its own error. torch gives them the rest of
its interval, which is as long by default, but may be 0."""
_NO_PAUSE = 1e-9  # seconds; torch requires more than 0
_DIE_WITH_AGENT = sys.platform == "linux" and bool(mechanisms())

TORCHS_HANDLER = handlers.get_subprocess_handler
"""torch's own function, even if another one replaces it where torch looks it up."""

default_numa_options: NumaOptions | None = None
"""The default for launches without NumaOptions of their own; rankspawn.torchrun.install() sets it."""
extras = Extras()
"""What rankspawn does beyond torch; rankspawn.torchrun.install() sets it."""


def _numa_options(launched: NumaOptions | None) -> NumaOptions | None:
    """The options of the launch, or the default. torch's own options get the memory policy of the default."""
    if launched is None or default_numa_options is None:
        return launched or default_numa_options
    if hasattr(launched, "memory_policy"):
        return launched
    mode, fall_back = AffinityMode(launched.affinity_mode), launched.should_fall_back_if_binding_fails
    return replace(default_numa_options, affinity_mode=mode, should_fall_back_if_binding_fails=fall_back)


class Worker(SubprocessHandler):
    """A rank of an elastic agent. It dies with the agent, however the agent ends."""

    _die_with_parent = _DIE_WITH_AGENT
    proc: Popen
    sent: set[int]
    """The signals that the agent sent while the rank ran."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self.sent = set()
        super().__init__(*args, **keywords)

    @classmethod
    def started(cls, process: Popen, local_rank_id: int, stdout: str, stderr: str) -> Worker:
        """The handler of a rank that start_ranks has started."""
        handler = cls.__new__(cls)
        handler.sent = set()
        handler.proc = process
        handler.local_rank_id = local_rank_id
        handler._log_paths = (stdout or None, stderr or None)
        handler._log_files = {}
        return handler

    def close(self, death_sig: Any = None) -> None:
        if self.proc.poll() is None:
            self.sent.add(death_sig or signal.SIGTERM)
        super().close(death_sig)


def get_subprocess_handler(
    entrypoint: str,
    args: tuple[Any, ...],
    env: dict[str, str],
    stdout: str,
    stderr: str,
    local_rank_id: int,
    numa_options: NumaOptions | None = None,
) -> Worker:
    """Start a rank, with torch's signature, for other code's contexts that derive from torch's."""
    return Worker(entrypoint, args, env, stdout, stderr, local_rank_id, _numa_options(numa_options))


class _Waiting:
    """What both contexts add to torch's: a wait for ranks sleeps until they end."""

    nprocs: int
    entrypoint: Any
    args: dict[int, tuple[Any, ...]]
    envs: dict[int, dict[str, str]]
    _poll: Any
    _numa_options: NumaOptions | None = None  # torch before 2.9 has none
    grace = 30
    """Seconds from the death signal to SIGKILL if close() gets no timeout, as when a rank has failed."""

    def _bindings(self) -> list[Binding | None]:
        options = _numa_options(self._numa_options)
        if options is not None and extras.place:
            return extras.bindings(self.nprocs, options)
        return [binding_for(number, options, self.envs[number]) for number in range(self.nprocs)]

    def close(self, death_sig: Any = None, timeout: int | None = None) -> None:
        super().close(death_sig, self.grace if timeout is None else timeout)  # type: ignore[misc]

    def wait(self, timeout: float = -1, period: float = 1) -> Any:
        end = math.inf if timeout < 0 else time.monotonic() + timeout
        while not (result := self._poll()) and (left := end - time.monotonic()) > 0:
            self.rest(min(period, left))
        return result

    def rest(self, seconds: float) -> None:
        """Sleep ``seconds``, or until every rank has ended, or a little after one has failed."""
        raise NotImplementedError


class SubprocessContext(_Waiting, contexts.SubprocessContext):  # type: ignore[misc]
    """torch's context, but one call starts all its ranks, or none."""

    subprocess_handlers: dict[int, SubprocessHandler]
    _watch: Watch | None = None
    _guard: Guard | None = None
    _deaths: Deaths | None = None
    _why: dict[int, str]
    _resources: ExitStack | None = None

    def _start(self) -> None:
        if self.subprocess_handlers:
            super()._start()  # this raises
        deaths.forget()
        self._deaths, self._why = Deaths(time.monotonic_ns()), {}
        start = contexts.get_subprocess_handler
        if start is not get_subprocess_handler and start is not TORCHS_HANDLER:
            self._start_through(start)
            return
        with ExitStack() as resources:
            guard, cgroup = hold(resources, extras.guard, extras.cgroup, None)
            self._start_ranks(guard, cgroup)
            self._guard, self._resources = guard, resources.pop_all()

    def _start_ranks(self, guard: Guard | None, cgroup: GroupCgroup | None) -> None:
        called_ns = time.monotonic_ns()
        numbers = range(self.nprocs)
        logs = [(self.stdouts[number], self.stderrs[number]) for number in numbers]
        ranks: list[Popen] = []
        start_ranks(
            ranks,
            [(self.entrypoint, *map(str, self.args[number])) for number in numbers],
            env=None,
            rank_env=[self.envs[number] for number in numbers],
            bindings=self._bindings(),
            streams=[(None, Path(out) if out else None, Path(err) if err else None) for out, err in logs],
            die_with_parent=_DIE_WITH_AGENT,
            cgroup=None if cgroup is None else cgroup.fd,
            guard=-1 if guard is None else guard.fd,
            template=extras.template,
        )
        if extras.record is not None:
            extras.record.begin(ranks, self.envs[0].get("TORCHELASTIC_RUN_ID", ""), called_ns)
        self.subprocess_handlers = {number: Worker.started(ranks[number], number, *logs[number]) for number in numbers}
        for number in numbers:
            warn_of_refused(number, ranks[number].binding_report.refused)
        self._watch = Watch(ranks)

    def _start_through(self, start: Callable[..., Any]) -> None:
        """Start the ranks with a function that other code put in the place of torch's, and bind them all the same.

        A process inherits mask and policy of the thread that starts it, so a thread is made and bound for each rank.
        """
        known = {"numa_options": None} if "numa_options" in signature(TORCHS_HANDLER).parameters else {}
        started: dict[int, Any] = {}
        try:
            for number, binding in enumerate(self._bindings()):
                call = functools.partial(
                    start,
                    entrypoint=self.entrypoint,
                    args=self.args[number],
                    env=self.envs[number],
                    stdout=self.stdouts[number],
                    stderr=self.stderrs[number],
                    local_rank_id=number,
                    **known,
                )
                if binding is None:
                    started[number] = call()
                    continue
                refused, started[number] = in_thread(lambda: (bind_thread(binding), call()))  # noqa: B023
                warn_of_refused(number, refused)
        except BaseException:
            for handler in started.values():
                handler.close(signal.SIGKILL)
                handler.proc.wait()
            raise
        self.subprocess_handlers = started

    def rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        failed = False
        watch = self._watch
        if watch is None and self.subprocess_handlers:  # other code's function started them: no pidfd shows their end
            time.sleep(seconds)
        while watch is not None and watch.running and (left := end - time.monotonic()) > 0:
            if any(watch.returncodes[number] for number in watch.look(extras.after_orphans(left))) and not failed:
                failed, end = True, time.monotonic() + _SIBLINGS_SECONDS

    def _poll(self) -> Any:
        # torch reaps the ended ranks, and the kernel then forgets why they ended.
        ours = {number: handler for number, handler in self.subprocess_handlers.items() if isinstance(handler, Worker)}
        alive = {number: handler for number, handler in ours.items() if handler.proc.returncode is None}
        codes = dict(zip(alive, returncodes([handler.proc for handler in alive.values()]), strict=True))
        dead = {number: code for number, code in codes.items() if code is not None and code < 0}
        ended = {number: (ours[number].proc, code, ours[number].sent) for number, code in dead.items()}
        if self._deaths is not None and ended:
            self._why |= self._deaths.why(ended)
        result = super()._poll()
        for number, failure in self._failures.items():
            if number in ours and -failure.exitcode in ours[number].sent:
                deaths.note(failure, "sent by the agent")
            elif self._why.get(number):
                deaths.note(failure, self._why[number])
        return result

    def _close(self, death_sig: Any, timeout: int = 30) -> None:
        if self._failures and extras.stacks and death_sig != signal.SIGKILL:
            running = [one for one in self.subprocess_handlers if one not in self._failures]
            alive = {one: proc for one in running if (proc := self.subprocess_handlers[one].proc).poll() is None}
            # The error files lie in the folders of the ranks, whether or not the ranks have logs.
            look_at_others(alive, self._failures, self.envs, Path(self.error_files[0]).parent.with_name("stacks.txt"))
        if self._failures:
            # torch signals only the groups of running ranks. The groups of failed ranks may still have members.
            for handler in self.subprocess_handlers.values():
                if handler.proc.returncode is not None:
                    handler.close(death_sig)
        processes = [handler.proc for handler in self.subprocess_handlers.values()]
        grace = 0 if death_sig == signal.SIGKILL else timeout
        with grace_for_all(processes, death_sig, grace, extras.after_orphans):
            super()._close(death_sig, timeout)
        if self._guard is not None:
            # torch has reaped the ranks, so only the guard knows which sessions are still theirs.
            self._guard.end_what_is_left()
            self._guard = None
        if self._resources is not None:
            self._resources.close()
            self._resources = None
        if self._watch is not None:
            if extras.record is not None:
                extras.record.end(self._watch, {}, self._why)
            self._watch.close()
            self._watch = None


class MultiprocessContext(_Waiting, contexts.MultiprocessContext):  # type: ignore[misc]
    """torch's context, but its processes are bound before they import what they run."""

    start_method: str

    def _start(self) -> None:
        if self._pc is not None or os.name != "posix":
            super()._start()
            return
        method, bindings = self.start_method, self._bindings()
        template = extras.template_of_functions(method, self.nprocs)
        self._numa_options = None  # torch itself binds in the process, after its imports, and needs numactl
        if method == "fork":
            self._bind_after_fork(bindings)
            super()._start()
            return
        processes: list[Any] = []

        def place(process: Any) -> Binding | None:
            processes.append(process)
            return bindings[len(processes) - 1]

        # torch asks multiprocessing for a context by its name, so ours is registered during the start.
        name = f"rankspawn-{id(self)}"
        known: dict[str, Any] = context._concrete_contexts  # type: ignore[attr-defined]
        how = method if template is None else "warm"
        die = method == "spawn" and _DIE_WITH_AGENT
        known[name] = get_context(how, place, die_with_parent=die, preload=template)
        self.start_method = name
        try:
            super()._start()
        except BaseException:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
            raise
        finally:
            self.start_method = method
            del known[name]
        for number, process in enumerate(processes):
            warn_of_refused(number, process.binding_report.refused)

    def _bind_after_fork(self, bindings: list[Binding | None]) -> None:
        """Bind in the process itself: after a fork it has one thread and imports nothing first."""
        entrypoint = self.entrypoint

        @functools.wraps(entrypoint)
        def bound(number: int, *args: Any) -> Any:
            binding = bindings[number]
            if binding is not None:
                warn_of_refused(number, bind_thread(binding))
            return entrypoint(*args)

        self.entrypoint = bound
        self.args = {number: (number, *args) for number, args in self.args.items()}

    def rest(self, seconds: float) -> None:
        """As for programs, but a function ends with its return value, and torch reports one failure at most."""
        if os.name != "posix":
            return time.sleep(seconds)
        end = time.monotonic() + seconds
        values = {queue._reader.fileno() for rank, queue in self._ret_vals.items() if rank not in self._return_values}
        while values and (left := end - time.monotonic()) > 0:
            ready = connection.wait([*values, *self._pc.sentinels], extras.after_orphans(left))
            if not values.issuperset(ready):
                break
            values.difference_update(ready)
        return None


class LocalElasticAgent(agents.LocalElasticAgent):  # type: ignore[misc]
    """torch's agent, but the pause between two looks at the ranks ends when they have ended.

    torch's loop sleeps for the interval of its spec and calls ``_monitor_workers``, which each agent defines: the pause
    moves from the loop to that method.
    """

    def __init__(self, spec: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(replace(spec, monitor_interval=_NO_PAUSE), *args, **kwargs)
        self._pause = spec.monitor_interval

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        finally:
            release_port()

    def _start_workers(self, worker_group: Any) -> Any:
        started = super()._start_workers(worker_group)
        if isinstance(self._pcontext, _Waiting):
            self._pcontext.grace = getattr(self, "_shutdown_timeout", _Waiting.grace)  # torch before 2.9 has none
        return started

    def _stop_workers(self, worker_group: Any) -> None:
        # Before a restart torch gives the ranks 30 seconds, whatever --shutdown-timeout says (pytorch#192815).
        if hasattr(self, "_shutdown_timeout"):
            self._shutdown(timeout=self._shutdown_timeout)
        else:
            super()._stop_workers(worker_group)

    def _monitor_workers(self, worker_group: Any) -> Any:
        rest = getattr(self._pcontext, "rest", time.sleep)  # other code's contexts have none
        rest(self._pause)
        return super()._monitor_workers(worker_group)
