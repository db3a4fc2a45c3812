"""torchrun's vocabulary, as `rankspawn run` takes it: options, their values, PET_ variables, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from rankspawn._cli import main
from tests.support.launchers import ENVIRONMENT, LAUNCHER, SAY, completed, environment_here, in_ranks, said

pytestmark = pytest.mark.skipif(os.name != "posix", reason="starts ranks")

BOTH = "import os; r = os.environ['RANK']; os.write(1, f'out {r}\\n'.encode()); os.write(2, f'err {r}\\n'.encode())"
TWO = ["--nproc-per-node", "2"]


def told(*options: str, **environment: str) -> dict[int, dict[str, str]]:
    """The environments of the ranks, by RANK, of a launcher that succeeds without a word."""
    done = completed(in_ranks(ENVIRONMENT, *options), env=environment_here(**environment))
    assert (done.returncode, done.stderr) == (0, "")
    return said(done.stdout)


def refused(*options: str, **environment: str) -> str:
    """The usage error of a launcher that starts nothing."""
    done = completed([*LAUNCHER, "run", *options, "x.py"], env=environment_here(**environment))
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr.splitlines()[-1].partition("error: ")[2]


# ---- how many ranks, and who they are --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cpu", "auto"])
def test_ranks_are_counted_by_cpus(kind: str) -> None:
    if kind == "auto" and (Path("/dev/dri").exists() or Path("/proc/driver/nvidia").exists()):
        pytest.skip("this machine has accelerators")
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert len(told("--nproc_per_node", kind)) == count


def test_a_kind_of_device_that_is_not_there_is_said() -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has NVIDIA GPUs")
    done = completed(in_ranks("", "--nproc-per-node", "gpu"), env=environment_here())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rankspawn: --nproc-per-node gpu: no NVIDIA or AMD GPU is visible\n"


def test_a_role_and_an_id_are_told() -> None:
    rank = told("--role", "trainer", "--rdzv-id", "job 7", "--nnodes", "1:1")[0]
    assert (rank["ROLE_NAME"], rank["TORCHELASTIC_RUN_ID"]) == ("trainer", "job 7")


def test_standalone_is_a_job_of_its_own_name_whatever_is_around() -> None:
    step = {
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_PROCID": "1",
        "SLURM_NODEID": "1", "SLURM_LOCALID": "0",
    }  # fmt: skip
    rank = told("--standalone", **step)[0]
    assert (rank["WORLD_SIZE"], rank["MASTER_ADDR"]) == ("1", "127.0.0.1")
    assert re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", rank["TORCHELASTIC_RUN_ID"])


def test_standalone_ignores_every_rendezvous() -> None:
    for options in ("--rdzv-backend=etcd --rdzv-endpoint=h:1 --rdzv-id=5", "--rdzv-endpoint=:29621"):
        rank = told("--standalone", *options.split())[0]
        assert rank["MASTER_ADDR"] == "127.0.0.1" and len(rank["TORCHELASTIC_RUN_ID"]) == 36
    assert told(PET_STANDALONE="1", PET_RDZV_BACKEND="etcd", PET_RDZV_ENDPOINT=":1").keys() == {0}


def test_values_of_unset_variables_of_a_shell() -> None:
    rank = told("--rdzv-endpoint=", "--role", "", "--master-addr", "localhost")[0]
    assert (rank["ROLE_NAME"], rank["MASTER_ADDR"]) == ("", "localhost")


def test_a_pod_without_variables_of_torchrun_is_told_that_it_is_the_whole_job() -> None:
    pod = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    done = completed(in_ranks(ENVIRONMENT), env=environment_here(**pod))
    assert (done.returncode, said(done.stdout)[0]["WORLD_SIZE"]) == (0, "1")
    assert re.fullmatch("rankspawn: RANK=1, WORLD_SIZE=2 and MASTER_ADDR are not read, .*\n", done.stderr)
    assert told(**pod, TORCHELASTIC_RUN_ID="a rank's own child").keys() == {0}
    assert told("--nnodes", "1", **pod).keys() == {0}
    assert told(**{**pod, "WORLD_SIZE": "1"}).keys() == {0}


def test_the_lines_of_a_slurm_script_need_no_change() -> None:
    """The step says which node this is, where torchrun's c10d would deal out the numbers."""
    step = {
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_PROCID": "1",
        "SLURM_NODEID": "1", "SLURM_LOCALID": "0",
    }  # fmt: skip
    options = "--nproc_per_node 1 --rdzv_id 101 --rdzv_backend c10d --rdzv_endpoint 10.0.0.7:29501".split()
    rank = told("--nnodes", "2", *options, **step)[1]
    assert (rank["GROUP_WORLD_SIZE"], rank["TORCHELASTIC_RUN_ID"]) == ("2", "101")
    assert (rank["MASTER_ADDR"], rank["MASTER_PORT"]) == ("10.0.0.7", "29501")
    assert refused("--nnodes", "3", *options, **step).startswith("--nnodes 3, but srun started this on 2")


