"""Our contexts under torch: tensors in queues, start_processes, a DataLoader, elastic's callables, as by stock ones.

torch takes the name of a start method and asks multiprocessing for the context of that name. So torch needs no patch:
the tests put our contexts into multiprocessing's table, under names of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rankspawn

pytest.importorskip("torch", reason="torch is not installed")

SOURCE = Path(rankspawn.__file__).parents[1]
CPUS = sorted(os.sched_getaffinity(0))

HEAD = """
import json, os, signal, sys, time
from multiprocessing import context

import rankspawn
import torch
import torch.multiprocessing as mp

METHOD, WHOSE, CPUS = json.loads(sys.argv[1])
PLACES = [rankspawn.Binding({CPUS[0]}), rankspawn.Binding({CPUS[-1]})]


def mask():
    return sorted(os.sched_getaffinity(0))


def registered():
    "The name by which torch finds the context."
    if METHOD == "forkserver":
        mp.set_forkserver_preload(["torch"])
    if WHOSE == "stock":
        return METHOD
    context._concrete_contexts["rankspawn"] = rankspawn.get_context(METHOD, PLACES)
    return "rankspawn"
"""

TENSORS = """
def work(inbox, outbox, shared):
    tensor = inbox.get()
    tensor += 1
    shared.fill_(7)
    outbox.put(torch.arange(4))
    outbox.put(mask())
    inbox.get()  # what was sent lies in this process's memory until then

if __name__ == "__main__":
    context = mp.get_context(registered())
    inbox, outbox = context.Queue(), context.Queue()
    sent, shared = torch.zeros(3).share_memory_(), torch.zeros(2).share_memory_()
    process = context.Process(target=work, args=(inbox, outbox, shared))
    process.start()
    inbox.put(sent)
    received = outbox.get().tolist()
    where = outbox.get()
    inbox.put(None)
    process.join()
    print(json.dumps([sent.tolist(), shared.tolist(), received, process.exitcode, where]))
"""

START = """
def report(i, pipes):
    pipe = pipes[i][1]
    pipe.send([i, mask()])
    pipe.recv()

def fail(i):
    if i == 1:
        raise ValueError("on purpose")
    time.sleep(600)

def end(i):
    if i == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)

if __name__ == "__main__":
    name = registered()
    found = []
    for function in (fail, end):
        try:
            mp.start_processes(function, nprocs=2, start_method=name)
        except Exception as error:
            found.append([type(error).__name__, error.error_index, getattr(error, "exit_code", None)])
    pipes = [mp.Pipe() for _ in range(2)]
    # Bound as the two before them, as the ranks of a restarted group are.
    running = mp.start_processes(report, args=(pipes,), nprocs=2, start_method=name, join=False)
    found.append([running.join(0.01), len(running.pids())])
    for ours, _ in pipes:
        found.append(ours.recv())
        ours.send("end")
    while not running.join():
        pass
    print(json.dumps(found))
"""

LOADER = """
class Masks(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.tensor(max(mask()))

if __name__ == "__main__":
    asked = METHOD if WHOSE == "stock" else rankspawn.get_context(METHOD, PLACES)
    loader = torch.utils.data.DataLoader(Masks(), num_workers=2, multiprocessing_context=asked)
    print(json.dumps([int(one) for one in loader]))
"""

ELASTIC = """
import tempfile
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def rank(folder):
    number, attempt = int(os.environ["LOCAL_RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt == 0:
        if number == 1:
            raise ValueError("on purpose")
        time.sleep(600)
    return [number, mask()]

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
            run_id="context", max_restarts=1, monitor_interval=0.1, start_method=registered(),
        )
        answers = elastic_launch(config, rank)(folder)
    print(json.dumps([answers[number] for number in sorted(answers)]))
"""


@pytest.fixture(params=["spawn", "forkserver"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["stock", "our"])
def whose(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(folder: Path, text: str, method: str, whose: str) -> Any:
    program = folder / "program.py"
    program.write_text(HEAD + text)
    done = subprocess.run(
        [sys.executable, str(program), json.dumps([method, whose, CPUS])],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def places(whose: str) -> list[list[int]]:
    return [CPUS, CPUS] if whose == "stock" else [[CPUS[0]], [CPUS[-1]]]


def test_tensors_in_queues(method: str, whose: str, tmp_path: Path) -> None:
    found = run(tmp_path, TENSORS, method, whose)
    assert found == [[1, 1, 1], [7, 7], [0, 1, 2, 3], 0, places(whose)[0]]


def test_start_processes(method: str, whose: str, tmp_path: Path) -> None:
    first, second = places(whose)
    assert run(tmp_path, START, method, whose) == [
        ["ProcessRaisedException", 1, None],
        ["ProcessExitedException", 0, -signal.SIGKILL],
        [False, 2],
        [0, first],
        [1, second],
    ]


def test_data_loader(method: str, whose: str, tmp_path: Path) -> None:
    """Items are dealt to the workers in turn."""
    assert run(tmp_path, LOADER, method, whose) == [max(place) for place in places(whose)] * 2


def test_elastic_launch(method: str, whose: str, tmp_path: Path) -> None:
    """The second attempt's ranks are where the first's were."""
    assert run(tmp_path, ELASTIC, method, whose) == [[0, places(whose)[0]], [1, places(whose)[1]]]
