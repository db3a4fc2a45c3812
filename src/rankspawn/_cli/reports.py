"""--report and --timeline: the files about a run, written when it starts and when it ends."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from .._group.record import write_attempts
from .options import CommandError
from .progress import say

if TYPE_CHECKING:
    from .._group.group import RankGroup
    from .._output.report import Attempt
    from .settings import RunSettings


_MAY_PASS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE}
"""Errors that do not mean a wrong path. write_last() tries again."""


class Reports:
    """Collects the attempts of a run and writes them to the files that --report and --timeline name.

    Args:
        settings: The settings of the run.
        interrupt: A descriptor. Once it is readable, nothing waits any longer for the reader of a FIFO.
    """

    def __init__(self, settings: RunSettings, interrupt: int | None = None) -> None:
        self._report, self._timeline = settings.report, settings.timeline
        self._command, self._job = settings.command, settings.job
        self._interrupt = interrupt
        self._attempts: list[Attempt] = []

    def note_bindings(self, group: RankGroup) -> None:
        """Read each rank's binding for the files as soon as it runs, because it is lost when the rank has ended."""
        if self._is_asked:
            group.note_effective()

    def write_first(self, group: RankGroup) -> None:
        """Write both files as soon as the ranks run, so that a bad path ends the job before the ranks have done work.

        After a restart the job has work to lose. If a file cannot be written then, a line says so and the job runs on.
        The same holds in the first attempt if the disk is full or does not answer: the path may be right.

        Raises:
            CommandError: A path is wrong in the first attempt. Nothing is written at the end then.
        """
        if not self._is_asked:
            return
        try:
            self._write([*self._attempts, group.attempt()], first=True)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
            if self._attempts or error.errno in _MAY_PASS:
                say(problem)
                return
            self._report = self._timeline = None
            raise CommandError(problem) from error

    def add(self, group: RankGroup) -> None:
        """Keep the record of an attempt that has ended, for write_last()."""
        if self._is_asked:
            self._attempts.append(group.attempt())

    def write_last(self) -> None:
        """Write the records of all attempts. If a file cannot be written, print a line and raise nothing."""
        if not self._attempts:
            return
        try:
            self._write(self._attempts)
        except OSError as error:
            say(f"{error.filename}: {error.strerror}")

    @property
    def _is_asked(self) -> bool:
        return bool(self._report or self._timeline)

    def _write(self, attempts: list[Attempt], *, first: bool = False) -> None:
        """Write both files. The first time, leave out pipes, because their reader would get two reports."""
        write_attempts(
            attempts, command=self._command, nprocs=self._job.nprocs, run_id=self._job.run_id, report=self._report,
            timeline=self._timeline, interrupt=self._interrupt, first=first,
        )  # fmt: skip
