"""What ``launch`` was asked: wrong arguments are named before anything starts, and the command's options are there."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rankspawn._group.launch  # noqa: F401
from rankspawn import AffinityMode, Binding, Job, MemoryPolicy, NumaOptions, Template, Topology, launch, place

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


async def _coroutine(line: object) -> None:
    raise AssertionError(line)


class _AsyncCallable:
    async def __call__(self, line: object) -> None:
        raise AssertionError(line)


_RAW = io.BytesIO()
_FLAGS = ("required", "keep_going", "capture_output", "handle_signals", "stacks", "guard", "die_with_parent")
_COMMON: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"devices": "none"}, TypeError, "devices: expected a sequence of PCI addresses or Device objects, .* got 'none'"),
    ({"devices": "gpu0"}, TypeError, "devices: expected a sequence .* got 'gpu0'"),
    ({"devices": 3}, TypeError, "devices: expected a sequence .* got 3"),
    ({"devices": {}}, TypeError, r"devices: expected a sequence .* got \{\}"),
    ({"devices": [3]}, TypeError, r"devices\[0\]: expected a PCI address or a Device, got 3"),
    ({"devices": ["gpu0"]}, ValueError, "device 'gpu0' is not a PCI address"),
    ({"reserve_cores": "1"}, TypeError, "reserve_cores: expected a non-negative integer, got '1'"),
    ({"reserve_cores": 1.5}, TypeError, "reserve_cores: expected a non-negative integer, got 1.5"),
    ({"reserve_cores": True}, TypeError, "reserve_cores: expected a non-negative integer, got True"),
    ({"reserve_cores": 4096}, ValueError, "reserve_cores 4096: must be from 0 to "),
    ({"reserve_cores": -1}, ValueError, "reserve_cores -1: must be from 0 to "),
    ({"threads_per_core": "1"}, TypeError, "threads_per_core: expected a positive integer or None, got '1'"),
    ({"threads_per_core": 1.0}, TypeError, "threads_per_core: expected a positive integer or None, got 1.0"),
    ({"threads_per_core": True}, TypeError, "threads_per_core: expected a positive integer or None, got True"),
    ({"threads_per_core": 0}, ValueError, "threads_per_core: expected a positive integer, got 0"),
    ({"memory_policy": 3}, TypeError, "memory_policy: expected a mode or a MemoryPolicy, got 3"),
    ({"memory_policy": "bnd"}, ValueError, "memory_policy: expected one of default, .*, got 'bnd'"),
    ({"numa": "nodes"}, ValueError, "numa: expected one of .*node, socket, exclusive, core-complex, got 'nodes'"),
    ({"numa": "Node"}, ValueError, "numa: expected one of .*node, socket, exclusive, core-complex, got 'Node'"),
    ({"numa": 3}, TypeError, "numa: expected one of .*core-complex, got 3"),
    ({"numa": True}, TypeError, "numa: expected one of .*core-complex, got True"),
    ({"required": 1}, TypeError, "required: expected True or False, got 1"),
]
_OF_LAUNCH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"args": ["python", "t.py", "--lr", 0.1]}, TypeError, r"args\[3\]: expected a text or a path, got 0.1"),
    ({"args": lambda rank: ["true", *[0.1] * rank]}, TypeError, r"args\(1\)\[1\]: expected a text or a path, got 0.1"),
    ({"args": [None]}, TypeError, r"args\[0\]: expected a text or a path, got None"),
    ({"args": [["true"]]}, TypeError, r"args\[0\]: expected a text or a path, got \['true'\]"),
    ({"args": {"true"}}, TypeError, r"args: expected a list of words or a function that gives one, got \{'true'\}"),
    ({"args": {"true": 1}}, TypeError, "args: expected a list of words or a function that gives one, got {'true'"),
    ({"args": lambda rank: {"true"}}, TypeError, r"args\(0\): expected a list of words, got \{'true'\}"),
    ({"numa": "nodes"}, ValueError, "numa: expected one of auto, none, node, socket, exclusive, core-complex, got"),
    ({"numa": True, "bindings": [None, None]}, TypeError, "numa: expected one of auto, none, node"),
    ({"numa": None, "devices": 3}, TypeError, "devices: "),
    ({"reserve_cores": False}, TypeError, "reserve_cores: expected a non-negative integer, got False"),
    ({"tee": _RAW}, TypeError, "tee: expected True, False or a text stream, got <_io.BytesIO"),
    ({"tee": io.BufferedWriter(io.FileIO(os.devnull, "w"))}, TypeError, "tee: expected True, False or a text stream"),
    ({"tee": 1}, TypeError, "tee: expected True, False or a text stream, got 1"),
    ({"on_line": _coroutine}, TypeError, r"on_line: expected a plain function, got <function _coroutine.*lines\(\)"),
    ({"on_line": _AsyncCallable()}, TypeError, "on_line: expected a plain function"),
    ({"on_line": _AsyncCallable().__call__}, TypeError, "on_line: expected a plain function"),
    ({"on_line": functools.partial(_coroutine)}, TypeError, "on_line: expected a plain function"),
    ({"tee": True, "tee_ranks": 3}, TypeError, "tee_ranks: expected a collection of local ranks or None, got 3"),
    ({"tee": True, "tee_ranks": "0"}, TypeError, "tee_ranks: expected a collection of local ranks or None, got '0'"),
    ({"tee": True, "tee_ranks": ["0"]}, TypeError, r"tee_ranks: expected a collection of local .*, got \['0'\]"),
    ({"tee": True, "tee_ranks": {0, 2}}, ValueError, "tee_ranks: expected local ranks, from 0 to 1, got 2"),
    ({"tee": True, "tee_ranks": [-1]}, ValueError, "tee_ranks: expected local ranks, from 0 to 1, got -1"),
    ({"tee": True, "tee_prefix": 3}, TypeError, r'tee_prefix: expected a text like "\[rank {rank}\]:", got 3'),
    ({"files": [1, 2]}, TypeError, r"files\[0\]: expected a RankFiles, got 1"),
    ({"progress": 3}, TypeError, "progress: expected a function or None, got 3"),
    ({"warm": 3}, TypeError, "warm: expected .* got 3"),
    ({"warm": "torch"}, TypeError, "warm: expected .* got 'torch'"),
    ({"cwd": 3}, TypeError, "cwd: expected a path or None, got 3"),
    ({"cgroup": 3}, TypeError, "cgroup: expected a path or None, got 3"),
    ({"temporary": 3}, TypeError, "temporary: expected a path or None, got 3"),
    ({"log_dir": 3}, TypeError, "log_dir: expected a text, a path or None, got 3"),
    ({"log_dir": b"x"}, TypeError, "log_dir: expected a text, a path or None, got b'x'"),
    ({"log_dir": ""}, ValueError, "log_dir: expected a folder, got ''"),
    ({"job": Job("2")}, TypeError, "job.nprocs: expected an integer, got '2'"),  # type: ignore[arg-type]
    ({"job": Job(2, "29500")}, TypeError, "job.master_port: expected an integer, got '29500'"),  # type: ignore[arg-type]
    ({"job": Job(2, 70000)}, ValueError, "job.master_port: expected an integer from 0 to 65535, got 70000"),
    ({"job": Job(2, run_id=3)}, TypeError, "job.run_id: expected a text, got 3"),  # type: ignore[arg-type]
    ({"job": Job(2, master_addr=3)}, TypeError, "job.master_addr: expected a text, got 3"),  # type: ignore[arg-type]
    ({"job": Job(2, 1, nnodes=2, node_rank=5)}, ValueError, "job.node_rank: expected an integer from 0 to 1, got 5"),
    ({"job": Job(2, nnodes=0)}, ValueError, "job.nnodes: expected an integer of at least 1, got 0"),
    *[({name: 1}, TypeError, f"{name}: expected True.* False.*, got 1") for name in _FLAGS],
    *[({name: "no"}, TypeError, f"{name}: expected True.* False.*, got 'no'") for name in _FLAGS],
    *[({name: None}, TypeError, f"{name}: expected True or False, got None") for name in _FLAGS[:5]],
]


@pytest.mark.parametrize(("options", "kind", "says"), [*_COMMON, *_OF_LAUNCH])
def test_launch_names_the_wrong_argument(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=f"^{says}"):
        launch(**{"args": TRUE, "nprocs": 2, **options})


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        *_COMMON,
        ({"numa": "auto"}, ValueError, "numa: expected one of node, socket, exclusive, core-complex, got 'auto'"),
        ({"nprocs": "2"}, TypeError, "nprocs: expected a positive integer or None, got '2'"),
        ({"nprocs": 0}, ValueError, "nprocs: expected a positive integer, got 0"),
        ({"gpu_index": 1.0}, TypeError, "gpu_index: expected a non-negative integer or None, got 1.0"),
        ({"allowed_cpus": "0-3"}, TypeError, "allowed_cpus: expected CPU numbers or None, got '0-3'"),
        ({"allowed_cpus": 3}, TypeError, "allowed_cpus: expected CPU numbers or None, got 3"),
    ],
)
def test_place_names_the_wrong_argument(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=f"^{says}"):
        place(Topology.read(), **{"numa": "node", "nprocs": 2, "devices": [], **options})


def test_what_is_unusual_and_right_is_taken(tmp_path: Path) -> None:
    words = (b"/bin/sh", "-c", Path("pwd"))
    shown = io.StringIO()
    options: dict[str, Any] = {"tee": shown, "tee_ranks": range(1), "cwd": os.fsencode(tmp_path), "devices": ()}
    with launch(
        words, 2, job=Job(2, run_id="x"), guard=None, on_line=functools.partial(list.append, []), **options
    ) as g:  # type: ignore[arg-type]
        g.wait(60, check=True)
    assert shown.getvalue() == f"[rank 0]:{tmp_path}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"modules": 3}, "modules: expected a sequence of names or True, got 3"),
        ({"modules": [3]}, r"modules: expected a sequence of names or True, got \[3\]"),
        ({"modules": False}, "modules: expected a sequence of names or True, got False"),
        ({"timeout": "3"}, "timeout: expected a number of seconds, got '3'"),
        ({"required": 1}, "required: expected True or False, got 1"),
    ],
)
def test_a_template_names_the_wrong_argument(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=f"^{says}$"):
        Template(**arguments)


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
    with pytest.raises(ValueError, match=r"^memory_policy: expected one of default, .*, got 'bnd'$"):
        NumaOptions(AffinityMode.NODE, memory_policy="bnd")  # type: ignore[arg-type]


# ---- the group's methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "arguments", "kind", "told"),
    [
        ("stop", ("TERM",), TypeError, "sig: expected the number of a signal, got 'TERM'"),
        ("stop", (True,), TypeError, "sig: expected the number of a signal, got True"),
        ("stop", (99,), ValueError, "sig: expected the number of a signal, from 1 to 64, got 99"),
        ("stop", (-9,), ValueError, "sig: expected the number of a signal, from 1 to 64, got -9"),
        ("stop", (15, "1"), TypeError, "grace: expected a number of seconds, got '1'"),
        ("stop", (15, float("nan")), ValueError, "grace: expected a non-negative number of seconds, got nan"),
        ("terminate", ("x",), TypeError, "grace: expected a number of seconds, got 'x'"),
        ("terminate", (-1,), ValueError, "grace: expected a non-negative number of seconds, got -1"),
        ("send_signal", ("TERM",), TypeError, "sig: expected the number of a signal, got 'TERM'"),
        ("send_signal", (99,), ValueError, "sig: expected the number of a signal, from 1 to 64, got 99"),
        ("send_signal", (15, "all"), ValueError, "to: expected 'rank', 'group' or 'session', got 'all'"),
        ("wait", ("3",), TypeError, "timeout: expected a number of seconds, got '3'"),
        ("wait", (float("nan"),), ValueError, "timeout: expected a number of seconds, got nan"),
        ("wait_any", (True,), TypeError, "timeout: expected a number of seconds, got True"),
    ],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names Linux's signals")
def test_a_groups_method_with_a_wrong_argument_does_nothing(
    method: str, arguments: tuple[Any, ...], kind: type[Exception], told: str
) -> None:
    with launch(["/bin/sleep", "1000"], 2, grace=0.5) as group:
        with pytest.raises(kind) as caught:
            getattr(group, method)(*arguments)
        assert str(caught.value) == told
        assert group.stop_asked is None and not group.stopping and not group.killing
        assert group.poll() == (None, None)
        group.kill()
