"""What the other ranks did when one has failed, under torch's agent."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="procfs")

ONE_FAILS = """
import os, sys, time
from pathlib import Path
here = Path(__file__).parent
if os.environ["RANK"] == "0":
    (here / "ready").touch()
    time.sleep(300)
while not (here / "ready").exists():
    time.sleep(0.01)
time.sleep(0.5)
sys.exit(3)
"""


@pytest.mark.parametrize("options", [["--stacks"], []])
def test_what_the_others_did_is_logged(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "script.py").write_text(ONE_FAILS)
    command = [sys.executable, "-m", "rankspawn.torchrun", *options, "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--log-dir", str(tmp_path / "logs"), str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    said = re.findall(r"rank 1 has failed; what the others did then: rank 0: (.*)", done.stderr)
    assert len(said) == len(options), done.stderr
    written = [*tmp_path.glob("logs/*/attempt_0/stacks.txt")]
    assert len(written) == len(options)
    for path in written:
        assert re.search(r"^rank 0, process \d+: .*script.py$", path.read_text(), re.MULTILINE)
