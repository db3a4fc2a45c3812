"""The GPUs of this machine as nvidia-smi sees them, and which processes use them."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rankspawn._place.devices import parse_devices

TIMEOUT = 300.0  # torch's first start on a machine reads gigabytes
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


class Gpu(NamedTuple):
    """A GPU as nvidia-smi lists it, which CUDA_VISIBLE_DEVICES does not change."""

    number: int
    address: str
    uuid: str
    name: str


def smi(*arguments: str) -> str:
    """What nvidia-smi prints; "" where there is no nvidia-smi, or it finds no driver."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def smi_gpus() -> tuple[Gpu, ...]:
    rows = csv.reader(smi("--query-gpu=index,pci.bus_id,uuid,name", "--format=csv,noheader").splitlines())
    cells = ([cell.strip() for cell in row] for row in rows if len(row) == 4)
    return tuple(Gpu(int(number), parse_devices(bus)[0], uuid, name) for number, bus, uuid, name in cells)


def mig_instances() -> tuple[str, ...]:
    """The UUIDs of MIG instances. Where GPUs are divided so, CUDA counts these, and a process has at most one."""
    return tuple(re.findall(r"UUID: (MIG-[^)\s]+)", smi("-L")))


def memory_used() -> list[int]:
    """MiB of each GPU."""
    return [int(line) for line in smi("--query-gpu=memory.used", "--format=csv,noheader,nounits").splitlines()]


def compute_pids() -> set[int]:
    """The processes with a CUDA context. In a container, nvidia-smi may show none, or pids of another namespace."""
    words = smi("--query-compute-apps=pid", "--format=csv,noheader").split()
    return {int(word) for word in words if word.isdecimal()}


def driver_files(pid: int | str = "self") -> set[str]:
    """The driver's device files that a process has open or mapped; none of a process that has ended."""
    folder, found = Path(f"/proc/{pid}"), set()
    with suppress(OSError):  # it has ended, or is another user's
        for fd in os.listdir(folder / "fd"):
            with suppress(FileNotFoundError):  # it has closed this one meanwhile
                found.add(os.readlink(folder / "fd" / fd))
        found.update(line[line.index("/") :] for line in (folder / "maps").read_text().splitlines() if "/" in line)
    return {name for name in found if name.startswith("/dev/nvidia")}


def driver_users() -> set[int]:
    """The processes that have a file of the driver open or mapped, of those that we may look at."""
    return {int(path.name) for path in Path("/proc").glob("[0-9]*") if driver_files(path.name)}
