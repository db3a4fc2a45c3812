"""What ``rankspawn run`` was asked to do: argparse's Namespace, checked, as plain frozen data."""

from __future__ import annotations

import argparse
import os
import re
import sys

from .._frozen import Frozen
from .._place.glance import has_one_node, hidden_devices, unbound_threads
from .._place.openmp import openmp_warnings, quota_note
from .._place.sysfs import TopologyError
from .options import AUTO_BINDS, CommandError, PlacementOptions, placement
from .progress import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from .._binding import Binding
    from .._group.job import Job
    from .._place.plan import Placed


class RunSettings(Frozen):
    """Everything that the command line, the environment and the machine say of a run. Nothing behind it sees argparse.

    Attributes:
        command: What each rank executes.
        job: What the ranks of the first attempt are told.
        bindings: Where each rank goes, by local rank; None for a rank that stays unbound.
        omp_threads: OMP_NUM_THREADS of each rank, by local rank.
        engine: Whether the engine starts the ranks, and the kernel can end them with the launcher.
        log_dir: The option of this name, as the others below; None where it was not given.
        tee: Whether the ranks' lines are shown.
        shown_ranks: The local ranks of --local-ranks-filter; None for all.
        report: The file for the report.
        timeline: The file for the drawing.
        keep_going: Whether a rank that fails leaves the others alone.
        grace: Seconds.
        signal_to: Whom of a rank a signal reaches first.
        signals_to_handle: The signals of --signals-to-handle; none where it was not given.
        guard: None where neither --guard nor --no-guard was given.
        stacks: Whether the launcher looks at what ranks do before it ends them.
        cgroup: The delegated cgroup.
    """

    command: tuple[str, ...]
    job: Job
    bindings: tuple[Binding | None, ...]
    omp_threads: tuple[int, ...]
    engine: bool
    log_dir: str | None
    tee: bool
    shown_ranks: frozenset[int] | None
    report: str | None
    timeline: str | None
    keep_going: bool
    grace: float | None
    signal_to: Literal["rank", "group", "session"]
    signals_to_handle: frozenset[int]
    guard: bool | None
    stacks: bool
    cgroup: str | None


def read_settings(args: argparse.Namespace) -> RunSettings:
    """Check the arguments of ``run``; usage errors end the process with status 2.

    Raises:
        CommandError: No port can be found at the master's address.
        PlacementError: A rank cannot be placed.
        OSError: The system refuses something else.
    """
    from .._start.engine import mechanisms

    script = _checked_script(args)
    bindings, threads = place_ranks(PlacementOptions.read(args), args.nproc_per_node)
    try:
        engine = bool(mechanisms()) and sys.platform == "linux"
    except ValueError as error:
        args.parser.error(str(error))
    return RunSettings(
        command=_command(script, module=args.module, no_python=args.no_python),
        job=_job(args),
        bindings=bindings,
        omp_threads=threads,
        engine=engine,
        log_dir=args.log_dir,
        tee=args.tee,
        shown_ranks=args.local_ranks_filter,
        report=args.report,
        timeline=args.timeline,
        keep_going=args.keep_going,
        grace=args.grace,
        signal_to=args.signal_to,
        signals_to_handle=args.signals_to_handle or frozenset(),
        guard=args.guard,
        stacks=args.stacks,
        cgroup=args.cgroup,
    )


def _checked_script(args: argparse.Namespace) -> list[str]:
    """Return SCRIPT and its arguments; usage errors end the process with status 2."""
    script: list[str] = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not script:
        args.parser.error("SCRIPT is missing")
    if args.tee and re.fullmatch(r"[0-3](,?\d+:[0-3])*|(\d+:[0-3],?)+", script[0]):
        args.parser.error(f"--tee takes no value (here: {script[0]}): all that is logged is shown")
    if args.module and args.no_python:
        args.parser.error("--module and --no-python exclude each other")
    if args.local_ranks_filter is not None and not args.tee:
        args.parser.error("--local-ranks-filter needs --tee")
    return script


def _command(script: Sequence[str], *, module: bool, no_python: bool) -> tuple[str, ...]:
    if no_python:
        return tuple(script)
    # As for torchrun, PYTHON_EXEC is another interpreter for the ranks.
    python = os.environ.get("PYTHON_EXEC", sys.executable)
    return (python, "-u", *(["-m"] if module else []), *script)


def place_ranks(
    options: PlacementOptions, nprocs: int, root: str = "/"
) -> tuple[tuple[Binding | None, ...], tuple[int, ...]]:
    """Place the ranks, and say what there is to say of it.

    Args:
        options: The options of placement.
        nprocs: How many ranks there are.
        root: The folder that has the machine's sys/ and proc/ in it.

    Returns:
        The binding of each rank, None for a rank that stays unbound; and OMP_NUM_THREADS of each.

    Raises:
        PlacementError: A rank cannot be placed; where mode auto decides all, the ranks stay unbound instead.
    """
    notes = list(openmp_warnings(os.environ))
    if root == "/" and hasattr(os, "sched_getaffinity"):
        notes.append(quota_note(len(os.sched_getaffinity(0))))
    ranks: Sequence[Placed] = ()
    mode = options.numa_binding if options.say_only_mode else ""
    try:
        # Without options, and on a machine with one node, there is nothing to choose, and no need to read the machine.
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


def _job(args: argparse.Namespace) -> Job:
    """Find what the options say of the job, and where they do not, what the job step that we run in says."""
    from .._group.job import Job
    from .step import Step

    nnodes, node_rank = args.nnodes, args.node_rank
    if nnodes is None and node_rank is None:
        step = Step.read(os.environ)
        node = step.node(args.master_addr, args.master_port)
        if step.launcher and hasattr(os, "sched_getaffinity"):
            if crowded := step.crowding(args.nproc_per_node, os.sched_getaffinity(0), set(range(os.cpu_count() or 1))):
                say(crowded)
        address, port, run_id = node.master_addr, node.master_port, node.run_id
        nnodes, node_rank = node.nnodes, node.node_rank
    else:
        address, port, run_id = args.master_addr, args.master_port, None
        nnodes = 1 if nnodes is None else nnodes
        if node_rank is None and nnodes > 1:
            args.parser.error("--nnodes needs --node-rank: which of the machines this is")
        node_rank = node_rank or 0
        if node_rank >= nnodes:
            args.parser.error(f"--node-rank {node_rank} of --nnodes {nnodes}: they are counted from 0")
        if nnodes > 1 and not (address and port):
            args.parser.error("--nnodes needs --master-addr and --master-port: where rank 0 listens")
    if nnodes > 1 and args.max_restarts:
        # The ranks of one machine would meet those that another has not ended yet.
        args.parser.error("--max-restarts is for one machine: several are restarted together by rankspawn torchrun")
    address = bare(address or "127.0.0.1")
    if not port:
        _check_local(address)
    return Job(args.nproc_per_node, port or 0, address, run_id or "none", nnodes, node_rank, 0, args.max_restarts)


def bare(address: str) -> str:
    """Return an address as MASTER_ADDR has it: without the brackets that torchrun's options have around IPv6's."""
    return address[1:-1] if address.startswith("[") and address.endswith("]") else address


def _check_local(address: str) -> None:
    """Check that a port can be found at the master's address. Raises CommandError where it is not this machine's."""
    from .._group.port import check_local

    try:
        check_local(address)
    except OSError as error:
        raise CommandError(
            f"--master-addr {address}: no port can be found there ({error.strerror}); if it is another machine's, give"
            " --master-port too"
        ) from error
