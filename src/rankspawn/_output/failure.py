"""Why a job failed: the rank that failed first, the error that it recorded, and both as text for people."""

from __future__ import annotations

import signal
import subprocess
import time
from types import MappingProxyType
from typing import TYPE_CHECKING

from .._frozen import Frozen
from .._ids import format_ids, name_ranks
from .._public import public
from .logs import last_lines, printable
from .recorded import RecordedError, read_error_file
from .words import place_in, why_by_words

_MOST_LINES = 20
_WIDEST = 300  # the most characters to print of a line
_MOST_CAUSES = 8  # of the other ranks, a line each

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from typing import Any, Literal

    from .._start.popen import Popen
    from .logs import RankFiles

# What each signal means. The sender is unknown: any signal may come from kill(2).
_MEANINGS = {
    "SIGKILL": "anyone may send it; the kernel does when memory runs out, and says so in its log",
    "SIGSEGV": "the signal of an invalid memory access",
    "SIGBUS": "the signal of an access to memory that is not there, as in a mapped file when /dev/shm is full",
    "SIGABRT": "the signal of abort(3): a failed assertion, an uncaught C++ exception",
    "SIGFPE": "the signal of an arithmetic error",
    "SIGILL": "the signal of an instruction that the processor does not have",
    "SIGSYS": "the signal of a system call that a seccomp filter forbids",
    "SIGPIPE": "the signal of a write to a pipe or socket that nobody reads",
    "SIGXCPU": "the signal of a CPU time limit that was passed",
    "SIGXFSZ": "the signal of a file size limit that was passed",
}


class LastLines(Frozen):
    """The end of what a rank had written when its failure was seen: at most 20 lines.

    Attributes:
        stream: "stderr", or "stdout" where it wrote nothing to stderr.
        lines: The lines without their newlines, printable; none where it wrote nothing at all.
        problem: Why the file cannot be read, or "".
    """

    stream: Literal["stderr", "stdout"]
    lines: tuple[str, ...]
    problem: str = ""


def read_last_lines(files: RankFiles | None) -> LastLines | None:
    """Read the end of what a rank wrote; None where it has no log files."""
    if files is None or files.stderr is None or files.stdout is None:
        return None
    streams: tuple[tuple[Literal["stderr", "stdout"], Any], ...] = ("stderr", files.stderr), ("stdout", files.stdout)
    for stream, path in streams:
        try:
            lines = last_lines(path, _MOST_LINES)
        except FileNotFoundError:
            continue
        except OSError as error:
            return LastLines(stream, (), f"cannot be read: {error.strerror}: {path}")
        if lines:
            return LastLines(stream, tuple(lines))
    return LastLines("stdout", ())


@public
class Failure(Frozen):
    """A rank that failed. ``str(failure)`` is the text that ``rankspawn run`` prints about it.

    Attributes:
        rank: Its RANK, which counts the ranks of all machines.
        returncode: As ``Popen.returncode``, negative for a signal.
        seen_at: When its end was noticed, in seconds since the epoch.
        pid: Its process id, None where it is not known.
        binding: Its binding in words, or "".
        files: Where it wrote; None where it had the launcher's output and no error file.
        error: What it recorded, None where it recorded nothing.
        sent: The signals that the launcher had sent it before it ended.
        output: The end of what it wrote; None where it had the launcher's output.
        first_rank: The RANK of this machine's local rank 0.
        others: What the other ranks did when this one had failed, "7 ranks (0-2,4-7): in all_reduce, train.py:88"; ""
            if their stacks were not taken.
        why: The cause in one line, as far as facts show it: a memory limit, a resource limit, a GPU's fault, a core, an
            exception; "" where none is known.
        lasted: Seconds from the launch call of its attempt until its end was noticed; None where that is not known.
    """

    rank: int
    returncode: int
    seen_at: float
    pid: int | None = None
    binding: str = ""
    files: RankFiles | None = None
    error: RecordedError | None = None
    sent: frozenset[int] = frozenset()
    output: LastLines | None = None
    first_rank: int = 0
    others: str = ""
    why: str = ""
    lasted: float | None = None

    @property
    def local_rank(self) -> int:
        """Its LOCAL_RANK, which counts the ranks of this machine; ``group[failure.local_rank]`` is its process."""
        return self.rank - self.first_rank

    def __str__(self) -> str:
        return describe(self).rstrip("\n")


