"""Accelerators, their PCI addresses and their NUMA nodes, without torch and without a CUDA context.

NVIDIA: NVML through nvidia-ml-py where that is installed, else the driver's files in proc/driver/nvidia/gpus
(NVIDIA driver README, "The /proc interface"). AMD: the KFD topology (the kernel's uapi/linux/kfd_sysfs.h). Intel: DRM
render nodes of the drivers i915 and xe. The display adapter of a management controller has none of these drivers, so it
is never taken for an accelerator. ``visible`` finds which accelerators are visible, and in which order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from .._binding import PLACEMENT_KINDS, refuse_other_kinds
from .sysfs import Tree
from .topology import Topology
from .visible import Device, DeviceError, Visible, intel_visible, nvidia_visible, rocm_visible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PCI = "sys/bus/pci/devices"
_NVIDIA = "proc/driver/nvidia/gpus"
_DRIVERS = "sys/bus/pci/drivers"
_KFD = "sys/class/kfd/kfd/topology/nodes"
_INTEL_DRIVERS = ("i915", "xe")

_ADDRESS = re.compile(r"(?:pci:)?(?:([0-9a-fA-F]{4,8}):)?([0-9a-fA-F]{2}):([0-9a-fA-F]{2})(?:\.([0-7]))?")
_FIELD = re.compile(r"^([^:\n]+):[ \t]*(.*?)[ \t]*$", re.MULTILINE)
_TILE = re.compile(r"tile[0-9]+")
_PONTE_VECCHIO = "0x0bd"  # how the PCI device ids of Intel's Max series begin


def find_devices(
    topology: Topology, environ: Mapping[str, str] | None = None, tree: Tree | None = None
) -> tuple[Device, ...]:
    """Find the visible accelerators of the first vendor that has any: NVIDIA, AMD, Intel.

    The arguments and the errors are those of ``find_visible``.

    Returns:
        The devices, in the order of the vendor's runtime.
    """
    return find_visible(topology, environ, tree).devices


def find_visible(topology: Topology, environ: Mapping[str, str] | None = None, tree: Tree | None = None) -> Visible:
    """Find the visible accelerators, with notes about the variables that hide others.

    Args:
        topology: The machine.
        environ: The variables that choose devices. None is this process's environment for the running machine, and an
            empty one for a captured tree.
        tree: The files to read; None for the topology's root.

    Raises:
        DeviceError: A variable cannot be understood, or NVML fails.
    """
    live = is_live(topology.root)
    if environ is None:
        environ = os.environ if live else {}
    return _visible(tree or Tree(topology.root), environ, live)


def hiding_notes(environ: Mapping[str, str], root: str = "/") -> tuple[str, ...]:
    """Say what variables hide by mistake, or that they hide all accelerators, for a caller that needs nothing else.

    It does not ask NVML, which would take longer than a whole launch, so it does not say what only NVML knows.
    """
    try:
        return _visible(Tree(root), environ, False).notes
    except DeviceError:
        return ()


def _visible(tree: Tree, environ: Mapping[str, str], live: bool) -> Visible:
    for find, visible in (
        (_nvidia, nvidia_visible),
        (_amd, rocm_visible),
        (_intel, intel_visible),
    ):
        found = find(tree, live)
        if found:
            return visible(found, environ)
    return Visible(())


def read_device_files(tree: Tree) -> None:
    """Read the files that describe devices, so that a capture of ``tree`` contains them even if NVML answered."""
    for find in (_nvidia, _amd, _intel):
        find(tree, False)


def is_live(root: str) -> bool:
    """Whether the root is that of the running machine, which environment variables and NVML describe."""
    return os.path.realpath(root) == "/"


def parse_devices(text: str) -> tuple[str, ...]:
    """Read the addresses of an option such as "pci:0000:3b:00.0,pci:af:00.0"; "none" gives no address."""
    if text.strip() == "none":
        return ()
    return tuple(_address(one, f"--devices {text!r}: ") for one in text.split(","))


def as_devices(topology: Topology, given: Sequence[str | Device]) -> tuple[Device, ...]:
    """Look up addresses, in any spelling, below the topology's root. Device objects stay as they are.

    Raises:
        DeviceError: A text is not an address, or no device has that address.
        TypeError: It is no sequence of these.
    """
    refuse_other_kinds(PLACEMENT_KINDS, {"devices": given})
    for number, one in enumerate(given := tuple(given)):
        if not isinstance(one, (str, Device)):
            raise TypeError(f"devices[{number}]: expected a PCI address or a Device, got {one!r}")
    tree = Tree(topology.root)
    return tuple(one if isinstance(one, Device) else _pci_device(tree, _address(one, "device ")) for one in given)


def locate(topology: Topology, device: Device) -> tuple[int | None, tuple[str, ...]]:
    """Find the NUMA node that a device belongs to.

    numa_node of sysfs decides, as in torch. If it is -1, the device's CPUs by local_cpulist or NVML decide, provided
    that they lie on one node. A note says if these sources disagree. If one node has all CPUs, -1 means that node.

    Returns:
        The node's id, None if unknown; and notes.
    """
    notes = list(device.notes)
    names = {"local_cpulist": _node_of(topology, device.local_cpus), "NVML": _node_of(topology, device.driver_cpus)}
    others = {source: node for source, node in names.items() if node is not None}
    own = topology.node(device.node)
    if device.node >= 0 and own is None:
        notes.append(f"device {device.address}: numa_node is {device.node}, which is not online")
    if own is not None:
        if own.cpus:
            notes += [
                f"device {device.address}: numa_node is {own.id}, but its CPUs by {source} are those of node {node}"
                for source, node in others.items()
                if node != own.id
            ]
        return own.id, tuple(notes)
    if len(set(others.values())) == 1:
        source, node = next(iter(others.items()))
        if len(topology.nodes_with_cpus()) > 1:
            notes.append(f"device {device.address}: numa_node is {device.node}; by {source} it is on node {node}")
        return node, tuple(notes)
    if others:
        told = ", ".join(f"{source} says node {node}" for source, node in others.items())
        notes.append(f"device {device.address}: numa_node is {device.node}, and {told}")
    alone = topology.nodes_with_cpus()
    return (alone[0].id if len(alone) == 1 and not others else None), tuple(notes)


def _node_of(topology: Topology, cpus: frozenset[int]) -> int | None:
    """Return the one node that has these CPUs; None if they lie on several nodes or on none."""
    nodes = [node.id for node in topology.nodes if not node.cpus.isdisjoint(cpus)] if cpus else []
    return nodes[0] if len(nodes) == 1 else None


def _address(text: str, what: str) -> str:
    found = _ADDRESS.fullmatch(text.strip())
    if found is None:
        raise DeviceError(f"{what}{text.strip()!r} is not a PCI address like 0000:3b:00.0")
    return f"{int(found[1] or '0', 16):04x}:{found[2]}:{found[3]}.{found[4] or '0'}".lower()


def _pci_device(tree: Tree, address: str, **known: Any) -> Device:
    """Read the device at an address in sysfs's spelling. Raises DeviceError if there is none."""
    folder = f"{_PCI}/{address}"
    node = tree.number(f"{folder}/numa_node")
    local = tree.first_ids(folder, ("local_cpulist", "local_cpus"))
    if node is None and local is None:
        if not tree.names(folder):
            raise DeviceError(f"device {address}: there is no {tree.root.rstrip('/')}/{folder}")
        known["notes"] = (f"device {address}: {folder} has neither numa_node nor local_cpulist",)
    return Device(address, -1 if node is None else node, local or frozenset(), **known)


