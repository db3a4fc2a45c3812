"""A pool of multiprocessing whose workers have a CPU each, from before their first import."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor

from rankspawn import Binding, get_context


def where(number: int) -> tuple[int, list[int]]:
    return number, sorted(os.sched_getaffinity(0))


def main() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    context = get_context("spawn", [Binding({cpu}) for cpu in cpus])
    with ProcessPoolExecutor(len(cpus), mp_context=context) as pool:
        found = list(pool.map(where, range(4)))
    print([number for number, _ in found], all(len(own) == 1 and own[0] in cpus for _, own in found))


if __name__ == "__main__":
    main()
