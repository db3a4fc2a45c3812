"""What ranks use and where they are bound now, for ``rankspawn ps``: procfs alone, a few reads for each rank."""

from __future__ import annotations

import os
import re
import time

from .._frozen import Frozen
from .._ids import format_ids, parse_ids
from .._procfs import read_stat
from .kernel import command_of, environment_of, parent_of, read
from .ranks import all_ranks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class RankNow(Frozen):
    """A rank that runs.

    Attributes:
        rank: Its RANK.
        pid: Its process.
        state: The letter of proc(5).
        asked: The CPUs that its launch asked for, "0-3"; None if these are not known, or if none were asked for.
        cpus: The CPUs that its first thread may use now.
        strays: How many of its threads may use CPUs that were not asked for.
        threads: How many it has.
        cpu: Seconds of CPU time that it has used.
        delay: Seconds for which its first thread was ready to run but waited for a CPU.
        rss: Resident bytes.
        age: Seconds since it was started.
        stdout: The file that its stdout goes to; None if it goes to no file.
        stderr: As stdout.
        gpu: Bytes of GPU memory that it uses; None if that is not known.
        off_node: Bytes of its memory on nodes whose CPUs its first thread may not use; None if that was not asked, or
            if this user may not read it.
    """

    rank: int
    pid: int
    state: str
    asked: str | None
    cpus: str
    strays: int
    threads: int
    cpu: float
    delay: float
    rss: int
    age: float
    stdout: str | None
    stderr: str | None
    gpu: int | None = None
    off_node: int | None = None


class JobNow(Frozen):
    """A job that runs on this machine.

    Attributes:
        job: Its id (TORCHELASTIC_RUN_ID), or "".
        launcher: The process that started the ranks.
        command: The launcher's command line.
        world: WORLD_SIZE, or "".
        ranks: Its ranks, in the order of RANK.
    """

    job: str
    launcher: int
    command: str
    world: str
    ranks: Sequence[RankNow]


def jobs_now(
    asked: Mapping[int, str | None],
    *,
    pages: bool = False,
    proc: str = "/proc",
    nodes: str = "/sys/devices/system/node",
) -> list[JobNow]:
    """The jobs whose ranks this user may look at, by launcher, whatever launcher that is.

    Args:
        asked: The CPUs that the launches asked for, by pid of the rank, if known.
        pages: Whether to count the pages of each rank by node. The kernel walks through all mappings of the rank, which
            takes a tenth of a second for some gigabytes.
        proc: Where procfs is mounted.
        nodes: The folder of the NUMA nodes in sysfs.
    """
    by_launcher: dict[int, dict[int, int]] = {}
    for pid, rank in all_ranks(proc).items():
        by_launcher.setdefault(parent_of(pid, proc), {})[pid] = rank
    gpus = _gpu_memory()
    cpus_of = _cpus_of_nodes(nodes) if pages else {}
    found = []
    for launcher, ranks in sorted(by_launcher.items()):
        its = [_rank(pid, rank, asked.get(pid), gpus, cpus_of, proc) for pid, rank in ranks.items()]
        alive = sorted((one for one in its if one is not None), key=lambda one: (one.rank, one.pid))
        if alive:
            told = environment_of(alive[0].pid, proc)
            job, world = told.get("TORCHELASTIC_RUN_ID", ""), told.get("WORLD_SIZE", "")
            found.append(JobNow(job, launcher, command_of(launcher, proc), world, alive))
    return found


def _rank(
    pid: int,
    rank: int,
    asked: str | None,
    gpus: Mapping[int, int],
    cpus_of: Mapping[int, frozenset[int]],
    proc: str,
) -> RankNow | None:
    try:
        stat = read_stat(f"{proc}/{pid}")
    except OSError:
        return None
    if stat.state in "ZX":
        return None
    masks = [*_masks(pid, proc)]
    wanted = None if asked is None else parse_ids(asked)
    delay = read(f"{proc}/{pid}/schedstat").split()
    size = read(f"{proc}/{pid}/statm").split()
    uptime = float((read(f"{proc}/uptime") or "0").split()[0])
    return RankNow(
        rank,
        pid,
        stat.state,
        asked,
        format_ids(masks[0]) if masks else "",
        sum(wanted is not None and not mask <= wanted for mask in masks),
        len(masks),
        stat.cpu_seconds,
        int(delay[1]) / 1e9 if len(delay) > 1 else 0.0,
        int(size[1]) * os.sysconf("SC_PAGE_SIZE") if len(size) > 1 else 0,
        uptime - stat.started / os.sysconf("SC_CLK_TCK"),
        _file(f"{proc}/{pid}/fd/1"),
        _file(f"{proc}/{pid}/fd/2"),
        gpus.get(pid),
        _off_node(pid, masks[0], cpus_of, proc) if cpus_of and masks else None,
    )


def _cpus_of_nodes(folder: str) -> dict[int, frozenset[int]]:
    """The CPUs of each NUMA node; empty if the system has no nodes."""
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    found = {}
    for name in names:
        if words := re.fullmatch(r"node(\d+)", name):
            found[int(words[1])] = parse_ids(read(f"{folder}/{name}/cpulist").strip())
    return found


def _off_node(pid: int, mask: frozenset[int], cpus_of: Mapping[int, frozenset[int]], proc: str) -> int | None:
    """Bytes on nodes whose CPUs are not in ``mask``, by numa_maps of proc_pid_numa_maps(5); None where it is empty."""
    text = read(f"{proc}/{pid}/numa_maps", 1 << 26)
    size = 0
    for line in text.splitlines():
        kib = re.search(r" kernelpagesize_kB=(\d+)", line)
        if kib is not None:
            far = (int(count) for node, count in re.findall(r" N(\d+)=(\d+)", line)
                   if not cpus_of.get(int(node), frozenset()) & mask)  # fmt: skip
            size += sum(far) * int(kib[1]) << 10
    return size if text else None


def _masks(pid: int, proc: str) -> Iterable[frozenset[int]]:
    """The CPU mask of each thread, the first one first."""
    try:
        tids = sorted(map(int, os.listdir(f"{proc}/{pid}/task")), key=lambda tid: (tid != pid, tid))
    except OSError:
        return
    for tid in tids:
        try:
            yield frozenset(os.sched_getaffinity(tid))
        except OSError:
            continue


def _file(link: str) -> str | None:
    try:
        path = os.readlink(link)
    except OSError:
        return None
    return path if path.startswith("/") and not path.startswith("/dev/") else None


def age_of(path: str) -> float | None:
    """Seconds since a file was written to; None if there is no such file."""
    try:
        return max(0.0, time.time() - os.stat(path).st_mtime)
    except OSError:
        return None


def _gpu_memory() -> dict[int, int]:
    """Bytes of GPU memory by process, from NVML (``pip install "rankspawn[nvidia]"``); empty without NVML."""
    try:
        import pynvml  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return {}
    used: dict[int, int] = {}
    try:
        pynvml.nvmlInit()
        try:
            for index in range(pynvml.nvmlDeviceGetCount()):
                device = pynvml.nvmlDeviceGetHandleByIndex(index)
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device):
                    used[process.pid] = used.get(process.pid, 0) + (process.usedGpuMemory or 0)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return used
    return used
