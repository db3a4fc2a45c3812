"""Accelerators from written trees, from a stand-in for NVML, and by the environment variables of the three vendors."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from rankspawn._binding import PlacementError
from rankspawn._place import devices as _devices
from rankspawn._place.auto import plan_auto
from rankspawn._place.devices import (
    as_devices,
    find_devices,
    find_visible,
    locate,
    parse_devices,
    read_device_files,
)
from rankspawn._place.glance import hidden_devices
from rankspawn._place.plan import plan
from rankspawn._place.sysfs import Tree
from rankspawn._place.topology import Topology
from rankspawn._place.visible import Device, DeviceError
from tests.support.sysfs_tree import PCI, Gpu, Machine, address, write

UUIDS = [f"GPU-{letter}{letter}{i}00000-0000-0000-0000-00000000000{i}" for i, letter in enumerate("abca")]


def four_gpus(tmp_path: Path, *, uuids: list[str] = UUIDS, models: str = "HHHH") -> Topology:
    """A machine of two nodes, each with two NVIDIA GPUs, which the driver's proc files list, and the display adapter of
    a management controller."""
    gpus = (Gpu(0), Gpu(0), Gpu(1), Gpu(1), Gpu(0, "0000:03:00.0", vendor=0x1A03, driver="ast"))
    extra = {
        f"proc/driver/nvidia/gpus/{address(i)}/information": (
            f"Model: \t\t NVIDIA {models[i]}\nIRQ:   \t\t 42\nGPU UUID: \t {uuid}\nBus Location: \t {address(i)}"
        )
        for i, uuid in enumerate(uuids)
    }
    return Topology.read(write(tmp_path, Machine(sockets=2, gpus=gpus, extra=extra)))


def indices(devices: tuple[Device, ...]) -> list[int]:
    return [[address(i) for i in range(4)].index(device.address) for device in devices]


def test_nvidia_by_the_drivers_proc_files(tmp_path: Path) -> None:
    devices = find_devices(four_gpus(tmp_path))
    assert indices(devices) == [0, 1, 2, 3]
    assert [device.node for device in devices] == [0, 0, 1, 1]
    assert devices[2] == Device(address(2), 1, frozenset(range(4, 8)), vendor="nvidia", name="NVIDIA H", uuid=UUIDS[2])


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        ("2,0", [2, 0]),
        ("3, 1 ,0", [3, 1, 0]),
        ("", []),
        ("-1", []),
        ("1,-1,0", [1]),
        ("NoDevFiles", []),
        ("2,0,", [2, 0]),
        ("0,,1", [0]),
        (",1", []),
        ("0,gpu1", [0]),
        ("1gpu,2x,+3", [1, 2, 3]),
        ("0-2", [0]),
        (f"0,{UUIDS[2]}", [0]),
        (f"{UUIDS[2]},0", [2]),
        ("1,7,0", [1]),
        (f"{UUIDS[3]},{UUIDS[0]}", [3, 0]),
        ("GPU-bb,GPU-cc,GPU-aa0", [1, 2, 0]),
        ("GPU-bb,GPU-dd,GPU-aa0", [1]),
        (f"MIG-{UUIDS[2]}/1/0", [2]),
    ],
)
def test_cuda_visible_devices(visible: str, chosen: list[int], tmp_path: Path) -> None:
    assert indices(find_devices(four_gpus(tmp_path), {"CUDA_VISIBLE_DEVICES": visible})) == chosen


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        ("0,1,0", r"CUDA_VISIBLE_DEVICES='0,1,0': '0' is listed twice"),
        ("GPU-aa", r"CUDA_VISIBLE_DEVICES: 'GPU-aa' is the beginning of 2 UUIDS"),
        ("MIG-1234", r"only NVML knows which GPU has 'MIG-1234': install nvidia-ml-py"),
    ],
)
def test_cuda_visible_devices_that_cannot_be_understood(visible: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=f"(?i){message}"):
        find_devices(four_gpus(tmp_path), {"CUDA_VISIBLE_DEVICES": visible})


ALL = "hides all accelerators (4)"


@pytest.mark.parametrize(
    ("visible", "note"),
    [
        (None, ""),
        ("1,0", ""),
        ("1,0,", ""),
        ("1,-1", ""),
        ("", f"CUDA_VISIBLE_DEVICES='' {ALL}"),
        ("-1", f"CUDA_VISIBLE_DEVICES='-1' {ALL}"),
        ("NoDevFiles", f"CUDA_VISIBLE_DEVICES='NoDevFiles' {ALL}"),
        ("9,0", f"CUDA_VISIBLE_DEVICES='9,0' {ALL}"),
        ("0,9", "CUDA_VISIBLE_DEVICES='0,9': '9' is no device here, and the list ends before it: 1 device is visible"),
        (
            "1,0,,2",
            "CUDA_VISIBLE_DEVICES='1,0,,2': '' is no device here, and the list ends before it: 2 devices are visible",
        ),
        ("0-3", "CUDA_VISIBLE_DEVICES='0-3': '0-3' is read as 0: 1 device is visible"),
    ],
)
def test_what_a_variable_hides_is_said(visible: str | None, note: str, tmp_path: Path) -> None:
    topology, environ = four_gpus(tmp_path), {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert find_visible(topology, environ).notes == ((note,) if note else ())
    assert hidden_devices(environ, topology.root) == ((note,) if note else ())


def test_hidden_devices_are_said_by_every_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = four_gpus(tmp_path)
    monkeypatch.setattr(_devices, "is_live", lambda root: True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,9")
    for ranks in (plan(topology, "node"), plan_auto(topology, nprocs=2), plan(topology, "node", gpu_index=0)):
        assert [("'9' is no device here" in " ".join(rank.notes)) for rank in ranks] == [
            i == 0 for i in range(len(ranks))
        ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert any(ALL in note for rank in plan_auto(topology, nprocs=2) for note in rank.notes)


def test_uuids_that_the_driver_does_not_tell(tmp_path: Path) -> None:
    topology = four_gpus(tmp_path, uuids=["GPU-????????-????-????-????-????????????"] * 4)
    assert indices(find_devices(topology, {"CUDA_VISIBLE_DEVICES": "1"})) == [1]
    with pytest.raises(DeviceError, match="the driver shows no UUIDs: install nvidia-ml-py"):
        find_devices(topology, {"CUDA_VISIBLE_DEVICES": "GPU-1234"})


def test_the_order_of_unlike_gpus_is_said_to_be_cudas_alone(tmp_path: Path) -> None:
    topology = four_gpus(tmp_path, models="AAHH")
    (one,) = find_devices(topology, {"CUDA_VISIBLE_DEVICES": "1"})
    (note,) = one.notes
    assert note.startswith("GPUs of several models (NVIDIA A, NVIDIA H): CUDA counts the fastest first, but rankspawn")
    assert note.endswith("set CUDA_DEVICE_ORDER=PCI_BUS_ID")
    for sure in ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, {"CUDA_VISIBLE_DEVICES": UUIDS[1]}):
        assert not any(device.notes for device in find_devices(topology, sure))


def test_a_tree_without_the_drivers_proc_files(tmp_path: Path) -> None:
    machine = Machine(sockets=2, gpus=(Gpu(1, driver="none"), Gpu(0, driver="none")))
    root = write(tmp_path, machine)
    assert find_devices(Topology.read(root)) == ()
    bound = root / "sys/bus/pci/drivers/nvidia"
    bound.mkdir(parents=True)
    for i in (1, 0):
        (bound / address(i)).symlink_to(root / PCI / address(i))
    (bound / "new_id").touch()
    assert [device.node for device in find_devices(Topology.read(root))] == [1, 0]


class FakeNvml(ModuleType):
    """The functions of nvidia-ml-py that we call, for two GPUs, of which the second has two MIG instances."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, broken: bool = False) -> None:
        super().__init__("pynvml")
        self.open = 0
        self.broken = broken

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(busId=f"0000{address(handle)}".upper().encode())

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"MIG-{handle}" if handle >= 100 else UUIDS[handle]

    def nvmlDeviceGetCpuAffinity(self, handle: int, words: int) -> list[int]:
        if handle == 0:
            raise self.NVMLError("Not Supported")
        return [0xF0, *[0] * (words - 1)]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        return 7 if handle else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, index: int) -> int:
        if index > 1:
            raise self.NVMLError("Not Found")
        return 100 * handle + index