@pytest.mark.parametrize(
    ("options", "address", "port"),
    [
        ("--rdzv-endpoint 127.0.0.1:29531", "127.0.0.1", "29531"),
        ("--rdzv-backend static --rdzv-endpoint [::1]:29531", "::1", "29531"),
        ("--rdzv-backend c10d --rdzv-endpoint localhost:29531 --master-addr 192.0.2.1", "localhost", "29531"),
        ("--rdzv-backend c10d --rdzv-endpoint localhost", "localhost", None),
        ("--rdzv-backend c10d --rdzv-endpoint localhost:0", "localhost", None),
        ("--rdzv-backend c10d --rdzv-endpoint localhost:0 --local-addr 127.0.0.1", "127.0.0.1", None),
        ("--master-port 0", "127.0.0.1", None),
        ("--nnodes 2 --node-rank 1 --rdzv-backend c10d --rdzv-endpoint 192.0.2.1", "192.0.2.1", "29400"),
        ("--nnodes 2 --node-rank 1 --master-addr 192.0.2.1", "192.0.2.1", "29500"),
    ],
)
def test_where_ranks_meet(options: str, address: str, port: str | None) -> None:
    (rank,) = told(*options.split()).values()
    assert rank["MASTER_ADDR"] == address
    assert rank["MASTER_PORT"] == port if port else int(rank["MASTER_PORT"]) > 1024


def test_each_rank_has_its_own_device_as_number_0() -> None:
    for listed, devices in ((None, ["0", "1"]), ("3, GPU-8f2,5", ["3", "GPU-8f2"])):
        code = SAY + "say([os.environ.get(n) for n in ('LOCAL_RANK', 'CUDA_VISIBLE_DEVICES')])"
        environment = environment_here() if listed is None else environment_here(CUDA_VISIBLE_DEVICES=listed)
        done = completed(in_ranks(code, *TWO, "--virtual-local-rank", "--numa-binding", "none"), env=environment)
        assert said(done.stdout) == {rank: ["0", device] for rank, device in enumerate(devices)}
    done = completed(in_ranks("", *TWO, "--virtual_local_rank"), env=environment_here(CUDA_VISIBLE_DEVICES="3"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("rankspawn: --virtual-local-rank: expected 2 devices, got CUDA_VISIBLE_DEVICES=3\n")


def test_the_local_rank_is_put_into_arguments(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SAY + "say(sys.argv[1:])\n")
    done = completed([*LAUNCHER, "run", *TWO, str(script), "--gpu=${local_rank}", "$$ $x"], env=environment_here())
    assert said(done.stdout) == {rank: [f"--gpu={rank}", "$$ $x"] for rank in range(2)}


def test_a_script_that_is_run_by_its_path(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SAY + "say([__name__, sys.argv])\n")
    done = completed([*LAUNCHER, "run", "--run-path", str(script), "-x"], env=environment_here())
    assert said(done.stdout) == {0: ["__main__", [str(script), "-x"]]}


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "stdout", "stderr"),
    [
        ("-t 3", ["[default0]:out 0", "[default1]:out 1"], ["[default0]:err 0", "[default1]:err 1"]),
        ("--tee=1 --role a", ["[a0]:out 0", "[a1]:out 1"], ["err 0", "err 1"]),
        ("-t 0:1,1:2", ["[default0]:out 0", "out 1"], ["[default1]:err 1", "err 0"]),
        ("-t0:3", ["[default0]:out 0", "out 1"], ["[default0]:err 0", "err 1"]),
        ("--tee 0", ["out 0", "out 1"], ["err 0", "err 1"]),
        ("--tee", ["[rank 0]:out 0", "[rank 1]:out 1"], ["[rank 0]:err 0", "[rank 1]:err 1"]),
        ("--tee --local_ranks_filter 1", ["[rank 1]:out 1"], ["[rank 1]:err 1"]),
        ("--local-ranks-filter 0", ["out 0"], ["err 0"]),
        ("-t 1 --local-ranks-filter 0", ["[default0]:out 0"], ["err 0"]),
        ("--tee --log-line-prefix-template <${role_name}/$rank>", ["<default/0>out 0", "<default/1>out 1"], None),
    ],
)
def test_what_is_shown(options: str, stdout: list[str], stderr: list[str] | None) -> None:
    done = completed(in_ranks(BOTH, *TWO, *options.split()), env=environment_here())
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == stdout
    assert stderr is None or sorted(done.stderr.splitlines()) == stderr


