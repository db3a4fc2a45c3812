"""``launch``: the ranks of a job on this machine, placed, started at once, and told what torchrun tells them."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from .._end.ranks import end_ranks
from .._start.arguments import callers_environment
from .._start.crew import start_ranks
from .._start.engine import mechanisms
from .group import GRACE_SECONDS, RankGroup

if TYPE_CHECKING:
    from .._binding import AffinityMode, Binding, MemoryMode, MemoryPolicy
    from .._end.cgroup import GroupCgroup
    from .._end.guard import Guard
    from .._output.logs import LogFolder, RankFiles
    from .._output.tee import Tee
    from .._place.plan import Rank
    from .._start.popen import Popen


class Job(NamedTuple):
    """What the ranks are told of the job, by the names that torchrun gives it.

    nprocs: ranks on this machine. run_id: a name for the job. master_addr, master_port: where rank 0 listens.
    nnodes, node_rank: how many machines, and which this is, from 0. restart_count: which start of the group this is,
    from 0. max_restarts: how many may follow the first.
    """

    nprocs: int
    master_port: int
    master_addr: str = "127.0.0.1"
    run_id: str = "none"
    nnodes: int = 1
    node_rank: int = 0
    restart_count: int = 0
    max_restarts: int = 0

    @property
    def first_rank(self) -> int:
        """The RANK of this machine's local rank 0."""
        return self.node_rank * self.nprocs

    def environment(self) -> dict[str, str]:
        """What all ranks of this machine are told (torch.distributed.run has the names)."""
        local, world = str(self.nprocs), str(self.nprocs * self.nnodes)
        return {
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": local,
            "GROUP_RANK": str(self.node_rank),
            "GROUP_WORLD_SIZE": str(self.nnodes),
            "ROLE_NAME": "default",
            "ROLE_WORLD_SIZE": world,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(self.restart_count),
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
            "TORCHELASTIC_RUN_ID": self.run_id,
            # Rank 0 makes the store at MASTER_PORT itself: there is no agent that holds one.
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }

    def environment_of(self, local_rank: int) -> dict[str, str]:
        """What one rank is told beside that."""
        rank = str(self.first_rank + local_rank)
        return {"RANK": rank, "LOCAL_RANK": str(local_rank), "ROLE_RANK": rank}


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that is free on ``address`` now. Raises OSError when the address is not this machine's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def launch(
    args: Sequence[str] | Callable[[int], Sequence[str]],
    nprocs: int,
    *,
    numa: AffinityMode | str | None = None,
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
    guard: bool = False,
    cgroup: str | os.PathLike[str] | None = None,
    keep_going: bool = False,
    grace: float | None = None,
    progress: Callable[[Callable[[], int]], object] | None = None,
) -> RankGroup:
    """Start ``nprocs`` ranks at once, each in a session of its own and with torchrun's variables. All or nothing.

    args: the command of every rank, or a function that gives that of a local rank. nprocs: how many ranks.
    numa, memory: place the ranks on this machine, as ``place`` does, and set OMP_NUM_THREADS unless ``env`` has it.
    bindings: where each rank goes, instead; by local rank.
    env: what all ranks inherit; this process's environment if left out. rank_env: what each has beside it; by local
        rank. cwd: the directory that they start in.
    job: what the ranks are told of the whole job; of this machine alone, with a free port, if left out.
    log_dir: a folder; each rank writes to ``attempt_N/LOCAL_RANK/stdout.log`` and ``stderr.log`` in it, as under
        torchrun.
    tee: the lines that the ranks write to their log files are shown here too, with a prefix; without ``log_dir`` the
        files are temporary ones. tee_ranks: of these ranks only. files: instead of ``log_dir``, made by ``rank_files``.
    die_with_parent: the kernel kills the ranks when this process ends, however it ends; None: where it can.
    guard: a small process ends, when this process has been killed, also what the ranks have started. Where it has been
        killed itself, whoever waits for the group gets a RuntimeWarning.
    cgroup: a delegated directory of cgroup v2. The ranks are born in a cgroup made in it, which ends with the group,
        whatever session its processes have moved to; a guard is on, too.
    keep_going: a rank that fails does not end the others. grace: from SIGTERM to SIGKILL, in seconds; 30 if left out.
    progress: is called before the first start with a function that tells, in any thread, how many have been started.

    Raises what Popen raises, with the rank's number in ``rank`` and in the message, after the ranks that were started
    have been killed and reaped; PlacementError where no placement can be made; ValueError for what does not fit;
    OSError (EMFILE) when there is not a free descriptor for each rank: this process's limit is not raised here.
    """
    called_ns = time.monotonic_ns()
    _check_arguments(nprocs, bindings=bindings, rank_env=rank_env, files=files)
    job = Job(nprocs, free_port()) if job is None else job
    if job.nprocs != nprocs:
        raise ValueError(f"nprocs is {nprocs}, and {job.nprocs} in job")
    if grace is not None and not grace >= 0:
        raise ValueError(f"grace is {grace}: it is a number of seconds from 0 on")
    if files is not None and log_dir is not None:
        raise ValueError("give log_dir or files")
    if tee_ranks is not None and not tee:
        raise ValueError("tee_ranks needs tee")
    own = [job.environment_of(rank) for rank in range(nprocs)]
    shared = {**(callers_environment() if env is None else env), **job.environment()}
    shared["RANKSPAWN_CALL_NS"] = str(called_ns)
    if numa is not None or memory is not None:
        if bindings is not None or numa is None:
            raise ValueError("give numa, with or without memory, or bindings")
        placed = _place(nprocs, numa, memory)
        bindings = [rank.binding for rank in placed]
        if "OMP_NUM_THREADS" not in shared:
            for variables, rank in zip(own, placed, strict=True):
                variables["OMP_NUM_THREADS"] = str(rank.omp_threads)
    _check_descriptors(nprocs)
    ranks: list[Popen] = []
    guarding: Guard | None = None
    temporary: LogFolder | None = None
    # Not a with block: there is no moment at which what was opened is neither this function's to close nor the group's.
    resources = ExitStack()
    try:
        if files is None and (tee or log_dir is not None):
            from .._output.logs import LogFolder, rank_files

            if log_dir is None:
                temporary = resources.enter_context(LogFolder())
                log_dir = temporary.path
            files = rank_files(os.fspath(log_dir), nprocs, job.restart_count)
        for number, of_rank in enumerate(files or ()):
            own[number]["TORCHELASTIC_ERROR_FILE"] = of_rank.error
        for variables, more in zip(own, rank_env or (), strict=False):
            variables.update(more)
        if tee:
            from .._output.tee import Tee, sources

            shown = None if tee_ranks is None else {job.first_rank + rank for rank in tee_ranks}
            resources.callback(_finish, Tee(sources(files or (), job.first_rank), ranks=shown).start(), temporary)
        name, own_cgroup = "", None
        if cgroup is not None:
            from .._end.cgroup import new_name

            name = new_name()
        if guard or cgroup is not None:
            from .._end.guard import Guard

            # Before its cgroup is made, and closed after that has gone: no death in between leaves the directory.
            path = None if cgroup is None else os.path.join(os.path.abspath(cgroup), name)
            guarding = resources.enter_context(closing(Guard.start(path)))
        if cgroup is not None:
            own_cgroup = _make_cgroup(resources, cgroup, name)
        start_ranks(
            ranks,
            [args(rank) for rank in range(nprocs)] if callable(args) else [args] * nprocs,
            env=shared,
            rank_env=own,
            bindings=[None] * nprocs if bindings is None else bindings,
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
                called_ns=called_ns,
                run_id=job.run_id,
            )
        if guarding is not None and guarding.process.pidfd is not None:
            group._watch.once(guarding.process.pidfd, partial(_warn_of_death, guarding))
        return group
    except BaseException:
        try:
            end_ranks(ranks)
        finally:
            resources.close()
        raise