@public
class RanksFailedError(subprocess.CalledProcessError):
    """Ranks of a group have failed. Its text is what ``rankspawn run`` prints: which rank, how, why, and its binding.

    Attributes:
        failures: The ranks that failed; the first to fail comes first.
        returncode: What that rank ended with, as ``Popen.returncode``.
        cmd: What that rank ran.
    """

    def __init__(self, failures: Sequence[Failure], cmd: Any) -> None:
        super().__init__(failures[0].returncode, cmd)
        self.failures = tuple(failures)

    def __str__(self) -> str:
        return describe(self.failures[0], self.failures[1:]).rstrip("\n")


def first_failure(failures: Iterable[Failure]) -> Failure:
    """Find the failure that came first: by the time that the rank recorded, else by the time when its end was noticed.

    This is torch's rule: recorded times are whole seconds, so both are compared as whole seconds, and among equal times
    the failure that was noticed first counts. A rank that raises may take long to end, and others may end before it
    because of it. A rank that recorded nothing and that the launcher's own signal ended comes after all others.

    Raises:
        ValueError: There is no failure.
    """
    return min(failures, key=lambda failure: (_is_ours(failure), int(_when(failure)), failure.seen_at))


def failures(
    ranks: Sequence[Popen],
    returncodes: Mapping[int, int],
    exited_ns: Mapping[int, int],
    files: Sequence[RankFiles] | None,
    sent: Mapping[int, Collection[int]] = MappingProxyType({}),
    first_rank: int = 0,
    others: str = "",
    why: Mapping[int, str] = MappingProxyType({}),
    called_ns: int | None = None,
    hung: Collection[int] = (),
) -> list[Failure]:
    """The ranks that have failed: the first failure, then the others by number.

    Args:
        ranks: The processes, by local rank.
        returncodes: How those that have ended did, by local rank.
        exited_ns: When each was seen to end, of CLOCK_MONOTONIC, by local rank.
        files: Where each writes, by local rank; None where all have the launcher's output.
        sent: The signals that the launcher sent to each rank before it ended, by local rank.
        first_rank: The RANK of this machine's local rank 0.
        others: What the other ranks did when the first had failed, as text.
        why: What the kernel says about their deaths, by local rank.
        called_ns: CLOCK_MONOTONIC when the attempt was launched.
        hung: The local ranks that were ended because they stood still. They have failed, whatever their returncode is.
    """
    failed = []
    ended_badly = [number for number, code in returncodes.items() if code or number in hung]
    first_seen = min(ended_badly, key=exited_ns.__getitem__, default=None)
    epoch = time.time() - time.monotonic()  # read once, so that ranks that were seen to end together stay equal
    for number, returncode in returncodes.items():
        if number in ended_badly:
            asked, of_rank = ranks[number].binding_report.requested, None if files is None else files[number]
            error = None if of_rank is None else read_error_file(of_rank.error)
            output = read_last_lines(of_rank)
            failed.append(
                Failure(
                    first_rank + number,
                    returncode,
                    seen_at=epoch + exited_ns[number] / 1e9,
                    pid=ranks[number].pid,
                    binding="" if asked is None else str(asked),
                    files=of_rank,
                    error=error,
                    sent=frozenset(sent.get(number, ())),
                    output=output,
                    first_rank=first_rank,
                    others=others if number == first_seen else "",
                    why=why.get(number) or why_by_words(returncode, error, () if output is None else output.lines),
                    lasted=None if called_ns is None else (exited_ns[number] - called_ns) / 1e9,
                )
            )
    first = first_failure(failed) if failed else None
    return sorted(failed, key=lambda failure: (failure is not first, failure.rank))


