"""A pytest plugin for the machine's serial line: one line a check as it ends, and the counts as the last line."""

from __future__ import annotations

import os
from collections import Counter

import pytest

_counts: Counter[str] = Counter()
_seconds: dict[str, float] = {}
_failed: set[str] = set()


def pytest_sessionstart() -> None:
    print(f"numavm: kernel {os.uname().release}, {os.cpu_count()} CPUs", flush=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Set-up and tear-down count with the check: the fixture that looks for leftovers fails there."""
    name = report.nodeid.rpartition("/")[2].replace(".py::test_", ": ").removeprefix("checks_")
    _seconds[name] = _seconds.get(name, 0.0) + report.duration
    if not report.passed:
        _failed.add(name)
        print(f"---- {name}, {report.when}\n{report.longreprtext}\n{report.capstdout}{report.capstderr}", flush=True)
    if report.when == "teardown":
        result = "failed" if name in _failed else "passed"
        _counts[result] += 1
        print(f"{result}  {_seconds[name]:5.2f} s  {name}", flush=True)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _counts["failed"] += 1
        print(f"---- {report.nodeid}\n{report.longrepr}", flush=True)


def pytest_sessionfinish() -> None:
    print(f"{_counts['passed']} passed, {_counts['failed']} failed", flush=True)
