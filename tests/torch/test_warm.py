"""A warm start with torch: under torchrun's agent, with data loaders, and as cold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from rankspawn import Template, launch
from rankspawn._torch.early import _split

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "ddp_digits.py"

FAILS_ONCE = """
import sys
preloaded = "torch" in sys.modules
import os, time
import torch
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
open(f"{sys.argv[1]}/{attempt}.{os.environ['RANK']}", "w").write(f"{preloaded} {torch.initial_seed()} {torch.rand(1)}")
if attempt == 0:
    if os.environ["RANK"] == "1":
        sys.exit(3)
    time.sleep(60)
"""


@pytest.mark.parametrize("option", [["--warm"], ["--preload", "torch"], ["--preload=torch"]])
@pytest.mark.parametrize(
    "command", [["rankspawn.torchrun"], ["rankspawn", "run"]], ids=["rankspawn.torchrun", "rankspawn run"]
)
def test_restarts_are_warm(command: list[str], option: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(FAILS_ONCE)
    done = subprocess.run(
        [sys.executable, "-m", *command, "--nproc-per-node", "2", "--max-restarts", "1", *option, "train.py", tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cold" not in done.stderr
    said = {name: (tmp_path / name).read_text().split(" ", 1) for name in ("0.0", "0.1", "1.0", "1.1")}
    assert [preloaded for preloaded, _ in said.values()] == ["True"] * 4
    assert len({numbers for _, numbers in said.values()}) == 4, "each rank has random numbers of its own"


NOTES_TEMPLATES = """
import sys
from rankspawn._warm import stem
made = []
init = stem.Stem.__init__
def noted(self, *args, **kwargs):
    made.append("torch" in sys.modules)
    init(self, *args, **kwargs)
stem.Stem.__init__ = noted
from rankspawn.torchrun import main
status = main(sys.argv[1:])
print(made, status)
"""


def test_the_agent_and_the_template_import_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import torch, os, time\nopen(os.environ['RANK'], 'w').write(str(os.getppid()))")
    done = subprocess.run(
        [sys.executable, "-c", NOTES_TEMPLATES, "--nproc_per_node=2", "--warm", "train.py"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[False] 0", "one template, begun before torch was imported here"


def test_no_module_list_is_an_error_of_the_parser() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rankspawn.torchrun", "--preload", "a b", "x.py"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--preload: expected names of modules, as torch,torch._dynamo, got 'a b'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "options", "script"),
    [
        ("--warm train.py --warm", {"--warm": ""}, ["train.py", "--warm"]),
        ("--nproc_per_node 2 -m pkg.train a", {"--nproc-per-node": "2", "-m": ""}, ["pkg.train", "a"]),
        ("-t3 --standalone --preload=a,b -- x", {"-t": "3", "--standalone": "", "--preload": "a,b"}, ["x"]),
        ("--nnodes", {"--nnodes": ""}, []),
    ],
)
def test_arguments_are_guessed(arguments: str, options: dict[str, str], script: list[str]) -> None:
    assert _split(arguments.split()) == (options, script)


FUNCTIONS = """
import os, sys, warnings

from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from rankspawn import Template, torchrun

def rank(folder):
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if attempt == "0" and os.environ["RANK"] == "1":
        raise ValueError("of the first attempt")
    return attempt, os.getppid()

if __name__ == "__main__":
    config = LaunchConfig(1, 1, 2, run_id="functions", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=1,
                          start_method=sys.argv[1], monitor_interval=0.1)
    modules = True if sys.argv[2] == "found" else ["torch", "torch.distributed.elastic.multiprocessing.api"]
    with Template(modules, required=sys.argv[2] == "required") as template, torchrun.installed(template=template):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            answers = elastic_launch(config, rank)("argument")
        assert set(answers.values()) == {("1", os.getpid())} or sys.argv[1] == "forkserver", answers
        print(sum(told["ranks"] for told in template.report()))
        print(*(str(one.message) for one in caught if "cold" in str(one.message)), sep="\\n", end="")
