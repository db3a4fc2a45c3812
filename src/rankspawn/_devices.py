"""Accelerators, their PCI addresses and their NUMA nodes, without torch and without a CUDA context."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankspawn._binding import format_ids
from rankspawn._topology import PlacementError, Topology, Tree

_PCI = "sys/bus/pci/devices"
_ADDRESS = re.compile(r"(?:pci:)?(?:([0-9a-fA-F]{4,8}):)?([0-9a-fA-F]{2}):([0-9a-fA-F]{2})(?:\.([0-7]))?")


class DeviceError(PlacementError):
    """A device that is not there, or an environment variable that cannot be read."""


@dataclass(frozen=True)
class Device:
    """One accelerator.

    address: PCI, as sysfs writes it ("0000:3b:00.0"). node: sysfs numa_node; -1 where the firmware does not say.
    local_cpus: sysfs local_cpulist, empty where it is not told. vendor, name, uuid: for people, "" where unknown.
    """

    address: str
    node: int = -1
    local_cpus: frozenset[int] = frozenset()
    vendor: str = ""
    name: str = ""
    uuid: str = ""


def pci_device(tree: Tree, address: str, *, vendor: str = "", name: str = "", uuid: str = "") -> Device:
    """The device at a PCI address, in any of its spellings ("3b:00.0", "00000000:3B:00.0", "pci:0000:3b:00.0").

    Raises DeviceError where the text is no address or nothing is there.
    """
    found = _ADDRESS.fullmatch(address.strip())
    if found is None:
        raise DeviceError(f"device {address!r} is not a PCI address like 0000:3b:00.0")
    domain = int(found[1] or "0", 16)
    full = f"{domain:04x}:{found[2].lower()}:{found[3].lower()}.{found[4] or '0'}"
    node = tree.number(f"{_PCI}/{full}/numa_node")
    local = tree.first_ids(f"{_PCI}/{full}", ("local_cpulist", "local_cpus"))
    if node is None and local is None:
        raise DeviceError(f"device {address!r}: no {tree.root.rstrip('/')}/{_PCI}/{full}")
    return Device(full, -1 if node is None else node, local or frozenset(), vendor, name, uuid)


def find_devices(topology: Topology, environ: Mapping[str, str] | None = None) -> tuple[Device, ...]:
    """The visible accelerators, in the order in which their runtime counts them."""
    tree = Tree(topology.root)
    return tuple(pci_device(tree, name, vendor="nvidia") for name in tree.names("proc/driver/nvidia/gpus"))


def as_devices(topology: Topology, given: Sequence[str | Device]) -> tuple[Device, ...]:
    """Device objects as they are; addresses looked up below the topology's root."""
    tree = Tree(topology.root)
    return tuple(one if isinstance(one, Device) else pci_device(tree, one) for one in given)


__all__ = ["Device", "DeviceError", "as_devices", "find_devices", "format_ids", "pci_device"]