def test_nvml_where_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, Machine(sockets=2, gpus=(Gpu(0, driver="none"), Gpu(-1, driver="none"))))
    topology = Topology.read(root)
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(_devices, "is_live", lambda root: True)
    devices = find_devices(topology, {})
    assert nvml.open == 0
    assert [(device.address, device.uuid) for device in devices] == [(address(0), UUIDS[0]), (address(1), UUIDS[1])]
    # As on the machines of cuCascade#119: numa_node is -1, local_cpulist has all CPUs, and only NVML knows the node.
    node, notes = locate(topology, devices[1])
    assert (node, notes) == (1, (f"device {address(1)}: numa_node is -1; by NVML it is on node 1",))
    assert locate(topology, devices[0]) == (0, ())
    assert find_devices(topology, {"CUDA_VISIBLE_DEVICES": "MIG-101"}) == (devices[1],)
    assert find_devices(topology, {"CUDA_VISIBLE_DEVICES": "MIG-7"}) == ()
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(broken=True))
    assert find_devices(topology, {}) == ()


def test_a_capture_has_the_files_also_where_nvml_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = four_gpus(tmp_path)
    tree = Tree(tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setattr(_devices, "is_live", lambda root: True)
    assert len(find_devices(topology, {}, tree)) == 2
    read_device_files(tree)
    assert f"proc/driver/nvidia/gpus/{address(3)}/information" in tree.opened
    assert f"{PCI}/{address(3)}/numa_node" in tree.opened


@pytest.mark.parametrize(
    ("device", "node", "words"),
    [
        (Device("a", 1, frozenset(range(4, 8))), 1, []),
        (Device("a", 1, frozenset(range(8))), 1, []),
        (Device("a", 1, frozenset(range(4))), 1, ["numa_node is 1, but its CPUs by local_cpulist are those of node 0"]),
        (Device("a", 0, driver_cpus=frozenset({5})), 0, ["its CPUs by NVML are those of node 1"]),
        (Device("a", -1, frozenset(range(8))), None, []),
        (Device("a", -1, frozenset({4, 5})), 1, ["numa_node is -1; by local_cpulist it is on node 1"]),
        (
            Device("a", -1, frozenset({4}), frozenset({1})),
            None,
            ["numa_node is -1, and local_cpulist says node 1, NVML says node 0"],
        ),
        (Device("a", 9), None, ["numa_node is 9, which is not online"]),
        (Device("a", 2, frozenset({4})), 2, []),
    ],
)
def test_locate(device: Device, node: int | None, words: list[str], tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(sockets=2, memory_only=1)))
    found, notes = locate(topology, device)
    assert found == node
    assert len(notes) == len(words)
    for note, word in zip(notes, words, strict=True):
        assert word in note


