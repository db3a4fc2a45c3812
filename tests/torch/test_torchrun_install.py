"""``rankspawn.torchrun.install``: what it replaces in torch and gives back, and what it rests on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch.distributed.run", reason="torch is not installed")

from rankspawn import AffinityMode, NumaOptions
from rankspawn._torch.seams import SEAMS, Seam
from rankspawn.torchrun import _REPLACED, install, installed, uninstall


def replaced() -> list[Any]:
    return [getattr(import_module(module), name) for module, name in _REPLACED]


TORCHS = replaced()


@pytest.fixture(autouse=True)
def uninstalled() -> Any:
    yield
    uninstall()
    assert replaced() == TORCHS


def options() -> NumaOptions | None:
    found: NumaOptions | None = import_module("rankspawn._torch.elastic").default_numa_options
    return found


# ---- seams ----------------------------------------------------------------------------------------------------------


def seam_name(seam: Seam) -> str:
    return f"{seam.module}.{seam.function}"


@pytest.mark.parametrize("seam", SEAMS, ids=seam_name)
def test_seam(seam: Seam) -> None:
    """A failure here means that this torch differs from all that we know, and says where to look."""
    assert seam.difference() is None


@pytest.mark.parametrize("seam", SEAMS, ids=seam_name)
def test_a_torch_that_differs(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the seam, and install() replaces nothing."""

    def unlike_all_that_we_know(brave: int, new: int) -> None:
        pass

    monkeypatch.setattr(f"{seam.module}.{seam.function}", unlike_all_that_we_know)
    before = replaced()
    with pytest.raises(ImportError, match=seam.function) as told:
        install()
    assert import_module("torch").__version__ in str(told.value)
    assert replaced() == before


@pytest.mark.parametrize(
    ("seam", "told"),
    [
        (Seam("torch.distributed.run", "no_such_function"), "is not there"),
        (Seam("torch.no_such_module", "function"), "is not there"),
        (Seam("torch.distributed.run", "main", "arguments"), "takes (args), not (arguments)"),
        (Seam("torch.distributed.run", "main", "[args] [more]"), None),
        (Seam("torch.distributed.run", "parse_args", "..."), None),
        (Seam("torch.distributed.run", "parse_args", "other ..."), "takes (args), not (other ...)"),
        (Seam("torch.distributed.run", "parse_args", names=("get_args_parser", "guess")), "does not use guess"),
    ],
    ids=str,
)
def test_difference(seam: Seam, told: str | None) -> None:
    difference = seam.difference()
    if told is None:
        assert difference is None
    else:
        assert difference is not None
        assert f"{seam.module}.{seam.function} {told}" in difference


# ---- install and uninstall ------------------------------------------------------------------------------------------


def test_install_and_uninstall() -> None:
    uninstall()  # harmless
    install()
    assert all(one.__module__.startswith("rankspawn._torch.") for one in replaced())
    install(NumaOptions(AffinityMode.NODE))
    assert options() == NumaOptions(AffinityMode.NODE)
    uninstall()
    assert replaced() == TORCHS


def test_installed_leaves_things_as_found() -> None:
    with installed(NumaOptions(AffinityMode.NODE)):
        ours = replaced()
        assert ours != TORCHS
        with pytest.raises(KeyError), installed(NumaOptions(AffinityMode.SOCKET)):
            assert options() == NumaOptions(AffinityMode.SOCKET)
            raise KeyError
        assert replaced() == ours
        assert options() == NumaOptions(AffinityMode.NODE)
    assert replaced() == TORCHS


