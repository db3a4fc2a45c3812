"""Why a job failed: the rank that failed first, the error that it recorded, and both as text for people."""

from __future__ import annotations

import json
import os
import signal
import time
from types import MappingProxyType
from typing import TYPE_CHECKING

from .._frozen import Frozen
from .._ids import format_ids
from .logs import last_lines, printable, read_regular

_MOST_BYTES = 1 << 20
_WIDEST = 300  # characters of a line that are printed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from .._start.popen import Popen
    from .logs import RankFiles

# What each signal is for. The sender is not known: any signal may come from kill(2).
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


class RecordedError(Frozen):
    """What a rank left in its error file (TORCHELASTIC_ERROR_FILE), as torch's ``@record`` writes it.

    Attributes:
        message: The exception in words.
        traceback: Its traceback, "" where there is none.
        time: Seconds since the epoch, whole seconds in torch's files; None where there is none.
        raw: The text of the file.
        problem: Why the file cannot be understood, or "".
    """

    message: str
    traceback: str
    time: float | None
    raw: str
    problem: str = ""


def read_error_file(path: str | os.PathLike[str]) -> RecordedError | None:
    """Read the error that a rank recorded; None where it recorded none.

    The forms are those that torch.distributed.elastic.multiprocessing.errors writes and reads: ``{"message":
    {"message": ..., "extraInfo": {"py_callstack": ..., "timestamp": ...}}}``, and ``{"message": "text"}``. A file that
    cannot be read or understood raises nothing: ``problem`` says what is wrong with it.
    """
    try:
        data, cut = read_regular(path, _MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        return RecordedError("", "", None, "", f"cannot be read: {error.strerror}")
    raw = data.decode(errors="backslashreplace")
    if cut:
        return RecordedError("", "", None, raw, f"is larger than {_MOST_BYTES >> 20} MiB")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return RecordedError("", "", None, raw, f"is no JSON: {error}" if raw else "is empty")
    message = found.get("message") if isinstance(found, dict) else None
    if isinstance(message, str):
        return RecordedError(message, "", _seconds(found.get("timestamp")), raw)
    if not isinstance(message, dict):
        return RecordedError("", "", None, raw, "has no message")
    extra = message.get("extraInfo")
    extra = extra if isinstance(extra, dict) else {}
    text, traceback = message.get("message", ""), extra.get("py_callstack", "")
    return RecordedError(
        text if isinstance(text, str) else json.dumps(text),
        traceback if isinstance(traceback, str) else json.dumps(traceback),
        _seconds(extra.get("timestamp")),
        raw,
    )


def _seconds(timestamp: object) -> float | None:
    """A time from JSON, where torch writes it as text."""
    try:
        seconds = float(timestamp)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds < 1e11 else None


def pass_on(error: RecordedError, returncode: int, path: str | os.PathLike[str]) -> None:
    """Write the error that ended the job to the launcher's own error file, with the rank's status as its errorCode.

    torchrun does this for whoever started it and set TORCHELASTIC_ERROR_FILE. An error file that cannot be understood
    is not passed on.

    Args:
        error: What the rank recorded.
        returncode: How the rank ended, as ``Popen.returncode``.
        path: The launcher's error file.

    Raises:
        OSError: The file cannot be written.
    """
    if error.problem:
        return
    from .write import write_text

    found = json.loads(error.raw)
    if isinstance(found["message"], dict):
        found["message"]["errorCode"] = returncode
    write_text(json.dumps(found), path)


class Failure(Frozen):
    """A rank that failed.

    Attributes:
        rank: Its local rank.
        returncode: As ``Popen.returncode``, negative for a signal.
        seen_at: When its end was noticed, in seconds since the epoch.
        pid: Its process id, None where it is not known.
        binding: Its binding in words, or "".
        files: Where it wrote; None where it had the launcher's output and no error file.
        error: What it recorded, None where it recorded nothing.
        sent: The signals that the launcher had sent it before it ended.
    """

    rank: int
    returncode: int
    seen_at: float
    pid: int | None = None
    binding: str = ""
    files: RankFiles | None = None
    error: RecordedError | None = None
    sent: frozenset[int] = frozenset()


def first_failure(failures: Iterable[Failure]) -> Failure:
    """The failure that came first: by the time that the rank recorded, else by when its end was noticed.

    As in torch: recorded times are whole seconds, so both are compared as whole seconds, and of equal ones the one that
    was noticed first is taken. A rank that raises may need long to end, and others may end before it because of it. A
    rank that the launcher's own signal ended, and that recorded nothing, comes after all others.

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
) -> list[Failure]:
    """The ranks that have failed: the first failure, then the others by number.

    Args:
        ranks: The processes, by local rank.
        returncodes: How those that have ended did, by local rank.
        exited_ns: When each was seen to end, of CLOCK_MONOTONIC, by local rank.
        files: Where each writes, by local rank; None where all have the launcher's output.
        sent: The signals that the launcher sent to each rank before it ended, by local rank.
    """
    failed = []
    epoch = time.time() - time.monotonic()  # read once, so that ranks that were seen to end together stay equal
    for number, returncode in returncodes.items():
        if returncode:
            asked, of_rank = ranks[number].binding_report.requested, None if files is None else files[number]
            seen_at = epoch + exited_ns[number] / 1e9
            error = None if of_rank is None else read_error_file(of_rank.error)
            binding = "" if asked is None else str(asked)
            signals = frozenset(sent.get(number, ()))
            failed.append(Failure(number, returncode, seen_at, ranks[number].pid, binding, of_rank, error, signals))
    first = first_failure(failed) if failed else None
    return sorted(failed, key=lambda failure: (failure is not first, failure.rank))


def _is_ours(failure: Failure) -> bool:
    """Whether the launcher's own signal ended the rank, or the shell that reports so, and it recorded no error."""
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


def describe_interruption(killed: Collection[int], seconds: float, *, first_rank: int = 0) -> str:
    """How a job ended that was told to: "interrupted; 2 ranks had to be killed after 30 s: 0-1".

    Args:
        killed: The local ranks that ended by the launcher's SIGKILL, at least one.
        seconds: How long they had had to end.
        first_rank: The RANK of this machine's local rank 0.
    """
    count = "1 rank" if len(killed) == 1 else f"{len(killed)} ranks"
    ranks = format_ids(first_rank + rank for rank in killed)
    return f"interrupted; {count} had to be killed after {round(seconds, 1):g} s: {ranks}"


def describe(
    first: Failure, others: Iterable[Failure] = (), *, lines: int = 20, kept: bool = True, first_rank: int = 0
) -> str:
    """What happened, for people: lines of text, each with its newline.

    Args:
        first: The first failure, which is described in full.
        others: The other failures, of which only the end is described.
        lines: How many lines of the traceback and of the log are quoted at most.
        kept: Whether the files of ``first`` will still be there when this is read.
        first_rank: The RANK of this machine's local rank 0.
    """
    pid = "" if first.pid is None else f" (pid {first.pid})"
    told = [f"rank {first_rank + first.rank}{pid} {how_it_ended(first.returncode, first.sent)}"]
    if first.binding:
        told.append(f"  it was bound to {first.binding}")
    traceback: list[str] = []
    if first.error is not None and first.files is not None:
        traceback = _text_lines(first.error.traceback)
        told += _recorded(first.error, first.files.error, traceback, lines)
    if first.files is not None and first.files.stderr is not None and first.files.stdout is not None:
        told += _end_of_logs(first.files.stderr, first.files.stdout, traceback, lines)
        if kept:
            told.append(f"  its files are in {first.files.stderr.parent}")
    ended: dict[str, list[int]] = {}
    for other in others:
        how = f"killed by {_signal_name(-other.returncode)}" if other.returncode < 0 else f"status {other.returncode}"
        ended.setdefault(how, []).append(first_rank + other.rank)
    if ended:
        told.append("  others: " + "; ".join(f"{format_ids(ranks)} {how}" for how, ranks in ended.items()))
    return "".join(f"{line}\n" for line in told)


def _recorded(error: RecordedError, path: str, traceback: Sequence[str], most: int) -> list[str]:
    """The lines about the error file: its message and its traceback."""
    if error.problem:
        return [f"  its error file {path} {error.problem}"]
    when = "" if error.time is None else time.strftime(", at %Y-%m-%d %H:%M:%S", time.localtime(error.time))
    headline, *more = _text_lines(error.message) or ["an error without a message"]
    texts = traceback or more
    left_out = [f"... ({len(texts) - most} lines)"] if len(texts) > most else []
    return [f"  it recorded{when}: {_short(headline)}", *_indented([*left_out, *texts[-most:]])]


def _end_of_logs(stderr: Path, stdout: Path, traceback: Sequence[str], most: int) -> list[str]:
    """The end of what it wrote to stderr, or else to stdout, after the traceback that ``_recorded`` has quoted."""
    for name, path in (("stderr", stderr), ("stdout", stdout)):
        try:
            tail = last_lines(path, most)
        except FileNotFoundError:
            continue
        except OSError as error:
            return [f"  its {name} cannot be read: {error.strerror}: {path}"]
        if not tail:
            continue
        for number in range(len(tail) - 1, -1, -1):
            if traceback and tail[number] == traceback[-1]:
                del tail[: number + 1]
                break
        return [f"  its {name} ends with:", *_indented(tail)] if tail else []
    return ["  it wrote nothing"]


def _text_lines(text: str) -> list[str]:
    return [printable(line).rstrip() for line in text.rstrip().split("\n")] if text.strip() else []


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"    {_short(line)}".rstrip() for line in lines]


def _short(line: str) -> str:
    return line if len(line) <= _WIDEST else f"{line[:_WIDEST]} ..."
