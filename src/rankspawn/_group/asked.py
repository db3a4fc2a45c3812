"""Checks the arguments of ``launch``, and the variables in its ``env``, before anything is started."""

from __future__ import annotations

import operator
import os
import signal
from collections.abc import Mapping, Sequence, Set
from math import isnan
from typing import TYPE_CHECKING, Any

from .._binding import FLAG, PLACEMENT_KINDS, Binding, affinity_mode, is_integer, or_none, refuse_other_kinds
from .job import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from .._binding import Kind


_PATH = or_none("a path", lambda given: isinstance(given, (str, bytes, os.PathLike)))
_FLAG_OR_NONE = or_none("True, False", FLAG[1])
_NUMBER: Kind = "an integer", is_integer
_TEXT: Kind = "a text", lambda given: isinstance(given, str)

_KINDS: dict[str, Kind] = {
    **PLACEMENT_KINDS,
    "keep_going": FLAG,
    "capture_output": FLAG,
    "handle_signals": FLAG,
    "stacks": FLAG,
    "guard": _FLAG_OR_NONE,
    "die_with_parent": _FLAG_OR_NONE,
    "cwd": _PATH,
    "cgroup": _PATH,
    "temporary": _PATH,
    "log_dir": or_none("a text, a path", lambda given: isinstance(given, (str, os.PathLike))),
    "tee": ("True, False or a text stream", lambda given: isinstance(given, bool) or _is_text_stream(given)),
    "tee_prefix": ('a text like "[rank {rank}]:"', _TEXT[1]),
    "tee_ranks": or_none("a collection of local ranks", lambda given: _is_integers(given)),
    "on_line": ("a function that takes a RankLine", lambda given: given is None or callable(given)),
    "progress": or_none("a function", callable),
    "job.nprocs": _NUMBER,
    "job.master_port": _NUMBER,
    "job.master_addr": _TEXT,
    "job.run_id": _TEXT,
    "job.nnodes": _NUMBER,
    "job.node_rank": _NUMBER,
    "job.restart_count": _NUMBER,
    "job.max_restarts": _NUMBER,
    "job.role": _TEXT,
}
"""What each argument of ``launch`` must be, if it has no function of its own below, and each field of ``job``."""

_CO_COROUTINE, _CO_ASYNC_GENERATOR = 0x80, 0x200  # as in inspect, whose import takes milliseconds


def check_kinds(**given: object) -> None:
    """Raise TypeError for the first argument that has the wrong type."""
    refuse_other_kinds(_KINDS, given)


def check_numa(numa: object) -> None:
    """Raise TypeError or PlacementError if it is no value of ``numa``."""
    if numa is not None and not (isinstance(numa, str) and numa in ("auto", "none")):
        affinity_mode(numa, "auto", "none")


def check_output(
    files: Sequence[object] | None,
    log_dir: object,
    tee: object,
    tee_prefix: str,
    tee_ranks: Collection[int] | None,
    on_line: Callable[..., object] | None,
    *,
    job: Job,
    max_restarts: int,
) -> None:
    """Check where lines go; ``check_kinds`` has checked the types. Raises TypeError and ValueError."""
    if log_dir == "":
        raise ValueError("log_dir: expected a folder, got ''")
    if files is not None and log_dir is not None:
        raise ValueError("log_dir and files exclude each other: give one of them")
    if files is not None and max_restarts:
        raise ValueError("files are those of one attempt: with max_restarts, give log_dir")
    if files is not None:
        from .._output.logs import RankFiles

        for number, of_rank in enumerate(files):
            if not isinstance(of_rank, RankFiles):
                raise TypeError(f"files[{number}]: expected a RankFiles, got {of_rank!r}; rank_files() makes them")
    if tee_ranks is not None and not tee:
        raise ValueError("tee_ranks needs tee")
    for rank in tee_ranks or ():
        if not 0 <= rank < job.nprocs:
            raise ValueError(f"tee_ranks: expected local ranks, from 0 to {job.nprocs - 1}, got {rank!r}")
    try:
        tee_prefix.format(rank=0)
    except (AttributeError, LookupError, ValueError):
        raise ValueError(f"tee_prefix: expected {_KINDS['tee_prefix'][0]}, got {tee_prefix!r}") from None
    if on_line is not None and _is_async(on_line):
        raise TypeError(
            f"on_line: expected a plain function, got {on_line!r}; in asyncio, loop over the group's lines() instead"
        )


