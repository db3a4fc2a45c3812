"""CUDA, NCCL and DDP in ranks that are forked from a template, on a machine with NVIDIA GPUs: `make test-gpu`.

The set is sized for ten minutes on a machine with one GPU and 16 CPUs. It has been collected, and its ranks have been
run on a CPU; it has not run on a GPU yet.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rankspawn import RankGroup, Template, launch
from tests.support.gpus import (
    TIMEOUT,
    VARIABLES,
    compute_pids,
    driver_files,
    driver_users,
    memory_used,
    mig_instances,
    smi_gpus,
)
from tests.support.processes import eventually

GPUS = smi_gpus()
if not GPUS:
    pytest.skip("nvidia-smi lists no NVIDIA GPU: nothing is tested here", allow_module_level=True)
if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)
if why := Template.why_not():
    pytest.skip(why, allow_module_level=True)

DEVICES = 1 if mig_instances() else len(GPUS)
SCRIPT = Path(__file__).with_name("rank.py")
MODULES = ["torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo"]
RANKS = 8
SHARING = 4 * DEVICES  # ranks that share GPUs
GOAL = 4.0  # seconds from a rank's death to the end of the first step of DDP of eight new ones
RESTARTS = 20
REASON = "started cold: an import has opened /dev/nvidia"


class Job:
    """Ranks that run rank.py.

    Args:
        group: The ranks.
        folder: Where they write what they have found.
    """

    def __init__(self, group: RankGroup, folder: Path) -> None:
        self.group, self.folder = group, folder
        self.statuses: tuple[int, ...] = ()
        self._waiting = threading.Thread(target=self._wait)
        self._waiting.start()

    def _wait(self) -> None:
        self.statuses = self.group.wait()

    def found(self, attempt: int = 0) -> list[dict[str, Any]]:
        """What each rank of this attempt has found, when all have."""
        files = [self.folder / f"{attempt}.{rank}.json" for rank in range(len(self.group.ranks))]
        until = time.monotonic() + TIMEOUT
        while not all(file.exists() for file in files):
            assert self._waiting.is_alive(), f"attempt {attempt}: the ranks have ended: {self.statuses}"
            assert time.monotonic() < until, f"attempt {attempt}: a rank has not reported"
            time.sleep(0.005)
        return [json.loads(file.read_text()) for file in files]

    def go(self) -> tuple[int, ...]:
        """Have ranks of ``compute`` end; their statuses."""
        (self.folder / "go").touch()
        self._waiting.join(TIMEOUT)
        return self.statuses

    def end(self) -> None:
        if self._waiting.is_alive():
            self.group.stop(signal.SIGKILL)
        self._waiting.join()


@contextmanager
def job(what: str, nprocs: int, warm: Any, **options: Any) -> Iterator[Job]:
    """Ranks of rank.py, until the end of the block at the latest."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env = {**env, "OMP_NUM_THREADS": "1", **options.pop("variables", {})}
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, str(SCRIPT), what, name]
        with launch(command, nprocs, warm=warm, env=env, grace=5.0, **options) as group:
            running = Job(group, Path(name))
            try:
                yield running
            finally:
                running.end()


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    """The template of all tests here; a rank of it has used CUDA, so that what the driver keeps for good is there."""
    with Template(MODULES, required=True) as template:
        with job("compute", DEVICES, template) as first:
            found = first.found()
            first.go()
        if not all(one["device"] == "cuda" for one in found):
            pytest.skip("torch finds no GPU that it can use (torch.cuda.is_available())")
        yield template


# ---- CUDA, NCCL, DDP ------------------------------------------------------------------------------------------------


def test_cuda_works_in_warm_ranks(template: Template) -> None:
    with job("compute", SHARING, template) as warm:
        found, pids = warm.found(), warm.group.pids()
        held = [driver_files(pid) for pid in pids]
        of_templates = [driver_files(one["pid"]) for one in template.report()]
        seen = compute_pids()
        assert warm.go() == (0,) * SHARING
        assert {rank.mechanism for rank in warm.group.ranks} == {"warm"}
    for one in found:
        assert (one["device"], one["product"], one["sorted"]) == ("cuda", True, True)
    # The ranks have what must not be in a template, so that its absence there says something.
    assert all("/dev/nvidia-uvm" in files for files in held)
    assert not any(of_templates)
    assert not seen & {one["pid"] for one in template.report()}


@pytest.mark.parametrize(("nprocs", "backend"), [(DEVICES, "nccl"), (SHARING, "gloo, nccl alone")])
def test_ddp_in_warm_ranks(template: Template, nprocs: int, backend: str) -> None:
    with job("step", nprocs, template) as warm:
        found = warm.found()
        assert {rank.mechanism for rank in warm.group.ranks} == {"warm"}
    assert [(one["device"], one["backend"], one["trained"]) for one in found] == [("cuda", backend, True)] * nprocs


