"""Two machines in one: two network namespaces, each with an address, joined by a veth pair. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest


class Machine:
    """address: the machine's address, on ``interface``."""

    def __init__(self, name: str, interface: str, address: str) -> None:
        self.name, self.interface, self.address = name, interface, address

    def runs(self, command: list[str]) -> list[str]:
        """The command line that runs ``command`` there. `ip` calls execve(2), so its pid becomes the command's."""
        return ["ip", "netns", "exec", self.name, *command]

    def unplug(self) -> None:
        """Drop the machine's packets from now on, without an error to anybody."""
        _ip("-n", self.name, "link", "set", self.interface, "down")


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Skips the test where they cannot be made."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux, root and ip(8)")
    pid = os.getpid()
    made = [Machine(f"rankspawn-{pid}-{n}", f"rs{pid}n{n}", f"192.0.2.{n + 1}") for n in range(2)]  # RFC 5737
    with ExitStack() as ends:
        for one in made:
            try:
                _ip("netns", "add", one.name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
            ends.callback(_ip, "netns", "delete", one.name)
        left, right = made
        try:
            _ip(
                *("-n", left.name, "link", "add", left.interface, "type", "veth"),
                *("peer", "name", right.interface, "netns", right.name),
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no cable can be made here: {error.stderr.strip()}")
        for one in made:
            _ip("-n", one.name, "address", "add", f"{one.address}/24", "dev", one.interface)
            _ip("-n", one.name, "link", "set", one.interface, "up")
            _ip("-n", one.name, "link", "set", "lo", "up")
        yield left, right


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
