"""``pytest benchmarks`` is what a user of pytest-benchmark expects. The table of ``make bench`` is run by CI."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
POPEN = "benchmarks/test_calls.py::test_call[spawn: subprocess.Popen, unbound]"
OURS = "benchmarks/test_calls.py::test_call[spawn: rankspawn.Popen(binding=)]"

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is measured is Linux's"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the measured programs need a C compiler"),
]


def run(folder: Path, *options: str) -> tuple[str, list[dict[str, Any]], float]:
    """Run two benchmarks. Returns the output, the JSON's list of benchmarks, and the seconds that all took."""
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("rankspawn._spawn", reason="this install has no extension")
    report = folder / "report.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--benchmark-json={report}"]
    command += [f"--benchmark-storage=file://{folder}", "--benchmark-max-time=0.1", *options, POPEN, OURS]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    took = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(report.read_text())["benchmarks"], took


def test_its_clock_times_the_calls(tmp_path: Path) -> None:
    _, benchmarks, took = run(tmp_path)
    assert [one["fullname"] for one in benchmarks] == [POPEN, OURS]
    for one in benchmarks:
        stats = one["stats"]
        assert one["options"]["timer"] == "perf_counter"
        assert len(stats["data"]) == stats["rounds"] >= 5
        assert 0 < sum(stats["data"]) < took  # real seconds of this very run


def test_two_runs_are_compared(tmp_path: Path) -> None:
    run(tmp_path, "--benchmark-save=before")
    shown, _, _ = run(tmp_path, "--benchmark-compare", "--benchmark-compare-fail=median:100000%")
    assert "before" in shown and "NOW" in shown
