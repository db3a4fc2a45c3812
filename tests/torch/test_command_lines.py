"""Command lines of torchrun from public documentation, under torchrun and under ``rankspawn run``.

The ranks of both have the same variables and arguments, and the launchers the same output and log files. Where a line
says "differs", docs/differences.md says why.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

from rankspawn._cli.run import add_run_options
from rankspawn._cli.vocabulary import ELASTIC, NEEDLESS, TAKEN

torchs = pytest.importorskip("torch.distributed.run", reason="torch is not installed")
THEIRS = torchs.get_args_parser()._option_string_actions

# Variables whose values are each launcher's own affair: see test_run_vs_torchrun.py.
OWN = {"TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE", "RANKSPAWN_CALL_NS"}
NAMES = {"port": "MASTER_PORT", "address": "MASTER_ADDR", "id": "TORCHELASTIC_RUN_ID"}

SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "localhost,node2", "SLURM_PROCID": "{node}",
    "SLURM_NODEID": "{node}", "SLURM_LOCALID": "0", "SLURM_NNODES": "2",
}  # fmt: skip
POD = {"PET_NNODES": "2", "PET_NODE_RANK": "{node}", "PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": "{port}"}


@dataclass
class Line:
    """A command line behind the launcher's name.

    source: whose documentation. words: {node} stands for the number of a machine, of which there are two then, and
    {port} for a port. differs: which of NAMES the two launchers choose themselves.
    """

    source: str
    words: str
    differs: str = ""
    env: dict[str, str] | None = None

    @property
    def nodes(self) -> int:
        return 2 if "{node}" in self.words + str(self.env) else 1


FREE = "port address id"  # torchrun makes a rendezvous by c10d of its own where one machine names no port
C10D = "port address"  # the agents' store, and the name of the host of rank 0
LINES = [
    Line("torch, docs of torchrun", "--standalone --nnodes=1 --nproc-per-node=2 train.py --arg1 --lr 0.1", FREE),
    Line("torch", "--rdzv-backend=c10d --rdzv-endpoint=localhost:0 --nnodes=1 --nproc-per-node=2 train.py", C10D),
    Line("torch", "--nnodes=2 --nproc-per-node=1 --node-rank={node} --master-addr=localhost --master-port={port} a.py"),
    Line("torch", "--standalone --nproc-per-node=2 --max-restarts=3 train.py", FREE),
    Line("torch", "--nnodes=1:1 --nproc-per-node=cpu train.py", FREE),
    Line("torch", "--nproc-per-node=auto train.py", FREE),
    Line("torch", "--standalone --nproc-per-node=2 --no-python ./wrapper.sh a 'b c'", FREE),
    Line("torch", "--standalone --nproc-per-node=2 -m package.train --epochs 3", FREE),
    Line("torch", "--nproc_per_node=2 --log_dir=logs --redirects=3 train.py", FREE),
    Line("torch", "--nproc_per_node=2 --log-dir=logs -r 0:1,1:2 train.py", FREE),
    Line("torch", "--nproc_per_node=2 --log-dir logs -r 3 -t 0:1 train.py", FREE),
    Line("torch", "--nproc-per-node=2 --tee=3 --local_ranks_filter=0 train.py", FREE),
    Line("torch", "--nproc-per-node=2 --local-ranks-filter=1 train.py", FREE),
    Line("torch", "--nproc-per-node 2 --log-dir logs -t 3 --duplicate-stdout-filters 'out 1,loss' train.py", FREE),
    Line("torch", "--nproc-per-node=2 --virtual-local-rank train.py", FREE),
    Line("torch", "--nproc-per-node=2 --virtual-local-rank train.py", FREE, {"CUDA_VISIBLE_DEVICES": "3, 5,6"}),
    Line("torch", "--nproc-per-node=2 --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=10 train.py", FREE),
    Line("torch", "--nproc-per-node=2 --monitor-interval=1 --start-method=fork --rdzv-conf=timeout=30 train.py", FREE),
    Line("torch", "--nproc-per-node=2 train.py --local-rank '${local_rank}'", FREE),
    Line("torch", "--nproc-per-node=1 --role trainer --rdzv-id 42 --rdzv-endpoint 127.0.0.1:{port} train.py"),
    Line("torch", "--nproc-per-node=1 --rdzv-endpoint=[::1]:{port} train.py"),
    Line("torch, tutorial on DDP", "--standalone --nproc_per_node=2 multigpu_torchrun.py 50 10", FREE),
    Line(
        "torch, tutorial on DDP",
        "--nproc_per_node=1 --nnodes=2 --node_rank={node} --rdzv_id=456 --rdzv_backend=c10d"
        " --rdzv_endpoint=localhost:{port} multinode_torchrun.py 50 10",
        C10D,
    ),
    Line(
        "torch, examples, Slurm",
        "--nnodes 2 --nproc_per_node 1 --rdzv_id 12907 --rdzv_backend c10d --rdzv_endpoint localhost:{port} main.py 50",
        C10D,
        SLURM,
    ),
    Line(
        "torchtitan",
        "--nproc_per_node=2 --rdzv_backend c10d --rdzv_endpoint=localhost:0 --local-ranks-filter 0 --role rank --tee 3"
        " -m package.train --job.config_file llama3_8b.toml",
        C10D,
    ),
    Line(
        "torchtitan, Slurm",
        "--nnodes 2 --nproc_per_node 2 --rdzv_id 101 --rdzv_backend c10d --rdzv_endpoint localhost:{port}"
        " -m package.train --job.config_file llama3_8b.toml",
        C10D,
        SLURM,
    ),
    Line("torchtune", "--nnodes 1 --nproc_per_node 2 train.py --config llama3/8B_full epochs=1", FREE),
    Line("torchvision", "--nproc_per_node=2 train.py --model resnet50 --batch-size 32", FREE),
    Line("Kubeflow", "train.py", env={**POD, "PET_NPROC_PER_NODE": "1"}),
    Line("Kubeflow", "--nproc_per_node 1 -m package.train", env={**POD, "PET_NPROC_PER_NODE": "8", "PET_ROLE": "w"}),
    Line(
        "Kubeflow, PyTorchJob",
        "train.py",
        C10D,
        {
            "PET_NPROC_PER_NODE": "2",
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": "localhost:0",
            "PET_RDZV_ID": "job-1",
            "PET_MAX_RESTARTS": "3",
            "PET_NNODES": "1:1",
            "PET_STANDALONE": "0",
        },
    ),
    Line("accelerate", "--nproc_per_node=2 --nnodes=1 nlp_example.py --mixed_precision fp16", FREE),
    Line(
        "accelerate",
        "--nproc_per_node=1 --nnodes=2 --node_rank={node} --master_addr=localhost --master_port={port} nlp_example.py",
    ),
    Line("transformers", "--nproc_per_node 2 run_clm.py --model_name_or_path gpt2 --do_train --fp16", FREE),
    Line(
        "transformers, Slurm",
        "--nproc_per_node 1 --nnodes 2 --node_rank {node} --master_addr localhost --master_port {port} your_program.py",
        env=SLURM,
    ),
    Line("nanoGPT", "--standalone --nproc_per_node=2 train.py config/train_gpt2.py", FREE),
    Line(
        "nanoGPT",
        "--nproc_per_node=1 --nnodes=2 --node_rank={node} --master_addr=127.0.0.1 --master_port={port} train.py",
    ),
    Line(
        "Megatron-LM",
        "--nproc_per_node 2 --nnodes 1 --node_rank 0 --master_addr localhost --master_port {port} pretrain_gpt.py"
        " --tensor-model-parallel-size 1",
    ),
    Line("llama", "--nproc_per_node 1 example_chat_completion.py --ckpt_dir llama-2-7b-chat/ --max_seq_len 512", FREE),
    Line("llama-recipes", "--nnodes 1 --nproc_per_node 2 finetuning.py --enable_fsdp --use_peft", FREE),
    Line("YOLOv5", "--nproc_per_node 2 --master_port {port} train.py --batch 64 --device 0,1"),
    Line("timm", "--nproc_per_node=2 train.py /data/imagenet --model seresnet34", FREE),
]

# What they document for elastic jobs, which are not `rankspawn run`'s.
ELASTIC_LINES = [
    "--nnodes=1:4 --nproc-per-node=2 --max-restarts=3 --rdzv-id=1 --rdzv-backend=c10d --rdzv-endpoint=h:1 train.py",
    "--nnodes=2 --nproc-per-node=2 --max-restarts=3 --rdzv-id=1 --rdzv-backend=c10d --rdzv-endpoint=h:1 train.py",
    "--nnodes=2 --nproc-per-node=2 --rdzv-id=1 --rdzv-backend=etcd-v2 --rdzv-endpoint=h:2379 train.py",
]

SCRIPT = """
import json, os, sys
said = {"environment": dict(os.environ), "arguments": sys.argv[1:]}
with open(os.path.join(os.environ["FOLDER"], "said-" + os.environ["RANK"]), "w") as file:
    json.dump(said, file)
