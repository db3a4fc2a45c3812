"""``rankspawn run`` beside a real torchrun: one node, static rendezvous."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

torchs = pytest.importorskip("torch.distributed.run", reason="torch is not installed")

PORT = "29611"

# Where the two differ, and why: variable -> (torchrun's, ours), None where it is not set, ... for any value.
DIFFERENCES: dict[str, tuple[object, object]] = {
    # Rank 0 makes the store at MASTER_PORT itself. torchrun's agent makes it, and lives as long as the job.
    "TORCHELASTIC_USE_AGENT_STORE": ("True", "False"),
    # Where torch's @record leaves a rank's exception, in the log folder of each.
    "TORCHELASTIC_ERROR_FILE": (..., ...),
    # An option of newer torchruns, which the agent puts into its environment, so that ranks inherit it.
    "TORCHELASTIC_SIGNALS_TO_HANDLE": (..., None),
    # The clock when the rank was called.
    "RANKSPAWN_CALL_NS": (None, ...),
}
if "--signals-to-handle" not in torchs.get_args_parser()._option_string_actions:
    del DIFFERENCES["TORCHELASTIC_SIGNALS_TO_HANDLE"]

SCRIPT = """
import json, os, sys
from pathlib import Path
about = {
    "environment": dict(os.environ),
    "arguments": sys.argv[1:],
    "interpreter": sys.executable,
    "unbuffered": sys.stdout.write_through,
    "leads session": os.getsid(0) == os.getpid(),
}
Path(__file__).with_name("said-" + os.environ["RANK"]).write_text(json.dumps(about))
print("out", os.environ["RANK"])
print("err", os.environ["RANK"], file=sys.stderr)
"""
# torchrun drops a double dash right behind the script; ours leaves it to the script, as the README says.
ARGUMENTS = ["--nproc-per-node", "7", "-m", "", "a b", "ü", "--", "--log-dir"]


@dataclass
class Outcome:
    """status: of the command. ranks: what each rank said of itself. files: the log folder's, with their text."""

    status: int
    ranks: list[dict[str, object]]
    files: dict[str, str]


def run(command: list[str], folder: Path, ranks: int) -> Outcome:
    folder.mkdir()
    script, logs = folder / "script.py", folder / "logs"
    script.write_text(SCRIPT)
    address = ["--master-addr", "127.0.0.1", "--master-port", PORT]
    # The same environment for both, without what the interpreter or a launcher around the tests may have set.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    options = ["--nproc-per-node", str(ranks), "--log-dir", str(logs), *address]
    done = subprocess.run(
        [*command, *options, str(script), *ARGUMENTS],
        capture_output=True, text=True, timeout=120, env={**environment, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    said = [json.loads((folder / f"said-{rank}").read_text()) for rank in range(ranks)]
    # torchrun names the folder after the run_id; ours after the script and the time, with a link to the newest.
    (job,) = [path for path in logs.iterdir() if not path.is_symlink()]
    assert re.fullmatch(r"none_\w{8}" if command[2] == "torch.distributed.run" else r"script-\d{8}-\d{6}", job.name)
    files = {str(path.relative_to(job)): path.read_text() for path in job.rglob("*") if path.is_file()}
    return Outcome(done.returncode, said, files)


@pytest.fixture(params=[1, 2])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Outcome, Outcome]:
    """The outcomes of torchrun and of ours, with as many ranks."""
    # torchrun redirects output into its log folder only when asked to; for ours, naming the folder is enough.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "static", "--redirects", "3"]
    ours = [sys.executable, "-m", "rankspawn", "run"]
    return run(torchrun, tmp_path / "torchrun", request.param), run(ours, tmp_path / "ours", request.param)


def differences(theirs: dict[str, str], ours: dict[str, str]) -> dict[str, tuple[object, object]]:
    """What differs, in the form of DIFFERENCES."""
    found: dict[str, tuple[object, object]] = {}
    for name in theirs.keys() | ours.keys():
        if theirs.get(name) != ours.get(name):
            a, b = DIFFERENCES.get(name, (0, 0))
            found[name] = (... if a is ... else theirs.get(name), ... if b is ... else ours.get(name))
    return found


def test_the_same_ranks(both: tuple[Outcome, Outcome]) -> None:
    theirs, ours = both
    assert (ours.status, ours.files) == (theirs.status, theirs.files)
    for rank_of_theirs, rank_of_ours in zip(theirs.ranks, ours.ranks, strict=True):
        environments = rank_of_theirs.pop("environment"), rank_of_ours.pop("environment")
        assert rank_of_ours == rank_of_theirs
        # torchrun sets 1 for several ranks, and nothing for one; ours have their share of the cores.
        threads = [environment.pop("OMP_NUM_THREADS", None) for environment in environments]  # type: ignore[attr-defined]
        assert threads[0] == (None if len(theirs.ranks) == 1 else "1") and int(threads[1]) >= 1
        assert differences(*environments) == DIFFERENCES  # type: ignore[arg-type]
