"""A Slurm cluster for tests: munged, slurmctld and two slurmd on this machine, in one folder that the end removes.

``python -m tests.slurm.cluster COMMAND ...`` runs a command beside one; SLURM_CONF tells Slurm's programs where it is.

The nodes' names are addresses of the loopback network, of a part of it that is drawn for each cluster. So their names
can be reached, as those of real nodes can, and two clusters on one machine have nothing in common.
"""

from __future__ import annotations

import getpass
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo", "scancel", "squeue", "scontrol")
START_SECONDS = 60.0
END_SECONDS = 30.0

FREEZER = Path("/sys/fs/cgroup/freezer")

CONFIGURATION = """
ClusterName=rankspawn
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType={proctrack}
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=2
SchedulerParameters=bf_interval=1
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=1000
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
    """Slurm does not run here; the text says why."""


class Cluster:
    """environ: what Slurm's programs need. nodes: the names of the two nodes. holds_all: whether Slurm ends every
    process of a step, by a cgroup, or only those that it finds by their parents."""

    def __init__(self, folder: Path, nodes: tuple[str, str], holds_all: bool) -> None:
        self.folder, self.nodes, self.holds_all = folder, nodes, holds_all
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def asked(self, *command: str, check: bool = True) -> str:
        """What one of Slurm's programs answers."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=START_SECONDS)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}\n{self.said()}")
        return done.stdout

    def wait(self, *command: str, until: str, seconds: float) -> None:
        """Ask until the answer is ``until``."""
        deadline = time.monotonic() + seconds
        while (answer := self.asked(*command, check=False).split()) != until.split():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)}: {answer}, not {until!r}, after {seconds} s\n{self.said()}")
            time.sleep(0.05)

    def said(self) -> str:
        """The last messages of each daemon."""
        return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))

    @contextmanager
    def daemon(self, name: str, *command: str) -> Iterator[None]:
        """Run a daemon in the foreground, so that we can end it, and keep its messages."""
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(command, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                yield
            finally:
                process.terminate()
                try:
                    process.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@contextmanager
def cluster(cpus: int | None = None, hold_all: bool = True) -> Iterator[Cluster]:
    """Two nodes, each with ``cpus`` CPUs, or those of the machine. hold_all: steps have cgroups, where that can be.

    Raises Unavailable where Slurm is not installed.
    """
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    programs = {name: shutil.which(name, path=path) for name in PROGRAMS}
    if missing := [name for name, found in programs.items() if found is None]:
        raise Unavailable(f"{', '.join(missing)} not installed; on Debian or Ubuntu: apt-get install slurm-wlm munge")
    here = programs["munged"], programs["slurmctld"], programs["slurmd"]
    with ExitStack() as stack:
        # Not pytest's folder: munge wants its socket where all users may look, and the path of a socket must be short.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        folder.chmod(0o755)
        network = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}"
        nodes = (f"{network}.1", f"{network}.2")
        # Slurm needs systemd for cgroup v2, which tests do not have.
        holds_all = hold_all and os.geteuid() == 0 and os.access(FREEZER, os.W_OK)
        mine = Cluster(folder, nodes, holds_all)
        _configure(mine, cpus or os.cpu_count() or 1)

        munge = ("--foreground", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket")
        files = (f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed", f"--log-file={folder}/munged")
        stack.enter_context(mine.daemon("munged", str(here[0]), *munge, *files))
        _until(lambda: (folder / "munge.socket").is_socket(), mine)
        stack.enter_context(mine.daemon("slurmctld", str(here[1]), "-D", "-c"))
        # A slurmd that finds no controller tries again only after seconds.
        _until(lambda: "UP" in mine.asked("scontrol", "ping", check=False), mine)
        stack.callback(_remove_cgroups, mine)
        for node in nodes:
            stack.enter_context(mine.daemon(f"slurmd-{node}", str(here[2]), "-D", "-N", node))
        mine.wait("sinfo", "-h", "-N", "-o", "%T", until="idle idle", seconds=START_SECONDS)
        stack.callback(_end_jobs, mine)
        yield mine


def _configure(mine: Cluster, cpus: int) -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    for name in ("state", *(f"spool-{node}" for node in mine.nodes)):
        (mine.folder / name).mkdir()
    configuration = CONFIGURATION.format(
        host=socket.gethostname().partition(".")[0],
        user=getpass.getuser(),
        folder=mine.folder,
        nodes=mine.nodes,
        ports=ports,
        cpus=cpus,
        proctrack="proctrack/cgroup" if mine.holds_all else "proctrack/linuxproc",
    )
    (mine.folder / "slurm.conf").write_text(configuration)
    cgroups = f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={FREEZER.parent}\n" if mine.holds_all else ""
    (mine.folder / "cgroup.conf").write_text(cgroups)
    key = mine.folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))


def _until(ready: Callable[[], bool], mine: Cluster) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"Slurm does not start\n{mine.said()}")
        time.sleep(0.05)


def _end_jobs(mine: Cluster) -> None:
    mine.asked("scancel", "--full", f"--user={getpass.getuser()}")
    mine.wait("squeue", "-h", until="", seconds=END_SECONDS)


def _remove_cgroups(mine: Cluster) -> None:
    """Remove the cgroups that slurmd leaves."""
    for node in mine.nodes:
        top = FREEZER / f"slurm_{node}"
        for folder in (*sorted(top.rglob("*/"), reverse=True), top):
            if folder.is_dir():
                folder.rmdir()


def main(command: Sequence[str]) -> int:
    with cluster() as mine:
        return subprocess.run(command, env=mine.environ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
