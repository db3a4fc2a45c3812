"""The job step that this process runs in, as its environment variables describe it.

They say which launcher started the process, which number it has of how many, and where the step's processes can meet.
This module knows Slurm, Flux, jsrun, Open MPI, Hydra (MPICH, Intel MPI), PALS, MVAPICH and other PMI launchers, and
torchrun. It only reads variables. It calls no launcher, and loads no launcher's library.
"""

from __future__ import annotations

import re

from .._binding import PlacementError
from .._frozen import Frozen
from .._ids import format_ids
from .launchers import FLUX, MORE_CPUS, MPI, ONE_A_NODE, PBSDSH, PMI, RANK_ALONE, SRUN, TORCHRUN, UNBOUND, Told

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Set

# Ports from torchrun's default up to 32500, below the ports that Linux gives to outgoing connections (32768 and up, see
# ip_local_port_range in ip(7)). The count is a prime number, so that jobs with close numbers get different ports.
_FIRST_PORT = 29500
_PORTS = 3001


class StepError(PlacementError):
    """The environment of a job step contradicts itself, or does not say what is needed."""


class StepNode(Frozen):
    """Which of a job's nodes this is, and where the job's rank 0 listens.

    Attributes:
        node_rank: The node's number, from 0.
        nnodes: The number of nodes.
        master_addr: The address; None if there is one node and the user gave no address.
        master_port: The port; None in the same case.
        run_id: The job's name; None if it has none.
    """

    node_rank: int
    nnodes: int
    master_addr: str | None
    master_port: int | None
    run_id: str | None


