"""CPU quotas of cgroups, from written trees and from a real one, and what every entry point makes of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankspawn._place.glance import sets_threads, unbound_threads
from rankspawn._place.openmp import openmp_warnings, threads_of_ranks
from rankspawn._place.plan import plan
from rankspawn._place.quota import Quota, cpu_quota
from rankspawn._place.topology import Topology
from tests.support.launchers import LAUNCHER, completed, environment_here
from tests.support.processes import writable_cgroups
from tests.support.sysfs_tree import Machine, write

OMP = "import os, sys; os.write(1, (os.environ.get('OMP_NUM_THREADS', 'unset') + '\\n').encode())"


def tree(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> str:
    """The files of /proc and of the cgroups in a folder."""
    for path, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return str(root)


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)
IN_CONTAINER = "40 31 0:29 /docker/ab\\040c /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "cpus"),
    [
        ("0::/a/b\n", V2, {"sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 2.5),
        ("0::/a/b\n", V2, {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", V2, {"sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b\n", V2, {"sys/fs/cgroup/a/b/cpu.max": "30000 10000", "sys/fs/cgroup/a/cpu.max": "400000 100000"}, 3),
        ("0::/\n", V2, {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/../other\n", V2, {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", V2, {}, None),
        (
            "4:cpu,cpuacct:/j/k\n3:cpuset:/\n",
            V1,
            {
                "sys/fs/cgroup/cpu,cpuacct/j/k/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/j/k/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/j/cpu.cfs_quota_us": "20000",
                "sys/fs/cgroup/cpu,cpuacct/j/cpu.cfs_period_us": "10000",
            },
            2,
        ),
        (
            "4:cpu,cpuacct:/docker/ab c\n",
            IN_CONTAINER,
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            1,
        ),
        (
            "4:cpu,cpuacct:/elsewhere/x\n",
            IN_CONTAINER,
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            1,
        ),
        (
            "4:cpu:/j\n0::/k\n",
            V1.replace(",cpuacct", "") + V2.replace("/cgroup ", "/cgroup/unified "),
            {
                "sys/fs/cgroup/cpu/j/cpu.cfs_quota_us": "700000",
                "sys/fs/cgroup/cpu/j/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/unified/k/cpu.max": "800000 100000",
            },
            7,
        ),
    ],
)  # fmt: skip
def test_the_least_quota_counts(
    cgroup: str, mounts: str, files: dict[str, str], cpus: float | None, tmp_path: Path
) -> None:
    quota = cpu_quota(tree(tmp_path, cgroup, mounts, files))
    assert (quota and quota.cpus) == cpus


def test_without_proc_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(str(tmp_path)) is None


def test_a_quota_is_shared(tmp_path: Path) -> None:
    assert [Quota(4, "").share(ranks) for ranks in (1, 2, 3, 8)] == [4, 2, 1, 1]
    assert [Quota(2.5, "").share(1), Quota(0.5, "").share(1)] == [2, 1]
    root = write(tmp_path, Machine(sockets=2, cores=8))
    tree(root, "0::/\n", V2, {"sys/fs/cgroup/cpu.max": "600000 100000\n"})
    topology = Topology.read(root)
    assert [rank.omp_threads for rank in plan(topology, "node", nprocs=2)] == [3, 3]
    assert threads_of_ranks(topology, topology.cpus, [None], sharing=4) == (1,)


@pytest.mark.parametrize("text", ["1", "16", "4,2", " 3 "])
def test_numbers_of_threads(text: str) -> None:
    assert sets_threads(text) and sets_threads(text.encode())
    assert openmp_warnings({"OMP_NUM_THREADS": text}) == ()


@pytest.mark.parametrize("text", ["", "all", "0", "-1", "4,", "1.5", "\u0663"])
def test_what_is_no_number_of_threads_is_said(text: str) -> None:
    assert not sets_threads(text)
    (said,) = openmp_warnings({"OMP_NUM_THREADS": text})
    assert said == f"OMP_NUM_THREADS={text!r} is not a number of threads: ignoring it"


LAUNCH = f"from rankspawn import launch\nwith launch([{sys.executable!r}, '-c', {OMP!r}], 1) as group: group.wait()"
ENTRANCES = {
    "run": [*LAUNCHER, "run", "--no-python", sys.executable, "-c", OMP],
    "bind": [*LAUNCHER, "bind", "--local-rank", "0", "--nproc-per-node", "1", sys.executable, "-c", OMP],
    "launch": [sys.executable, "-c", LAUNCH],
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("text", ["", "all"])
def test_each_entrance_takes_no_number_for_unset(entrance: str, text: str) -> None:
    done = completed(ENTRANCES[entrance], env=environment_here(OMP_NUM_THREADS=text))
    assert done.stdout == f"{unbound_threads(1)}\n"
    assert f"OMP_NUM_THREADS={text!r} is not a number of threads" in done.stderr


@pytest.fixture
def half() -> Iterator[Path]:
    """A real cgroup of version 1 with a quota of one CPU and a half, and one in it."""
    if not (roots := writable_cgroups("cgroup", "cpu")):
        pytest.skip("no cgroup v1 with the CPU controller can be made here")
    folder = roots[0] / f"rankspawn-test-{os.getpid()}"
    folder.mkdir()
    (folder / "in").mkdir()
    (folder / "cpu.cfs_quota_us").write_text("150000")
    (folder / "cpu.cfs_period_us").write_text("100000")
    yield folder
    (folder / "in").rmdir()
    folder.rmdir()


def inside(folder: Path, command: list[str]) -> list[str]:
    return ["sh", "-c", f'echo $$ > {folder}/in/cgroup.procs; exec "$@"', "sh", *command]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_each_entrance_keeps_to_a_real_quota(entrance: str, half: Path) -> None:
    done = completed(inside(half, ENTRANCES[entrance]), env=environment_here())
    assert done.stdout == "1\n"
    if entrance != "launch":
        assert f"a CPU quota limits all ranks together to 1.5 CPUs ({half}/cpu.cfs_quota_us)" in done.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_plan_and_doctor_say_a_real_quota(half: Path) -> None:
    said = f"1.5 CPUs ({half}/cpu.cfs_quota_us)"
    done = completed(inside(half, [*LAUNCHER, "plan", "--nproc-per-node", "1"]), env=environment_here())
    assert f"note: a CPU quota limits all ranks together to {said}" in done.stdout
    assert done.stdout.splitlines()[1].split()[-1] == "1"
    assert said in completed(inside(half, [*LAUNCHER, "doctor"]), env=environment_here()).stdout