def _is_ours(failure: Failure) -> bool:
    """Whether the launcher's own signal ended the rank (or its program, as a shell says), and it recorded no error."""
    return failure.error is None and any(failure.returncode in (-sig, 128 + sig) for sig in failure.sent)


def _when(failure: Failure) -> float:
    recorded = None if failure.error is None else failure.error.time
    return failure.seen_at if recorded is None else recorded


def how_it_ended(returncode: int, sent: Collection[int] = ()) -> str:
    """A returncode in words: "exited with status 1", "was killed by SIGSEGV (...)".

    Args:
        returncode: As ``Popen.returncode``.
        sent: The signals that the launcher had sent.
    """
    if returncode < 0:
        name = _signal_name(-returncode)
        if -returncode in sent:
            return f"was killed by this launcher's {name}"
        return f"was killed by {name}" + (f" ({_MEANINGS[name]})" if name in _MEANINGS else "")
    by_shell = f" (as a shell whose command {_signal_name(returncode - 128)} killed)" if 128 < returncode < 193 else ""
    return f"exited with status {returncode}{by_shell}"


def _signal_name(sig: int) -> str:
    try:
        return signal.Signals(sig).name
    except ValueError:
        return f"signal {sig}"


def describe_interruption(killed: Collection[int], seconds: float) -> str:
    """How a job ended that was asked to: "interrupted; 2 ranks had to be killed after 30 s: 0-1".

    Args:
        killed: The ranks that the launcher's SIGKILL ended, at least one.
        seconds: How many seconds they had to end.
    """
    count = "1 rank" if len(killed) == 1 else f"{len(killed)} ranks"
    return f"interrupted; {count} had to be killed after {round(seconds, 1):g} s: {format_ids(killed)}"


def describe(
    first: Failure,
    others: Iterable[Failure] = (),
    *,
    lines: int = _MOST_LINES,
    kept: bool | None = None,
    shown: str = "",
) -> str:
    """Describe what happened, for people: lines of text, each with its newline.

    Args:
        first: The first failure, which is described in full.
        others: The other failures: one line for each cause, with the returncode and the cause.
        lines: The most lines of the traceback and of the log to quote.
        kept: Whether the files of ``first`` will still be there when this is read; None where they are there now.
        shown: If all that ``first`` wrote to its stderr stands above this text, the prefix of these lines; they are not
            quoted again then. "" if it was not shown.
    """
    pid = "" if first.pid is None else f" (pid {first.pid})"
    told = [f"rank {first.rank}{pid} {how_it_ended(first.returncode, first.sent)}"]
    if first.lasted is not None:
        told.append(f"  it ended at {_clock(first.seen_at)}, after {duration(first.lasted)}")
    output = first.output
    if not (shown and output is not None and output.stream == "stderr" and output.lines):
        shown = ""
    if first.why and (shown or not _is_quoted(first)):
        told.append(f"  why: {_cause(first)}")
    if first.binding:
        told.append(f"  it was bound to {first.binding}")
    traceback: list[str] = []
    if first.error is not None and first.files is not None:
        traceback = _text_lines(first.error.traceback)
        told += _recorded(
            first.error, first.files.error, traceback, lines, above=bool(shown) and _has(output, traceback)
        )
    if shown:
        told.append(f"  what it wrote to stderr is shown above, behind {shown}")
    elif output is not None:
        told += _end_of_logs(output, traceback, lines)
    if first.files is not None and first.files.stderr is not None:
        folder = first.files.stderr.parent
        if folder.exists() if kept is None else kept:
            told.append(f"  its files are in {folder}")
    others = list(others)
    told += [f"  what the others did then: {one.others}" for one in (first, *others) if one.others]
    told += _ends_of(others)
    return "".join(f"{line}\n" for line in told)


