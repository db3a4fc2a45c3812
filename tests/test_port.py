"""The port of rank 0: a socket of the launcher's holds it until the job ends."""

from __future__ import annotations

import errno
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from rankspawn import Job, launch
from rankspawn._group.port import check_local, hold_port
from tests.support.launchers import SAY, completed, environment_here, in_ranks, said
from tests.support.processes import eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no way to hold a port")

SAY_PORT = ["sh", "-c", "echo $MASTER_PORT >port.new; mv port.new port; exec sleep 60"]
EVERYWHERE = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")]


def told_port(folder: Path) -> int:
    """The MASTER_PORT that rank 0 has written down."""
    eventually((folder / "port").exists)
    return int((folder / "port").read_text())


def is_held(port: int) -> bool:
    """Whether a plain bind(2) is refused at each address of this machine, and a server's is not."""
    refused = []
    for family, address in EVERYWHERE:
        with socket.socket(family) as plain:
            try:
                plain.bind((address, port))
                refused.append(False)
            except OSError as error:
                assert error.errno == errno.EADDRINUSE
                refused.append(True)
        with socket.socket(family) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((address, port))
            server.listen()
    assert len({*refused}) == 1
    return refused[0]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost", "0.0.0.0"])
def test_addresses_of_this_machine(address: str) -> None:
    check_local(address)


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_addresses_that_are_not_this_machines(address: str) -> None:
    with pytest.raises(OSError):
        check_local(address)


def test_a_name_that_has_an_address_of_ipv6_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a pod's name has in a cluster of IPv6. The resolver's answer is replaced, because it needs a name server."""
    answer = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    check_local("pod-0.six")


def test_held_ports_are_given_to_nobody() -> None:
    with ExitStack() as stack:
        ports = {stack.enter_context(hold_port()).getsockname()[1] for _ in range(200)}
        assert len(ports) == 200
        for _ in range(5000):
            with socket.socket() as other:
                other.bind(("127.0.0.1", 0))
                assert other.getsockname()[1] not in ports


def test_a_group_holds_the_port_of_its_rank_0(tmp_path: Path) -> None:
    with launch(SAY_PORT, 1, cwd=tmp_path) as group:
        port = told_port(tmp_path)
        assert is_held(port)
        group.kill()
    assert not is_held(port)


@pytest.mark.parametrize("node", [0, 1])
def test_a_port_that_a_job_of_several_machines_names(node: int) -> None:
    with hold_port() as found:
        port = found.getsockname()[1]
    with launch(["sleep", "60"], 1, job=Job(1, port, nnodes=2, node_rank=node)) as group:
        assert is_held(port) == (node == 0)
        group.kill()


def test_a_port_that_is_taken_is_left_to_rank_0_to_say(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with launch(SAY_PORT, 1, job=Job(1, port), cwd=tmp_path) as group:
            assert told_port(tmp_path) == port
            group.kill()


def test_a_launch_that_fails_gives_the_port_back() -> None:
    with hold_port() as found:
        port = found.getsockname()[1]
    with pytest.raises(FileNotFoundError):
        launch(["/no/such/program"], 1, job=Job(1, port))
    assert not is_held(port)


def test_an_address_that_is_not_this_machines_needs_a_port() -> None:
    with pytest.raises(OSError):
        launch(["true"], 1, job=Job(1, master_addr="192.0.2.1"))
    with pytest.raises(ValueError, match="expected a port that the other machines know, got 0"):
        launch(["true"], 1, job=Job(1, nnodes=2))
    with launch(["true"], 1, job=Job(1, 29519, master_addr="192.0.2.1")) as group:
        assert group.wait() == (0,)


LISTEN = """
import socket
port = int(os.environ["MASTER_PORT"])
try:
    socket.socket().bind(("127.0.0.1", port))
    held = False
except OSError:
    held = True
with socket.create_server((os.environ["MASTER_ADDR"], port), family=socket.AF_INET6 if ":" in os.environ["MASTER_ADDR"]
                          else socket.AF_INET):
    say([os.environ["MASTER_ADDR"], port, held])
"""


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "[::1]"])
def test_run_holds_the_port_of_each_attempt(address: str) -> None:
    code = SAY + LISTEN + "\nsys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] == '0')"
    options = ["--master-addr", address, "--max-restarts", "1"]
    done = completed(in_ranks(code, *options), env=environment_here())
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    for line in (first, second):
        told, _, held = said(line)[0]
        assert (told, held) == (address.strip("[]"), True)
    assert first != second, "another attempt has another port"