def _check_arguments(nprocs: int, **by_rank: Sequence[object] | None) -> None:
    if nprocs < 1:
        raise ValueError(f"nprocs is {nprocs}: a job has at least one rank")
    for name, given in by_rank.items():
        if given is not None and len(given) != nprocs:
            raise ValueError(f"{name} has {len(given)} items for {nprocs} ranks")


def _check_descriptors(nprocs: int) -> None:
    """Refuse what cannot be: a descriptor for each rank, and one to watch them all by."""
    if sys.platform == "linux":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and nprocs >= soft:
            raise _too_few_descriptors(nprocs)


@contextmanager
def _enough_descriptors(ranks: Sequence[Popen]) -> Iterator[None]:
    """Refuse to go on with a rank that has no pidfd for want of a descriptor: it would be polled as long as it runs."""
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


def _place(nprocs: int, numa: AffinityMode | str, memory: MemoryMode | MemoryPolicy | None) -> Sequence[Rank]:
    from .._place.plan import plan
    from .._place.topology import Topology

    ranks = plan(Topology.read(), numa, nprocs=nprocs, memory=memory)
    for note in dict.fromkeys(note for rank in ranks for note in rank.notes):
        warnings.warn(note, RuntimeWarning, stacklevel=3)
    return ranks


def _make_cgroup(resources: ExitStack, parent: str | os.PathLike[str], name: str) -> GroupCgroup:
    """A cgroup for the ranks, which ends, with all that is in it, when ``resources`` are closed."""
    from .._end.cgroup import GroupCgroup

    made = GroupCgroup.make(parent, name)

    def end() -> None:
        made.kill()
        if made.wait_empty(1.0):
            made.remove()
        else:
            made.close()  # who does not end has been named

    resources.callback(end)
    return made


def _warn_of_death(guard: Guard) -> None:
    warnings.warn(
        f"the guard (process {guard.process.pid}) has ended: what the ranks have started stays behind if this process"
        " is killed now",
        RuntimeWarning,
        stacklevel=2,
    )


def _can_die_with_parent() -> bool:
    """Whether the kernel can be asked to kill the ranks with this process: by the engine, on Linux."""
    return sys.platform == "linux" and bool(mechanisms())


def _finish(tee: Tee, temporary: LogFolder | None) -> None:
    """Show the rest of what the ranks wrote; what could not be shown must not be lost."""
    if tee.finish() and temporary is not None:
        temporary.keep = True