def test_addresses_in_any_spelling(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(gpus=(Gpu(0, "0000:af:00.0", driver="none"),))))
    for text in ("0000:af:00.0", "AF:00.0", "pci:0000:af:00", "00000000:AF:00.0"):
        (device,) = as_devices(topology, parse_devices(text))
        assert device.address == "0000:af:00.0"
    assert parse_devices("none") == ()
    for wrong in ("", "af", "pci:", "0000:af:00.0,", "0000:af:00.9", "mlx5_0"):
        with pytest.raises(DeviceError, match=r"^--devices .* is not a PCI address like 0000:3b:00\.0"):
            parse_devices(wrong)
    with pytest.raises(PlacementError, match=r"device 0000:b0:00\.0: there is no .*0000:b0:00\.0"):
        as_devices(topology, ("b0:00.0",))


def test_a_device_whose_files_are_broken(tmp_path: Path) -> None:
    extra = {f"{PCI}/{address(0)}/numa_node": "one"}
    topology = Topology.read(write(tmp_path, Machine(gpus=(Gpu(0),), extra=extra)))
    with pytest.raises(PlacementError, match=r"numa_node: expected a number, got 'one'"):
        find_devices(topology)
    (tmp_path / PCI / address(0) / "numa_node").unlink()
    (tmp_path / PCI / address(0) / "local_cpulist").unlink()
    (device,) = find_devices(topology)
    assert device.node == -1
    assert "has neither numa_node nor local_cpulist" in device.notes[0]


