"""What the checks share: a child that touches memory, cgroups, and the refusal to run outside the virtual machine."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from rankspawn import Binding, MemoryPolicy, Popen
from tests.numavm.cgroups import Group, mounted_v1
from tests.numavm.machine import DEVICES

BUILT = Path(__file__).resolve().parents[2] / "build" / "numavm"
NVIDIA = Path("/proc/driver/nvidia/gpus")


@pytest.fixture(scope="session", autouse=True)
def in_the_machine() -> None:
    if "RANKSPAWN_NUMAVM_SECONDS" not in os.environ:
        pytest.exit("these checks run in the virtual machine of tests/numavm/run.py, and break things elsewhere", 2)


class Touched:
    """A running child that has touched ``pages`` pages from ``address`` on."""

    def __init__(self, process: Popen, pages: int) -> None:
        assert process.stdout is not None
        self.process, self.pages = process, pages
        self.pid = process.pid
        self.address = int(process.stdout.readline(), 16)

    @property
    def numa_maps(self) -> str:
        return Path(f"/proc/{self.pid}/numa_maps").read_text()


@pytest.fixture
def touched() -> Iterator[Callable[..., Touched]]:
    """A function that starts a child with a binding or other arguments of Popen; the child ends with the check."""
    with ExitStack() as stack:

        def start(
            binding: Binding | None = None, pages: int = 64, command: Sequence[object] | None = None, **more: Any
        ) -> Touched:
            process = Popen(
                command or [BUILT / "touch", str(pages)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                binding=binding,
                **more,
            )
            assert process.mechanism == "clone"
            # When the stack leaves the child's context, it closes the child's stdin, and the child ends.
            return Touched(stack.enter_context(process), pages)

        yield start


def bound(cpus: Any = None, mode: Any = None, nodes: Any = (), **more: Any) -> Binding:
    """A Binding, for short."""
    memory = None if mode is None else MemoryPolicy(mode, frozenset(nodes))
    return Binding(None if cpus is None else frozenset(cpus), memory, **more)


# The scope is the session, so that pytest runs all checks with one kind, and then all with the other.
@pytest.fixture(scope="session", params=["v2", "v1"])
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of cgroup."""
    if request.param == "v1":
        try:
            with mounted_v1():
                pass
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            pytest.skip("this kernel is built without the cpusets of cgroup v1")
    return str(request.param)


@pytest.fixture
def cpuset(kind: str) -> Iterator[Callable[[str, str], Group]]:
    """A function that makes a cpuset with these CPUs and nodes, of the kind ``kind``; it is removed after the check."""
    with ExitStack() as stack:

        def make(cpus: str, mems: str) -> Group:
            return stack.enter_context(Group.cpuset(kind, cpus, mems))

        yield make


@contextmanager
def nvidia_gpus(*addresses: str) -> Iterator[None]:
    """Make the NVIDIA driver's files for these PCI addresses, where QEMU has put other devices."""
    subprocess.run(["mount", "-t", "tmpfs", "none", "/proc/driver"], check=True)
    try:
        for number, address in enumerate(addresses):
            folder = NVIDIA / address
            folder.mkdir(parents=True)
            uuid = f"GPU-{number:08x}-0000-0000-0000-000000000000"
            (folder / "information").write_text(
                f"Model: \t\t Made up\nGPU UUID: \t {uuid}\nBus Location: \t {address}\n"
            )
        yield
    finally:
        subprocess.run(["umount", "/proc/driver"], check=True)


@pytest.fixture
def gpus() -> Iterator[None]:
    """All devices that belong to a node are NVIDIA GPUs: in the order of addresses, on nodes 3, 0, 1, 1 and 4."""
    with nvidia_gpus(*DEVICES):
        yield
