"""What one call of ``launch`` ordered, ready to be started: once, or once for each attempt."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from subprocess import DEVNULL
from typing import TYPE_CHECKING, Any, NamedTuple

from .._end.deferral import Deferral, has_deferred
from .._frozen import Frozen
from .._start.arguments import named_by_text
from .._start.engine import mechanisms
from .asked import refuse_overridden
from .port import hold_port_of
from .start import start_ranks

if TYPE_CHECKING:
    from typing import IO, Literal

    from .._binding import Binding
    from .._end.cgroup import GroupCgroup
    from .._end.guard import Guard
    from .._output.form import TemplateReport
    from .._output.logs import LogFolder, RankFiles
    from .._start.popen import Popen
    from .._warm.template import Template
    from .job import Job


class Started(NamedTuple):
    """The ranks of one attempt, and what holds them.

    Attributes:
        job: What they know of the job.
        called_ns: CLOCK_MONOTONIC when the attempt was ordered.
        ranks: The processes, by local rank.
        files: Where each writes; None where they have this process's output.
        cgroup: The cgroup that they were born in.
        guard: The process that ends what the ranks started if this process is killed.
        templates: The templates that they were forked from, for the report.
    """

    job: Job
    called_ns: int
    ranks: Sequence[Popen]
    files: Sequence[RankFiles] | None
    cgroup: GroupCgroup | None
    guard: Guard | None
    templates: Sequence[TemplateReport] = ()


class Order(Frozen):
    """The arguments of ``launch``, checked, and by local rank where they differ.

    Attributes:
        commands: What each rank runs.
        bindings: The binding of each.
        omp_threads: OMP_NUM_THREADS of each; None does not set it.
        env: As the argument of launch(), like all below.
        rank_env: What each rank has beside it.
        cwd: The directory.
        log_dir: The folder.
        files: The files, instead of the folder.
        tee: Whether to show lines, or the stream to show them on.
        tee_prefix: What stands before each.
        tee_ranks: Whose lines; None for all.
        die_with_parent: None if it was not given, as for the others below.
        guard: Whether there is a guard.
        cgroup: The delegated cgroup.
        temporary: A folder that the guard removes.
        progress: A function, called before the first start.
        template: The Template that ranks are forked from; None if they are executed.
        captures: Whether ranks have log files even without a folder.
        stdin: Which ranks have this process's stdin.
    """

    commands: Sequence[Sequence[str]]
    bindings: Sequence[Binding | None]
    omp_threads: Sequence[int] | None
    env: Mapping[str, str] | None
    rank_env: Sequence[Mapping[str, str]] | None
    cwd: str | os.PathLike[str] | None
    log_dir: str | os.PathLike[str] | None
    files: Sequence[RankFiles] | None
    tee: bool | IO[str]
    tee_prefix: str
    tee_ranks: Collection[int] | None
    die_with_parent: bool | None
    guard: bool | None
    cgroup: str | os.PathLike[str] | None
    temporary: str | os.PathLike[str] | None
    progress: Callable[[Callable[[], int]], object] | None
    template: Template | None = None
    captures: bool = False
    stdin: Literal["all", "none"] | int = "all"

    def start(self, job: Job, called_ns: int, resources: ExitStack, ranks: list[Popen]) -> Started:
        """Start all ranks, or none.

        Args:
            job: What they know of the job.
            called_ns: CLOCK_MONOTONIC when the attempt was ordered.
            resources: Gets what must be closed when the ranks have ended, also if the start fails.
            ranks: An empty list, as for start_ranks(): at every moment it has the processes that must not be lost.

        Raises:
            OSError: As launch(); ranks that were started have been killed and reaped.
            ValueError: ``env`` sets a variable of the job.
        """
        with Deferral():  # an interrupt finds all that was made in ``resources``
            job, files, shared, own, guard, cgroup = self._prepare(job, resources)
        start_ranks(
            ranks,
            self.commands,
            env=self.env,
            shared={**shared, "RANKSPAWN_CALL_NS": str(called_ns)},
            numbered=job.numbers(),
            rank_env=own,
            bindings=self.bindings,
            streams=self._streams(job, files),
            cwd=self.cwd,
            die_with_parent=_can_die_with_parent() if self.die_with_parent is None else self.die_with_parent,
            cgroup=None if cgroup is None else cgroup.fd,
            guard=-1 if guard is None else guard.fd,
            progress=self.progress,
            template=self.template,
        )
        templates = () if self.template is None else self.template.report()
        return Started(job, called_ns, ranks, files, cgroup, guard, templates)

    def _streams(self, job: Job, files: Sequence[RankFiles] | None) -> list[tuple[Any, Any, Any]]:
        """Stdin, stdout and stderr of each rank, as Popen takes them."""
        others = None if self.stdin == "all" else DEVNULL
        stdins = [None if rank == self.stdin else others for rank in range(job.first_rank, job.first_rank + job.nprocs)]
        if files is None:
            return [(stdin, None, None) for stdin in stdins]
        return [(stdin, of_rank.stdout, of_rank.stderr) for stdin, of_rank in zip(stdins, files, strict=True)]

    def _prepare(self, job: Job, resources: ExitStack) -> tuple[Any, ...]:
        """Open what the ranks need. ``resources`` closes it."""
        job, held = hold_port_of(job)
        if held is not None:
            resources.enter_context(held)
        files, own_folder = self._files(job, resources)
        shared, own = self._variables(job, files)
        if self.tee:
            from .._output.tee import show

            out = None if self.tee is True else self.tee
            resources.enter_context(
                show(
                    files or (), job.first_rank, self.tee_ranks, own_folder,
                    out=out, err=out, prefix=self.tee_prefix, interrupt=has_deferred,
                )
            )  # fmt: skip
        # Without a death signal the ranks shall outlive this process: no guard, either.
        guarded = False if self.guard is None and self.die_with_parent is False else self.guard
        guard, cgroup = hold(resources, guarded, self.cgroup, self.temporary if own_folder is None else own_folder.path)
        return job, files, shared, own, guard, cgroup

    def _files(self, job: Job, resources: ExitStack) -> tuple[Sequence[RankFiles] | None, LogFolder | None]:
        """Where each rank writes, and the temporary folder of these files, which ``resources`` removes."""
        if self.files is not None or not (self.captures or self.tee or self.log_dir is not None):
            return self.files, None
        from .._output.logs import LogFolder, claimed, rank_files

        if self.log_dir is None:
            folder = resources.enter_context(LogFolder())
            return rank_files(folder.path, job.nprocs, job.restart_count), folder
        log_dir = os.fspath(self.log_dir)
        resources.enter_context(claimed(log_dir, job.restart_count))
        return rank_files(log_dir, job.nprocs, job.restart_count), None

    def _variables(
        self, job: Job, files: Sequence[RankFiles] | None
    ) -> tuple[dict[str, str], list[dict[str, Any]] | None]:
        """The variables that all ranks have beside ``env``, and by local rank its own ones, except numbers."""
        env = os.environ if self.env is None else named_by_text(self.env)
        shared = job.environment(env)
        errors: list[dict[str, Any]] = [{"TORCHELASTIC_ERROR_FILE": of_rank.error} for of_rank in files or ()]
        if self.env is not None:
            refuse_overridden(env, {**shared, **dict.fromkeys((*job.numbers(), *(errors[0] if errors else ())))})
        threads = [{"OMP_NUM_THREADS": str(count)} for count in self.omp_threads or ()]
        if len(set(self.omp_threads or ())) == 1:
            shared |= threads[0]
            threads = []
        layers = [layer for layer in (errors, threads, [*map(named_by_text, self.rank_env or ())]) if layer]
        if not layers:
            return shared, None
        return shared, [{name: own[name] for own in owns for name in own} for owns in zip(*layers, strict=True)]


def hold(
    resources: ExitStack,
    guard: bool | None,
    cgroup: str | os.PathLike[str] | None,
    temporary: str | os.PathLike[str] | None,
) -> tuple[Guard | None, GroupCgroup | None]:
    """The guard and the cgroup that hold what the ranks will start, until ``resources`` are closed."""
    if cgroup is None and (guard is False or (guard is None and not _can_die_with_parent())):
        return None, None
    from .._end.guard import Guard
    from .._output.noted import own_note

    note = own_note()
    if cgroup is None:
        if guard is None and Guard.why_not():
            return None, None
        return resources.enter_context(closing(Guard.start(folder=temporary, note=note))), None
    from .._end.cgroup import new_name

    if isinstance(cgroup, str) and cgroup == "auto":  # bytes compare with no text
        from .._end.delegated import delegated_cgroup

        cgroup = delegated_cgroup()

    # The guard starts before its cgroup is made and ends after it has gone: no death in between leaves the directory.
    name = new_name()
    guarding = resources.enter_context(
        closing(Guard.start(os.path.join(os.path.abspath(os.fsdecode(cgroup)), name), folder=temporary, note=note))
    )
    return guarding, _make_cgroup(resources, cgroup, name)


def _make_cgroup(resources: ExitStack, parent: str | os.PathLike[str], name: str) -> GroupCgroup:
    """A cgroup for the ranks, which ends, with all that is in it, when ``resources`` are closed."""
    from .._end.cgroup import GroupCgroup

    made = GroupCgroup.make(parent, name)

    def end() -> None:
        made.kill()
        if made.wait_empty(1.0):
            made.remove()
        else:
            made.close()  # the error names what does not end

    resources.callback(end)
    return made


def _can_die_with_parent() -> bool:
    """Whether the kernel can kill the ranks when this process ends: with the engine, on Linux."""
    return sys.platform == "linux" and bool(mechanisms())
