"""torch.numa.binding, made to see another machine: the names of torch 2.9 to 2.13 and those of 2.14 and newer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import signature
from types import SimpleNamespace
from typing import Any


def seen_by_torch(addresses: Iterable[str]) -> SimpleNamespace:
    """What stands in for the module ``torch`` in torch.numa.binding: it sees accelerators at these PCI addresses.

    Up to 2.13 torch asks torch.cuda; from 2.14 on torch.accelerator, and the module of the accelerator that is there.
    """
    found = []
    for one in addresses:
        domain, bus, rest = one.split(":")
        slot = int(rest.partition(".")[0], 16)
        found.append(SimpleNamespace(pci_domain_id=int(domain, 16), pci_bus_id=int(bus, 16), pci_device_id=slot))
    device = SimpleNamespace(device_count=lambda: len(found), get_device_properties=lambda index: found[index])
    accelerator = SimpleNamespace(
        device_count=lambda: len(found), is_available=lambda: bool(found), current_accelerator=lambda: "accelerator"
    )
    return SimpleNamespace(cuda=device, accelerator=accelerator, get_device_module=lambda _: device)


def cpus_by_torch(binding: Any) -> Callable[[str, int], set[int]]:
    """torch's CPUs for a mode and a device, whatever it calls the device's number."""
    name = (
        "device_index" if "device_index" in signature(binding._get_logical_cpus_to_bind_to).parameters else "gpu_index"
    )

    def cpus(mode: str, index: int) -> set[int]:
        options = binding.NumaOptions(affinity_mode=binding.AffinityMode(mode))
        chosen: set[int] = binding._get_logical_cpus_to_bind_to(**{name: index}, numa_options=options)
        return chosen

    return cpus
