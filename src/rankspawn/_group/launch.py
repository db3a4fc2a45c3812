"""``launch``: the ranks of a job on this machine, placed, started at once, and with torchrun's variables."""

from __future__ import annotations

import errno
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING

from .._end.ranks import SignalTo, end_ranks
from .._public import public
from .._start.arguments import named_by_text
from .._start.engine import mechanisms
from .group import GRACE_SECONDS, RankGroup
from .job import Job
from .port import hold_port_of
from .start import start_ranks

if TYPE_CHECKING:
    from .._binding import AffinityMode, Binding, MemoryMode, MemoryPolicy
    from .._end.cgroup import GroupCgroup
    from .._end.guard import Guard
    from .._output.logs import LogFolder, RankFiles
    from .._start.popen import Popen


@public
def launch(
    args: Sequence[str] | Callable[[int], Sequence[str]],
    nprocs: int,
    *,
    numa: AffinityMode | str | None = "auto",
    memory: MemoryMode | MemoryPolicy | None = None,
    bindings: Sequence[Binding | None] | None = None,
    env: Mapping[str, str] | None = None,
    rank_env: Sequence[Mapping[str, str]] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    job: Job | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    tee: bool = False,
    tee_ranks: Collection[int] | None = None,
    files: Sequence[RankFiles] | None = None,
    die_with_parent: bool | None = None,
    guard: bool | None = None,
    cgroup: str | os.PathLike[str] | None = None,
    keep_going: bool = False,
    grace: float | None = None,
    signal_to: SignalTo = "session",
    handle_signals: bool = False,
    temporary: str | os.PathLike[str] | None = None,
    progress: Callable[[Callable[[], int]], object] | None = None,
) -> RankGroup:
    """Start ``nprocs`` ranks at once, each in a session of its own and with torchrun's variables. All or nothing.

    Args:
        args: The command of every rank, or a function that gives that of a local rank.
        nprocs: How many ranks.
        numa: One of torch's modes, as for ``place``; "auto" binds each rank to its NUMA node where several nodes have
            CPUs and each of these gets ranks, and is optional; "none" or None leaves the ranks unbound. OMP_NUM_THREADS
            is each rank's share of the cores, unless ``env`` has it.
        memory: A mode or policy, as for ``place``.
        bindings: Where each rank goes, instead; by local rank. OMP_NUM_THREADS is not touched.
        env: What all ranks inherit; this process's environment if left out.
        rank_env: What each has beside it; by local rank.
        cwd: The directory that they start in.
        job: The whole job, for the ranks' variables; this machine alone, with a free port, if left out. As long as the
            group lives, the port is held on the machine of rank 0: only processes that set SO_REUSEADDR, as torch's
            TCPStore does, can bind it.
        log_dir: A folder; each rank writes to ``attempt_N/LOCAL_RANK/stdout.log`` and ``stderr.log`` in it, as under
            torchrun. As long as the group lives no other may write there: that is an OSError (EBUSY).
        tee: The lines that the ranks write to their log files are shown here too, with a prefix; without ``log_dir``
            the files are temporary ones.
        tee_ranks: Those of these ranks only.
        files: Instead of ``log_dir``, made by ``rank_files``.
        die_with_parent: The kernel kills the ranks when this process ends, however it ends; None: where it can.
        guard: A small process ends, when this process has been killed, also what the ranks have started; None: where
            it can, and ``die_with_parent`` is not False. Where it has been killed itself, whoever waits for the group
            gets a RuntimeWarning.
        cgroup: A delegated directory of cgroup v2. The ranks are born in a cgroup made in it, which ends with the
            group, whatever session its processes have moved to; a guard is on, too.
        keep_going: A rank that fails does not end the others.
        grace: From SIGTERM to SIGKILL, in seconds; 30 if left out.
        signal_to: What is signalled first when ranks are to end: all in a rank's "session", its process "group",
            or the "rank" itself. The rest of its session follows when the rank has ended, or half of the grace has
            gone. The default signals all at once, as a terminal and Slurm do: no program has less than the whole grace,
            whatever shell or wrapper it runs under. A rank that needs its helpers to come to its end, as a training
            loop needs the batches of its forked data loader, wants "rank".
        handle_signals: SIGTERM and SIGHUP, where their action is the default, end the ranks with their grace, and then
            this process, by that signal; until the group is closed. For the main thread. Without it they end this
            process at once, and its ranks are killed with it. The default is False, because a program's signals are its
            own: it dies then without a look at its ``finally`` blocks, as without us, but seconds later.
        temporary: A folder that this process removes in the end, with its ``files``; the guard does if it is killed.
        progress: Is called before the first start with a function that tells, in any thread, how many have been
            started.

    Raises:
        OSError: What Popen raises, with the rank's number in ``rank`` and in the message, after the ranks that were
            started have been killed and reaped. EMFILE: there is not a free descriptor for each rank; this process's
            limit is not raised here.
        PlacementError: No placement can be made.
        ValueError: Arguments do not fit.
    """
    called_ns = time.monotonic_ns()
    job = _checked(nprocs, job, bindings, rank_env, files, log_dir, tee, tee_ranks, grace, signal_to)
    shared = {**job.environment(), "RANKSPAWN_CALL_NS": str(called_ns)}
    own: list[dict[str, str]] = [{} for _ in range(nprocs)]
    if memory is not None and (numa is None or numa == "none"):
        raise ValueError("memory needs numa: without it ranks are left unbound")
    if bindings is None:
        from .._place.glance import sets_threads, threads_note

        threads_given = (os.environ if env is None else named_by_text(env)).get("OMP_NUM_THREADS")
        if note := threads_note(threads_given):
            warnings.warn(note, RuntimeWarning, stacklevel=2)
        bindings, threads = _place(numa, memory, nprocs)
        if not sets_threads(threads_given):
            for variables, count in zip(own, threads, strict=True):
                variables["OMP_NUM_THREADS"] = str(count)
    elif memory is not None or numa not in (None, "none", "auto"):
        raise ValueError("give numa, with or without memory, or bindings")
    _check_descriptors(nprocs)
    ranks: list[Popen] = []
    # Not a with block: at every moment either this function or the group owns what was opened and closes it.
    resources = ExitStack()
    signals = None
    if handle_signals:
        from .handlers import SignalHold

        # Taken first, and so given back last.
        signals = resources.enter_context(closing(SignalHold.take()))
    try:
        job, held = hold_port_of(job)
        if held is not None:
            resources.enter_context(held)
        shared["MASTER_PORT"] = str(job.master_port)
        if files is None and (tee or log_dir is not None):
            files, own_folder = _open_files(resources, log_dir, job)
            temporary = temporary if own_folder is None else own_folder.path
        else:
            own_folder = None
        for number, of_rank in enumerate(files or ()):
            own[number]["TORCHELASTIC_ERROR_FILE"] = of_rank.error
        for variables, more in zip(own, rank_env or (), strict=False):
            variables.update(named_by_text(more))
        if tee:
            from .._output.tee import show

            resources.enter_context(show(files or (), job.first_rank, tee_ranks, own_folder))
        if guard is None and die_with_parent is False:
            guard = False  # the ranks shall outlive this process
        guarding, own_cgroup = _hold(resources, guard, cgroup, temporary)
        start_ranks(
            ranks,
            [args(rank) for rank in range(nprocs)] if callable(args) else [args] * nprocs,
            env=env,
            shared=shared,
            numbered=job.numbers(),
            rank_env=own,
            bindings=bindings,
            streams=[(None, None, None)] * nprocs if files is None else [(None, f.stdout, f.stderr) for f in files],
            cwd=cwd,
            die_with_parent=_can_die_with_parent() if die_with_parent is None else die_with_parent,
            cgroup=None if own_cgroup is None else own_cgroup.fd,
            guard=-1 if guarding is None else guarding.fd,
            progress=progress,
        )
        with _enough_descriptors(ranks):
            group = RankGroup(
                ranks,
                resources=resources,
                keep_going=keep_going,
                grace=GRACE_SECONDS if grace is None else grace,
                files=files,
                cgroup=own_cgroup,
                guard=guarding,
                called_ns=called_ns,
                job=job,
                signal_to=signal_to,
            )
        if signals is not None:
            signals.give(group)
        return group
    except BaseException:
        try:
            end_ranks(ranks)
        finally:
            resources.close()
        raise