LAUNCH = """
import sys, threading
from importlib.util import find_spec
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from rankspawn import torchrun

def launch(name, **config):
    config = LaunchConfig(1, 1, 2, run_id=name, rdzv_backend="c10d", rdzv_endpoint="localhost:0", **config)
    elastic_launch(config, sys.executable)(sys.argv[1], name)

def everything():
    with torchrun.installed():
        if find_spec("torch.numa"):  # from 2.9 on
            import torch.numa.binding as numa
            launch("torch's options", numa_options=numa.NumaOptions(numa.AffinityMode.EXCLUSIVE))
        launch("none")
    with torchrun.installed(torchrun.NumaOptions(torchrun.AffinityMode.EXCLUSIVE)):
        launch("ours")
    launch("uninstalled")

if sys.argv[2] == "in a thread":
    thread = threading.Thread(target=everything)
    thread.start()
    thread.join()
else:
    everything()
"""
RANK = """
import json, os, sys
said = json.dumps([sys.argv[1], sorted(os.sched_getaffinity(0))])
os.write(1, f"{said}\\n".encode())
"""
needs_two_cpus = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="binds two ranks apart"
)


def apart(masks: list[list[int]]) -> bool:
    """Whether each of two ranks has CPUs of its own, within this process's."""
    one, other = map(set, masks)
    return bool(one and other) and not one & other and one | other <= os.sched_getaffinity(0)


