"""The settings of ``rankspawn run``: the checked command line as plain frozen data."""

from __future__ import annotations

import argparse
import os
import sys

from .._frozen import Frozen
from .._place.glance import has_one_node, hidden_devices, unbound_threads
from .._place.openmp import openmp_warnings, quota_note
from .._place.sysfs import TopologyError
from .meeting import count_ranks, read_job
from .options import AUTO_BINDS, USAGE, CommandError, PlacementOptions, placement
from .program import check_folder_of, check_script, unmeant
from .progress import say
from .streams import Streams
from .vocabulary import settle_torchrun_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from .._binding import Binding
    from .._group.job import Job
    from .._place.plan import Placed

_RUN_PATH = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
"""The program of --run-path. It runs SCRIPT as torchrun's own function does."""


class RunSettings(Frozen):
    """All settings of a run: from the command line, the environment and the machine. No later code sees argparse.

    Attributes:
        command: What each rank executes.
        name: The job's name in the name of its log folder: its script, its run_id and its machine.
        job: The job of the first attempt.
        bindings: Where each rank goes, by local rank; None for a rank that stays unbound.
        omp_threads: OMP_NUM_THREADS of each rank, by local rank.
        engine: Whether the engine starts the ranks, and the kernel can end them together with the launcher.
        log_dir: The option of this name; None if the user did not give it.
        streams: Where the ranks' stdout and stderr go.
        stdin: Which ranks read the launcher's stdin: "all", "none", or one RANK.
        own_devices: CUDA_VISIBLE_DEVICES of each rank, by local rank, for --virtual-local-rank; else none.
        report: The file for the report.
        timeline: The file for the drawing.
        keep_going: Whether the other ranks keep running when one fails.
        grace: Seconds between SIGTERM and SIGKILL.
        wait: Seconds that the other ranks may run after the first has ended with status 0.
        signal_to: Which processes of a rank a signal reaches first.
        signals_to_handle: The signals of --signals-to-handle; empty if the user did not give it.
        guard: None if the user gave neither --guard nor --no-guard.
        stacks: Whether the launcher looks at what ranks do before it ends them.
        hang_timeout: Seconds without progress after which a job counts as hung; None for no hang watch.
        on_hang: What to do about a hang.
        cgroup: The delegated cgroup, or "auto"; None for no cgroup.
        warm: Whether ranks are forked from a template.
        preload: The modules that the template imports; None for those that the script imports at its top.
    """

    command: tuple[str, ...]
    name: str
    job: Job
    bindings: tuple[Binding | None, ...]
    omp_threads: tuple[int, ...]
    engine: bool
    log_dir: str | None
    streams: Streams
    stdin: Literal["all", "none"] | int
    own_devices: tuple[str, ...]
    report: str | None
    timeline: str | None
    keep_going: bool
    grace: float | None
    wait: float | None
    signal_to: Literal["rank", "group", "session"]
    signals_to_handle: frozenset[int]
    guard: bool | None
    stacks: bool
    hang_timeout: float | None
    on_hang: Literal["report", "end", "restart"]
    cgroup: str | None
    warm: bool
    preload: tuple[str, ...] | None


def read_settings(args: argparse.Namespace) -> RunSettings:
    """Check the arguments of ``run``. A usage error ends the process with status 2.

    Raises:
        CommandError: This machine cannot listen at the master's address, or no device is visible to count ranks by.
        PlacementError: A rank cannot be placed.
        OSError: The system refuses something else.
    """
    from .._start.engine import mechanisms

    script = _checked_script(args)
    settle_torchrun_options(args)
    nprocs = count_ranks(args.nproc_per_node)
    bindings, threads = place_ranks(PlacementOptions.read(args), nprocs)
    try:
        engine = bool(mechanisms()) and sys.platform == "linux"
    except ValueError as error:
        args.parser.error(str(error))
    job = read_job(args, nprocs)
    _check_files(script[0], args)
    if not args.no_python:
        say_unmeant(script, args.module and not args.run_path)
    return RunSettings(
        command=command_of(script, args),
        name=_name(script[0], job, own_id=not args.standalone),
        job=job,
        bindings=bindings,
        omp_threads=threads,
        engine=engine,
        log_dir=args.log_dir,
        streams=Streams.read(args, nprocs, os.environ),
        stdin=_stdin(args, script[0], job),
        own_devices=_own_devices(nprocs) if args.virtual_local_rank else (),
        report=args.report,
        timeline=args.timeline,
        keep_going=args.keep_going,
        grace=_shutdown_timeout(args),
        wait=args.wait,
        signal_to=args.signal_to,
        signals_to_handle=args.signals_to_handle or frozenset(),
        guard=args.guard,
        stacks=args.stacks,
        hang_timeout=args.hang_timeout,
        on_hang=_on_hang(args),
        cgroup=args.cgroup,
        warm=args.warm or args.preload is not None,
        preload=args.preload,
    )


def say_unmeant(script: Sequence[str], is_module: bool) -> None:
    """Say which words after SCRIPT look like the launcher's options; see unmeant()."""
    if left := unmeant(script, is_module):
        say(
            f"{' and '.join(left)} after SCRIPT: passed to {script[0]}, whose text does not name"
            f" {'it' if len(left) == 1 else 'them'}; put options of rankspawn run before SCRIPT"
        )


def _checked_script(args: argparse.Namespace) -> list[str]:
    """Return SCRIPT and its arguments. A usage error ends the process with status 2."""
    script: list[str] = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not script:
        args.parser.error("SCRIPT is missing")
    if args.module and args.no_python and not args.run_path:
        args.parser.error("--module and --no-python cannot be combined")
    return script