def test_an_empty_filter_of_ranks_shows_all() -> None:
    assert sorted(told(*TWO, "--local-ranks-filter=")) == sorted(told(*TWO, PET_LOCAL_RANKS_FILTER="")) == [0, 1]


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        ("--t 3", "--tee 3"),
        ("--re 3", "--redirects 3"),
        ("--log- logs", "--log-dir logs"),
        ("--numa-b none", "--numa-binding none"),
        ("--numa_bind none", "--numa-binding none"),
        ("--no-", "--no-python"),
    ],
)
def test_abbreviations_of_torchrun(short: str, whole: str) -> None:
    for command in "run", "plan":
        given = [
            vars(main._parser(command).parse_args([command, *words.split(), "/bin/echo"])) for words in (short, whole)
        ]
        assert {**given[0], "parser": None} == {**given[1], "parser": None}


def test_an_abbreviation_of_several_options_of_torchrun() -> None:
    assert "ambiguous option: --st" in refused("--st")


def test_the_prefix_of_torchruns_variable() -> None:
    environment = environment_here(TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="${local_rank}/${rank}: ")
    meet = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1"]
    done = completed(in_ranks(BOTH, *TWO, *meet, "-t", "1"), env=environment)
    assert sorted(done.stdout.splitlines()) == ["0/2: out 2", "1/3: out 3"]


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ("-r 3", {"0/stdout.log", "0/stderr.log", "1/stdout.log", "1/stderr.log"}),
        ("--redirects 0:1,1:2", {"0/stdout.log", "1/stderr.log"}),
        ("-r 0:1 -t 1:3", {"0/stdout.log", "1/stdout.log", "1/stderr.log"}),
        ("--redirects 0", set()),
        ("", {"0/stdout.log", "0/stderr.log", "1/stdout.log", "1/stderr.log"}),
    ],
)
def test_what_goes_to_files(options: str, files: set[str], tmp_path: Path) -> None:
    command = in_ranks(BOTH, *TWO, "--log-dir", str(tmp_path), "--rdzv-id", "job/7", *options.split())
    done = completed(command, env=environment_here())
    folder = tmp_path / os.readlink(tmp_path / "latest")
    assert (
        re.fullmatch(r"python[\d.]*-job_7-\d{8}-\d{6}", folder.name) and f"rankspawn: logs in {folder}\n" in done.stderr
    )
    made = {str(path.relative_to(folder / "attempt_0")): path.read_text() for path in folder.rglob("*.log")}
    assert made.keys() == files
    for name, text in made.items():
        rank, stream = name.split("/")
        assert text == f"{stream.removeprefix('std').removesuffix('.log')} {rank}\n"
    written = [line for line in (done.stdout + done.stderr).splitlines() if line[:4] in ("out ", "err ")]
    assert sorted([*written, *"".join(made.values()).splitlines()]) == ["err 0", "err 1", "out 0", "out 1"]


def test_files_without_a_folder_are_kept_and_said() -> None:
    done = completed(in_ranks(BOTH, "-r", "1"), env=environment_here())
    said_folder = re.fullmatch(r"rankspawn: logs in (\S+)\nerr 0\n", done.stderr)
    assert said_folder is not None and done.stdout == ""
    folder = Path(said_folder[1])
    try:
        assert (folder / "attempt_0" / "0" / "stdout.log").read_text() == "out 0\n"
    finally:
        shutil.rmtree(folder)


def test_lines_that_are_copied(tmp_path: Path) -> None:
    lines = "step 1\\nloss 3, x\\nrank\\nloss 2\\nend"
    code = f"import os; os.write(1, b'{lines}'); os.write(2, b'warning: a\\nnone\\n' * 20000)"
    filters = ["--duplicate-stdout-filters", "loss 3,, x,end", "--duplicate_stderr_filters", "warn"]
    done = completed(in_ranks(code, "--log-dir", str(tmp_path), "-t", "3", *filters), env=environment_here())
    assert done.returncode == 0 and done.stdout.count("[default0]:") == 5
    folder = tmp_path / os.readlink(tmp_path / "latest")
    assert (folder / "attempt_0/filtered_stdout.log").read_text() == "[default0]:loss 3, x\n[default0]:end\n"
    assert (folder / "attempt_0/filtered_stderr.log").read_text() == "[default0]:warning: a\n" * 20000


# ---- other doors -----------------------------------------------------------------------------------------------------

POD = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "2",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "node-0",
    "PET_MASTER_PORT": "29500",
}