def _checked(
    nprocs: int,
    job: Job | None,
    bindings: Sequence[object] | None,
    rank_env: Sequence[object] | None,
    files: Sequence[object] | None,
    log_dir: object,
    tee: bool,
    tee_ranks: object,
    grace: float | None,
    signal_to: str,
) -> Job:
    """The job, made where none was given. Raises ValueError for arguments of launch() that do not fit each other."""
    if nprocs < 1:
        raise ValueError(f"nprocs is {nprocs}: a job has at least one rank")
    for name, given in (("bindings", bindings), ("rank_env", rank_env), ("files", files)):
        if given is not None and len(given) != nprocs:
            raise ValueError(f"{name} has {len(given)} items for {nprocs} ranks")
    job = Job(nprocs) if job is None else job
    if job.nprocs != nprocs:
        raise ValueError(f"nprocs is {nprocs}, and {job.nprocs} in job")
    if not job.master_port and job.nnodes > 1:
        raise ValueError("master_port of job is 0, a free port, which the other machines could not know")
    if grace is not None and not grace >= 0:
        raise ValueError(f"grace is {grace}: it is a number of seconds from 0 on")
    if signal_to not in ("rank", "group", "session"):
        raise ValueError(f"signal_to is {signal_to!r}: it is 'rank', 'group' or 'session'")
    if files is not None and log_dir is not None:
        raise ValueError("give log_dir or files")
    if tee_ranks is not None and not tee:
        raise ValueError("tee_ranks needs tee")
    return job