KFD = "sys/class/kfd/kfd/topology/nodes"


def amd(tmp_path: Path) -> Topology:
    """A CPU node of KFD, a card of two partitions, of which PCI has one, and another card."""
    gpus = (Gpu(0, "0000:c1:00.0", driver="amdgpu"), Gpu(1, "0001:c6:00.0", driver="amdgpu"))
    extra = {f"{KFD}/0/properties": "cpu_cores_count 8\nsimd_count 0\nlocation_id 0", f"{KFD}/0/gpu_id": "0"}
    for number, (domain, location, unique) in enumerate([(0, 0xC100, 7), (0, 0xC101, 8), (1, 0xC600, 9)], start=1):
        extra[f"{KFD}/{number}/properties"] = (
            f"cpu_cores_count 0\nsimd_count 304\ndomain {domain}\nlocation_id {location}\nunique_id {unique}"
        )
        extra[f"{KFD}/{number}/name"] = "aqua_vanjaram"
    return Topology.read(write(tmp_path, Machine(sockets=2, gpus=gpus, extra=extra)))


@pytest.mark.parametrize(
    ("environ", "buses"),
    [
        ({}, ["c1", "c1", "c6"]),
        ({"ROCR_VISIBLE_DEVICES": "2,0"}, ["c6", "c1"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-0000000000000009"}, ["c6"]),
        ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}, ["c6"]),
        ({"HIP_VISIBLE_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "0"}, ["c6"]),
        ({"CUDA_VISIBLE_DEVICES": "2,1"}, ["c6", "c1"]),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
        ({"HIP_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "2"}, ["c6"]),
        ({"ROCR_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "0"}, []),
        ({"ROCR_VISIBLE_DEVICES": "2, 0,2,1"}, ["c6", "c1"]),
        ({"HIP_VISIBLE_DEVICES": "2,2,0,1"}, ["c6", "c1", "c1"]),
        ({"HIP_VISIBLE_DEVICES": "2, 0"}, ["c6"]),
        ({"ROCR_VISIBLE_DEVICES": "2,0,"}, ["c6", "c1"]),
        ({"ROCR_VISIBLE_DEVICES": "NoDevFiles"}, []),
        ({"GPU_DEVICE_ORDINAL": "2"}, ["c1", "c1", "c6"]),
    ],
)
def test_amd_by_kfd(environ: dict[str, str], buses: list[str], tmp_path: Path) -> None:
    devices = find_devices(amd(tmp_path), environ)
    assert [device.address[5:7] for device in devices] == buses
    for device in devices:
        assert device.node == (1 if device.address.startswith("0001") else 0)
        assert (device.vendor, device.name) == ("amd", "aqua_vanjaram")


def intel(tmp_path: Path) -> Topology:
    """A machine with an integrated GPU, two cards of two tiles each, and a display adapter, which is no accelerator."""
    gpus = tuple(
        Gpu(node, at, vendor=0x8086, device=0x0BD5, driver="xe")
        for node, at in ((0, "0000:00:02.0"), (1, "0000:4d:00.0"), (0, "0000:29:00.0"), (0, "0000:03:00.0"))
    )
    root = write(tmp_path, Machine(sockets=2, gpus=gpus))
    for number, gpu in enumerate(gpus):
        (root / PCI / gpu.address / "drm" / f"renderD{128 + number}").mkdir(parents=True)
        driver = root / "sys/bus/pci/drivers" / ("ast" if number == 3 else "xe")
        driver.mkdir(parents=True, exist_ok=True)
        (driver / gpu.address).symlink_to(root / PCI / gpu.address)
        for tile in range(2 if number in (1, 2) else 0):
            (root / PCI / gpu.address / f"tile{tile}").mkdir()
    return Topology.read(root)


@pytest.mark.parametrize(
    ("environ", "buses"),
    [
        ({}, ["29", "29", "4d", "4d", "00"]),
        ({"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE"}, ["29", "4d", "00"]),
        ({"ZE_AFFINITY_MASK": "3,0"}, ["29", "4d"]),
        ({"ZE_AFFINITY_MASK": "3,,0,"}, ["29", "4d"]),
        ({"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE", "ZE_AFFINITY_MASK": "1.0,1.1"}, ["4d"]),
        ({"ONEAPI_DEVICE_SELECTOR": "level_zero:gpu"}, ["29", "29", "4d", "4d", "00"]),
        ({"ONEAPI_DEVICE_SELECTOR": "level_zero:2,0"}, ["29", "4d"]),
        ({"ONEAPI_DEVICE_SELECTOR": "*:gpu;!Level_Zero:0,1"}, ["4d", "4d", "00"]),
        ({"ONEAPI_DEVICE_SELECTOR": "!level_zero:4"}, ["29", "29", "4d", "4d"]),
        ({"ONEAPI_DEVICE_SELECTOR": "!*:cpu"}, ["29", "29", "4d", "4d", "00"]),
        ({"ONEAPI_DEVICE_SELECTOR": "opencl:gpu"}, []),
        ({"ONEAPI_DEVICE_SELECTOR": "level_zero:1", "ZE_AFFINITY_MASK": "1,2"}, ["4d"]),
    ],
)
def test_intel_by_drm(environ: dict[str, str], buses: list[str], tmp_path: Path) -> None:
    assert [device.address[5:7] for device in find_devices(intel(tmp_path), environ)] == buses


def test_the_tiles_that_i915_shows(tmp_path: Path) -> None:
    gpus = tuple(Gpu(0, address(i), vendor=0x8086, device=id, driver="i915") for i, id in enumerate((0x0BD5, 0x56C0)))
    root = write(tmp_path, Machine(gpus=gpus))
    for gpu in gpus:
        (root / "sys/bus/pci/drivers/i915" / gpu.address).mkdir(parents=True)
        (root / PCI / gpu.address / "drm/renderD128").mkdir(parents=True)
        for gt in ("gt0", "gt1"):
            (root / PCI / gpu.address / "drm/card1/gt" / gt).mkdir(parents=True)
    devices = find_devices(Topology.read(root), {})
    assert [device.address for device in devices] == [address(0), address(0), address(1)]


def test_a_malformed_affinity_mask(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"ZE_AFFINITY_MASK='0,x': 'x' is not a device number"):
        find_devices(intel(tmp_path), {"ZE_AFFINITY_MASK": "0,x"})


@pytest.mark.parametrize(
    ("selector", "message"),
    [("gpu", "'gpu' is not a term like level_zero:0,1"), ("level_zero:x", "'x' is not a device like gpu, [*] or 0")],
)
def test_a_malformed_device_selector(selector: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=f"ONEAPI_DEVICE_SELECTOR='{selector}': {message}"):
        find_devices(intel(tmp_path), {"ONEAPI_DEVICE_SELECTOR": selector})


def test_hidden_intel_and_amd_devices_are_said(tmp_path: Path) -> None:
    (note,) = find_visible(intel(tmp_path / "intel"), {"ONEAPI_DEVICE_SELECTOR": "opencl:*"}).notes
    assert note == "ONEAPI_DEVICE_SELECTOR='opencl:*' hides all accelerators (5)"
    (note,) = find_visible(amd(tmp_path / "amd"), {"ROCR_VISIBLE_DEVICES": "2,7", "HIP_VISIBLE_DEVICES": "0"}).notes
    assert note == "ROCR_VISIBLE_DEVICES='2,7': '7' is no device here, and the list ends before it: 1 device is visible"
    (note,) = find_visible(amd(tmp_path / "both"), {"ROCR_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "1"}).notes
    assert note == "HIP_VISIBLE_DEVICES='1' hides all accelerators (1)"


def test_a_captured_tree_is_read_with_no_variables_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(broken=True))
    assert len(find_devices(four_gpus(tmp_path))) == 4


def test_this_machine_makes_no_error() -> None:
    find_devices(Topology.read(), {})
