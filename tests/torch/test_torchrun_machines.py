"""``rankspawn torchrun`` on two machines, which are network namespaces: torch's rendezvous, ranks that exchange data.

torch decides what becomes of the job when a machine is lost. These tests check that our ranks and our agent let it:
they notice ends within a bounded time, and the elastic restart comes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.launchers import SAY, Launched, launched, said
from tests.support.machines import Machine, two_machines

pytest.importorskip("torch.distributed.run", reason="torch is not installed")

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 240
PORT = 29400

MEET = (
    SAY
    + f"""
sys.path.insert(0, {str(EXAMPLES)!r})
import ring_allreduce
here = os.path.exists(sys.argv[1])
job = ring_allreduce.meet(60)
say([int(os.environ["TORCHELASTIC_RESTART_COUNT"]), ring_allreduce.WORLD_SIZE])
"""
)
# Ranks that exchange data until a file exists; their sockets wait two seconds for the others.
EXCHANGE = (
    MEET
    + """
from array import array
ring = ring_allreduce.join_ring(job, 2)
vector = array('d', [0])
while not vector[0]:  # all leave in the same turn
    vector[0] = os.path.exists(sys.argv[1])
    ring_allreduce.all_reduce(vector, ring)
    time.sleep(0.01)
"""
)
# One of two ranks fails, once; the other then waits until the agent ends it.
FAIL_ONCE = (
    MEET
    + """
if not here and ring_allreduce.RANK == 1:
    open(sys.argv[1], "x").close()
    sys.exit(3)
if not here:
    time.sleep(600)
"""
)


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    with two_machines() as both:
        yield both


@contextmanager
def agents(
    machines: tuple[Machine, Machine], folder: Path, code: str, nnodes: str, *options: str
) -> Iterator[tuple[list[Launched], Path]]:
    """An agent on each machine, each with one rank, and the file whose path their script gets."""
    script, file = folder / "script.py", folder / "file"
    script.write_text(code)
    with ExitStack() as started:
        jobs = []
        for number, machine in enumerate(machines):
            rendezvous = (
                f"is_host={number == 0},timeout=60,last_call_timeout=1,read_timeout=10,"
                "keep_alive_interval=1,keep_alive_max_attempt=2"
            )
            command = [
                *("env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", f"TMPDIR={folder}", "OMP_NUM_THREADS=1"),
                *(sys.executable, "-m", "rankspawn.torchrun", "--nnodes", nnodes, "--nproc-per-node", "1"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{machines[0].address}:{PORT}", "--rdzv-id", "job"),
                *("--rdzv-conf", rendezvous, "--local-addr", machine.address, *options, str(script), str(file)),
            ]
            jobs.append(started.enter_context(launched(machine.runs(command), seconds=SECONDS)))
        yield jobs, file


def heard(job: Launched) -> list[int]:
    """What the agent's rank says next: the number of its attempt, and how many ranks there are."""
    line = job.stdout.readline()
    assert line, job.stderr.read()
    (what,) = said(line).values()
    return list(what)


def test_a_ring_of_two_machines(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    with agents(machines, tmp_path, EXCHANGE, "2") as (jobs, file):
        assert [heard(job) for job in jobs] == [[0, 2], [0, 2]]
        file.touch()
        assert [job.process.wait(SECONDS) for job in jobs] == [0, 0], [job.stderr.read() for job in jobs]


def test_a_failure_on_one_machine_starts_both_again(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    with agents(machines, tmp_path, FAIL_ONCE, "2", "--max-restarts", "1") as (jobs, _):
        assert [heard(job) for job in jobs] == [[0, 2], [0, 2]]
        assert [heard(job)[1] for job in jobs] == [2, 2]
        assert [job.process.wait(SECONDS) for job in jobs] == [0, 0], [job.stderr.read() for job in jobs]


def ranks_of(agent: int) -> list[psutil.Process]:
    """The agent's children but its guard."""
    return [child for child in psutil.Process(agent).children() if child.name() != "rankspawn-guard"]


def test_a_lost_agent_and_the_job_goes_on_without_it(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    """A killed agent takes its rank with it. The other machine's rank loses its connection, and restarts alone."""
    with agents(machines, tmp_path, EXCHANGE, "1:2", "--max-restarts", "3") as (jobs, file):
        assert [heard(job) for job in jobs] == [[0, 2], [0, 2]]
        (rank,) = ranks_of(jobs[1].process.pid)
        jobs[1].process.kill()
        rank.wait(10)
        attempt, world = heard(jobs[0])
        assert (attempt > 0, world) == (True, 1)
        file.touch()
        assert jobs[0].process.wait(SECONDS) == 0, jobs[0].stderr.read()


def test_a_machine_that_is_cut_off_ends_the_job_on_both(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    """No connection is closed, so the ranks wait until their sockets time out. The agent without the store waits, in
    torch's rendezvous, as long as TCP does: a quarter of an hour, unless tcp_retries2 (tcp(7)) says less, as it does
    here."""
    few = "echo 4 >/proc/sys/net/ipv4/tcp_retries2"
    for machine in machines:
        subprocess.run(machine.runs(["sh", "-c", few]), check=True)
    with agents(machines, tmp_path, EXCHANGE, "2") as (jobs, _):
        assert [heard(job) for job in jobs] == [[0, 2], [0, 2]]
        ranks = [ranks_of(job.process.pid)[0] for job in jobs]
        machines[1].unplug()
        assert [job.process.wait(SECONDS) for job in jobs] == [1, 1], [job.stderr.read() for job in jobs]
        assert not any(rank.is_running() for rank in ranks)
