"""What the ranks of a group write, line by line: for a function, a loop, or a loop in asyncio."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .._end.deadline import left, sooner

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from .._end.watch import Watch
    from .._output.lines import LineReader, RankLine
    from .._output.logs import RankFiles
    from .ending import Ending
    from .job import Job


class Lined:
    """The part of a RankGroup that reads what the ranks write. The group makes the attributes."""

    files: tuple[RankFiles, ...] | None
    job: Job
    _watch: Watch
    _ending: Ending
    _closed: bool
    _on_line: Callable[[RankLine], object] | None
    _loops: list[Loop]

    if TYPE_CHECKING:

        def advance(self, timeout: float | None = 0) -> bool: ...
        def _hang_due(self) -> float | None: ...

    def lines(self) -> Lines:
        """Iterate over the lines that the ranks write: ``for line in group.lines()``, or ``async for``.

        The loop does what ``wait`` and ``await group`` do, and ends when they would return and no line is left. The
        ranks need log files: launch them with ``log_dir``, ``tee``, ``capture_output`` or ``on_line``.

        Returns:
            RankLine objects, each with ``rank``, ``stream`` and ``text``; those of one stream are in their order.

        Raises:
            ValueError: The ranks have no log files, because they write to this process's output; or they had temporary
                ones, and the group is closed.
            TimeoutError: In the loop, a killed rank does not end.
            OSError: In the loop, a file cannot be read.
        """
        if self.files is None:
            raise ValueError("the ranks have no log files: launch them with capture_output=True, or with log_dir")
        self._refuse_if_gone()
        return Lines(self)

    def _refuse_if_gone(self) -> None:
        from .._output.tee import sources

        paths = [source.path for source in sources(self.files or ())] if self._closed else []
        if paths and not any(map(os.path.exists, paths)):
            raise ValueError("the group is closed, and its temporary log files are gone: give log_dir to keep them")

    def _begin_lines(self) -> None:
        """Begin to read the files of a new attempt."""
        self._reader = None if self._on_line is None else self._new_reader()
        for loop in self._loops:
            loop.readers.append(self._new_reader())

    def _new_reader(self) -> LineReader:
        from .._output.lines import LineReader
        from .._output.tee import sources

        return LineReader(sources(self.files or (), self.job.first_rank))

    @contextmanager
    def _loop(self) -> Iterator[Loop]:
        self._refuse_if_gone()
        loop = Loop(self._new_reader())
        self._loops.append(loop)
        try:
            yield loop
        finally:
            self._loops.remove(loop)
            for reader in loop.readers:
                reader.close()

    def _due(self) -> float | None:
        """When the next thing is to be done."""
        due = sooner(self._ending.due, self._hang_due())
        return due if self._reader is None else sooner(due, self._reader.due)

    def _hand_lines(self) -> None:
        """Give ``on_line`` what has been written."""
        if self._reader is not None and self._on_line is not None:
            for line in self._reader.read():
                self._on_line(line)

    def _end_lines(self) -> None:
        """Give ``on_line`` the rest, because the ranks have ended. Loops over ``lines()`` may continue."""
        for loop in self._loops:
            loop.readers[-1].end()
        reader: LineReader | None
        reader, self._reader = self._reader, None
        if reader is not None and self._on_line is not None:
            try:
                reader.end()
                while found := reader.read():
                    for line in found:
                        self._on_line(line)
            finally:
                reader.close()


class Lines:
    """What ``RankGroup.lines()`` returns: an iterable, also for ``async for``, of RankLine objects."""

    def __init__(self, group: Lined) -> None:
        self._group = group

    def __iter__(self) -> Iterator[RankLine]:
        group = self._group
        with group._loop() as loop:
            going = group.advance()
            while (found := loop.read()) or going:
                yield from found
                going = group.advance(0 if found else left(loop.due))

    async def __aiter__(self) -> AsyncIterator[RankLine]:
        group = self._group
        with group._loop() as loop:
            going = group.advance()
            while (found := loop.read()) or going:
                for line in found:
                    yield line
                if not found:
                    await group._watch.sleep(sooner(group._due(), loop.due))
                going = group.advance()


class Loop:
    """The readers of one loop over the lines: one for the attempt that it is at, and one for each later attempt."""

    def __init__(self, reader: LineReader) -> None:
        self.readers = [reader]

    @property
    def due(self) -> float:
        return self.readers[0].due

    def read(self) -> list[RankLine]:
        """The next lines; empty if there are none now."""
        while not (found := self.readers[0].read()) and len(self.readers) > 1:
            self.readers.pop(0).close()
        return found
