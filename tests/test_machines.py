"""``rankspawn run`` on several machines: a launcher in each of two network namespaces, with only TCP between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launchers import LAUNCHER, SAY, in_ranks, launched
from tests.support.machines import Machine, two_machines

EXAMPLES = Path(__file__).parent.parent / "examples"

# Ranks that exchange data until something ends them; their sockets wait SECONDS for the others.
EXCHANGE = SAY + (
    "from array import array\n"
    f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
    "import ring_allreduce\n"
    "seconds = float(sys.argv[1])\n"
    "job = ring_allreduce.meet(60)\n"
    "ring = ring_allreduce.join_ring(job, seconds)\n"
    "for turn in range(10**9):\n"
    "    ring_allreduce.all_reduce(array('d', range(1000)), ring)\n"
    "    if turn == 3: say('met')\n"
)


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    with two_machines() as both:
        yield both


def meeting(machines: tuple[Machine, Machine], node: int) -> list[str]:
    return ["--nnodes", "2", "--node-rank", str(node), "--master-addr", machines[0].address, "--master-port", "29500"]


def test_a_ring_over_two_machines(machines: tuple[Machine, Machine]) -> None:
    script = [str(EXAMPLES / "ring_allreduce.py"), "--elements", "10000"]
    first, second = (
        machines[node].runs([*LAUNCHER, "run", "--nproc-per-node", "2", *meeting(machines, node), *script])
        for node in range(2)
    )
    with launched(second) as other, launched(first) as one:
        assert (one.end(), other.end()) == (0, 0), one.stderr.read() + other.stderr.read()
        shown = one.stdout.read().splitlines()
        assert [line.split()[0] for line in shown[1:5]] == ["0", "1", "2", "3"]
        assert re.fullmatch(r"all-reduce of 10,000 doubles over 4 ranks: \d+ ms, the sum is exact", shown[-1])
        assert other.stdout.read() == ""


@pytest.mark.parametrize("killed", [0, 1])
def test_a_launcher_that_is_killed_ends_the_job_on_the_other_machine(
    machines: tuple[Machine, Machine], killed: int
) -> None:
    """The kernel kills the ranks of a dead launcher and closes their connections, so that the other ranks fail."""
    command = [in_ranks(EXCHANGE, "--nproc-per-node", "2", *meeting(machines, node)) for node in range(2)]
    with (
        launched(machines[0].runs([*command[0], "600"])) as one,
        launched(machines[1].runs([*command[1], "600"])) as other,
    ):
        assert one.hear(2) == {0: "met", 1: "met"}
        assert other.hear(2) == {2: "met", 3: "met"}
        (one, other)[killed].process.kill()
        survivor = (other, one)[killed]
        assert survivor.end() == 1
        # Both ranks there lose a connection at the same time, so either may be the first that is reported.
        mine = "[23]" if killed == 0 else "[01]"
        assert re.search(rf"^rankspawn: rank {mine} \(pid \d+\) exited with status 1$", survivor.stderr.read(), re.M)


def test_a_machine_that_is_cut_off_ends_the_job_when_its_ranks_wait_no_longer(
    machines: tuple[Machine, Machine],
) -> None:
    """No connection is closed, and no launcher notices: only the time-out of the ranks' own sockets ends the job."""
    command = [in_ranks(EXCHANGE, "--nproc-per-node", "1", *meeting(machines, node)) for node in range(2)]
    with (
        launched(machines[0].runs([*command[0], "1"])) as one,
        launched(machines[1].runs([*command[1], "1"])) as other,
    ):
        assert (one.hear(1), other.hear(1)) == ({0: "met"}, {1: "met"})
        machines[1].unplug()
        assert (one.end(), other.end()) == (1, 1)
        assert "timed out" in one.stderr.read() and "timed out" in other.stderr.read()


def test_an_address_of_another_machine_needs_a_port(machines: tuple[Machine, Machine]) -> None:
    with launched(machines[0].runs(in_ranks("pass", "--master-addr", machines[1].address))) as job:
        assert job.end() == 2
        assert "if it is another machine's, pass --master-port too" in job.stderr.read()
