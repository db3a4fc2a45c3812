"""--report and --timeline: the files that say what became of a run, written while it runs and at its end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .options import CommandError
from .progress import say

if TYPE_CHECKING:
    from .._group.group import RankGroup
    from .._output.report import Attempt
    from .settings import RunSettings


class Reports:
    """Collects the attempts of a run and writes them to the files that --report and --timeline name."""

    def __init__(self, settings: RunSettings) -> None:
        self._report, self._timeline = settings.report, settings.timeline
        self._command, self._job = settings.command, settings.job
        self._attempts: list[Attempt] = []

    def write_first(self, group: RankGroup) -> None:
        """Write what is known as soon as the ranks run, so that a bad path is said before their work.

        Raises CommandError where a file cannot be written; nothing is written at the end then.
        """
        if not self._is_asked:
            return
        try:
            self._write([*self._attempts, group.attempt()], first=True)
        except OSError as error:
            self._report = self._timeline = None
            raise CommandError(f"{error.filename}: {error.strerror}") from error

    def add(self, group: RankGroup) -> None:
        """Keep what became of an attempt, for write_last()."""
        if self._is_asked:
            self._attempts.append(group.attempt())

    def write_last(self) -> None:
        """Write what became of all attempts; a failure is said."""
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
        """first: not to pipes and the like, of which a reader would have two."""
        from .._output.report import group_report, write_report, write_text
        from .._output.timeline import timeline_svg

        report = group_report(attempts, command=self._command, nprocs=self._job.nprocs, run_id=self._job.run_id)
        if self._report and not (first and _is_special(self._report)):
            write_report(report, self._report)
        if self._timeline and not (first and _is_special(self._timeline)):
            write_text(timeline_svg(report), self._timeline)


def _is_special(path: str) -> bool:
    return os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)) and not os.path.isdir(path)