os.write(1, f"out {os.environ['RANK']}\\n".encode())
os.write(2, f"err {os.environ['RANK']}\\n".encode())
"""

# torchrun's own main, in a fork for each line of stdin, because the import of torch takes most of its time.
TORCHRUN = """
import json, os, sys
from torch.distributed.run import main
for line in sys.stdin:
    words, env, folder = json.loads(line)
    if os.fork():
        continue
    os.chdir(folder)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o666), fd)
    os.environ.clear()
    os.environ.update(env)
    status = 70
    try:
        main(words)
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.stderr.flush()
        with open("ended", "w") as file:
            file.write(str(status))
        os._exit(0)
"""


@dataclass
class Outcome:
    """port: that the launchers were given. statuses: theirs. ranks: what each said. lines: of the launchers' output.
    files: of the log folder."""

    port: int
    statuses: list[int]
    ranks: dict[int, dict[str, object]]
    lines: list[list[str]]
    files: dict[str, str]


def prepared(line: Line, node: int, port: int, folder: Path) -> tuple[list[str], dict[str, str], Path]:
    """The words, the environment and the working folder of a launcher."""
    (folder / "package").mkdir(parents=True)
    words = shlex.split(line.words.format(node=node, port=port, local_rank="{local_rank}"))
    for name in ("package/train.py", "package/__init__.py", *(word for word in words if word.endswith(".py"))):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("" if "__init__" in name else SCRIPT)
    (folder / "script.py").write_text(SCRIPT)
    (folder / "wrapper.sh").write_text(f'#!/bin/sh\nexec {sys.executable} script.py "$@"\n')
    (folder / "wrapper.sh").chmod(0o755)
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    own = {name: text.format(node=node, port=port) for name, text in (line.env or {}).items()}
    environment |= {"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "FOLDER": str(folder), **own}
    return words, environment, folder


def outcome(port: int, folders: Sequence[Path], statuses: Sequence[int]) -> Outcome:
    ranks, lines, files = {}, [], {}
    for folder in folders:
        ranks.update({int(path.name[5:]): json.loads(path.read_text()) for path in folder.glob("said-*")})
        printed = (folder / "stdout").read_text(), (folder / "stderr").read_text()
        # What a launcher itself says is its own affair, and on stderr.
        own = re.compile(r"rankspawn: |[IWE]\d{4} |\[rank\d+\]:\[W")
        lines += [sorted(line for line in text.splitlines() if not own.match(line)) for text in printed]
        for path in (folder / "logs").rglob("*.log"):
            files[str(path.relative_to(folder / "logs")).partition("/")[2]] = path.read_text()
    return Outcome(port, list(statuses), ranks, lines, files)


def a_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ran_by_ours(line: Line, port: int, folder: Path) -> Outcome:
    started = []
    for node in range(line.nodes):
        words, env, cwd = prepared(line, node, port, folder / f"{node}")
        with (cwd / "stdout").open("w") as out, (cwd / "stderr").open("w") as err:
            command = [sys.executable, "-m", "rankspawn", "run", *words]
            started.append(subprocess.Popen(command, stdout=out, stderr=err, env=env, cwd=cwd))
    return outcome(port, [folder / f"{node}" for node in range(line.nodes)], [one.wait(120) for one in started])


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What torchrun makes of each line; four at a time."""
    made: dict[str, Outcome] = {}
    root = tmp_path_factory.mktemp("torchrun")
    with subprocess.Popen([sys.executable, "-c", TORCHRUN], stdin=subprocess.PIPE, text=True) as process:
        stdin = process.stdin
        assert stdin is not None

        def run(number: int) -> None:
            line = LINES[number]
            port, folders = a_port(), [root / f"{number}" / f"{node}" for node in range(line.nodes)]
            for node, folder in enumerate(folders):
                words, env, cwd = prepared(line, node, port, folder)
                stdin.write(json.dumps([words, env, str(cwd)]) + "\n")
            stdin.flush()
            until = time.monotonic() + 240
            while not all((folder / "ended").exists() and (folder / "ended").read_text() for folder in folders):
                assert time.monotonic() < until and process.poll() is None, line
                time.sleep(0.02)
            made[f"{number}"] = outcome(port, folders, [int((folder / "ended").read_text()) for folder in folders])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(len(LINES))))
        stdin.close()
    return made


