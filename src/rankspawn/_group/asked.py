"""Checks the arguments of ``launch``, and the variables in its ``env``, before anything is started."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._binding import Binding
from .job import Job

if TYPE_CHECKING:
    from collections.abc import Callable


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
    try:
        count = len(words)
    except TypeError:
        or_function = " or a function that gives one" if name == "args" else ""
        raise TypeError(f"{name}: expected a list of words{or_function}, got {words!r}") from None
    if not count:
        raise ValueError(f"{name}: expected a program and its arguments, got {words!r}")
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
