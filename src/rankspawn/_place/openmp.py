"""OMP_NUM_THREADS of a rank, and the OpenMP variables that would undo its CPU mask or have no effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .glance import threads_note
from .quota import cpu_quota
from .topology import Topology


def omp_num_threads(topology: Topology, masks: Sequence[Iterable[int]]) -> tuple[int, ...]:
    """Compute OMP_NUM_THREADS for each mask: its physical cores. A core in k masks counts 1/k. At least 1."""
    core_of = {cpu: number for number, core in enumerate(topology.cores) for cpu in core.cpus}
    cores = [{core_of[cpu] for cpu in mask if cpu in core_of} for mask in masks]
    users: dict[int, int] = {}
    for mine in cores:
        for core in mine:
            users[core] = users.get(core, 0) + 1
    # The small addend keeps 3 cores shared by 3 ranks at 1: the fractions add up to 0.999.
    return tuple(max(1, int(sum(1 / users[core] for core in mine) + 1e-9)) for mine in cores)


def threads_of_ranks(
    topology: Topology, allowed: frozenset[int], masks: Iterable[frozenset[int] | None], sharing: int | None = None
) -> tuple[int, ...]:
    """Compute OMP_NUM_THREADS of each rank. A rank without a mask of its own (None) may use all ``allowed`` CPUs.

    All ranks share a CPU quota. ``sharing`` is their number if there are more ranks than masks. A rank gets no more
    threads than its share of the quota, because the kernel would only throttle them.
    """
    threads = omp_num_threads(topology, [allowed if mask is None else mask for mask in masks])
    quota = cpu_quota(topology.root)
    return threads if quota is None else tuple(min(count, quota.share(sharing or len(threads))) for count in threads)


def quota_note(cpus: int, root: str = "/") -> str:
    """Say that a quota leaves less CPU time than ``cpus`` CPUs have; "" if none does."""
    quota = cpu_quota(root)
    if quota is None or quota.cpus >= cpus:
        return ""
    return f"a CPU quota limits all ranks together to {quota}, of {cpus} CPUs that they may use"


def openmp_warnings(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Warn of variables that make an OpenMP runtime shrink each rank's mask, and of a bad OMP_NUM_THREADS.

    libgomp and libomp bind the main thread to its first place as soon as the library is imported (OpenMP 5.2, 2.6 and
    21.7; libgomp's manual, "Environment Variables"; Intel's KMP_AFFINITY). Later threads then inherit that one CPU.
    """
    unset = threads_note(environ.get("OMP_NUM_THREADS"))
    said = []
    bind = environ.get("OMP_PROC_BIND", "").strip().lower()
    if bind not in ("", "false"):
        said.append(f"OMP_PROC_BIND={environ['OMP_PROC_BIND']}")
    if environ.get("OMP_PLACES", "").strip() and bind == "":
        said.append(f"OMP_PLACES={environ['OMP_PLACES']}")
    kmp = environ.get("KMP_AFFINITY", "").strip().lower()
    if kmp and not {"none", "disabled"} & {word.strip() for word in kmp.split(",")}:
        said.append(f"KMP_AFFINITY={environ['KMP_AFFINITY']}")
    if environ.get("GOMP_CPU_AFFINITY", "").strip():
        said.append(f"GOMP_CPU_AFFINITY={environ['GOMP_CPU_AFFINITY']}")
    said = [
        f"{one} makes the OpenMP runtime pin each rank's main thread when it is loaded: the rank and its threads may"
        " end up on a part of the CPUs they were given; unset it"
        for one in said
    ]
    return tuple(filter(None, (unset, *said)))
