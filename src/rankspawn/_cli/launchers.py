"""What launchers call the variables by which they number their processes, and some of their options."""

from __future__ import annotations

from .._frozen import Frozen


class Told(Frozen):
    """The variables by which a launcher numbers its processes; "" for a variable that it does not set.

    Attributes:
        launcher: The launcher's name in messages.
        local_rank: The variable with the process's number on its node, from 0.
        local_size: The variable with the number of processes on the node.
        rank: The variable with the process's number in the whole step, from 0 (PBS_TASKNUM counts from 1).
        size: The variable with the number of processes in the whole step.
    """

    launcher: str
    local_rank: str
    local_size: str
    rank: str
    size: str


# These are looked up before Slurm's, because the launchers run inside Slurm's jobs, and their processes have the
# variables of both. Flux comes before jsrun, because it runs inside jsrun's jobs. jsrun comes before Open MPI, because
# it starts Spectrum MPI, which sets Open MPI's variables, too.
FLUX = Told("flux run", "FLUX_TASK_LOCAL_ID", "", "FLUX_TASK_RANK", "FLUX_JOB_SIZE")
MPI = (
    # IBM's Job Step Manager
    Told(
        "jsrun",
        "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
    ),
    # docs.open-mpi.org, "Environment variables set for MPI applications"
    Told(
        "mpirun",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
    ),
    # Hydra, which MPICH and Intel MPI share
    Told("mpiexec", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_RANK", "PMI_SIZE"),
    # HPE's Parallel Application Launch Service
    Told("PALS mpiexec", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE", "PALS_RANKID", "PMI_SIZE"),
    # MVAPICH's own launcher: the names of version 2, and of version 3 and later
    *(
        Told(
            "mpirun_rsh",
            f"{prefix}_COMM_WORLD_LOCAL_RANK",
            f"{prefix}_COMM_WORLD_LOCAL_SIZE",
            f"{prefix}_COMM_WORLD_RANK",
            f"{prefix}_COMM_WORLD_SIZE",
        )
        for prefix in ("MV2", "MVP")
    ),
    # HPE's Message Passing Toolkit
    Told("mpiexec_mpt", "MPT_LRANK", "", "", ""),
)
PMI = Told("a PMI launcher", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE", "PMI_RANK", "PMI_SIZE")
TORCHRUN = Told("torchrun", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE")
SRUN = Told("srun", "SLURM_LOCALID", "", "SLURM_PROCID", "SLURM_NTASKS")
"""A task of srun whose other variables are missing; see Step.read() for the whole set."""
# These processes have no local rank: their launcher sets none, or a wrapper passes only some variables on. They are
# listed so that no process takes itself for the only one. Hydra's mpiexec is not listed, because without its local rank
# it looks like any PMI launcher.
RANK_ALONE = (
    FLUX,
    PMI,
    *(told for told in MPI if told.rank not in ("", PMI.rank)),
    # Cray's Application Level Placement Scheduler
    Told("aprun", "", "", "ALPS_APP_PE", ""),
    Told("a PMIx launcher", "", "", "PMIX_RANK", ""),
    Told("blaunch", "", "", "LSF_PM_TASKID", ""),
)
PBSDSH = Told("pbsdsh", "", "", "PBS_TASKNUM", "")

# The launchers' options: start one process on each node; bind no process; give each process more CPUs.
ONE_A_NODE = {
    "srun": "--ntasks-per-node=1",
    "flux run": "--nodes=N --tasks-per-node=1",
    "jsrun": "-r 1 -a 1 -c ALL_CPUS -g ALL_GPUS",
    "aprun": "-N 1",
    "mpirun": "--map-by ppr:1:node",
    "mpiexec": "-ppn 1",
    "PALS mpiexec": "--ppn 1",
}
UNBOUND = {
    "srun": "--cpu-bind=none",
    "flux run": "-o cpu-affinity=off",
    "jsrun": "--bind none",
    "mpirun_rsh": "MV2_ENABLE_AFFINITY=0",
    "mpirun": "--bind-to none",
    "mpiexec": "-bind-to none",
    "PALS mpiexec": "--cpu-bind none",
}
MORE_CPUS = {
    **UNBOUND,
    "srun": "--cpus-per-task=N",
    "flux run": "--cores-per-task=N",
    "jsrun": "-c ALL_CPUS",
}
