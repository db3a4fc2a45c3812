"""Which processes are ranks: those with the variables that torchrun sets for its ranks, whatever started them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from .kernel import environment_of, parent_of, processes_below


def ranks_below(pid: int, proc: str = "/proc") -> dict[int, int | None]:
    """The ranks that a launcher has started: RANK by pid.

    Args:
        pid: A launcher, or any other process: if no process below it is a rank, it is the only one found.
        proc: Where procfs is mounted.
    """
    found = _ranks_among(processes_below([pid], proc)[pid], proc)
    return {**found} if found else {pid: None}


def ranks_of_job(run_id: str, proc: str = "/proc") -> dict[int, int | None]:
    """The ranks of a job on this machine, by their TORCHELASTIC_RUN_ID: RANK by pid; empty if there are none."""
    return {**_ranks_among(_pids(proc), proc, run_id)}


def all_ranks(proc: str = "/proc") -> dict[int, int]:
    """The ranks of all jobs on this machine whose variables this user may read: RANK by pid."""
    return _ranks_among(_pids(proc), proc)


def _pids(proc: str) -> list[int]:
    return [int(name) for name in os.listdir(proc) if name.isdecimal()]


def _ranks_among(pids: Iterable[int], proc: str, run_id: str | None = None) -> dict[int, int]:
    """The processes with a RANK that they did not inherit from a rank."""
    told: dict[int, Mapping[str, str]] = {}

    def identity(pid: int) -> tuple[str | None, str | None, str | None]:
        if pid not in told:
            told[pid] = environment_of(pid, proc)
        its = told[pid]
        return its.get("RANK"), its.get("LOCAL_RANK"), its.get("TORCHELASTIC_RUN_ID")

    found = {}
    for pid in pids:
        rank, local, job = identity(pid)
        if rank is None or not rank.isdecimal() or local is None or (run_id is not None and job != run_id):
            continue
        if identity(parent_of(pid, proc)) != (rank, local, job):
            found[pid] = int(rank)
    return dict(sorted(found.items(), key=lambda one: one[1]))
