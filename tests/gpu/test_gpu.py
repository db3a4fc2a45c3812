"""Our devices compared with those of torch.cuda and nvidia-smi, on a machine with NVIDIA GPUs: `make test-gpu`.

These tests have passed on a machine with one H100 (driver 580.159, torch 2.11), where many lists of GPUs are the same
list. They have not run yet with several GPUs, or with MIG instances.

Every question is asked in a fresh process, because a runtime reads its variables once, and because the tests look at
what a process holds open.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import select
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rankspawn._ids import parse_ids
from tests.support.gpus import TIMEOUT, VARIABLES, compute_pids, mig_instances, smi, smi_gpus

PROC = Path("/proc/driver/nvidia/gpus")

GPUS = smi_gpus()
if not GPUS:
    pytest.skip("nvidia-smi lists no NVIDIA GPU: nothing is tested here", allow_module_level=True)
MIG = mig_instances()

# ---- what is asked, each in a process of its own --------------------------------------------------------------------

# What the process holds of the driver: the device files that it has open, and whether it has loaded CUDA's library.
HELD = """
def held():
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass
    maps = open("/proc/self/maps").read()
    files = sorted({link for link in links if link.startswith("/dev/nvidia")})
    return {"files": files, "libcuda": "libcuda.so" in maps}
"""

# A launcher that finds the devices and starts a bound rank, and runs until its stdin ends.
OURS = (
    HELD
    + """
import json, os, sys, time
if sys.argv[1] == "proc":
    sys.modules["pynvml"] = None  # its import fails, as if it were not installed
else:
    import pynvml
    pynvml.nvmlInit()  # so that a failure of NVML is seen, where rankspawn would use the driver's proc files
    pynvml.nvmlShutdown()
began = time.perf_counter()
from rankspawn import Binding, Popen, Topology
from rankspawn._place.devices import find_devices, locate
loaded = time.perf_counter()
topology = Topology.read()
found = find_devices(topology)
ended = time.perf_counter()
devices = [
    {
        "address": device.address,
        "uuid": device.uuid,
        "numa_node": device.node,
        "node": locate(topology, device)[0],
        "local_cpus": sorted(device.local_cpus),
    }
    for device in found
]
notes = [note for device in found for note in device.notes]
assert Popen(["true"], binding=Binding(topology.allowed_cpus)).wait() == 0
said = {"devices": devices, "notes": notes, "import": loaded - began, "ask": ended - loaded, **held()}
print(json.dumps(said), flush=True)
sys.stdin.read()
"""
)

# It asks CUDA itself for the count, because torch.cuda.device_count() asks NVML and reads the variables itself.
TORCH = (
    HELD
    + """
import json, os, sys, time
began = time.perf_counter()
import torch
from torch.numa import binding
loaded = time.perf_counter()
count = torch._C._cuda_getDeviceCount() if torch.version.cuda else None
devices = []
if hasattr(binding, "_get_numa_node_index_for_device_index"):  # torch 2.14 and newer
    node_of = lambda index: binding._get_numa_node_index_for_device_index(device_index=index)
else:
    node_of = lambda index: binding._get_numa_node_index_for_gpu_index(gpu_index=index)
for index in range(count or 0):
    found = torch.cuda.get_device_properties(index)
    try:
        node = node_of(index)
    except OSError:
        node = None
    bus = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    devices.append({"address": bus, "uuid": str(getattr(found, "uuid", "")), "node": node})
ended = time.perf_counter()
if "context" in sys.argv:
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
said = {"cuda": count is not None, "devices": devices, "import": loaded - began, "ask": ended - loaded, **held()}
print(json.dumps(said), flush=True)
sys.stdin.read()
"""
)


# A launcher that finds devices, and then forks, as multiprocessing's start method "fork" does. The fork uses CUDA.
FORKED = """
import json, os, sys
if sys.argv[1] == "proc":
    sys.modules["pynvml"] = None
from rankspawn import Topology
from rankspawn._place.devices import find_devices
assert find_devices(Topology.read())
pid = os.fork()
if pid == 0:
    import torch
    os._exit(int(torch.ones(2, device="cuda").sum().item() != 2))