class Step(Frozen):
    """One process of a job step. A field is None if the environment does not say it.

    Attributes:
        launcher: What started it: "srun", "flux run", "jsrun", "mpirun", "mpiexec" (Hydra's), "PALS mpiexec",
            "mpirun_rsh", "mpiexec_mpt", "aprun", "blaunch", "pbsdsh", "a PMI launcher", "a PMIx launcher", "torchrun"
            (and all that set LOCAL_RANK), or "" for no launcher.
        variable: A variable that only the launcher's own processes have; "" for no launcher.
        rank: Its number among all processes of the step, from 0.
        size: The number of the step's processes.
        local_rank: Its number among the processes of this node, from 0.
        local_size: The number of this node's processes.
        node_rank: This node's number among the step's, from 0.
        nnodes: The number of the step's nodes.
        own_masks: Whether the launcher gave each process of this node its own CPU mask; None if no variable says it.
        master_addr: The host of node 0.
        master_port: A port that follows from the job's name, and is the same on every node: 29500 + (10 * JOB + STEP)
            mod 3001 under Slurm; with a PMIx namespace or Flux's job id, the same with its bytes as one number; else
            29500.
        run_id: "JOB.STEP" of Slurm, the id of Flux's job, or the namespace of PMIx.
    """

    launcher: str = ""
    variable: str = ""
    rank: int | None = None
    size: int | None = None
    local_rank: int | None = None
    local_size: int | None = None
    node_rank: int | None = None
    nnodes: int | None = None
    own_masks: bool | None = None
    master_addr: str | None = None
    master_port: int = _FIRST_PORT
    run_id: str | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Step:
        """Read the step from a process's environment. Raises StepError for impossible values."""
        # With these variables it is a worker of torchrun or a rank of ours, whatever started the launcher above it.
        if "TORCHELASTIC_RUN_ID" in environ and "LOCAL_RANK" in environ:
            return _torchrun(environ)
        if FLUX.local_rank in environ:
            return _flux(environ)
        for told in MPI:
            if told.local_rank in environ:
                return _mpi(told, environ)
        # A batch script is no step, although it has Slurm's other variables, as if it were task 0 of one task.
        if "SLURM_STEP_NUM_NODES" in environ and "SLURM_PROCID" in environ:
            return _slurm(environ)
        if PMI.local_rank in environ:
            return _mpi(PMI, environ)
        if "LOCAL_RANK" in environ:
            return _torchrun(environ)
        for told in RANK_ALONE:
            if told.rank in environ:
                return _alone(told, environ)
        if "SLURM_STEP_ID" in environ and SRUN.rank in environ:
            return _alone(SRUN, environ)
        if environ.get(PBSDSH.rank, "1") != "1":  # the batch script itself is task 1
            return _alone(PBSDSH, environ)
        return cls()

    def node(self, master_addr: str | None = None, master_port: int | None = None) -> StepNode:
        """Find this node among the step's nodes, for a launcher that runs once on each node.

        Without a launcher, or under torchrun, this node is the only one.

        Args:
            master_addr: The user's own address; None if the user gave none.
            master_port: The user's own port; None if the user gave none.

        Raises:
            StepError: Several processes of the step run on this node, or no variable says where the nodes can meet.
        """
        if self.launcher in ("", "torchrun"):
            return StepNode(0, 1, master_addr, master_port, None)
        if self.local_size != 1:
            if self.local_size is not None:
                where = f"{self.local_size} processes on this node"
            elif self.size is not None and self.nnodes is not None:
                where = f"{self.size} processes on {self.nnodes} nodes"
            else:
                raise StepError(
                    f"{self.launcher} started this ({self.variable} is set), but does not say how many processes run on"
                    " this node: pass --nnodes, --node-rank and --master-addr"
                )
            raise StepError(
                f"{self.launcher} started {where}, and each would start all ranks: start one on each node"
                f" ({self._with(ONE_A_NODE)}), or a rank in each process with `rankspawn bind`;"
                " in a shell of the step, --nnodes 1 starts all on this node"
            )
        if self.nnodes is None or self.node_rank is None:
            raise StepError(f"{self.launcher} does not say how many nodes there are: pass --nnodes and --node-rank")
        if self.nnodes == 1:
            return StepNode(0, 1, master_addr, master_port, self.run_id)
        address = master_addr or self.master_addr
        if address is None:
            raise StepError(
                f"{self.launcher} started this on {self.nnodes} nodes, but does not say which host the first is: pass"
                " --master-addr HOST, the host of its rank 0"
            )
        return StepNode(self.node_rank, self.nnodes, address, master_port or self.master_port, self.run_id)

    def crowding(self, nprocs: int, inherited: Set[int], online: Set[int]) -> str | None:
        """Say that the launcher leaves too few CPUs to the ranks, as Slurm (one CPU) and Open MPI (one core) do.

        Args:
            nprocs: How many ranks there are.
            inherited: The CPUs that they inherit.
            online: The machine's online CPUs.

        Returns:
            The sentence; None if there are enough CPUs.
        """
        if self.launcher in ("", "torchrun") or len(inherited) >= min(nprocs, len(online)):
            return None
        return f"{nprocs} ranks share CPUs {format_ids(inherited)}: {self._with(MORE_CPUS)} may give more"

    @property
    def unbound(self) -> str:
        """The launcher's name with the option by which it binds no process by itself."""
        return self._with(UNBOUND)

    def _with(self, options: Mapping[str, str]) -> str:
        return (
            f"`{self.launcher} {options[self.launcher]}`" if self.launcher in options else "an option of the launcher"
        )


