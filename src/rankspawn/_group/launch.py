"""``launch``: the ranks of a job on this machine, placed, started at once, and with torchrun's variables."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from .._end.deferral import Deferral
from .._end.ranks import SignalTo, end_ranks
from .._public import public
from .._start.arguments import named_by_text
from .._start.popen import Popen
from .asked import (
    check_environment,
    check_grace,
    check_kinds,
    check_numa,
    check_output,
    check_ranks,
    check_signal_to,
    check_stdin,
    checked_job,
    commands_of_ranks,
    number_of_ranks,
)
from .descriptors import check_descriptors
from .group import GRACE_SECONDS, RankGroup
from .hangs import checked_hang
from .job import Job
from .order import Order
from .start import chosen_template

if TYPE_CHECKING:
    from typing import IO, Any, Literal

    from .._binding import AffinityMode, Binding, MemoryMode, MemoryPolicy, NumaMode
    from .._output.lines import RankLine
    from .._output.logs import RankFiles
    from .._place.visible import Device
    from .._warm.template import Template


@public
def launch(
    args: Sequence[str] | Callable[[int], Sequence[str]],
    nprocs: int,
    *,
    numa: AffinityMode | NumaMode | None = "auto",
    memory_policy: MemoryMode | MemoryPolicy | None = None,
    devices: Sequence[str | Device] | None = None,
    reserve_cores: int = 0,
    threads_per_core: int | None = None,
    required: bool = True,
    bindings: Sequence[Binding | None] | None = None,
    env: Mapping[str, str] | None = None,
    rank_env: Sequence[Mapping[str, str]] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    job: Job | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    tee: bool | IO[str] = False,
    tee_prefix: str = "[rank {rank}]:",
    tee_ranks: Collection[int] | None = None,
    capture_output: bool = False,
    on_line: Callable[[RankLine], object] | None = None,
    files: Sequence[RankFiles] | None = None,
    stdin: Literal["all", "none"] | int = "all",
    die_with_parent: bool | None = None,
    guard: bool | None = None,
    cgroup: str | os.PathLike[str] | None = None,
    max_restarts: int = 0,
    keep_going: bool = False,
    grace: float | None = None,
    signal_to: SignalTo = "session",
    handle_signals: bool = False,
    stacks: bool = False,
    hang_timeout: float | None = None,
    on_hang: Literal["report", "end", "restart"] = "report",
    temporary: str | os.PathLike[str] | None = None,
    progress: Callable[[Callable[[], int]], object] | None = None,
    warm: Template | Sequence[str] | bool | Literal["required"] = False,
) -> RankGroup:
    """Start ``nprocs`` ranks at once, each in a session of its own and with torchrun's variables: all of them, or none.

    Args:
        args: The command of every rank, or a function that takes a local rank and returns its command.
        nprocs: How many ranks.
        numa: One of torch's modes, as for ``place``. "auto" (the default) binds each rank to its NUMA node, if several
            nodes have CPUs and each of these gets ranks; it starts ranks unbound where it cannot bind them. "none" or
            None leaves the ranks unbound. OMP_NUM_THREADS is each rank's share of the cores, unless ``env`` has it.
        memory_policy: A mode or policy, as for ``place``.
        devices: As for ``place``: accelerators in local-rank order, empty for none; None looks for them.
        reserve_cores: As for ``place``: how many physical cores of the machine no rank gets.
        threads_per_core: As for ``place``: how many hardware threads of each core are used; None for all.
        required: False starts a rank unbound if it cannot be placed (a RuntimeWarning says so) or bound (the rank's
            ``binding_report`` says so). "auto" never requires a binding.
        bindings: Instead of ``numa``, the binding of each rank, by local rank. OMP_NUM_THREADS is not touched.
        env: What all ranks inherit; this process's environment if left out. The job's own variables replace those of
            ``env``. If you set one of them in ``env`` to another value, launch raises ValueError, because it belongs in
            ``job``. A value that ``env`` copied from this process's environment is replaced.
        rank_env: The variables of each rank, by local rank. They win over all others.
        cwd: The directory that the ranks start in; this process's if left out.
        job: The whole job, for the ranks' variables; this machine alone, with a free port, if left out. As long as the
            group lives, it holds the port on the machine of rank 0: only processes that set SO_REUSEADDR, as torch's
            TCPStore does, can bind it.
        log_dir: A folder; each rank writes to ``attempt_N/LOCAL_RANK/stdout.log`` and ``stderr.log`` in it, as under
            torchrun. As long as the group lives, a second group that wants the same folder gets an OSError (EBUSY).
        tee: True also shows the lines of the ranks' log files in this process's output. With a text stream, another
            thread writes all lines to that stream. Without ``log_dir`` the log files are temporary.
        tee_prefix: The text before each of these lines; ``{rank}`` is the rank's number.
        tee_ranks: Show only the lines of these local ranks; None shows all.
        capture_output: True has the ranks write to log files, for ``lines()`` of the group and for the text of a
            failure. Without ``log_dir`` the files are temporary.
        on_line: A function that is called with each line that a rank writes, as a RankLine. A wait for the group calls
            it, in its thread or asyncio loop, and so does ``close``. The lines come from log files, as those of
            ``lines()``, so that a slow function delays no rank. The wait raises what the function raises.
        files: Instead of ``log_dir``, the files that ``rank_files`` made.
        stdin: Which ranks have this process's stdin: "all" (the default, as in subprocess), "none", or the number of
            one rank in the job (RANK). The others have /dev/null. With "all", no rank sees what another has read.
        die_with_parent: The kernel kills the ranks when this process ends, however it ends. None: if the system can.
        guard: If this process is killed, a small process, the guard, also ends the processes that the ranks started, so
            that no orphan is left. None: if the system can, and ``die_with_parent`` is not False. If the guard itself
            is killed, a wait for the group issues a RuntimeWarning.
        cgroup: A delegated directory of cgroup v2. The ranks are born in a new cgroup below it. The group ends every
            process of that cgroup, whatever session it has moved to; a guard does if this process is killed.
        max_restarts: How often a wait for the group starts all ranks again after a failure, on a new port unless
            ``job`` has one. The logger "rankspawn" then gets a warning that says what failed.
        keep_going: True leaves the other ranks alone when one fails.
        grace: Seconds from SIGTERM to SIGKILL; 30 if left out.
        signal_to: Which processes are signalled first when ranks are to end: all in a rank's "session" (the default),
            its process "group", or the "rank" itself. The rest of its session gets the signal when the rank has ended,
            or when half of the grace is over. The default signals all at once, as a terminal and Slurm do: every
            program has the whole grace, whatever shell or wrapper it runs under. Choose "rank" if a rank needs its
            helpers until it ends, as a training loop needs the batches of its forked data loader.
        handle_signals: Until the group is closed, SIGTERM and SIGHUP end the ranks with their grace, and then this
            process, by that signal, if their action was the default. Needs the main thread. Without it the signals end
            this process at once, and the ranks are killed with it. The default is False, because a program's signals
            are its own. True does not run the program's ``finally`` blocks: it dies as without rankspawn, but later.
        stacks: Look at the stacks of ranks that did not fail before the group ends them: when another rank has failed,
            when a TimeoutError leaves the ``with`` block, and before SIGKILL. ``RankGroup.dump`` says how; ``stacks``
            of the group, the report and the text of a failure have the result. The default is False, because a look
            takes up to two seconds in which the caller waits, also in asyncio. On Linux.
        hang_timeout: A job hangs if for so many seconds no rank has written a line or used more than one percent of a
            CPU. The stacks are then taken twice, and the log of "rankspawn" (``RankGroup.tell_hang``), ``stacks.txt``
            and the report say what stands still. A job does not count as hung while a rank is stopped, a debugger holds
            it, or it reads from a terminal. Lines are seen in log files; for a rank without one, every write counts. A
            wait for the group does the looking. On Linux.
        on_hang: What the group does about a hang. "report" (the default): the ranks run on, and the next hang is
            reported once something has moved in between. "end": the group ends the ranks, and those that stood still
            count as failed. "restart": the group restarts the ranks as after a failure, with ``max_restarts``.
        temporary: A folder, with ``files`` in it, that this process removes at the end; the guard does if it is killed.
        progress: A function, called before the first start. Its argument is a function that returns, in any thread, how
            many ranks have been started.
        warm: Fork the ranks from a process that has imported these modules, so that each rank need not import them.
            True takes the modules that the script imports at its top. A ``Template`` keeps that process for other
            launches. A rank that cannot be forked is executed as usual, and a RuntimeWarning says why; with "required",
            or with a ``Template`` that is ``required``, launch raises RuntimeError instead.

    Raises:
        OSError: What Popen raises, with the rank's number in ``rank`` and in the message. The ranks that were started
            have been killed and reaped by then. EMFILE: there is not a free descriptor for each rank; launch does not
            raise this process's limit.
        PlacementError: The ranks cannot be placed on this machine.
        TypeError: An argument has the wrong type: the message names the argument and says what is expected.
        ValueError: An argument has a wrong value, or arguments do not fit each other.
    """
    called_ns = time.monotonic_ns()
    nprocs = number_of_ranks(nprocs)
    job = checked_job(job, nprocs, max_restarts)
    new_port = not job.master_port  # of each attempt
    check_ranks(nprocs, bindings=bindings, rank_env=rank_env, files=files)
    if env is not None:
        check_environment("env", env)
    check_stdin(stdin, job)
    check_kinds(
        required=required, keep_going=keep_going, capture_output=capture_output, handle_signals=handle_signals,
        stacks=stacks, guard=guard, die_with_parent=die_with_parent, cwd=cwd, cgroup=cgroup, temporary=temporary,
        log_dir=log_dir, tee=tee, tee_prefix=tee_prefix, tee_ranks=tee_ranks, on_line=on_line, progress=progress,
        devices=devices, reserve_cores=reserve_cores, threads_per_core=threads_per_core,
    )  # fmt: skip
    check_numa(numa)
    check_grace(grace)
    check_signal_to("signal_to", signal_to)
    hang = checked_hang(hang_timeout, on_hang, job.max_restarts)
    check_output(files, log_dir, tee, tee_prefix, tee_ranks, on_line, job=job, max_restarts=max_restarts)
    wanted = _given(
        memory_policy=memory_policy,
        devices=devices,
        reserve_cores=reserve_cores or None,
        threads_per_core=threads_per_core,
    )
    threads: Sequence[int] | None = None
    if bindings is None:
        from .._place.glance import sets_threads, threads_note

        threads_given = (os.environ if env is None else named_by_text(env)).get("OMP_NUM_THREADS")
        if note := threads_note(threads_given):
            warnings.warn(note, RuntimeWarning, stacklevel=2)
        with Deferral():  # an interrupt leaves no file of the kernel's open
            bindings, threads = _place(numa, nprocs, required=required, **wanted)
        threads = None if sets_threads(threads_given) else threads
    elif wanted or numa not in (None, "none", "auto"):
        raise ValueError(f"bindings say where ranks go: leave out {', '.join(wanted) or f'numa={numa!r}'}")
    check_descriptors(nprocs)
    order = Order(
        commands_of_ranks(args, nprocs), bindings, threads, env, rank_env, cwd, log_dir, files,
        tee, tee_prefix, tee_ranks, die_with_parent, guard, cgroup, temporary, progress,
        template := chosen_template(warm, lasts=bool(max_restarts)), capture_output or on_line is not None, stdin,
    )  # fmt: skip
    # Not a with block: at every moment either this function or the group owns what was opened and closes it.
    resources, ranks = ExitStack(), list[Popen]()
    signals = group = None
    if handle_signals:
        from .handlers import SignalHold

        # Taken first, and given back last.
        signals = SignalHold.take()
    try:
        if template is not None and template is not warm:
            resources.callback(template.close)
        of_attempt = resources.enter_context(ExitStack())
        restarts = None
        if max_restarts:
            from .restarts import Restarts

            done = None if signals is None else signals.give
            restarts = Restarts(order.start, of_attempt, new_port=new_port, done=done)
        group = RankGroup(
            order.start(job, called_ns, of_attempt, ranks),
            resources=resources,
            keep_going=keep_going,
            grace=GRACE_SECONDS if grace is None else grace,
            signal_to=signal_to,
            restarts=restarts,
            last=None if signals is None else signals.close,
            stacks=stacks and sys.platform == "linux",
            on_line=on_line,
            hang=hang,
        )
        if template is not None and not template.lasts and not max_restarts:
            template.close()  # the ranks that were forked from it do not need it
        if signals is not None:
            signals.give(group)
        return group
    except BaseException:
        try:
            with Deferral():
                try:
                    end_ranks(ranks)
                finally:
                    if group is not None:
                        group.close()
                    resources.close()
        finally:
            if signals is not None:
                signals.close()
        raise


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _place(
    numa: AffinityMode | NumaMode | None, nprocs: int, *, required: bool = True, **wanted: Any
) -> tuple[list[Binding | None], list[int]]:
    """Find the binding of each rank on this machine, and its OMP_NUM_THREADS; ``wanted`` is for ``place``."""
    from .._place.glance import has_one_node, hidden_devices, unbound_threads

    is_free = numa == "auto" and not wanted
    if wanted and numa in (None, "none"):
        raise ValueError(f"numa={numa!r} leaves ranks unbound: it excludes {', '.join(wanted)}")
    # On a machine with one node there is nothing to choose, and no need to read it.
    if numa in (None, "none") or (is_free and has_one_node()):
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
            ranks = plan_auto(topology, nprocs=nprocs, **wanted)
        else:
            ranks = plan(topology, numa, nprocs=nprocs, required=required, **wanted)
    except TopologyError as error:
        if not is_free:
            raise
        warnings.warn(f"ranks are left unbound: {error}", RuntimeWarning, stacklevel=3)
        return [None] * nprocs, [unbound_threads(nprocs)] * nprocs
    for note in dict.fromkeys(note for rank in ranks for note in rank.notes):
        warnings.warn(note, RuntimeWarning, stacklevel=3)
    return [rank.binding for rank in ranks], [rank.omp_threads for rank in ranks]