def _ends_of(others: Iterable[Failure]) -> list[str]:
    """A line for each cause of the other ranks' failures, and a last line for those without a cause of their own."""
    causes: dict[str, list[int]] = {}
    ended: dict[str, list[int]] = {}
    for other in others:
        how = (
            f"killed by {_signal_name(-other.returncode)}"
            if other.returncode < 0
            else f"exit status {other.returncode}"
        )
        if other.why and not _is_ours(other):
            cause = _cause(other) if other.returncode == 1 else f"{how}: {_cause(other)}"
            causes.setdefault(cause, []).append(other.rank)
        else:
            ended.setdefault(how, []).append(other.rank)
    told = [f"  {name_ranks(ranks)}: {cause}" for cause, ranks in list(causes.items())[:_MOST_CAUSES]]
    if more := [rank for ranks in list(causes.values())[_MOST_CAUSES:] for rank in ranks]:
        told.append(f"  {name_ranks(more)}: other causes")
    if ended:
        told.append("  others: " + "; ".join(f"{format_ids(ranks)} {how}" for how, ranks in ended.items()))
    return told


def _cause(failure: Failure) -> str:
    """Its cause and, if that is the exception at the end of its traceback, the line of code that raised it."""
    lines = list(() if failure.output is None else failure.output.lines)
    if failure.error is not None:
        lines = _text_lines(failure.error.traceback) or lines
    place = place_in(lines) if any(failure.why == line.strip() for line in lines) else ""
    return _short(failure.why) + (f" ({place})" if place else "")


def duration(seconds: float) -> str:
    """A duration in words: "12.3 s", "3 min 12 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{round(seconds, 1):g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _is_quoted(failure: Failure) -> bool:
    """Whether the cause is its last line or its recorded error, both of which are quoted anyway."""
    lines = [] if failure.output is None else [*failure.output.lines[-1:]]
    if failure.error is not None:
        lines += _text_lines(failure.error.message)[:1]
    return any(failure.why == line.strip() for line in lines)


def _has(output: LastLines | None, traceback: Sequence[str]) -> bool:
    """Whether its last lines contain the end of the traceback."""
    return output is not None and bool(traceback) and traceback[-1] in output.lines


def _recorded(
    error: RecordedError, path: str, traceback: Sequence[str], most: int, *, above: bool = False
) -> list[str]:
    """The lines about the error file: its message, and its traceback unless that stands above."""
    if error.problem:
        return [f"  its error file {path} {error.problem}"]
    when = "" if error.time is None else f", at {_clock(error.time)}"
    headline, *more = _text_lines(error.message) or ["an error without a message"]
    texts = [] if above else traceback or more
    left_out = [f"... ({len(texts) - most} lines)"] if len(texts) > most else []
    return [f"  it recorded{when}: {_short(headline)}", *_indented([*left_out, *texts[-most:]])]


def _end_of_logs(output: LastLines, traceback: Sequence[str], most: int) -> list[str]:
    """The end of what it wrote to stderr, or else to stdout, after the traceback that ``_recorded`` has quoted."""
    if output.problem:
        return [f"  its {output.stream} {output.problem}"]
    if not output.lines:
        return ["  it wrote nothing"]
    quoted = 0
    if traceback:
        quoted = next((n for n in range(len(output.lines), 0, -1) if output.lines[n - 1] == traceback[-1]), 0)
    tail = output.lines[quoted:][-most:]
    return [f"  its {output.stream} ends with:", *_indented(tail)] if tail else []


def _text_lines(text: str) -> list[str]:
    return [printable(line).rstrip() for line in text.rstrip().split("\n")] if text.strip() else []


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {_short(line)}".rstrip() for line in lines]


def _short(line: str) -> str:
    return line if len(line) <= _WIDEST else f"{line[:_WIDEST]} ..."
