"""What becomes of the ranks' stdout and stderr: which go to files, which are shown, and behind which prefix."""

from __future__ import annotations

import os

from .._frozen import Frozen
from .vocabulary import BARE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    from .._output.logs import RankFiles

_OUT, _ERR = 1, 2
_OUR_PREFIX, _TORCHRUNS_PREFIX = "[rank ${rank}]:", "[${role_name}${local_rank}]:"


class Streams(Frozen):
    """What was asked of the ranks' streams.

    Attributes:
        filed: What goes to log files, by local rank: 1 for stdout, 2 for stderr, 3 for both.
        shown: What of that is shown as well.
        hidden: The local ranks of which nothing is shown, be it in a file or not.
        prefix: Of a line that is shown, with $rank, $local_rank and $role_name in it.
        copied: The words for which lines of stdout, and of stderr, are copied to a file of their own.
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
        """Take them from the parsed command line, with torchrun's meaning.

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
            hidden=frozenset() if only is None else frozenset(range(nprocs)) - only,
            prefix=template or (_TORCHRUNS_PREFIX if tee and not bare else _OUR_PREFIX),
            copied=copied,
            kept=any(_by_rank(redirects, nprocs)) or any(copied),
        )

    @property
    def tee(self) -> bool:
        """Whether anything is shown that goes to a file."""
        return any(self.shown)

    @property
    def silent(self) -> bool:
        """Whether no rank writes to the launcher's own streams, by itself or by --tee."""
        return not self.tee and all(bits == 3 or rank in self.hidden for rank, bits in enumerate(self.filed))

    def without_files(self) -> Streams:
        """Have what would go to files go where this process's own output goes; what is hidden stays so."""
        nothing = (0,) * len(self.filed)
        return self.replace(filed=nothing, shown=nothing)

    def files(self, files: Sequence[RankFiles]) -> list[RankFiles]:
        """Leave of the ranks' log files those that are written; what is hidden and goes to no file is thrown away."""
        from pathlib import Path

        made = []
        for rank, (of_rank, bits) in enumerate(zip(files, self.filed, strict=True)):
            other = Path(os.devnull) if rank in self.hidden else None
            out, err = (of_rank.stdout if bits & _OUT else other), (of_rank.stderr if bits & _ERR else other)
            made.append(of_rank.replace(stdout=out, stderr=err))
        return made

    def files_to_show(self, files: Sequence[RankFiles]) -> list[RankFiles]:
        """Leave of the ranks' log files those that are shown."""
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
        """Make the function from a RANK to the prefix of its lines."""
        from string import Template

        template = Template(self.prefix)
        return lambda rank: template.safe_substitute(rank=rank, local_rank=rank - first_rank, role_name=role)


def _by_rank(given: Mapping[int, int] | None, nprocs: int) -> tuple[int, ...]:
    bits = given or {}
    return tuple([bits.get(rank, bits.get(-1, 0)) for rank in range(nprocs)])
