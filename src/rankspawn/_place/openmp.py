"""What OpenMP in a rank should be told of its CPUs, and what in the environment works against its mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .topology import Topology


def omp_num_threads(topology: Topology, masks: Sequence[Iterable[int]]) -> tuple[int, ...]:
    """OMP_NUM_THREADS for each mask: its physical cores, a core that k ranks may use counting as 1/k; at least 1."""
    core_of = {cpu: number for number, core in enumerate(topology.cores) for cpu in core.cpus}
    cores = [{core_of[cpu] for cpu in mask if cpu in core_of} for mask in masks]
    users: dict[int, int] = {}
    for mine in cores:
        for core in mine:
            users[core] = users.get(core, 0) + 1
    # Sums of fractions are counted by how many share, so that 3 cores shared by 3 ranks are 1 and not 0.999.
    return tuple(max(1, int(sum(1 / users[core] for core in mine) + 1e-9)) for mine in cores)


def affinity_warnings(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What in the environment makes an OpenMP runtime shrink the mask of each rank when it is loaded.

    libgomp and libomp bind the main thread to its first place as soon as the library is imported (OpenMP 5.2, 2.6 and
    21.7; libgomp's manual, "Environment Variables"; Intel's KMP_AFFINITY): threads made later inherit one CPU.
    """
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
    return tuple(
        f"{one} makes the OpenMP runtime pin each rank's main thread when it is loaded: the rank and its threads may"
        " end up on a part of the CPUs they were given; unset it"
        for one in said
    )
