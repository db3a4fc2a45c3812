"""``launch(max_restarts=)``: starts all ranks of a group again after a failure."""

from __future__ import annotations

import threading
import time
from _thread import get_ident
from collections.abc import Callable
from typing import TYPE_CHECKING

from .._end.deferral import Deferral
from .._end.ranks import end_ranks, name_stuck
from .job import Job

if TYPE_CHECKING:
    from contextlib import ExitStack
    from typing import Any, Protocol

    from .._output.failure import Failure
    from .._start.popen import Popen
    from .order import Started

    class Group(Protocol):
        """The part of a RankGroup that a restart needs."""

        job: Job
        stop_asked: tuple[int, float | None] | None

        @property
        def running(self) -> tuple[int, ...]: ...
        @property
        def first_failure(self) -> int | None: ...
        @property
        def is_closed(self) -> bool: ...
        def failures(self) -> list[Failure]: ...
        def end_attempt(self) -> dict[int, str]: ...
        def begin(self, started: Started) -> None: ...
        def close(self) -> None: ...


class Restarts:
    """The restarts of one group. Any thread that waits for the group makes them, one at a time.

    A signal handler that closes the group in the middle of a restart closes it right after that.

    Args:
        start: Starts the ranks of a job: ``Order.start``.
        resources: What holds the ranks of the present attempt.
        new_port: Whether each attempt has a port of its own.
        done: Called with the group after each restart, so that ``handle_signals`` handles a signal that came meanwhile.

    Attributes:
        is_active: Whether a restart is being made.
    """

    def __init__(
        self,
        start: Callable[[Job, int, ExitStack, list[Popen]], Started],
        resources: ExitStack,
        *,
        new_port: bool,
        done: Callable[[Any], object] | None,
    ) -> None:
        self._start, self._resources = start, resources
        self._new_port, self._done = new_port, done
        self._lock, self._thread = threading.Lock(), 0
        self._over = self._closes = False

    @property
    def is_active(self) -> bool:
        return bool(self._thread)

    def after_end(self, group: Group) -> bool:
        """Start the ranks again if one has failed and a restart is left. Returns whether there are ranks to wait for.

        Raises:
            OSError: As launch(). There is no other try.
            TimeoutError: A killed process of the last attempt does not end.
        """
        if self._thread == get_ident():
            return False  # a signal handler that waits, in the middle of a restart
        with self._lock:
            if group.running:
                return True  # another thread has done it
            job = group.job
            failed = group.first_failure is not None and group.stop_asked is None and not group.is_closed
            if self._over or not failed or job.restart_count >= job.max_restarts:
                return False
            self._thread, self._over = get_ident(), True
            try:
                self._start_again(group)
                self._over = False
            finally:
                self._thread = 0
        if self._closes:
            group.close()
        if self._done is not None:
            self._done(group)
        return True

    def postpone_close(self) -> bool:
        """Whether to close the group later, because this is a signal handler in the middle of a restart."""
        if self._thread == get_ident():
            self._closes = True
            return True
        with self._lock:
            return False

    def _start_again(self, group: Group) -> None:
        job = group.job
        # The last attempt's ranks may have left their port in a state that refuses a listener.
        port = 0 if self._new_port else job.master_port
        job = job._replace(restart_count=job.restart_count + 1, master_port=port)
        failures = group.failures()
        with Deferral():
            if stuck := group.end_attempt():
                raise TimeoutError(name_stuck(stuck))
            self._resources.close()
        _log(failures, job)
        ranks: list[Popen] = []
        try:
            group.begin(self._start(job, time.monotonic_ns(), self._resources, ranks))
        except BaseException:
            with Deferral():
                end_ranks(ranks)
            raise


def _log(failures: list[Failure], job: Job) -> None:
    """Log what the command prints about a restart. Without handlers, the module logging prints it to stderr."""
    import logging

    from .._output.failure import describe

    told = describe(failures[0], failures[1:]).rstrip()
    logging.getLogger("rankspawn").warning("%s\nrestart %d of %d", told, job.restart_count, job.max_restarts)