@needs_two_cpus
@pytest.mark.parametrize("where", ["in the main thread", "in a thread"])
def test_elastic_launch(tmp_path: Path, where: str) -> None:
    """A program's own launches, bound as they say."""
    script, rank = tmp_path / "launch.py", tmp_path / "rank.py"
    script.write_text(LAUNCH)
    rank.write_text(RANK)
    done = subprocess.run(
        [sys.executable, str(script), str(rank), where], capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    masks: dict[str, list[list[int]]] = {}
    for name, mask in map(json.loads, done.stdout.splitlines()):
        masks.setdefault(name, []).append(mask)
    if find_spec("torch.numa"):
        assert apart(masks["torch's options"])
    assert apart(masks["ours"])
    assert masks["none"] == masks["uninstalled"] == [sorted(os.sched_getaffinity(0))] * 2


FOREIGN = """
import os, subprocess, sys, time
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from rankspawn import AffinityMode, NumaOptions, torchrun

handlers = []

class PipeHandler(SubprocessHandler):
    def __init__(self, entrypoint, args, env, stdout, stderr, local_rank_id, numa_options=None):
        self._stdout, self._stderr = subprocess.PIPE, None
        self.local_rank_id = local_rank_id
        self.proc = self._popen((entrypoint, *map(str, args)), {**os.environ, **env})
        handlers.append(self)

    def close(self, death_sig=None):
        os.killpg(self.proc.pid, death_sig or 15)

def start_by_pipe(**keywords):
    return PipeHandler(**keywords)

def launch(*args):
    config = LaunchConfig(1, 1, 2, run_id="foreign", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    elastic_launch(config, sys.executable)(*args)
    for handler in handlers:
        print(handler.local_rank_id, handler.proc.stdout.read().decode(), end="")
        handler.proc.stdout.close()
    handlers.clear()

options = NumaOptions(AffinityMode.EXCLUSIVE)
if sys.argv[2] == "before":
    api.get_subprocess_handler = start_by_pipe
    torchrun.install(options)
else:
    torchrun.install(options)
    api.get_subprocess_handler = start_by_pipe
torchrun.install(options)
launch("-c", sys.argv[1])
torchrun.uninstall()
assert api.get_subprocess_handler is start_by_pipe
launch("-c", sys.argv[1])
"""


@needs_two_cpus
@pytest.mark.parametrize("order", ["before", "after"])
def test_somebody_elses_function_that_starts_ranks(tmp_path: Path, order: str) -> None:
    """As NVIDIA's ft_launcher has one: ranks are started through it, and bound; uninstall() leaves it alone."""
    script = tmp_path / "launch.py"
    script.write_text(FOREIGN)
    rank = "import os, json; print(json.dumps([int(os.environ['RANK']), sorted(os.sched_getaffinity(0))]))"
    done = subprocess.run([sys.executable, str(script), rank, order], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    said = [(int(number), *json.loads(text)) for number, text in lines]
    assert [(number, rank) for number, rank, _ in said] == [(0, 0), (1, 1)] * 2
    assert apart([mask for _, _, mask in said[:2]])
    assert [mask for _, _, mask in said[2:]] == [sorted(os.sched_getaffinity(0))] * 2


def test_somebody_elses_function_that_fails_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, api

    started: list[Any] = []

    def start(**keywords: Any) -> Any:
        if keywords["local_rank_id"] == 1:
            raise OSError("no more of these")
        started.append(import_module("rankspawn._torch.elastic").TORCHS_HANDLER(**keywords))
        return started[-1]

    monkeypatch.setattr(api, "get_subprocess_handler", start)
    install()
    elastic = import_module("rankspawn._torch.elastic")
    context = elastic.SubprocessContext("c", "sleep", {0: ("60",), 1: ("60",)}, {0: {}, 1: {}}, DefaultLogsSpecs())
    with pytest.raises(OSError, match="no more of these"):
        context._start()
    assert started[0].proc.returncode == -9


FUNCTIONS = """
import json, os, sys, time
mask_at_import = sorted(os.sched_getaffinity(0))

from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from rankspawn import AffinityMode, NumaOptions, torchrun

def report(word):
    return word, int(os.environ["RANK"]), mask_at_import, sorted(os.sched_getaffinity(0))

def fail():
    if os.environ["RANK"] == "1":
        raise ValueError("of rank 1")
    time.sleep(600)

def launch(function, *args, interval=600):  # nobody waits so long
    config = LaunchConfig(1, 1, 2, run_id="functions", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
                          start_method=sys.argv[1], monitor_interval=interval)
    return elastic_launch(config, function)(*args)

if __name__ == "__main__":
    with torchrun.installed(NumaOptions(AffinityMode.EXCLUSIVE)):
        for rank, told in launch(report, "hello").items():
            print(json.dumps([rank, told]))
        try:
            launch(fail)
        except ChildFailedError as error:
            print(error.get_first_failure()[1].message)
"""


@needs_two_cpus
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_functions(tmp_path: Path, method: str) -> None:
    """The functions' values and errors come back. They run bound; with "spawn", so do the imports of their modules."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "functions.py"), method], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [(rank, told[:2]) for rank, told in said] == [(0, ["hello", 0]), (1, ["hello", 1])]
    assert apart([told[3] for _, told in said])
    if method == "spawn":
        assert all(at_import == now for _, (_, _, at_import, now) in said)
    assert "ValueError: of rank 1" in done.stdout


REFUSED = """
import multiprocessing, tempfile, time
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from rankspawn import Binding, BindingError, torchrun
from rankspawn._torch import elastic as _elastic

if __name__ == "__main__":
    torchrun.install()
    _elastic.binding_for = lambda rank, *_: Binding({5000}) if rank else None
    with tempfile.TemporaryDirectory() as folder:
        try:
            start_processes("test", time.sleep, {0: (600,), 1: (600,)}, {0: {}, 1: {}}, DefaultLogsSpecs(folder))
        except BindingError as error:
            print(error.step, multiprocessing.active_children())
"""


@needs_two_cpus
def test_a_function_that_cannot_be_bound_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "refused.py").write_text(REFUSED)
    done = subprocess.run([sys.executable, str(tmp_path / "refused.py")], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "sched_setaffinity []\n"), done.stderr


# ---- waiting --------------------------------------------------------------------------------------------------------


@pytest.fixture
def context(tmp_path: Path) -> Any:
    """Starts ranks of a shell script through torch's start_processes with ours installed. It runs in a thread of its
    own, because torch sets signal handlers when the main thread calls it."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    contexts = []

    def start(*scripts: str) -> Any:
        contexts.append(
            start_processes(
                name="test",
                entrypoint="/bin/sh",
                args={rank: ("-c", script) for rank, script in enumerate(scripts)},
                envs={rank: {} for rank in range(len(scripts))},
                logs_specs=DefaultLogsSpecs(log_dir=str(tmp_path)),
            )
        )
        return contexts[-1]

    with ThreadPoolExecutor(1) as thread, installed():
        yield lambda *scripts: thread.submit(start, *scripts).result()
        while contexts:  # pytest keeps the fixture's value a little longer, which would keep the pidfds
            contexts.pop().close()


LONG = 30.0  # seconds; a wait that takes so long was not woken by an end


def test_wait_ends_with_the_ranks(context: Any) -> None:
    began = time.monotonic()
    result = context("exit 0", "sleep 0.2").wait(period=LONG)
    assert time.monotonic() - began < LONG
    assert not result.is_failed()
    assert result.return_values == {0: None, 1: None}


def test_a_failure_ends_the_wait_for_ranks_that_run(context: Any) -> None:
    began = time.monotonic()
    result = context("sleep 600", "sleep 0.2; exit 3").wait(period=LONG)
    assert time.monotonic() - began < LONG
    # torch before 2.9 does not report the ranks that it has ended.
    expected = {0: -15, 1: 3} if find_spec("torch.numa") else {1: 3}
    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == expected


def test_a_wait_that_nobody_ends(context: Any) -> None:
    ranks = context("sleep 600")
    assert ranks.wait(timeout=0) is None
    assert ranks.wait(timeout=0.3, period=0.1) is None
    assert ranks.wait(timeout=0.1, period=0) is None
    (pid,) = ranks.pids().values()
    ranks.close()
    assert not Path(f"/proc/{pid}").exists()
    ranks.close()


def test_one_that_cannot_start_leaves_none(tmp_path: Path) -> None:
    """torch would leave the ranks that it has started before, and no object would know them."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, api

    logs = DefaultLogsSpecs(log_dir=str(tmp_path), redirects=api.Std.ALL)
    with installed():
        ours = import_module("torch.distributed.elastic.multiprocessing").SubprocessContext
        ranks = ours("test", "/bin/sleep", {0: (600,), 1: (600,)}, {0: {}, 1: {}}, logs)
        Path(ranks.stdouts[1]).parent.rmdir()
        with pytest.raises(FileNotFoundError, match=r"rank 1: .*stdout\.log"):
            ranks._start()
        assert ranks.pids() == {}


@pytest.mark.skipif(sys.platform != "linux", reason="signals to a group whose leader was waited for")
def test_what_a_failed_rank_has_left_ends(context: Any, tmp_path: Path) -> None:
    left = tmp_path / "left"
    result = context(f"sleep 600 & echo $! >{left}; exit 1", f"while [ ! -s {left} ]; do :; done").wait(period=0.1)
    assert result.is_failed()
    until = time.monotonic() + 10
    while Path(f"/proc/{left.read_text().strip()}").exists():
        assert time.monotonic() < until, "it still runs"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("script", "status"),
    [("", 0), ("import os, time; time.sleep(600 * int(os.environ['RANK'])); raise SystemExit(1)", 1)],
    ids=["all end", "one fails"],
)
def test_the_agents_interval_is_not_waited_for(tmp_path: Path, script: str, status: int) -> None:
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "rankspawn.torchrun", "--nproc-per-node", "2", "--monitor-interval", "600"]
    done = subprocess.run([*command, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr


def test_ranks_without_pidfds(tmp_path: Path) -> None:
    """The standard library starts them. The context finds out that they have ended by looking 50 times a second."""
    (tmp_path / "script.py").write_text("import os; print('rank', os.environ['RANK'])")
    done = subprocess.run(
        [sys.executable, "-m", "rankspawn.torchrun", "--nproc-per-node", "1", str(tmp_path / "script.py")],
        capture_output=True, text=True, timeout=120, env={**os.environ, "RANKSPAWN_MECHANISM": "subprocess"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "rank 0\n"), done.stderr
