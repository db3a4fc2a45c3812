"""All the ranks of a job, or none: many starts in one call of the engine."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from .._binding import is_sequence
from .._end.ranks import end_ranks
from .._start.crew import RankProcess, name_rank, start_by_engine
from .._start.engine import mechanisms, why_no_engine
from .._start.variables import RankVariables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Literal

    from .._binding import Binding
    from .._start.popen import Popen
    from .._warm.template import Template


def start_ranks(
    ranks: list[Popen],
    commands: Sequence[Sequence[str]],
    *,
    env: Mapping[str, str] | None,
    rank_env: Sequence[Mapping[str, str]] | None = None,
    shared: Mapping[str, str] | None = None,
    numbered: Mapping[str, int] | None = None,
    bindings: Sequence[Binding | None],
    streams: Sequence[tuple[Any, Any, Any]],
    cwd: str | os.PathLike[str] | None = None,
    die_with_parent: bool = False,
    cgroup: int | None = None,
    guard: int = -1,
    progress: Callable[[Callable[[], int]], object] | None = None,
    template: Template | None = None,
) -> None:
    """Start a rank for each of ``commands``, each in a session of its own, with as many threads as make it faster.

    Args:
        ranks: An empty list. It holds all the Popen objects before the first of them is started, so that the
            code that catches an exception can end them.
        commands: What each runs.
        env: The variables that all inherit; None is the caller's environment.
        rank_env: By rank, its own variables, which replace all others.
        shared: The variables that all have beside ``env``.
        numbered: Variables whose value is a number that grows with the rank, as RANK's does: name -> the first rank's.
        bindings: By rank.
        streams: By rank, stdin, stdout and stderr as Popen takes them, except PIPE.
        cwd: The directory that they start in.
        die_with_parent: As for Popen.
        cgroup: A descriptor of a cgroup v2's directory.
        guard: A pipe that each rank writes its pid to (a pid_t, 4 bytes) once it leads its session, before its program
            runs; -1 for none.
        progress: Called once, before the first start, with a function that any thread may call to ask how many ranks
            have been started so far.
        template: The Template that ranks are forked from instead of executed: a warm start.

    Raises:
        OSError: What Popen raises when one cannot be started, with the rank in front of its text and as its attribute
            ``rank``. The ranks that were started have been killed by then, with their sessions, and reaped;
            ``ranks`` keeps only those that do not end, because this process may not kill them (a set-user-ID program),
            or nothing can.
    """
    made: list[RankProcess] = []
    variables = RankVariables(env, [{}] * len(commands) if rank_env is None else rank_env, shared, numbered)
    try:
        for command, three, binding in zip(commands, streams, bindings, strict=True):
            try:
                made.append(RankProcess(command, three, binding))
            except Exception as error:
                name_rank(error, len(made))
                raise
        ranks += made
        left: Sequence[int] = range(len(made))
        if template is not None:
            left = template.start(
                made, variables, cwd=cwd, die_with_parent=die_with_parent, cgroup=cgroup, guard=guard,
                homes=_homes(bindings),
            )  # fmt: skip
        if not left or not mechanisms():
            if progress is not None:
                progress(lambda: sum(rank._child_created for rank in made))
            done = not left
        elif len(left) == len(made):
            done = start_by_engine(
                made, variables, cwd=cwd, die_with_parent=die_with_parent, cgroup=cgroup, guard=guard, progress=progress
            )
        else:
            done = _start_some(
                made, variables, left, cwd=cwd, die_with_parent=die_with_parent, cgroup=cgroup, guard=guard,
                progress=progress,
            )  # fmt: skip
        if not done:
            _start_alone(made, variables, guard, cwd=cwd, die_with_parent=die_with_parent, cgroup=cgroup)
    except BaseException:
        end_ranks(ranks)
        raise
    finally:
        for rank in made:
            rank.let_go()


def _start_alone(ranks: list[RankProcess], variables: RankVariables, guard: int, **keywords: Any) -> None:
    """Start the ranks that the engine could not start, one by one."""
    for number, rank in enumerate(ranks):
        if not rank._child_created:
            try:
                if guard >= 0:
                    raise OSError(errno.ENOTSUP, f"guard needs rankspawn's engine: {why_no_engine()}")
                rank.start_alone(env=variables.of(number), **keywords)
            except Exception as error:
                name_rank(error, number)
                raise


def _start_some(ranks: list[RankProcess], variables: RankVariables, some: Sequence[int], **options: Any) -> bool:
    """Start these ranks by the engine. Returns whether it could start them all."""
    try:
        return start_by_engine([ranks[number] for number in some], variables.some(some), **options)
    except Exception as error:
        place = getattr(error, "rank", None)
        if place is not None:
            name_rank(error, some[place])
        raise


def _homes(bindings: Sequence[Binding | None]) -> list[int | None]:
    """Find the node of each rank: ranks of one node can be forked from one template."""
    from .._place.glance import homes

    return homes([None if binding is None else binding.cpus for binding in bindings])


def chosen_template(warm: Template | Sequence[str] | bool | Literal["required"], *, lasts: bool) -> Template | None:
    """Find the Template that ranks are forked from: the caller's, or a new one; None if ranks are executed.

    Args:
        warm: The argument of launch().
        lasts: Whether a new Template serves several starts.

    Raises:
        TypeError: ``warm`` has another type.
    """
    if warm is False or warm is None:
        return None
    from .._warm.template import Template

    if isinstance(warm, Template):
        return warm
    required = isinstance(warm, str) and warm == "required"
    if not (required or warm is True or is_sequence(warm)):
        raise TypeError(f"warm: expected True, False, 'required', names of modules or a Template, got {warm!r}")
    return Template(True if required or warm is True else warm, required=required, lasts=lasts)
