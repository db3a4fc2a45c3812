"""Which of the job's machines this is, and where its ranks meet: from the options, else from the job step."""

from __future__ import annotations

import os

from .options import USAGE, CommandError
from .progress import say
from .step import Step, StepNode
from .vocabulary import endpoint, only_torchrun

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from .._group.job import Job
    from .._place.topology import Topology

# torch's default ports for several machines: for the static backend, and for a c10d endpoint without a port.
_STATIC_PORT, _C10D_PORT = 29500, 29400


def count_ranks(asked: int | str, topology: Topology | None = None) -> int:
    """Count the ranks of --nproc-per-node auto, cpu, gpu and xpu, as torchrun does but without torch.

    Args:
        asked: The value of the option.
        topology: The machine, as for ``plan --sysfs``; None for this one.

    Raises:
        CommandError: No device of this kind is visible.
        TopologyError: The machine cannot be read.
    """
    if isinstance(asked, int):
        return asked
    if asked == "cpu":
        return _cpu_count(topology)
    from .._place.devices import find_devices
    from .._place.topology import Topology

    vendors = [device.vendor for device in find_devices(topology or Topology.read())]
    count = sum(vendor != "intel" for vendor in vendors), vendors.count("intel")
    if asked == "auto":
        return count[0] or count[1] or _cpu_count(topology)
    found = count[asked == "xpu"]
    if not found:
        kind = "Intel" if asked == "xpu" else "NVIDIA or AMD"
        raise CommandError(f"--nproc-per-node {asked}: no {kind} GPU is visible", USAGE)
    return found


def _cpu_count(topology: Topology | None) -> int:
    if topology is not None:
        return len(topology.allowed_cpus)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_job(args: argparse.Namespace, nprocs: int) -> Job:
    """Read the job from the options, and the rest from the job step that this process runs in.

    Args:
        args: The parsed command line. A usage error ends the process with status 2.
        nprocs: How many ranks this machine has.

    Raises:
        CommandError: No port can be found at the master's address.
        StepError: The step does not say enough, or has several processes on this machine.
    """
    from .._group.job import Job

    node = _node(args, nprocs)
    if node.nnodes > 1 and args.max_restarts:
        # After a restart, the ranks of one machine would meet old ranks that another machine has not ended yet.
        only_torchrun(args.parser, "--max-restarts on several machines")
    address = bare(node.master_addr or "127.0.0.1")
    if not node.master_port:
        _check_local(address)
    return Job(
        nprocs,
        node.master_port or 0,
        address,
        _run_id(args) or node.run_id or "none",
        node.nnodes,
        node.node_rank,
        0,
        args.max_restarts,
        "default" if args.role is None else args.role,
    )


def _node(args: argparse.Namespace, nprocs: int) -> StepNode:
    """Find which machine this is."""
    parser, nnodes, node_rank = args.parser, args.nnodes, args.node_rank
    if isinstance(nnodes, str):
        only_torchrun(parser, f"--nnodes {nnodes}")
    if args.standalone:  # the options of a rendezvous are ignored then, as in torchrun
        if (nnodes or 1) > 1:
            parser.error(f"--standalone is for one machine, but --nnodes is {nnodes}")
        nnodes = 1
    elif args.rdzv_backend not in (None, "static", "c10d"):
        only_torchrun(parser, f"--rdzv-backend {args.rdzv_backend}")
    address, port = _meeting_place(args)
    step = Step.read(os.environ) if node_rank is None and nnodes != 1 else Step()
    if step.launcher not in ("", "torchrun") or (nnodes is None and node_rank is None):
        if not step.launcher and not address:
            _note_pod(os.environ)
        node = step.node(address, port)
        if nnodes not in (None, node.nnodes):
            parser.error(f"--nnodes {nnodes}, but {step.launcher} started this on {node.nnodes}: pass --node-rank too")
        if step.launcher and hasattr(os, "sched_getaffinity"):
            if crowded := step.crowding(nprocs, os.sched_getaffinity(0), set(range(os.cpu_count() or 1))):
                say(crowded)
        return node
    nnodes = 1 if nnodes is None else nnodes
    if node_rank is None and nnodes > 1:
        if args.rdzv_backend == "c10d":
            only_torchrun(parser, "--rdzv-backend c10d on several machines, without --node-rank,")
        parser.error("--nnodes needs --node-rank, the number of this machine from 0")
    node_rank = node_rank or 0
    if node_rank >= nnodes:
        parser.error(f"--node-rank {node_rank}: expected 0 to {nnodes - 1}, because --nnodes is {nnodes}")
    if nnodes > 1 and not address:
        parser.error("--nnodes needs --master-addr, the address where rank 0 listens")
    return StepNode(node_rank, nnodes, address, port or (_STATIC_PORT if nnodes > 1 else None), None)


def _note_pod(environ: Mapping[str, str]) -> None:
    """Say that the variables of a pod (Kubeflow's PyTorchJob without PET_ variables) make no job of several machines.

    torchrun does not read them, either, but each pod may have been meant to be a machine of the job.
    """
    size = environ.get("WORLD_SIZE", "")
    is_of_pod = {"RANK", "MASTER_ADDR"} <= environ.keys() and "TORCHELASTIC_RUN_ID" not in environ
    if is_of_pod and size.isdecimal() and int(size) > 1:
        say(
            f"RANK={environ['RANK']}, WORLD_SIZE={size} and MASTER_ADDR are not read, and this machine is the whole"
            " job: for several machines, pass --nnodes, --node-rank and --master-addr (or PET_NNODES, ...)"
        )


def _meeting_place(args: argparse.Namespace) -> tuple[str | None, int | None]:
    """Find the address and the port that the options name."""
    if args.standalone:
        return args.local_addr, None
    address, port = args.master_addr, args.master_port
    if args.rdzv_endpoint:  # it wins, as in torchrun; "" is an unset variable of a shell
        try:
            end = endpoint(args.rdzv_endpoint)
        except ValueError as error:
            args.parser.error(f"--rdzv-endpoint: {error}")
        address, port = end.host, end.port
        if port is None and args.rdzv_backend == "c10d" and args.nnodes not in (None, 1):
            port = _C10D_PORT
    if args.local_addr is not None:
        if args.rdzv_backend == "c10d" and args.nnodes in (None, 1):
            address = args.local_addr
        else:
            say("--local-addr: ignored, because rank 0 listens at the master's address")
    return address, port


def _run_id(args: argparse.Namespace) -> str | None:
    if args.standalone:
        import uuid

        return str(uuid.uuid4())
    run_id: str | None = args.rdzv_id
    return run_id


def bare(address: str) -> str:
    """Return an address for MASTER_ADDR: without the brackets around an IPv6 address in torchrun's options."""
    return address[1:-1] if address.startswith("[") and address.endswith("]") else address


def _check_local(address: str) -> None:
    """Raise CommandError if this machine cannot listen at the master's address."""
    from .._group.port import check_local

    try:
        check_local(address)
    except OSError as error:
        raise CommandError(
            f"--master-addr {address}: cannot listen there ({error.strerror}); if it is another machine's, pass"
            " --master-port too",
            USAGE,
        ) from error
