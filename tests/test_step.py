"""How the variables of launchers are read; tests/slurm and tests/mpi ask the launchers themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankspawn._cli.step import Step, StepError, StepNode, first_host
from tests.support.launchers import SAY, completed, environment_here, in_ranks, said

# Variables as srun 22.05, Open MPI 4.1 and MPICH 4.0 set them, without those that nobody here reads.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[001-004]",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NODELIST": "gpu[002,004]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
# Slurm tells a batch script that it is task 0 on its node, although it is a task of no step.
BATCH = {name: SRUN[name] for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NNODES")} | {
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "6",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "5",
    "PMIX_NAMESPACE": "1837826049",
}
ONE_A_NODE = {
    **MPIRUN,
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", "PMI_FD": "7"}
PALS = {"PALS_RANKID": "5", "PMI_SIZE": "8", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4", "PALS_NODEID": "1"}
PMI = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"}
# As jsrun's and Flux's documentation and the sources of MVAPICH and LAMMPS name them: none of these could be tried.
JSRUN = {
    "JSM_NAMESPACE_RANK": "5",
    "JSM_NAMESPACE_SIZE": "8",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "4",
    "PMIX_RANK": "5",
}
FLUX = {
    "FLUX_TASK_RANK": "5",
    "FLUX_TASK_LOCAL_ID": "1",
    "FLUX_JOB_SIZE": "8",
    "FLUX_JOB_NNODES": "1",
    "FLUX_JOB_ID": "ƒ3ETxsR9H",
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "5",
    "MV2_COMM_WORLD_SIZE": "8",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "4",
}
MVAPICH_3 = {name.replace("MV2", "MVP"): value for name, value in MVAPICH.items()}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}


def test_srun() -> None:
    assert Step.read(SRUN) == Step(
        launcher="srun",
        variable="SLURM_LOCALID",
        rank=1,
        size=2,
        local_rank=0,
        local_size=1,
        node_rank=1,
        nnodes=2,
        own_masks=False,
        master_addr="gpu002",
        master_port=29500 + 47113 % 3001,
        run_id="4711.3",
    )
    assert Step.read(SRUN).node() == StepNode(1, 2, "gpu002", 31598, "4711.3")


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (MPIRUN, "mpirun"),
        (HYDRA, "mpiexec"),
        (PALS, "PALS mpiexec"),
        (PMI, "a PMI launcher"),
        (TORCHRUN, "torchrun"),
        (JSRUN, "jsrun"),
        (MVAPICH, "mpirun_rsh"),
        (MVAPICH_3, "mpirun_rsh"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_of_several_processes_on_a_node(environ: dict[str, str], launcher: str) -> None:
    step = Step.read(environ)
    assert (step.launcher, step.rank, step.size, step.local_rank, step.local_size) == (launcher, 5, 8, 1, 4)
    assert environ[step.variable] == "1"
    # Ranks do not say which node this is, or how many nodes there are.
    assert (step.node_rank, step.nnodes) == ((1, 2) if launcher == "torchrun" else (None, None))


def test_tasks_of_flux() -> None:
    """Flux says the local rank and the numbers of nodes and of tasks, and not how many tasks a node has."""
    step = Step.read(FLUX)
    assert (step.launcher, step.rank, step.local_rank, step.local_size, step.nnodes) == ("flux run", 5, 1, 8, 1)
    step = Step.read(FLUX | {"FLUX_JOB_NNODES": "8", "FLUX_TASK_LOCAL_ID": "0"})
    assert (step.local_size, step.node_rank, step.nnodes) == (1, 5, 8)
    with pytest.raises(StepError, match=r"flux run started this on 8 nodes.*--master-addr HOST"):
        step.node()
    node = step.node("corona1")
    assert (node.node_rank, node.nnodes, node.master_addr, node.run_id) == (5, 8, "corona1", "ƒ3ETxsR9H")
    assert 29500 <= (node.master_port or 0) < 32768
    step = Step.read(FLUX | {"FLUX_JOB_NNODES": "3"})
    assert step.local_size is None
    with pytest.raises(StepError, match=r"flux run started 8 processes on 3 nodes.*flux run --nodes=N --tasks-per"):
        step.node("corona1")


def test_a_name_of_a_job_that_the_locale_cannot_decode() -> None:
    name = "ƒ3ETxsR9H".encode().decode("ascii", "surrogateescape")
    ports = {Step.read(FLUX | {"FLUX_JOB_ID": one}).master_port for one in (name, "ƒ3ETxsR9H")}
    assert len(ports) == 1


def test_a_local_rank_without_its_number_of_ranks() -> None:
    step = Step.read({"MPT_LRANK": "3"})
    assert (step.launcher, step.local_rank, step.local_size) == ("mpiexec_mpt", 3, None)
    with pytest.raises(StepError, match=r"mpiexec_mpt started this .MPT_LRANK is set"):
        step.node()


def test_mpirun_with_one_process_on_each_node() -> None:
    step = Step.read(ONE_A_NODE)
    assert (step.node_rank, step.nnodes, step.master_addr) == (5, 8, None)
    with pytest.raises(StepError, match=r"mpirun started this on 8 nodes.*--master-addr HOST"):
        step.node()
    port = 29500 + int.from_bytes(b"1837826049", "big") % 3001
    assert step.node("gpu001") == StepNode(5, 8, "gpu001", port, "1837826049")
    assert step.node("gpu001", 1234) == StepNode(5, 8, "gpu001", 1234, "1837826049")


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        (MPIRUN, "mpirun --map-by ppr:1:node"),
        (HYDRA, "mpiexec -ppn 1"),
        (PALS, "PALS mpiexec --ppn 1"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1,4"}, "srun --ntasks-per-node=1"),
        (JSRUN, "jsrun -r 1 -a 1 -c ALL_CPUS"),
        (MVAPICH, "an option of the launcher"),
        (PMI, "an option of the launcher"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_launcher_of_ranks_in_several_processes_of_a_node(environ: dict[str, str], told: str) -> None:
    step = Step.read(environ)
    with pytest.raises(StepError) as error:
        step.node("gpu001")
    assert f"{step.launcher} started 4 processes on this node" in str(error.value)
    assert told in str(error.value) and "rankspawn bind" in str(error.value)
    assert str(error.value).endswith("; in a shell of the step, --nnodes 1 starts all on this node")


@pytest.mark.parametrize(
    "environ",
    [{}, {"HOME": "/root", "RANK": "3", "WORLD_SIZE": "4"}, BATCH, TORCHRUN, {"LOCAL_RANK": "3"}],
    ids=["nothing", "no launcher's", "a batch script", "torchrun", "LOCAL_RANK"],
)
def test_who_is_in_no_step_of_nodes_is_the_only_node(environ: dict[str, str]) -> None:
    step = Step.read(environ)
    assert step.node() == StepNode(0, 1, None, None, None)
    assert step.node("gpu001", 1234) == StepNode(0, 1, "gpu001", 1234, None)


def test_one_node_needs_no_address() -> None:
    alone = SRUN | {"SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert Step.read(alone).node() == StepNode(0, 1, None, None, "4711.3")
    assert Step.read(ONE_A_NODE | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}).node().nnodes == 1


def test_who_started_a_process_last_is_its_launcher() -> None:
    # mpirun's daemons are tasks of Slurm; torchrun's agent, or ours, may be a process of either.
    assert Step.read(SRUN | MPIRUN).launcher == "mpirun"
    assert Step.read(SRUN | HYDRA).launcher == "mpiexec"
    assert Step.read(SRUN | MPIRUN | TORCHRUN).launcher == "torchrun"
    # Flux runs inside steps of Slurm and of jsrun, whose processes have Spectrum MPI's variables, too.
    assert Step.read(SRUN | JSRUN | MPIRUN | FLUX).launcher == "flux run"
    assert Step.read(MPIRUN | JSRUN).launcher == "jsrun"
    # Slurm's PMI plugins set ranks, too; a LOCAL_RANK without torchrun may come from anywhere.
    assert Step.read(SRUN | PMI | {"PMIX_RANK": "1"}).launcher == "srun"
    assert Step.read(SRUN | {"LOCAL_RANK": "3"}).launcher == "srun"
    assert Step.read(BATCH | {"LOCAL_RANK": "3"}).launcher == "torchrun"


@pytest.mark.parametrize(
    "environ",
    [
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        {"PMIX_RANK": "1"},
        {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"},
        {"ALPS_APP_PE": "1"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"},
        {"MVP_COMM_WORLD_RANK": "1", "MVP_COMM_WORLD_SIZE": "2"},
        {"PALS_RANKID": "1"},
        {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2"},
        {"LSF_PM_TASKID": "1"},
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
    ],
    ids=["PMI", "PMIx", "JSM", "ALPS", "Open MPI", "MVAPICH", "MVAPICH 3", "PALS", "Flux", "LSF", "Slurm"],
)
def test_a_rank_alone_is_not_the_only_process(environ: dict[str, str]) -> None:
    step = Step.read(environ)
    assert (step.rank, step.local_rank) == (1, None)
    assert step.variable in environ
    with pytest.raises(StepError, match=f"{step.variable} is set.*--nnodes, --node-rank and --master-addr"):
        step.node()


def test_a_task_of_slurm_whose_step_is_told_in_part() -> None:
    step = Step.read({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"})
    assert (step.launcher, step.local_rank, step.local_size) == ("srun", 1, None)
    with pytest.raises(StepError, match=r"srun started this .SLURM_LOCALID is set"):
        step.node()


def test_a_task_of_pbsdsh_is_not_the_batch_script() -> None:
    assert Step.read({"PBS_TASKNUM": "1"}) == Step()
    with pytest.raises(StepError, match=r"pbsdsh started this .PBS_TASKNUM is set"):
        Step.read({"PBS_TASKNUM": "2"}).node()


@pytest.mark.parametrize(
    ("rank", "size"),
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
    ],
)
def test_the_only_process_of_a_step_needs_no_local_rank(rank: str, size: str) -> None:
    step = Step.read({rank: "0", size: "1", "SLURM_STEP_ID": "0"})
    assert (step.local_rank, step.local_size) == (0, 1)
    assert step.node().nnodes == 1


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (MPIRUN | {"OMPI_COMM_WORLD_RANK": "one"}, "OMPI_COMM_WORLD_RANK='one': expected a non-negative integer"),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": ""}, "OMPI_COMM_WORLD_LOCAL_SIZE='': expected a non-negative integer"),
        (HYDRA | {"MPI_LOCALRANKID": "4"}, "MPI_LOCALRANKID=4 contradicts MPI_LOCALNRANKS=4"),
        (PMI | {"PMI_RANK": "-1"}, "PMI_RANK='-1': expected a non-negative integer"),
        (SRUN | {"SLURM_JOB_ID": "²"}, "SLURM_JOB_ID='²': expected a non-negative integer"),
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_NODEID=2 contradicts SLURM_STEP_TASKS_PER_NODE='1(x2)'"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x"}, "SLURM_STEP_TASKS_PER_NODE='1(x' is not a list of counts"),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[001"}, "SLURM_STEP_NODELIST='gpu[001' is not a list of hosts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_cannot_be(environ: dict[str, str], message: str) -> None:
    with pytest.raises(StepError) as error:
        Step.read(environ)
    assert message in str(error.value)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1))
def test_tasks_of_each_node(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else f"{tasks}" for tasks, nodes in runs)
    counts = [tasks for tasks, nodes in runs for _ in range(nodes)]
    for node, tasks in enumerate(counts):
        environ = SRUN | {"SLURM_NODEID": str(node), "SLURM_STEP_TASKS_PER_NODE": text}
        assert Step.read(environ).local_size == tasks


@pytest.mark.parametrize(
    ("kind", "masks", "own"),
    [
        ("", "", False),
        ("none", "", False),
        ("mask_cpu:", "0x3", False),
        ("mask_cpu:", "0x3,0x3", False),
        ("mask_cpu:", "0x1,0x2", True),
        ("map_cpu:", "0,1", True),
        ("rank", "", True),
    ],
)
def test_masks_of_slurm(kind: str, masks: str, own: bool) -> None:
    environ = SRUN | {"SLURM_CPU_BIND_TYPE": kind, "SLURM_CPU_BIND_LIST": masks}
    assert Step.read(environ).own_masks is own


def test_ports_of_neighbours_differ() -> None:
    """Jobs with near numbers may share a node, and so may steps of a job: 300 jobs of 10 steps have a port each."""
    ports = {
        Step.read(SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(123_456, 123_456 + 300)
        for step in range(10)
    }
    assert len(ports) == 3000
    assert 29500 <= min(ports) and max(ports) < 32768


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("", None),
        ("login1", "login1"),
        ("gpu[001-003,7],login1", "gpu001"),
        ("login1,gpu[001-003]", "login1"),
        ("rack[2-3]-blade[07,1]", "rack2-blade07"),
        ("a.b-c[5].d,x", "a.b-c5.d"),
        ("127.0.0.[1-2]", "127.0.0.1"),
        ("[3,1]", "3"),
    ],
)
def test_first_host(hosts: str, first: str | None) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize("hosts", [",", "[", "]", "a[", "a]b", "a[]", "a[-3]", "a[1", "a[1]]", "a[[1]]", "a[x]", ",a"])
def test_no_list_of_hosts(hosts: str) -> None:
    with pytest.raises(StepError):
        first_host(hosts)


@given(st.text("ab01[],-"))
def test_any_text_is_a_host_or_an_error(hosts: str) -> None:
    try:
        host = first_host(hosts)
    except StepError:
        return
    assert host is None if hosts == "" else host and not {*"[],"} & {*host}


def test_crowding() -> None:
    step = Step.read(SRUN)
    said = step.crowding(4, {3, 4}, {1, 2, 3, 4})
    assert said == "4 ranks share CPUs 3-4: `srun --cpus-per-task=N` may give more"
    assert step.crowding(2, {3, 4}, {1, 2, 3, 4}) is None
    assert step.crowding(4, {1, 2}, {1, 2}) is None, "there are no more"
    assert Step().crowding(4, {3}, {1, 2, 3, 4}) is None


def test_what_the_message_says_starts_all_on_this_node() -> None:
    """In an interactive shell of a step, which is one of its processes (srun --pty bash)."""
    environ = environment_here(**{**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1,4"})
    refused = completed(in_ranks(SAY + "say('here')\n", "--nproc-per-node", "2"), env=environ)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.endswith("; in a shell of the step, --nnodes 1 starts all on this node\n")
    done = completed(in_ranks(SAY + "say('here')\n", "--nproc-per-node", "2", "--nnodes", "1"), env=environ)
    assert (done.returncode, said(done.stdout)) == (0, {0: "here", 1: "here"})
