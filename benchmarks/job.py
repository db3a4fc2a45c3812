"""What a job is, and what several of them use: the place where children go, bindings, the wait, a device for torch."""

from __future__ import annotations

import importlib
import resource
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Any

Job = Callable[[], int]

# What a launcher adds to the environment of a rank.
RANK_ENV = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


class Skip(Exception):
    """This competitor cannot run here; the text says why."""


@dataclass(frozen=True)
class Place:
    """Where the measured children go: one CPU, a node (-1: no memory policy), programs by name, a folder for logs."""

    cpu: int
    node: int
    programs: Mapping[str, str]
    logs: Path


def module(name: str) -> Any:
    """The module, or Skip. A module that is there but broken raises what it raises."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name != name:
            raise
        raise Skip(f"{name} is not installed") from None


def allow_fds(count: int) -> int:
    """Raise the soft limit of open fds to ``count``, as far as that may be; the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard == resource.RLIM_INFINITY else count, hard))
    return hard


def binding_to(place: Place, cpus: Iterable[int]) -> Any:
    rankspawn = module("rankspawn")
    memory = None if place.node < 0 else rankspawn.MemoryPolicy("bind", frozenset({place.node}))
    return rankspawn.Binding(frozenset(cpus), memory)


def reaped(process: subprocess.Popen[Any]) -> int:
    """Wait for ``process`` and return the time, before anything else is done."""
    status = process.wait()
    now = perf_counter_ns()
    if status:
        raise RuntimeError(f"{process.args!r} ended with status {status}")
    return now


def pretend_device() -> None:
    """Give torch a device for each rank. Where the machine has none, torch sees the address of any PCI device; the rest
    of torch's way (sysfs, the node's CPUs, numactl) is unchanged."""
    cuda: Any = importlib.import_module("torch.cuda")
    count, ask = cuda.device_count(), cuda.get_device_properties
    if count:
        cuda.get_device_properties = lambda index: ask(index % count)
        return
    for device in sorted(Path("/sys/bus/pci/devices").glob("*.0")):
        domain, bus, slot = device.name.removesuffix(".0").split(":")
        if (device / "numa_node").is_file():
            found = SimpleNamespace(pci_domain_id=int(domain, 16), pci_bus_id=int(bus, 16), pci_device_id=int(slot, 16))
            cuda.get_device_properties = lambda _index, found=found: found
            return
    raise Skip("torch finds a node by PCI address, and this machine has neither a GPU nor any PCI device")