def _check_files(script: str, args: argparse.Namespace) -> None:
    """Raise CommandError if the script, or the folder of a report, does not exist."""
    # With PYTHON_EXEC, the interpreter may run in a container and see other files.
    if "PYTHON_EXEC" not in os.environ and (args.run_path or not (args.module or args.no_python)):
        check_script(script)
    for path in (args.report, args.timeline):
        check_folder_of(path)


def _stdin(args: argparse.Namespace, script: str, job: Job) -> Literal["all", "none"] | int:
    """Check which ranks read stdin. A usage error ends the process with status 2."""
    stdin: Literal["all", "none"] | int = args.stdin
    if isinstance(stdin, int) and stdin >= job.world_size:
        args.parser.error(f"--stdin {stdin}: the job has {job.world_size} ranks, counted from 0")
    if script == "-" and job.world_size > 1 and not (args.module or args.no_python):
        args.parser.error("SCRIPT - is read from stdin, which only one rank can read: pass a file")
    return stdin


def command_of(script: Sequence[str], args: argparse.Namespace) -> tuple[str, ...]:
    """The command of each rank: SCRIPT and its arguments, with the interpreter in front."""
    if args.no_python and not args.run_path:
        return tuple(script)
    # As in torchrun, PYTHON_EXEC names another interpreter for the ranks.
    python = os.environ.get("PYTHON_EXEC", sys.executable)
    how = ["-c", _RUN_PATH] if args.run_path else ["-m"] if args.module else []
    return (python, "-u", *how, *script)


def _name(script: str, job: Job, *, own_id: bool) -> str:
    """Name a job by its script, by its run_id if it has one, and by the machine if there are several."""
    name = os.path.basename(script.rstrip(os.sep)).removesuffix(".py")
    words = ["stdin" if script == "-" else name]
    if own_id and job.run_id != "none":  # with --standalone it is a UUID
        words.append(job.run_id.replace(os.sep, "_"))
    if job.nnodes > 1:
        words.append(f"node{job.node_rank}")
    return "-".join(words)


def _on_hang(args: argparse.Namespace) -> Literal["report", "end", "restart"]:
    """Check what to do about a hang. A usage error ends the process with status 2."""
    action: Literal["report", "end", "restart"] = args.on_hang or "report"
    if args.on_hang and args.hang_timeout is None:
        args.parser.error(f"--on-hang {action} needs --hang-timeout SECONDS")
    if action == "restart" and not args.max_restarts:
        args.parser.error("--on-hang restart needs --max-restarts N")
    if args.hang_timeout is not None:
        from .._stacks.take import can_look

        if not can_look():
            args.parser.error("--hang-timeout needs Linux's /proc, which this system does not have")
    return action


def _own_devices(nprocs: int) -> tuple[str, ...]:
    """Choose the one device that each rank sees, as torchrun does: the visible devices in local-rank order."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return tuple(map(str, range(nprocs)))
    devices = [word.strip() for word in listed.split(",")]
    if len(devices) < nprocs:
        raise CommandError(f"--virtual-local-rank: expected {nprocs} devices, got CUDA_VISIBLE_DEVICES={listed}", USAGE)
    return tuple(devices[:nprocs])


def _shutdown_timeout(args: argparse.Namespace) -> float | None:
    """Return the seconds of --grace, else those of torchrun's variable, else None."""
    text = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    if args.grace is not None or not text:
        grace: float | None = args.grace
        return grace
    if not text.isdecimal():
        raise CommandError(f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={text}: expected a number of seconds", USAGE)
    return float(text)


def place_ranks(
    options: PlacementOptions, nprocs: int, root: str = "/"
) -> tuple[tuple[Binding | None, ...], tuple[int, ...]]:
    """Place the ranks, and print the notes about it.

    Args:
        options: The placement options.
        nprocs: How many ranks there are.
        root: The folder that has the machine's sys/ and proc/ in it.

    Returns:
        The binding of each rank, None for a rank that stays unbound; and OMP_NUM_THREADS of each.

    Raises:
        PlacementError: A rank cannot be placed. If only mode auto decides, the ranks stay unbound instead.
    """
    notes = list(openmp_warnings(os.environ))
    if root == "/" and hasattr(os, "sched_getaffinity"):
        notes.append(quota_note(len(os.sched_getaffinity(0))))
    ranks: Sequence[Placed] = ()
    mode = options.numa_binding if options.say_only_mode else ""
    try:
        # Without options and with one node there is nothing to choose, so the machine need not be read.
        if root == "/" and (mode == "none" or (mode == "auto" and has_one_node())):
            notes += hidden_devices(os.environ)
        else:
            from .._place.topology import Topology

            ranks = placement(options, Topology.read(root), nprocs)
            notes[:0] = [note for rank in ranks for note in rank.notes]
            if options.auto_binds(ranks):
                notes.insert(0, AUTO_BINDS)
    except TopologyError as error:
        if mode != "auto":
            raise
        notes.insert(0, f"ranks are left unbound: {error}")
    for note in filter(None, dict.fromkeys(notes)):
        say(note)
    if not ranks:
        return (None,) * nprocs, (unbound_threads(nprocs),) * nprocs
    bindings = [rank.binding for rank in ranks]
    return (
        tuple([None if one.cpus is None and one.memory is None else one for one in bindings]),
        tuple([rank.omp_threads for rank in ranks]),
    )
