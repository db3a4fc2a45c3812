"""Calls of rankspawn and of others under pytest-benchmark: ``pytest benchmarks``.

Its clock times each call, so its options mean what they say: ``--benchmark-json``, ``--benchmark-autosave`` and
``--benchmark-compare`` between two states of the code. It runs one test after the other, and the machine's mood is in
what it compares. ``make bench`` prints ratios of what was timed in turns, and has the floor in C, and what is no time
of a call: how late an end is noticed, and how much CPU time a launcher takes that waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from figures import SECTIONS
from harness import Case, Situation
from job import Place, Skip, module
from worker import JOBS

# Jobs whose time is that of the call.
CALLS = {"popen", "numactl", "handler", "threads", "launch", "numactl_loop", "context", "run", "command", "plan"}
CALLS |= {"interpreter"}


def _parameter(section: str, case: Case) -> Any:
    situation = case.situation
    words = [f"{situation.fds} fds" * (situation.fds > 10), f"{situation.touch_mib} MiB" * (situation.touch_mib > 0)]
    return pytest.param(section, case, id=", ".join([f"{section}: {case.label}", *filter(None, words)]))


CASES = [
    _parameter(section.group.name, case)
    for section in SECTIONS
    for case in section.group.cases
    # torch's plan is made by functions that are patched for the whole process.
    if case.job in CALLS and (case.job, dict(case.options).get("api")) != ("plan", "torch")
]


@pytest.mark.parametrize(("section", "case"), CASES)
def test_call(benchmark: Any, place: Place, enter: Callable[[Situation], None], section: str, case: Case) -> None:
    benchmark.group = section
    try:
        enter(case.situation)
        benchmark(JOBS[case.job](place, **dict(case.options)))
    except Skip as why:
        pytest.skip(str(why))


def test_terminate(benchmark: Any) -> None:
    """``terminate()`` of 64 ranks that SIGTERM ends, until all are reaped and nobody is left in their sessions."""
    launch = module("rankspawn").launch
    groups = []

    def started() -> tuple[tuple[Any], dict[str, Any]]:
        groups.append(launch(["sleep", "120"], 64))
        groups[-1].wait_any(0.1)
        return (groups[-1],), {}

    benchmark.group = "groups"
    try:
        benchmark.pedantic(lambda group: group.terminate(), setup=started, rounds=20)
    finally:
        for group in groups:
            group.close()
