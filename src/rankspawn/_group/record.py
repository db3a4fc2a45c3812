"""Writes the files of a job's report and drawing, and records what they need where ranks have no group."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from .._binding import Binding
    from .._end.watch import Watch
    from .._output.report import Attempt
    from .._start.popen import Popen


def write_attempts(
    attempts: Sequence[Attempt],
    *,
    command: Sequence[str],
    nprocs: int,
    run_id: str,
    report: str | None,
    timeline: str | None,
    interrupt: int | None = None,
    first: bool = False,
) -> None:
    """Write the files.

    Args:
        attempts: In order, at least one.
        command: What each rank runs.
        nprocs: How many ranks.
        run_id: The job's name.
        report: The file for the report; None for none.
        timeline: The file for the drawing; None for none.
        interrupt: A descriptor; once it is readable, the write does not wait for the reader of a FIFO.
        first: Whether a later report follows: pipes and the like are left out then, because their reader would get two.

    Raises:
        OSError: A file cannot be written.
    """
    from .._output.report import group_report
    from .._output.timeline import timeline_text
    from .._output.write import is_special, write_report, write_text

    told = group_report(attempts, command=command, nprocs=nprocs, run_id=run_id)
    if report and not (first and is_special(report)):
        write_report(told, report, interrupt)
    if timeline and not (first and is_special(timeline)):
        write_text(timeline_text(told, timeline), timeline, interrupt)


class Record:
    """The record of a job whose ranks other code starts and reaps.

    Args:
        report: The file for the report; None for none.
        timeline: The file for the drawing; None for none.

    Attributes:
        files: The files.
    """

    def __init__(self, report: str | None, timeline: str | None) -> None:
        self.files = report, timeline
        self._attempts: list[Attempt] = []
        self._command: Any = ()
        self._run_id = ""
        self._ranks: Sequence[Popen] = ()
        self._effective: dict[int, Binding | None] = {}
        self._called_ns = 0

    def begin(self, ranks: Sequence[Popen], run_id: str, called_ns: int) -> None:
        """Note an attempt whose ranks have just been started, and what they are bound to."""
        inherited = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        self._ranks, self._command, self._run_id, self._called_ns = ranks, ranks[0].args, run_id, called_ns
        reports = [rank.binding_report for rank in ranks]
        self._effective = {number: one.effective or one.at_birth(inherited) for number, one in enumerate(reports)}

    def end(
        self, watch: Watch, collected: Mapping[int, tuple[tuple[Any, ...], bool]], why: Mapping[int, str] | None = None
    ) -> None:
        """Note that the attempt has ended, what the reaped ranks used, as reap() returns it, and why ranks ended."""
        from .._output.report import attempt

        if not self._ranks:
            return
        watch.look(0)
        ended = {number: rank.returncode for number, rank in enumerate(self._ranks) if rank.returncode is not None}
        self._attempts.append(
            attempt(
                self._ranks,
                called_ns=self._called_ns,
                exited_ns=watch.exited_ns,
                returncodes=ended,
                effective=self._effective,
                collected=collected,
                why=why or {},
            )
        )
        self._ranks = ()

    def write(self) -> None:
        """Write the files if a rank was started. Raises OSError if a file cannot be written."""
        if self._attempts:
            report, timeline = self.files
            write_attempts(
                self._attempts, command=self._command, nprocs=len(self._attempts[-1].ranks), run_id=self._run_id,
                report=report, timeline=timeline,
            )  # fmt: skip