def _is_text_stream(given: object) -> bool:
    if not callable(getattr(given, "write", None)):
        return False
    import io

    return not isinstance(given, (io.RawIOBase, io.BufferedIOBase))


def _is_integers(given: Any) -> bool:
    return not isinstance(given, (str, bytes, Mapping)) and hasattr(given, "__len__") and all(map(is_integer, given))


def _is_async(function: Callable[..., object]) -> bool:
    """Whether a call of it, or of what a functools.partial calls, makes a coroutine and runs no code of it."""
    function = getattr(function, "func", function)
    codes = [getattr(one, "__code__", None) for one in (function, type(function).__call__)]
    return any(code is not None and code.co_flags & (_CO_COROUTINE | _CO_ASYNC_GENERATOR) for code in codes)


def check_signal(sig: object) -> None:
    """Raise TypeError or ValueError if it is not the number of a signal."""
    if isinstance(sig, bool) or not isinstance(sig, int):
        raise TypeError(f"sig: expected the number of a signal, got {sig!r}")
    if not 0 <= sig < signal.NSIG:
        raise ValueError(f"sig: expected the number of a signal, from 1 to {signal.NSIG - 1}, got {sig}")


def check_grace(grace: object) -> None:
    """Raise TypeError or ValueError if it is neither seconds to wait nor None."""
    if grace is not None and not _seconds("grace", grace) >= 0:
        raise ValueError(f"grace: expected a non-negative number of seconds, got {grace}")


def check_signal_to(name: str, to: object) -> None:
    """Raise ValueError if the argument of that name does not say which processes of a rank get a signal."""
    if to not in ("rank", "group", "session"):
        raise ValueError(f"{name}: expected 'rank', 'group' or 'session', got {to!r}")


def check_timeout(timeout: object) -> None:
    """Raise TypeError or ValueError if it is neither a number of seconds nor None."""
    if timeout is not None and isnan(_seconds("timeout", timeout)):
        raise ValueError(f"timeout: expected a number of seconds, got {timeout}")


def _seconds(name: str, given: Any) -> float:
    if isinstance(given, bool) or not hasattr(given, "__float__"):
        raise TypeError(f"{name}: expected a number of seconds, got {given!r}")
    return float(given)


def commands_of_ranks(args: Sequence[str] | Callable[[int], Sequence[str]], nprocs: int) -> list[Sequence[str]]:
    """What each rank runs.

    Raises:
        TypeError: ``args``, or what it returns for a rank, is not a list of words.
        ValueError: The list is empty.
    """
    if callable(args):
        return [_command(f"args({rank})", args(rank)) for rank in range(nprocs)]
    return [_command("args", args)] * nprocs


def _command(name: str, words: Any) -> Sequence[str]:
    if isinstance(words, (str, bytes)):
        example = '["sh", "-c", "echo hi"]'
        raise TypeError(f"{name}: expected a list of words, got {words!r}; a line for a shell is {example}")
    if isinstance(words, (Set, Mapping)) or not hasattr(words, "__len__"):
        or_function = " or a function that gives one" if name == "args" else ""
        raise TypeError(f"{name}: expected a list of words{or_function}, got {words!r}")
    if not len(words):
        raise ValueError(f"{name}: expected a program and its arguments, got {words!r}")
    for number, word in enumerate(words):
        if not isinstance(word, (str, bytes, os.PathLike)):
            raise TypeError(f"{name}[{number}]: expected a text or a path, got {word!r}")
    return words  # type: ignore[no-any-return]


def number_of_ranks(nprocs: Any) -> int:
    """``nprocs`` as an int. Raises TypeError and ValueError where it is no positive integer."""
    try:
        if isinstance(nprocs, bool):
            raise TypeError
        count = operator.index(nprocs)
    except TypeError:
        raise TypeError(f"nprocs: expected a positive integer, got {nprocs!r}") from None
    if count < 1:
        raise ValueError(f"nprocs: expected a positive integer, got {count}: a job has at least one rank")
    return count


