"""Where the ranks' stdout and stderr go: which to files, which to the terminal, and with which prefix."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager

from .._frozen import Frozen
from .colours import coloured_prefix
from .options import CommandError
from .vocabulary import BARE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .._group.job import Job
    from .._output.failure import Failure
    from .._output.logs import LogFolder, RankFiles
    from .._output.tee import Tee

_OUT, _ERR = 1, 2
_OUR_PREFIX, _TORCHRUNS_PREFIX = "[rank ${rank}]:", "[${role_name}${local_rank}]:"


class Streams(Frozen):
    """The settings of the ranks' streams.

    Attributes:
        filed: What goes to log files, by local rank: 1 for stdout, 2 for stderr, 3 for both.
        shown: What of that is also shown here, in the same form.
        hidden: The local ranks whose output is never shown here, whether it goes to a file or not.
        prefix: The prefix of each shown line, with $rank, $local_rank and $role_name in it.
        copied: Words for stdout and for stderr. Lines that contain one of them are copied to a file of their own.
        kept: Whether the files are kept without --log-dir.
    """

    filed: tuple[int, ...]
    shown: tuple[int, ...]
    hidden: frozenset[int]
    prefix: str
    copied: tuple[tuple[str, ...], tuple[str, ...]]
    kept: bool

    @classmethod
    def read(cls, args: argparse.Namespace, nprocs: int, environ: Mapping[str, str]) -> Streams:
        """Read them from the parsed command line, with torchrun's meaning.

        --tee without a value, and --log-dir without --redirects and --tee, mean all streams.
        """
        bare, redirects, tee = args.tee == BARE, args.redirects, args.tee
        if bare:
            tee = {-1: 3}
        elif tee is None and redirects is None and args.log_dir is not None:
            redirects = {-1: 3}
        shown = _by_rank(tee, nprocs)
        template = args.log_line_prefix_template or environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE")
        copied = args.duplicate_stdout_filters or (), args.duplicate_stderr_filters or ()
        only = args.local_ranks_filter
        return cls(
            filed=tuple([a | b for a, b in zip(_by_rank(redirects, nprocs), shown, strict=True)]),
            shown=shown,
            hidden=frozenset(range(nprocs)) - only if only else frozenset(),
            prefix=template or (_TORCHRUNS_PREFIX if tee and not bare else _OUR_PREFIX),
            copied=copied,
            kept=any(_by_rank(redirects, nprocs)) or any(copied),
        )

    @property
    def tee(self) -> bool:
        """Whether anything that goes to a file is also shown here."""
        return any(self.shown)

    @property
    def silent(self) -> bool:
        """Whether no rank writes to the launcher's own streams, by itself or by --tee."""
        return not self.tee and all(bits == 3 or rank in self.hidden for rank, bits in enumerate(self.filed))

    def without_files(self) -> Streams:
        """Send what would go to files to this process's own output instead. Hidden output stays hidden."""
        nothing = (0,) * len(self.filed)
        return self.replace(filed=nothing, shown=nothing)

    def files(self, files: Sequence[RankFiles]) -> list[RankFiles]:
        """Keep only the log files that are written. Hidden output that goes to no file is thrown away."""
        nowhere = None
        if self.hidden:
            from pathlib import Path

            nowhere = Path(os.devnull)
        made = []
        for rank, (of_rank, bits) in enumerate(zip(files, self.filed, strict=True)):
            other = nowhere if rank in self.hidden else None
            out, err = (of_rank.stdout if bits & _OUT else other), (of_rank.stderr if bits & _ERR else other)
            made.append(of_rank.replace(stdout=out, stderr=err))
        return made

    def files_to_show(self, files: Sequence[RankFiles]) -> list[RankFiles]:
        """Keep only the log files that are also shown here."""
        made = []
        for rank, (of_rank, bits) in enumerate(zip(files, self.shown, strict=True)):
            bits = 0 if rank in self.hidden else bits
            made.append(
                of_rank.replace(
                    stdout=of_rank.stdout if bits & _OUT else None, stderr=of_rank.stderr if bits & _ERR else None
                )
            )
        return made

    def prefix_of(self, first_rank: int, role: str) -> Callable[[int], str]:
        """Make a function that returns the prefix of a RANK's lines."""
        from string import Template

        template = Template(self.prefix)
        return lambda rank: template.safe_substitute(rank=rank, local_rank=rank - first_rank, role_name=role)


class Shown:
    """What --tee has shown of one attempt, so that a report can point to lines above it."""

    def __init__(self, tee: Tee, prefix: Callable[[int], str]) -> None:
        self._tee, self._prefix = tee, prefix

    def prefix_above(self, failure: Failure) -> str:
        """The prefix of a rank's lines if all of its stderr was shown; else ""."""
        path = None if failure.files is None else failure.files.stderr
        return self._prefix(failure.rank) if path is not None and self._tee.has_shown(path) else ""


@contextmanager
def shown(
    streams: Streams, job: Job, files: Sequence[RankFiles], folder: LogFolder, interrupt: int
) -> Iterator[Shown | None]:
    """While the block runs, show what the ranks write (--tee), and copy the lines that the filters choose.

    Args:
        streams: The settings.
        job: The job of this attempt.
        files: The ranks' log files.
        folder: The folder of those files. It is kept if not all of them could be shown.
        interrupt: A descriptor. Once it is readable, nothing waits any longer for somebody to read the rest.

    Raises:
        CommandError: The system allows no thread for it.
    """
    if not streams.tee and not any(streams.copied):
        yield None
        return
    from .._output.tee import show

    plain = streams.prefix_of(job.first_rank, job.role)
    prefix = coloured_prefix(plain)
    of_ranks = streams.files_to_show(files)
    with ExitStack() as showing:
        try:
            tee = showing.enter_context(show(of_ranks, job.first_rank, None, folder, interrupt, prefix=prefix))
            for stream, words in zip(("stdout", "stderr"), streams.copied, strict=True):
                if words:
                    showing.enter_context(_copied(stream, words, of_ranks, job, folder, plain))
        except RuntimeError as error:
            raise CommandError(f"--tee: {error}") from error
        yield Shown(tee, plain)


@contextmanager
def _copied(
    stream: str,
    words: Sequence[str],
    files: Sequence[RankFiles],
    job: Job,
    folder: LogFolder,
    prefix: Callable[[int], str],
) -> Iterator[None]:
    """While the block runs, copy the lines of a stream that contain one of the words to a file."""
    from .._output.tee import Tee, sources

    followed = [one for one in sources(files, job.first_rank) if one.is_stderr == (stream == "stderr")]
    path = os.path.join(folder.path, f"attempt_{job.restart_count}", f"filtered_{stream}.log")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb", buffering=0) as file:
        with Tee(followed, prefix=lambda rank, _: prefix(rank), out=file.fileno(), err=file.fileno(), words=words):
            yield


def _by_rank(given: Mapping[int, int] | None, nprocs: int) -> tuple[int, ...]:
    bits = given or {}
    return tuple([bits.get(rank, bits.get(-1, 0)) for rank in range(nprocs)])