"""
COLD = "ranks 0-1 started cold: they are functions"


@pytest.mark.parametrize(
    ("method", "modules", "forked", "said"),
    [
        ("spawn", "named", "4", ""),
        ("spawn", "found", "0", f"{COLD}, which do not say what they import; name the modules, as by --preload"),
        ("forkserver", "named", "0", f"{COLD} with the start method forkserver, and only spawn has a warm start"),
    ],
)
def test_functions_of_the_agent_are_forked_or_it_is_said_why_not(
    method: str, modules: str, forked: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    command = [sys.executable, "functions.py", method]
    done = subprocess.run([*command, modules], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n", 1) == [forked, said]


def test_functions_that_have_to_be_warm_and_cannot(tmp_path: Path) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    command = [sys.executable, "functions.py", "fork", "required"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"RuntimeError: a warm start is required, but {COLD} with the start method fork" in done.stderr


def test_a_script_that_a_function_runs_is_warm(tmp_path: Path) -> None:
    script = "import psutil, torch, os\nopen(os.environ['RANK'], 'w').write(open('/proc/self/cmdline').read())"
    (tmp_path / "train.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-c", NOTES_TEMPLATES, "--nproc_per_node=2", "--warm", "--run-path", "train.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cold" not in done.stderr and done.stdout.splitlines()[-1] == "[True] 0"
    assert all("--multiprocessing-fork" in (tmp_path / rank).read_text() for rank in "01")


LOADER = """
import json, sys
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
class Squares(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return i * i, get_worker_info().id
if __name__ == "__main__":
    torch.ones(2_000_000).sum()  # a parallel operation, before and behind the workers
    said = []
    for method in ("fork", "spawn", "forkserver"):
        loader = DataLoader(Squares(), batch_size=2, num_workers=2, multiprocessing_context=method)
        said.append([[part.tolist() for part in batch] for batch in loader])
    print(json.dumps(said), torch.ones(2_000_000).sum().item(), torch.get_num_threads())
"""


def test_data_loaders_have_the_workers_that_they_have_cold(tmp_path: Path) -> None:
    (tmp_path / "loads.py").write_text(LOADER)
    said = {}
    with Template(["torch", "torch.utils.data"], required=True) as template:
        for way, warm in (("cold", False), ("warm", template)):
            with launch(
                [sys.executable, "loads.py"], 1, cwd=tmp_path, log_dir=tmp_path / way, warm=warm, numa=None
            ) as group:
                assert group.wait(120) == (0,), (tmp_path / way / "attempt_0/0/stderr.log").read_text()
            said[way] = (tmp_path / way / "attempt_0" / "0" / "stdout.log").read_text()
    assert said["warm"] == said["cold"]
    assert said["warm"].startswith("[[[[0, 1], [0, 0]], [[4, 9], [1, 1]]")


def test_the_example_trains_warm(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "rankspawn", "run", "--nproc-per-node", "2", "--warm", "--report", report, EXAMPLE,
         "--epochs", "2"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "identical on every rank" in done.stdout
    (attempt,) = json.loads(report.read_text())["attempts"]
    assert {rank["mechanism"] for rank in attempt["ranks"]} == {"warm"}
    assert "torch._dynamo" in attempt["templates"][0]["modules"]


@pytest.mark.parametrize(
    ("source", "how"),
    [
        ("torch.set_num_threads(4)", "clone"),
        ("torch.ones(2_000_000).sum()", "warm"),
        ("import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)", "warm"),
    ],
    ids=["XNNPACK's", "OpenMP's", "no SIGCHLD"],
)
def test_pools_of_threads(source: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """set_num_threads makes XNNPACK's pool, whose end a forked rank would wait for, when it ends, for ever."""
    (tmp_path / "pools.py").write_text(f"import torch\n{source}\ntorch.ones(300, 300) @ torch.ones(300, 300)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with warnings.catch_warnings(record=True) as said, Template(["numpy", "pools"]) as template:
        warnings.simplefilter("always")
        command = [sys.executable, "-c", "import torch; torch.ones(2_000_000).sum()"]
        with launch(command, 2, warm=template) as group:
            assert group.wait(60) == (0, 0)
            assert {rank.mechanism for rank in group.ranks} == {how}
    assert [("started a native thread" in str(one.message)) for one in said] == [True] * (how == "clone")
