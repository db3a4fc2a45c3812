"""A trace of ours beside one of torch.profiler's, of the same process: their events lie where they happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROFILED = """
import os, sys, torch
with torch.profiler.profile() as profiler:
    torch.ones(3) + 1
profiler.export_chrome_trace(sys.argv[1])
"""


def test_a_trace_lies_over_the_profilers(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROFILED)
    command = ["-m", "rankspawn", "run", "--nproc-per-node", "1", "--timeline", "job.json", "train.py", "torch.json"]
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True)
    ours, theirs = (json.loads((tmp_path / name).read_text()) for name in ("job.json", "torch.json"))
    assert ours["baseTimeNanoseconds"] == theirs["baseTimeNanoseconds"]
    run = next(one for one in ours["traceEvents"] if one["name"] == "run")
    operators = [one for one in theirs["traceEvents"] if one["ph"] == "X" and one["cat"] == "cpu_op"]
    assert {one["pid"] for one in operators} == {run["pid"]}
    for one in operators:
        assert run["ts"] < one["ts"] < run["ts"] + run["dur"]