@pytest.mark.parametrize("number", range(len(LINES)), ids=lambda number: f"{LINES[number].source}-{number}")
def test_a_line_of_public_documentation(number: int, torchrun: dict[str, Outcome], tmp_path: Path) -> None:
    line = LINES[number]
    options = {word.partition("=")[0] for word in line.words.split() if word.startswith("--")}
    if missing := {option for option in options if option in (*TAKEN, *NEEDLESS) and option not in THEIRS}:
        pytest.skip(f"this torch has no {', '.join(missing)}")
    theirs = torchrun[f"{number}"]
    ours = ran_by_ours(line, theirs.port, tmp_path)
    assert theirs.statuses == [0] * line.nodes, theirs.lines
    assert ours.statuses == theirs.statuses, ours.lines
    assert ours.ranks.keys() == theirs.ranks.keys() == {*range(len(theirs.ranks))}
    chosen = OWN | {"FOLDER", "TMPDIR", "PWD", *(NAMES[name] for name in line.differs.split())}
    if "c10d" in line.words:  # deals out the numbers of the machines
        chosen |= {"SLURM_NODEID", "SLURM_PROCID"}
    for rank, said in theirs.ranks.items():
        assert ours.ranks[rank]["arguments"] == said["arguments"]
        environments = [dict(one["environment"]) for one in (said, ours.ranks[rank])]  # type: ignore[call-overload]
        theirs_left, ours_left = ({name: one[name] for name in one.keys() - chosen} for one in environments)
        assert ours_left == theirs_left
        assert all(environments[1].get(name) for name in NAMES.values())
    assert ours.files == theirs.files
    if line.nodes == 1:
        assert ours.lines == theirs.lines
    else:
        for stream in (0, 1):
            # torch's store may write a stack on stderr, when the agent that has it ends first.
            merged = [sorted(chain.from_iterable(one.lines[stream::2])) for one in (theirs, ours)]
            of_ranks = [[line for line in lines if re.match("(out|err) ", line)] for lines in merged]
            assert of_ranks[0] == of_ranks[1] == merged[1]


def test_there_are_forty() -> None:
    assert len(LINES) >= 40 and len({(line.words, str(line.env)) for line in LINES}) == len(LINES)


@pytest.mark.parametrize("words", ELASTIC_LINES)
def test_a_line_of_an_elastic_job_is_left_to_torchruns_agent(words: str) -> None:
    command = [sys.executable, "-m", "rankspawn", "run", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(" needs an elastic agent: use `rankspawn torchrun`\n")


def test_every_option_of_the_torchrun_that_is_installed_is_known() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_run_options(parser)
    long = {name for name in THEIRS if name.startswith("--") and "_" not in name} - {"--help"}
    assert long - {*TAKEN, *NEEDLESS, *ELASTIC} == set()
    assert {*TAKEN, *NEEDLESS, *ELASTIC} <= set(parser._option_string_actions)
    # In every spelling, and with as many words behind it.
    for name, action in THEIRS.items():
        ours = parser._option_string_actions.get(name)
        assert ours is not None, name
        if "--tee" not in action.option_strings:
            assert (ours.nargs == 0) == (action.nargs == 0), name