def test_a_pod_that_kubeflow_configures() -> None:
    ranks = told(**POD)
    assert sorted(ranks) == [2, 3]
    assert [ranks[3][name] for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")] == ["4", "node-0", "29500"]
    # The command line wins.
    assert sorted(told("--nproc-per-node", "1", **POD)) == [1]


def test_flags_and_choices_in_variables() -> None:
    rank = told(PET_STANDALONE="1", PET_NO_PYTHON="0", PET_NUMA_BINDING="none", PET_ROLE="x", PET_TEE="0")[0]
    assert (rank["ROLE_NAME"], rank["WORLD_SIZE"]) == ("x", "1")


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("PET_NNODES=1:3", "--nnodes 1:3 needs an elastic agent: use `rankspawn torchrun`"),
        ("PET_NNODES=", "PET_NNODES: expected a positive integer, or MIN:MAX, got ''"),
        ("PET_NPROC_PER_NODE=two", "PET_NPROC_PER_NODE: expected a positive integer, auto, cpu, gpu or xpu, got 'two'"),
        ("PET_STANDALONE=yes", "PET_STANDALONE: expected 0 or 1, got 'yes'"),
        ("PET_NUMA_BINDING=nodes", "PET_NUMA_BINDING: expected one of auto, "),
        ("PET_SHUTDOWN_TIMEOUT=soon", "PET_SHUTDOWN_TIMEOUT: expected a number of seconds, got 'soon'"),
        ("PET_RDZV_ENDPOINT=a:b", "--rdzv-endpoint: expected HOST:PORT, got 'a:b'"),
    ],
)
def test_variables_that_cannot_be(variable: str, words: str) -> None:
    name, _, value = variable.partition("=")
    assert refused(**{name: value}).startswith(words)


def test_a_misspelt_variable_is_said() -> None:
    done = completed(in_ranks("", *TWO), env=environment_here(PET_NPROCS_PER_NODE="8", PET_COLOUR="red"))
    assert done.returncode == 0
    assert (
        "ignoring PET_NPROCS_PER_NODE: torchrun has no such variable (did you mean PET_NPROC_PER_NODE?)" in done.stderr
    )
    assert "ignoring PET_COLOUR: torchrun has no such variable\n" in done.stderr


def test_torchruns_variable_for_the_grace(tmp_path: Path) -> None:
    deaf = str(tmp_path / "deaf")  # rank 0 fails once rank 1 ignores SIGTERM
    code = (
        "import os, signal, time; signal.signal(15, 1)\n"
        f"if os.environ['RANK'] == '1': os.mkdir({deaf!r}); time.sleep(60)\n"
        f"while not os.path.exists({deaf!r}): time.sleep(0.01)\n"
        "os._exit(3)"
    )
    done = completed(in_ranks(code, *TWO), env=environment_here(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1"))
    assert done.returncode == 3 and "the grace period is over: killing" in done.stderr
    done = completed(in_ranks("", *TWO), env=environment_here(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="soon"))
    assert done.returncode == 2 and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=soon: expected" in done.stderr


# ---- what is not needed, and what is refused -------------------------------------------------------------------------


def test_what_is_not_needed_is_said_once() -> None:
    options = "--monitor-interval 0.5 --start_method fork --rdzv-conf timeout=900 --event-log-handler null".split()
    done = completed(in_ranks("", *TWO, *options), env=environment_here())
    assert done.returncode == 0
    words = "--monitor-interval and --start-method and --rdzv-conf: ignored, because rankspawn run has no elastic agent"
    assert done.stderr == f"rankspawn: {words}\n"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("--nnodes 2:4", "--nnodes 2:4"),
        ("--rdzv-backend etcd-v2", "--rdzv-backend etcd-v2"),
        ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:1", "--rdzv-backend c10d on several machines, without"),
        ("--logs-specs mine", "--logs-specs mine"),
        ("--event-log-handler console", "--event-log-handler console"),
        ("--nnodes 2 --node-rank 1 --master-addr a --max-restarts 3", "--max-restarts on several machines"),
    ],
)
def test_what_only_an_elastic_agent_can_do(options: str, what: str) -> None:
    words = refused(*options.split())
    assert words.startswith(what) and words.endswith(" needs an elastic agent: use `rankspawn torchrun`")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--tee 4", "expected 0 (none), 1 (stdout), 2 (stderr) or 3 (both), or these by local rank (0:3,1:2), got '4'"),
        ("-r 0:3,1", "expected 0 (none), 1 (stdout)"),
        ("--rdzv-endpoint a:99999", "expected HOST:PORT, got 'a:99999'"),
        ("--standalone --nnodes 2", "--standalone is for one machine, but --nnodes is 2"),
    ],
)
def test_values_that_cannot_be(options: str, words: str) -> None:
    assert words in refused(*options.split())
