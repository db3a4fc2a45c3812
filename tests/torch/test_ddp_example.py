"""examples/ddp_digits.py under our launcher, with a real torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

DIGITS = str(Path(__file__).parents[2] / "examples" / "ddp_digits.py")


def test_two_bound_ranks_learn_the_digits() -> None:
    command = [sys.executable, "-m", "rankspawn", "run", "--nproc-per-node", "2", "--numa-binding", "node", DIGITS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ranks +2, \d+ threads each$", done.stdout, re.MULTILINE)
    accuracy = re.search(r"^test accuracy +(0\.\d+|1\.0+) ", done.stdout, re.MULTILINE)
    assert accuracy is not None and float(accuracy[1]) > 0.9
    assert re.search(r"^parameters +identical on every rank$", done.stdout, re.MULTILINE)
