"""examples/ddp_digits.py under our launcher, with a real torch."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.launchers import LAUNCHER, launched
from tests.support.machines import two_machines

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


def test_ranks_of_two_machines_learn_the_digits() -> None:
    with two_machines() as machines, ExitStack() as jobs:
        started = []
        for node in (1, 0):
            meeting = f"--nnodes 2 --node-rank {node} --master-addr {machines[0].address} --master-port 29500"
            # gloo would use the address of the host's name, and both machines have the same name here.
            command = ["env", f"GLOO_SOCKET_IFNAME={machines[node].interface}", *LAUNCHER, "run", *meeting.split()]
            started.append(jobs.enter_context(launched(machines[node].runs([*command, DIGITS]), seconds=300)))
        for job in started:
            assert job.process.wait(300) == 0, job.stderr.read()
        shown = started[1].stdout.read()
    assert re.search(r"^ranks +2, ", shown, re.MULTILINE)
    assert re.search(r"^parameters +identical on every rank$", shown, re.MULTILINE)