print(json.dumps({"status": os.waitpid(pid, 0)[1]}), flush=True)
sys.stdin.read()
"""


@contextmanager
def asked(code: str, *arguments: str, variables: tuple[tuple[str, str], ...] = ()) -> Iterator[tuple[int, Any]]:
    """Run ``code`` in a process until the end of the block; the process's pid, and what it said."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | dict(variables)
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdin is not None and process.stdout is not None
        if not select.select([process.stdout], [], [], TIMEOUT)[0]:
            process.kill()
        line = process.stdout.readline()
        assert line, f"it ended with status {process.wait()}; its error is above"
        yield process.pid, json.loads(line)


@functools.cache
def torch_says(variables: tuple[tuple[str, str], ...] = ()) -> Any:
    """torch's answer; skips the test where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    with asked(TORCH, variables=variables) as (_, said):
        return said


def with_cuda(said: Any) -> Any:
    if not said["cuda"]:
        pytest.skip("this torch is built without CUDA")
    return said


@pytest.fixture(params=["nvml", "proc"])
def source(request: pytest.FixtureRequest) -> str:
    """The source of our devices: NVML, or the driver's proc files."""
    if request.param == "nvml" and importlib.util.find_spec("pynvml") is None:
        pytest.skip("nvidia-ml-py is not installed")
    if request.param == "proc" and not PROC.is_dir():
        pytest.skip(f"there is no {PROC} here")
    if request.param == "proc" and MIG:
        pytest.skip("MIG instances are known to NVML alone")
    return str(request.param)


def known(uuid: str) -> bool:
    """Whether this is a UUID: the driver's proc files have question marks there until the GPU was used."""
    return bool(uuid) and "?" not in uuid


# ---- nvidia-smi -----------------------------------------------------------------------------------------------------