def _nvidia(tree: Tree, live: bool) -> list[Device]:
    """Find all NVIDIA GPUs, by PCI address.

    If a captured tree lacks the driver's proc files, its GPUs are those in the driver's sysfs folder. On the running
    machine, a container without those files has no GPU, whatever sysfs shows.
    """
    found = _nvml(tree) if live else None
    if found is None:
        found = []
        for name in tree.names(_NVIDIA):
            text = tree.text(f"{_NVIDIA}/{name}/information") or ""
            told = {key.strip(): value for key, value in _FIELD.findall(text)}
            known = {"vendor": "nvidia", "name": told.get("Model", ""), "uuid": told.get("GPU UUID", "")}
            found.append(_pci_device(tree, _address(name, f"{_NVIDIA}: "), **known))
        if not found and not live:
            bound = [name for name in tree.names(f"{_DRIVERS}/nvidia") if _ADDRESS.fullmatch(name)]
            found = [_pci_device(tree, name, vendor="nvidia") for name in bound]
    return sorted(found, key=lambda device: device.address)


def _nvml(tree: Tree) -> list[Device] | None:
    """Ask NVML, which makes no CUDA context; None if it is not installed or does not answer (no driver)."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return [_nvml_device(tree, pynvml, i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        raise DeviceError(f"NVML: {error}; name the devices with --devices") from error
    finally:
        pynvml.nvmlShutdown()


def _nvml_device(tree: Tree, nvml: Any, index: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    address = _address(_str(nvml.nvmlDeviceGetPciInfo(handle).busId), "NVML: ")
    known = {"vendor": "nvidia", "name": _str(nvml.nvmlDeviceGetName(handle))}
    known["uuid"] = _str(nvml.nvmlDeviceGetUUID(handle))
    device = _pci_device(tree, address, **known)
    return device.replace(driver_cpus=_nvml_cpus(nvml, handle), partitions=_nvml_mig(nvml, handle))


def _nvml_cpus(nvml: Any, handle: Any) -> frozenset[int]:
    """Ask NVML for the near CPUs; some machines, and VMs without topology, answer "not supported"."""
    words = max(1, ((os.cpu_count() or 1) + 63) // 64) + 15
    try:
        mask = nvml.nvmlDeviceGetCpuAffinity(handle, words)
    except nvml.NVMLError:
        return frozenset()
    return frozenset(64 * i + bit for i, word in enumerate(mask) for bit in range(64) if word >> bit & 1)


def _nvml_mig(nvml: Any, handle: Any) -> tuple[str, ...]:
    uuids = []
    try:
        for i in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            uuids.append(_str(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i))))
    except nvml.NVMLError:
        pass  # "Not found" after the last instance, "not supported" on GPUs without MIG.
    return tuple(uuids)


def _str(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text  # nvidia-ml-py gave bytes until version 11.5


def _amd(tree: Tree, live: bool) -> list[Device]:
    """Find the GPUs of the KFD topology, in its order, which is ROCr's. A node with SIMDs is a GPU, any other a CPU.

    location_id is bus, device and function. The partitions of one card differ in the function. A partition that PCI
    does not know is looked up at function 0.
    """
    found = []
    for number in sorted(int(name) for name in tree.names(_KFD) if name.isdecimal()):
        text = tree.text(f"{_KFD}/{number}/properties") or ""
        pairs = (line.split() for line in text.splitlines())
        told = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
        if not told.get("simd_count"):
            continue
        place = told.get("location_id", 0)
        card = f"{told.get('domain', 0):04x}:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}"
        address = f"{card}.{place & 7}"
        if not tree.names(f"{_PCI}/{address}"):
            address = f"{card}.0"
        uuid = f"GPU-{told['unique_id']:016x}" if told.get("unique_id") else ""
        found.append(_pci_device(tree, address, vendor="amd", name=tree.text(f"{_KFD}/{number}/name") or "", uuid=uuid))
    return found


def _intel(tree: Tree, live: bool) -> list[Device]:
    """Find the GPUs of i915 and xe with a DRM render node, by PCI address; the integrated one (bus 0) comes last.

    Level Zero counts them in this order.
    """
    found = []
    for driver in _INTEL_DRIVERS:
        for address in filter(_ADDRESS.fullmatch, tree.names(f"{_DRIVERS}/{driver}")):
            drm = tree.names(f"{_PCI}/{address}/drm")
            if any(name.startswith("renderD") for name in drm):
                found.append(_pci_device(tree, address, vendor="intel", partitions=_intel_tiles(tree, address, drm)))
    return sorted(found, key=lambda device: (device.address.startswith("0000:00:"), device.address))


def _intel_tiles(tree: Tree, address: str, drm: list[str]) -> tuple[str, ...]:
    """Find the tiles: folders of the device with xe; with i915 the card's "gt" folders, tiles on one series."""
    tiles = [name.removeprefix("tile") for name in tree.names(f"{_PCI}/{address}") if _TILE.fullmatch(name)]
    if not tiles and (tree.text(f"{_PCI}/{address}/device") or "")[:5] == _PONTE_VECCHIO:
        card = next((name for name in drm if name.startswith("card")), "")
        tiles = [name.removeprefix("gt") for name in tree.names(f"{_PCI}/{address}/drm/{card}/gt")]
    return tuple(tiles)
