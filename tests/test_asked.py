"""What ``launch`` was asked: wrong arguments are named before anything starts, and the command's options are there."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rankspawn._group.launch  # noqa: F401
from rankspawn import AffinityMode, Binding, Job, MemoryPolicy, NumaOptions, Topology, launch, place

_launch = sys.modules["rankspawn._group.launch"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="binds ranks")

TRUE = ["/bin/true"]


@pytest.mark.parametrize(
    ("args", "nprocs", "options", "says"),
    [
        ("echo hi", 2, {}, r"args: expected a list of words, got 'echo hi'; a line for a shell is \[\"sh\", \"-c\""),
        (None, 2, {}, "args: expected a list of words or a function that gives one, got None"),
        (lambda rank: None, 2, {}, r"args\(0\): expected a list of words, got None"),
        (lambda rank: "echo" if rank else TRUE, 2, {}, r"args\(1\): expected a list of words, got 'echo'"),
        (TRUE, "2", {}, "nprocs: expected a positive integer, got '2'"),
        (TRUE, True, {}, "nprocs: expected a positive integer, got True"),
        (TRUE, 2.0, {}, "nprocs: expected a positive integer, got 2.0"),
        (TRUE, 1, {"max_restarts": "3"}, "max_restarts: expected a non-negative integer, got '3'"),
        (TRUE, 1, {"job": 1}, "job: expected a Job or None, got 1"),
        (TRUE, 1, {"bindings": Binding({0})}, "bindings: expected a sequence with an item for each rank, got Binding"),
        (TRUE, 1, {"bindings": [{0}]}, r"bindings\[0\]: expected a Binding or None, got {0}"),
        (TRUE, 1, {"env": "A=1"}, "env: expected a mapping of names to texts, got 'A=1'"),
        (TRUE, 1, {"env": {"A": 1}}, r"env\['A'\]: expected a text, got 1"),
        (TRUE, 1, {"rank_env": {"A": "1"}}, "rank_env: expected a sequence with an item for each rank, got {'A'"),
        (TRUE, 1, {"rank_env": [{"A": None}]}, r"rank_env\[0\]\['A'\]: expected a text, got None"),
        (TRUE, 1, {"grace": "5"}, "grace: expected a number of seconds, got '5'"),
        (TRUE, 2, {"stdin": None}, "stdin: expected 'all', 'none' or the number of a rank, from 0 to 1, got None"),
        (TRUE, 2, {"stdin": True}, "stdin: expected 'all', 'none' or the number of a rank, from 0 to 1, got True"),
        (TRUE, 1, {"tee": "out"}, "tee: expected True, False or a text stream, got 'out'"),
    ],
)
def test_a_wrong_type_is_named(args: Any, nprocs: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=f"^{says}"):
        launch(args, nprocs, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nprocs": 0}, "nprocs: expected a positive integer, got 0"),
        ({"args": []}, r"args: expected a program and its arguments, got \[\]"),
        ({"max_restarts": -1}, "max_restarts: expected a non-negative integer, got -1"),
        ({"max_restarts": 1, "job": Job(1, 29500, nnodes=2)}, "max_restarts is for one machine"),
        ({"max_restarts": 1, "job": Job(1, 29500, max_restarts=2)}, "max_restarts: expected 2, as in job, got 1"),
        ({"max_restarts": 1, "files": [None]}, "files are those of one attempt"),
        ({"tee": True, "tee_prefix": "{node}"}, r"tee_prefix: expected a text like \"\[rank {rank}\]:\", got '{node}'"),
        ({"tee_ranks": {0}}, "tee_ranks needs tee"),
        ({"stdin": "first"}, "stdin: expected 'all', 'none' or the number of a rank, from 0 to 0, got 'first'"),
        ({"stdin": 1}, "from 0 to 0, got 1"),
        ({"stdin": subprocess.DEVNULL}, "from 0 to 0, got -3"),
        ({"stdin": 4, "nprocs": 2, "job": Job(2, 29500, nnodes=2)}, "from 0 to 3, got 4"),
        ({"numa": "none", "reserve_cores": 1}, "numa='none' leaves ranks unbound: it excludes reserve_cores"),
        ({"bindings": [None], "threads_per_core": 1}, "leave out threads_per_core"),
        ({"bindings": [None], "numa": "node"}, "leave out numa='node'"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        launch(**{"args": TRUE, "nprocs": 1, **options})


def test_bindings_say_what_they_want() -> None:
    with pytest.raises(TypeError, match=r"^cpus: expected a set of integers, got 0; one is \{0\}$"):
        Binding(0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^memory nodes: expected a set of integers, got '0'$"):
        MemoryPolicy("bind", "0")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^topology: expected a Topology, got '/'; Topology\.read"):
        place("/", "node", nprocs=1)  # type: ignore[arg-type]


def told(folder: Path, name: str, nprocs: int = 1, **options: Any) -> list[str]:
    with launch(["/bin/sh", "-c", f"echo ${name}"], nprocs, log_dir=folder, **options) as group:
        group.wait(60, check=True)
        assert group.files is not None
        return [files.stdout.read_text().strip() for files in group.files if files.stdout is not None]


@pytest.mark.parametrize("name", ["MASTER_PORT", "RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"])
@pytest.mark.parametrize("value", ["7", b"7"])
def test_a_variable_of_the_job_is_not_overridden_without_a_word(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^env sets {name} to '7', and the job sets it .*job=Job"):
        told(tmp_path, name, env={**os.environ, name: value})


def test_a_variable_of_the_job_that_is_inherited_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under another launcher every copy of os.environ has it."""
    monkeypatch.setenv("RANK", "7")
    assert told(tmp_path, "RANK", 2, env={**os.environ}) == ["0", "1"]


def test_rank_env_wins(tmp_path: Path) -> None:
    assert told(tmp_path, "RANK", 2, rank_env=[{"RANK": "7"}, {}]) == ["7", "1"]


@pytest.mark.parametrize(("given", "has"), [({}, "1"), ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, "0")])
def test_a_default_gives_way_to_env(given: dict[str, str], has: str, tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], **given}
    assert told(tmp_path, "TORCH_NCCL_ASYNC_ERROR_HANDLING", env=env) == [has]


def test_placement_is_that_of_place() -> None:
    options: dict[str, Any] = {"devices": [], "threads_per_core": 1, "memory_policy": "bind"}
    with launch(TRUE, 1, numa="node", **options) as group:
        asked = [rank.binding_report.requested for rank in group]
        group.wait(60)
    assert asked == list(place(Topology.read(), "node", nprocs=1, **options))
    with pytest.warns(RuntimeWarning, match="is left unbound: exclusive"):
        bindings, _ = _launch._place("exclusive", 4096, devices=[], required=False)
    assert {binding and binding.cpus for binding in bindings} == {None}


def test_lines_are_shown_on_a_stream_with_a_prefix(tmp_path: Path) -> None:
    shown = io.StringIO()
    script = "echo out; echo err >&2"
    with launch(["/bin/sh", "-c", script], 2, tee=shown, tee_prefix="{rank:02d}> ") as group:
        group.wait(60)
    assert sorted(shown.getvalue().splitlines()) == ["00> err", "00> out", "01> err", "01> out"]


def test_options_of_torch_say_what_they_want() -> None:
    with pytest.raises(
        TypeError, match=r"^affinity_mode: expected an AffinityMode, got 'node'; AffinityMode\('node'\)"
    ):
        NumaOptions("node")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^memory_policy: expected a mode or a MemoryPolicy, got \{0\}$"):
        NumaOptions(AffinityMode.NODE, memory_policy={0})  # type: ignore[arg-type]