def _place(
    numa: AffinityMode | str | None, memory: MemoryMode | MemoryPolicy | None, nprocs: int
) -> tuple[list[Binding | None], list[int]]:
    """Find the binding of each rank on this machine, and its OMP_NUM_THREADS."""
    from .._place.glance import has_one_node, hidden_devices, unbound_threads

    is_free = numa == "auto" and memory is None
    # On a machine with one node there is nothing to choose, and no need to read it.
    if numa is None or numa == "none" or (is_free and has_one_node()):
        for note in hidden_devices(os.environ):
            warnings.warn(note, RuntimeWarning, stacklevel=3)
        return [None] * nprocs, [unbound_threads(nprocs)] * nprocs
    from .._place.auto import plan_auto
    from .._place.plan import plan
    from .._place.sysfs import TopologyError
    from .._place.topology import Topology

    try:
        topology = Topology.read()
        if numa == "auto":
            ranks = plan_auto(topology, nprocs=nprocs, memory=memory)
        else:
            ranks = plan(topology, numa, nprocs=nprocs, memory=memory)
    except TopologyError as error:
        if not is_free:
            raise
        warnings.warn(f"ranks are left unbound: {error}", RuntimeWarning, stacklevel=3)
        return [None] * nprocs, [unbound_threads(nprocs)] * nprocs
    for note in dict.fromkeys(note for rank in ranks for note in rank.notes):
        warnings.warn(note, RuntimeWarning, stacklevel=3)
    return [rank.binding for rank in ranks], [rank.omp_threads for rank in ranks]


def _open_files(
    resources: ExitStack, log_dir: str | os.PathLike[str] | None, job: Job
) -> tuple[list[RankFiles], LogFolder | None]:
    """Where each rank writes: in ``log_dir``, or in a temporary folder, which goes with ``resources``."""
    from .._output.logs import LogFolder, claimed, rank_files

    temporary = None
    if log_dir is None:
        temporary = resources.enter_context(LogFolder())
        log_dir = temporary.path
    else:
        resources.enter_context(claimed(os.fspath(log_dir), job.restart_count))
    return rank_files(os.fspath(log_dir), job.nprocs, job.restart_count), temporary


def _hold(
    resources: ExitStack,
    guard: bool | None,
    cgroup: str | os.PathLike[str] | None,
    temporary: str | os.PathLike[str] | None,
) -> tuple[Guard | None, GroupCgroup | None]:
    """The guard and the cgroup that hold what the ranks will start, until ``resources`` are closed."""
    if cgroup is None and (guard is False or (guard is None and not _can_die_with_parent())):
        return None, None
    from .._end.guard import Guard

    if cgroup is None:
        if guard is None and Guard.why_not():
            return None, None
        return resources.enter_context(closing(Guard.start(folder=temporary))), None
    from .._end.cgroup import new_name

    if isinstance(cgroup, str) and cgroup == "auto":  # bytes compare with no text
        from .._end.delegated import delegated_cgroup

        cgroup = delegated_cgroup()

    # The guard starts before its cgroup is made and ends after it has gone: no death in between leaves the directory.
    name = new_name()
    guarding = resources.enter_context(
        closing(Guard.start(os.path.join(os.path.abspath(os.fsdecode(cgroup)), name), folder=temporary))
    )
    return guarding, _make_cgroup(resources, cgroup, name)


def _check_descriptors(nprocs: int) -> None:
    """Raise if there cannot be a descriptor for each rank, and one to watch them all."""
    if sys.platform == "linux":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and nprocs >= soft:
            raise _too_few_descriptors(nprocs)


@contextmanager
def _enough_descriptors(ranks: Sequence[Popen]) -> Iterator[None]:
    """Raise for a rank that has no pidfd for want of a descriptor, because it would be polled as long as it runs."""
    try:
        lacking = next((rank for rank in ranks if rank.pidfd is None), None)
        if lacking is not None and hasattr(os, "pidfd_open"):
            try:
                os.close(os.pidfd_open(lacking.pid))
            except OSError as error:
                if error.errno == errno.EMFILE:
                    raise
        yield
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise _too_few_descriptors(len(ranks)) from error


def _too_few_descriptors(nprocs: int) -> OSError:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    up_to = "any number" if hard == resource.RLIM_INFINITY else hard
    return OSError(
        errno.EMFILE,
        f"{os.strerror(errno.EMFILE)}: {nprocs} ranks need a descriptor each, and this process may have {soft};"
        f" raise RLIMIT_NOFILE before (ulimit -n, resource.setrlimit), here up to {up_to}",
    )


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
    """Whether the kernel can be asked to kill the ranks with this process: by the engine, on Linux."""
    return sys.platform == "linux" and bool(mechanisms())
