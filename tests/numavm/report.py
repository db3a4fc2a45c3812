"""A pytest plugin for the machine's serial line: it prints a line for each check as it ends, and the counts last."""

from __future__ import annotations

import faulthandler
import os
from collections import Counter

import pytest

from tests.numavm.machine import RUNNING

_counts: Counter[str] = Counter()
_seconds: dict[str, float] = {}
_failed: set[str] = set()
_skipped: dict[str, str] = {}
"""The checks that were skipped, and why."""


def pytest_configure(config: pytest.Config) -> None:
    config.option.tbstyle = "short"  # The terminal plugin has this option, and is not loaded.


def pytest_sessionstart() -> None:
    """Shortly before run.py ends the machine, a check that hangs prints where. It uses a copy of descriptor 2, because
    pytest captures that one."""
    faulthandler.dump_traceback_later(float(os.environ["RANKSPAWN_NUMAVM_SECONDS"]), exit=True, file=os.dup(2))
    print(f"numavm: kernel {os.uname().release}, {os.cpu_count()} CPUs", flush=True)


def _name(nodeid: str) -> str:
    return nodeid.rpartition("/")[2].replace(".py::test_", ": ").removeprefix("checks_")


def pytest_runtest_logstart(nodeid: str) -> None:
    print(f"{RUNNING}{_name(nodeid)}", flush=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A check's set-up and tear-down count as the check, because the fixture that looks for leftovers fails there."""
    name = _name(report.nodeid)
    _seconds[name] = _seconds.get(name, 0.0) + report.duration
    if report.skipped:
        _skipped[name] = str(report.longrepr[2]).removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
    elif not report.passed:
        _failed.add(name)
        print(f"---- {name}, {report.when}\n{report.longreprtext}\n{report.capstdout}{report.capstderr}", flush=True)
    if report.when == "teardown":
        why = "" if name in _failed else _skipped.get(name, "")
        result = "failed" if name in _failed else "skipped" if name in _skipped else "passed"
        _counts[result] += 1
        print(f"{result:7} {_seconds[name]:5.2f} s  {name}{why and ': '}{why}", flush=True)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _counts["failed"] += 1
        print(f"---- {report.nodeid}\n{report.longrepr}", flush=True)


def pytest_sessionfinish() -> None:
    if _skipped:
        print(f"{_counts['skipped']} skipped; the others:", flush=True)
    print(f"{_counts['passed']} passed, {_counts['failed']} failed", flush=True)