# ---- restarts -------------------------------------------------------------------------------------------------------


def restarted(warm: Template | bool) -> float:
    """Seconds from a rank's death to the end of the first step of DDP of the last of its successors."""
    with job("step", RANKS, warm, max_restarts=1) as running:
        running.found()
        killed = time.monotonic()
        os.kill(running.group.ranks[0].pid, signal.SIGKILL)
        return max(one["ended"] for one in running.found(1)) - killed


def test_a_restart_is_sooner_at_work(template: Template, capsys: pytest.CaptureFixture[str]) -> None:
    """The seconds are printed beside their goal; what is judged is only which of the two is first."""
    warm, cold = restarted(template), restarted(False)
    with capsys.disabled():
        print(f"\n{RANKS} ranks on {DEVICES} GPUs, from a rank's death to the end of the new ranks' first step of DDP:")
        print(f"  warm {warm:.2f} s (goal: {GOAL:g} s), cold {cold:.2f} s")
    assert warm < cold


def test_restarts_under_load_leave_nothing(template: Template) -> None:
    users, used = driver_users(), memory_used()
    pids = set()
    with job("load", SHARING, template, max_restarts=RESTARTS) as running:
        for attempt in range(RESTARTS + 1):
            assert all(one["trained"] for one in running.found(attempt))
            pids |= set(running.group.pids())
            time.sleep(attempt % 5 / 10)  # so that ranks are killed at several moments of their work
            if attempt < RESTARTS:
                os.kill(running.group.ranks[attempt % SHARING].pid, signal.SIGKILL)
        report = running.group.report()
    assert {rank["mechanism"] for one in report["attempts"] for rank in one["ranks"]} == {"warm"}
    assert len(pids) == SHARING * (RESTARTS + 1)
    # The kernel frees a context behind its process's end.
    eventually(lambda: driver_users() <= users)
    eventually(lambda: all(now <= before for now, before in zip(memory_used(), used, strict=True)))
    assert not compute_pids() & pids
    assert not any(driver_files(one["pid"]) for one in template.report())


# ---- what a template must not have done -----------------------------------------------------------------------------

# Each makes the ranks of a fork fail, or leaves the driver's files open.
INITIALIZED = {
    "is_available": "import torch; assert torch.cuda.is_available()",
    "properties": "import torch; torch.cuda.get_device_properties(0)",
    "tensor": "import torch; kept = torch.zeros(1, device='cuda')",
    "freed tensor": "import torch; torch.zeros(1, device='cuda'); torch.cuda.empty_cache()",
    "cuInit": "import ctypes; assert ctypes.CDLL('libcuda.so.1').cuInit(0) == 0",
}
# These ask NVML, which follows a fork, and may leave its files open: the ranks work, whichever way they were started.
BY_NVML = {
    "is_available": "import torch; assert torch.cuda.is_available()",
    "device_count": "import torch; assert torch.cuda.device_count()",
    "nvmlInit": "import ctypes; assert ctypes.CDLL('libnvidia-ml.so.1').nvmlInit_v2() == 0",
}


def ranks_of(source: str, folder: Path, variables: dict[str, str]) -> tuple[set[str | None], list[str]]:
    """How ranks were started behind a template that ran ``source``, and the warnings; the ranks use CUDA."""
    (folder / "initializes.py").write_text(source)
    variables = {**variables, "PYTHONPATH": str(folder)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with Template(["initializes"]) as template, job("compute", 2, template, variables=variables) as running:
            found = running.found()
            assert running.go() == (0, 0)
            how = {rank.mechanism for rank in running.group.ranks}
            (told,) = template.report()
    assert told["failed"] == {}
    assert [(one["device"], one["product"]) for one in found] == [("cuda", True)] * 2
    return how, [str(one.message) for one in said]


@pytest.mark.parametrize("way", INITIALIZED)
def test_a_template_that_has_initialized_cuda(template: Template, way: str, tmp_path: Path) -> None:
    how, said = ranks_of(INITIALIZED[way], tmp_path, {"PYTORCH_NVML_BASED_CUDA_CHECK": "0"})
    assert how == {"clone"}
    assert len(said) == 1 and REASON in said[0], said


@pytest.mark.parametrize("way", BY_NVML)
def test_a_template_that_has_asked_nvml(template: Template, way: str, tmp_path: Path) -> None:
    how, said = ranks_of(BY_NVML[way], tmp_path, {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"})
    assert (how, said) == ({"warm"}, []) or (how == {"clone"} and len(said) == 1 and REASON in said[0]), (how, said)


def test_a_template_that_has_calculated_on_the_cpu(template: Template, tmp_path: Path) -> None:
    """Ranks would wait for ever for its threads, if they were not ended."""
    source = "import torch; torch.ones(2_000_000).sum()"
    assert ranks_of(source, tmp_path, {"OMP_NUM_THREADS": "4"}) == ({"warm"}, [])