def test_the_gpus_that_nvidia_smi_lists(source: str) -> None:
    with asked(OURS, source, variables=(("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),)) as (_, said):
        devices = said["devices"]
    assert [device["address"] for device in devices] == [gpu.address for gpu in GPUS]
    for device, gpu in zip(devices, GPUS, strict=True):
        assert device["uuid"] == gpu.uuid or (source == "proc" and not known(device["uuid"]))


def smi_affinity() -> dict[int, tuple[frozenset[int], frozenset[int]]]:
    """The CPUs and nodes of each GPU, from the matrix of `nvidia-smi topo -m`.

    One or more tabs separate the columns, and escape sequences underline the heading. A GPU with an empty or unknown
    cell ("N/A", in many virtual machines) is left out.
    """
    lines = re.sub(r"\x1b\[[0-9;]*m", "", smi("topo", "-m")).splitlines()
    rows = [[cell.strip() for cell in line.split("\t") if cell.strip()] for line in lines]
    head = next((row for row in rows if "CPU Affinity" in row and "NUMA Affinity" in row), [])
    found = {}
    for name, *cells in (row for row in rows if row and re.fullmatch("GPU[0-9]+", row[0]) and row is not head):
        told = dict(zip(head, cells, strict=True)) if len(cells) == len(head) else {}
        try:
            found[int(name.removeprefix("GPU"))] = parse_ids(told["CPU Affinity"]), parse_ids(told["NUMA Affinity"])
        except (KeyError, ValueError):
            continue
    return found


def test_the_nodes_that_nvidia_smi_topo_gives(source: str) -> None:
    affinity = smi_affinity()
    if not affinity:
        pytest.skip("`nvidia-smi topo -m` tells no CPU and NUMA affinity here")
    with asked(OURS, source, variables=(("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),)) as (_, said):
        by_address = {device["address"]: device for device in said["devices"]}
    for gpu in GPUS:
        if gpu.number in affinity:
            cpus, nodes = affinity[gpu.number]
            assert by_address[gpu.address]["node"] in nodes, gpu
            # A subset, because a container's cpuset may reduce what nvidia-smi shows.
            assert cpus <= frozenset(by_address[gpu.address]["local_cpus"]), gpu


# ---- torch.cuda -----------------------------------------------------------------------------------------------------


def beginnings(words: list[str]) -> list[str]:
    """The shortest beginnings of one length that are unique; at least "GPU-" and four digits."""
    length = next(n for n in range(8, 64) if len({word[:n] for word in words}) == len(words))
    return [word[:length] for word in words]


def lists() -> dict[str, str | None]:
    """Values of CUDA_VISIBLE_DEVICES, by name; on a machine with one GPU, several are the same."""
    if MIG:
        return {f"instance {number}": uuid for number, uuid in enumerate(MIG)}
    numbers, uuids = [str(gpu.number) for gpu in GPUS], [gpu.uuid for gpu in GPUS]
    return {
        "unset": None,
        "in order": ",".join(numbers),
        "reversed": ",".join(reversed(numbers)),
        "rotated": ",".join([*numbers[1:], numbers[0]]),
        "the last": numbers[-1],
        "UUIDs": ",".join(uuids),
        "UUIDs, reversed": ",".join(reversed(uuids)),
        "beginnings of UUIDs, reversed": ",".join(reversed(beginnings(uuids))),
        "up to -1": f"{numbers[-1]},-1",
        "up to one that is not there": f"{numbers[-1]},{len(GPUS)}",
        "none": "",
    }


@pytest.mark.parametrize("order", ["PCI_BUS_ID", None])
@pytest.mark.parametrize("name", lists())
def test_the_devices_that_torch_counts(name: str, order: str | None, source: str) -> None:
    if order is None and len({gpu.name for gpu in GPUS}) > 1:
        pytest.skip("GPUs of several models: which is the fastest is known to CUDA alone")
    visible = lists()[name]
    chosen = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": order}
    variables = tuple((key, value) for key, value in chosen.items() if value is not None)
    theirs = with_cuda(torch_says(variables))["devices"]
    if source == "proc" and visible is not None and "GPU-" in visible:
        files = [path.read_text() for path in PROC.glob("*/information")]
        if any("GPU-?" in text for text in files):
            pytest.skip("the driver's proc files tell no UUIDs until a GPU is in use")
    with asked(OURS, source, variables=variables) as (_, said):
        ours = said["devices"]
    assert [device["address"] for device in ours] == [device["address"] for device in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if not MIG and known(mine["uuid"]) and other["uuid"]:
            assert mine["uuid"].removeprefix("GPU-") == other["uuid"].removeprefix("GPU-")
        if other["node"] is not None:
            assert max(mine["numa_node"], 0) == other["node"]  # torch replaces node -1 by 0
    if name in ("unset", "reversed"):
        assert len(ours) == len(GPUS)  # so that two empty lists do not pass as equal


# ---- no CUDA context ------------------------------------------------------------------------------------------------


def test_no_cuda_context_in_the_launcher(source: str) -> None:
    with asked(OURS, source) as (pid, said):
        assert pid not in compute_pids()
    assert len(said["devices"]) == len(GPUS) or MIG
    assert said["files"] == []
    # NVML itself loads CUDA's library (driver 580), and makes no context.
    assert source == "nvml" or not said["libcuda"]


def test_what_the_launcher_forks_can_use_cuda(source: str) -> None:
    """CUDA fails in the child of a process that has initialized it."""
    if not with_cuda(torch_says())["devices"]:
        pytest.skip("torch sees no device")
    with asked(FORKED, source) as (_, said):
        assert said["status"] == 0


def test_a_cuda_context_would_have_been_seen() -> None:
    """A process with a context shows each sign that test_no_cuda_context_in_the_launcher looks for."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    with asked(TORCH, "context") as (pid, said):
        with_cuda(said)
        seen = compute_pids()
    assert said["libcuda"]
    assert "/dev/nvidia-uvm" in said["files"]
    if pid not in seen:
        pytest.skip(
            "nvidia-smi does not show this container's processes by our pids: that no context appears was seen by open"
            " files and loaded libraries alone"
        )


# ---- time -----------------------------------------------------------------------------------------------------------


def test_the_time_beside_torch(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The times are printed and not judged. The processes are fresh, and their files are in the page cache."""
    milliseconds: dict[str, dict[str, float]] = {}
    for name, code, arguments in ((f"rankspawn ({source})", OURS, (source,)), ("torch", TORCH, ())):
        if name == "torch" and not with_cuda(torch_says())["devices"]:
            pytest.skip("torch sees no device")
        samples = []
        for _ in range(5):
            with asked(code, *arguments) as (_, said):
                samples.append(said)
        milliseconds[name] = {
            part: 1000 * statistics.median(one[part] for one in samples) for part in ("import", "ask")
        }
    with capsys.disabled():
        print(f"\n{len(GPUS)} GPUs: milliseconds to import, and then for the devices and their nodes")
        for name, took in milliseconds.items():
            print(f"  {name:18} {took['import']:9.1f} {took['ask']:9.1f}")