def checked_job(job: Any, nprocs: int, max_restarts: Any) -> Job:
    """The job, made where none was given.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The arguments do not fit each other.
    """
    if job is not None and not isinstance(job, Job):
        raise TypeError(f"job: expected a Job or None, got {job!r}")
    if isinstance(max_restarts, bool) or not isinstance(max_restarts, int):
        raise TypeError(f"max_restarts: expected a non-negative integer, got {max_restarts!r}")
    if max_restarts < 0:
        raise ValueError(f"max_restarts: expected a non-negative integer, got {max_restarts}")
    if job is None:
        return Job(nprocs, max_restarts=max_restarts)
    _check_fields(job)
    if job.nprocs != nprocs:
        raise ValueError(f"nprocs: expected {job.nprocs}, as in job, got {nprocs}")
    if not job.master_port and job.nnodes > 1:
        raise ValueError("job.master_port: expected a port that the other machines know, got 0 (any free port)")
    if not max_restarts:
        return job
    if job.nnodes > 1:
        # The ranks of one machine would meet those that another has not ended yet.
        raise ValueError("max_restarts is for one machine: rankspawn torchrun restarts a job of several")
    if job.max_restarts not in (0, max_restarts):
        raise ValueError(f"max_restarts: expected {job.max_restarts}, as in job, got {max_restarts}")
    return job._replace(max_restarts=max_restarts)


def _check_fields(job: Job) -> None:
    fields = job._asdict()
    refuse_other_kinds(_KINDS, {f"job.{name}": value for name, value in fields.items()})
    for name, least, most in (
        ("nprocs", 1, None),
        ("master_port", 0, 65535),
        ("nnodes", 1, None),
        ("node_rank", 0, job.nnodes - 1),
        ("restart_count", 0, None),
        ("max_restarts", 0, None),
    ):
        if fields[name] < least or (most is not None and fields[name] > most):
            wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"job.{name}: expected an integer {wanted}, got {fields[name]!r}")


def check_ranks(
    nprocs: int,
    *,
    bindings: Sequence[object] | None,
    rank_env: Sequence[object] | None,
    files: Sequence[object] | None,
) -> None:
    """Check what was given for each rank. Raises TypeError and ValueError."""
    for name, given in (("bindings", bindings), ("rank_env", rank_env), ("files", files)):
        if given is None:
            continue
        if isinstance(given, (str, bytes, Mapping, Binding)) or not hasattr(given, "__len__"):
            raise TypeError(f"{name}: expected a sequence with an item for each rank, got {given!r}")
        if len(given) != nprocs:
            raise ValueError(f"{name}: expected {nprocs} items, one for each rank, got {len(given)}")
    for number, binding in enumerate(bindings or ()):
        if binding is not None and not isinstance(binding, Binding):
            raise TypeError(f"bindings[{number}]: expected a Binding or None, got {binding!r}")
    for number, variables in enumerate(rank_env or ()):
        check_environment(f"rank_env[{number}]", variables)


def check_stdin(stdin: object, job: Job) -> None:
    """Raise TypeError or ValueError if ``stdin`` does not name the ranks that have this process's stdin."""
    expected = f"stdin: expected 'all', 'none' or the number of a rank, from 0 to {job.world_size - 1}, got {stdin!r}"
    if isinstance(stdin, bool) or not isinstance(stdin, (str, int)):
        raise TypeError(expected)
    if stdin not in ("all", "none") if isinstance(stdin, str) else not 0 <= stdin < job.world_size:
        raise ValueError(expected)


def check_environment(name: str, env: object) -> None:
    """Raise TypeError if no environment can be made of it."""
    if not isinstance(env, Mapping):
        raise TypeError(f"{name}: expected a mapping of names to texts, got {env!r}")
    for variable, value in env.items():
        if not isinstance(variable, (str, bytes)):
            raise TypeError(f"{name}: expected texts as names, got {variable!r}")
        if not isinstance(value, (str, bytes, os.PathLike)):
            raise TypeError(f"{name}[{variable!r}]: expected a text, got {value!r}")


def refuse_overridden(env: Mapping[str, Any], ours: Mapping[str, str | None]) -> None:
    """Raise ValueError for a variable of the job that the caller has set in ``env``.

    The job is the one source of these variables, for the ranks and for ``group.job``. If ``env`` won, the two would
    differ, and a variable that differs from rank to rank would be wrong. A value that ``env`` copied from this
    process's environment, as a copy of os.environ does under another launcher, was not set for this job: it is
    replaced.

    Args:
        env: As it was given.
        ours: The job's variables; None for a value that differs from rank to rank.
    """
    for name in ours.keys() & env.keys():
        theirs = os.fsdecode(env[name])
        if theirs not in (ours[name], os.environ.get(name)):
            by_job = "for each rank" if ours[name] is None else f"to {ours[name]!r}"
            raise ValueError(
                f"env sets {name} to {theirs!r}, and the job sets it {by_job}: give it in job=Job(...), or in rank_env,"
                " which wins over both"
            )