def _slurm(environ: Mapping[str, str]) -> Step:
    """Read a task of srun ("OUTPUT ENVIRONMENT VARIABLES" in srun(1)). A step may have fewer nodes than its job."""
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID") or 0
    # Not SLURM_PROCID, because with --distribution=arbitrary task 0 may run on any host of the list.
    node, tasks = _number(environ, "SLURM_NODEID"), environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts = _tasks_per_node(tasks)
    if node is not None and not node < len(counts):
        raise StepError(f"SLURM_NODEID={node} contradicts SLURM_STEP_TASKS_PER_NODE={tasks!r}")
    return Step(
        launcher="srun",
        variable="SLURM_LOCALID",
        rank=_number(environ, "SLURM_PROCID"),
        size=_number(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_size=None if node is None else counts[node],
        node_rank=node,
        nnodes=_number(environ, "SLURM_STEP_NUM_NODES"),
        own_masks=_own_masks(environ),
        master_addr=first_host(environ.get("SLURM_STEP_NODELIST", "")),
        master_port=_FIRST_PORT if job is None else _FIRST_PORT + (10 * job + step) % _PORTS,
        run_id=None if job is None else f"{job}.{step}",
    )


def _own_masks(environ: Mapping[str, str]) -> bool:
    """Whether Slurm gave the tasks of this node different masks.

    One mask for all tasks is the job's share of the node. Slurm's task plugin sets it even with --cpu-bind=none.
    """
    kind, masks = environ.get("SLURM_CPU_BIND_TYPE", ""), environ.get("SLURM_CPU_BIND_LIST", "")
    return kind.startswith("rank") or (kind.startswith(("map", "mask")) and len(set(masks.split(","))) > 1)


def _flux(environ: Mapping[str, str]) -> Step:
    """Read a task of a Flux job ("ENVIRONMENT" in flux-environment(7)).

    Flux does not say how many tasks a node has. But it gives each node at least one task, so if there are as many
    tasks as nodes, each node has one.
    """
    found = _named(_of(FLUX, environ), environ.get("FLUX_JOB_ID"))
    nnodes = _number(environ, "FLUX_JOB_NNODES")
    if nnodes == 1:
        return found.replace(local_size=found.size, node_rank=0, nnodes=1)
    if nnodes is not None and nnodes == found.size:
        return found.replace(local_size=1, node_rank=found.rank, nnodes=nnodes)
    return found.replace(nnodes=nnodes)


def _named(step: Step, name: str | None) -> Step:
    """Give a step its job's name, and the port that follows from it."""
    if not name:
        return step
    number = int.from_bytes(name.encode(errors="surrogateescape"), "big")  # Flux's names are no ASCII
    return step.replace(run_id=name, master_port=_FIRST_PORT + number % _PORTS)


def _mpi(told: Told, environ: Mapping[str, str]) -> Step:
    """Read a process of an MPI launcher.

    No variable says where rank 0 runs. The addresses in the environment (as in OMPI_MCA_orte_hnp_uri) are those of the
    host of mpirun itself, which may not be one of the job's hosts.
    """
    found = _named(_of(told, environ), environ.get("PMIX_NAMESPACE"))
    # One process here means one on every node (a node with more ends the job), so process ranks are node ranks.
    if found.local_size == 1:
        found = found.replace(node_rank=found.rank, nnodes=found.size)
    return found


def _alone(told: Told, environ: Mapping[str, str]) -> Step:
    """Read a process whose launcher does not say how many processes this node has, unless it is the only process."""
    found = _mpi(told, environ)
    if found.size == 1:
        return found.replace(local_rank=0, local_size=1, node_rank=0, nnodes=1)
    return found


def _torchrun(environ: Mapping[str, str]) -> Step:
    groups = _number(environ, "GROUP_RANK"), _number(environ, "GROUP_WORLD_SIZE")
    return _of(TORCHRUN, environ).replace(node_rank=groups[0], nnodes=groups[1])


def _of(told: Told, environ: Mapping[str, str]) -> Step:
    rank, size = _number(environ, told.rank), _number(environ, told.size)
    local_rank, local_size = _number(environ, told.local_rank), _number(environ, told.local_size)
    for name, number, of, count in (
        (told.rank, rank, told.size, size),
        (told.local_rank, local_rank, told.local_size, local_size),
    ):
        if number is not None and count is not None and not number < count:
            raise StepError(f"{name}={number} contradicts {of}={count}")
    variable = told.rank if local_rank is None else told.local_rank
    return Step(told.launcher, variable, rank, size, local_rank, local_size)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """Read the number in a variable; None if the variable is not set. Raises StepError for other text."""
    text = environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise StepError(f"{name}={text!r}: expected a non-negative integer")
    return int(text)


def first_host(hosts: str) -> str | None:
    """Find the first host of a Slurm host list: "gpu001" of "gpu[001-003,7],login1"; None for an empty list.

    In a name with several brackets the last one counts fastest, as in `scontrol show hostnames`, so the first host has
    the first number of each.

    Raises:
        StepError: The text is no host list.
    """
    if not hosts:
        return None
    name = re.match(r"(?:[^][,]|\[[0-9][0-9,-]*\])+(?=,|$)", hosts)
    if name is None:
        raise StepError(f"SLURM_STEP_NODELIST={hosts!r} is not a list of hosts like gpu[001-003,7]")
    return re.sub(r"\[([0-9]+)[0-9,-]*\]", r"\1", name[0])


def _tasks_per_node(text: str) -> list[int]:
    """Read the number of tasks of each node: "4(x2),3" is 4, 4, 3 (SLURM_TASKS_PER_NODE in srun(1))."""
    counts: list[int] = []
    for part in text.split(",") if text else ():
        run = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if run is None:
            raise StepError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not a list of counts like 4(x2),3")
        counts += [int(run[1])] * int(run[2] or 1)
    return counts
