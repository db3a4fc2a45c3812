"""A probe finds out where clone does not share memory, as under QEMU's user mode, which makes it a fork."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

EMULATOR = shutil.which(f"qemu-{os.uname().machine}")

CODE = """
import json, sys
from rankspawn import Binding, Popen
from rankspawn._group.start import start_ranks
from rankspawn._start import engine as _engine

told = {"mechanisms": len(_engine.mechanisms())}
with Popen([sys.argv[1]]) as process:
    told["plain"] = [process.wait(), process.mechanism]
with Popen([sys.argv[1]], binding=Binding({int(sys.argv[2])})) as process:
    told["bound"] = [process.wait(), process.mechanism]
ranks = []
bindings = [None, Binding({int(sys.argv[2])})] * 2
start_ranks(
    ranks, [[sys.argv[1]]] * 4, env=None, rank_env=[{}] * 4, bindings=bindings, streams=[(None, None, None)] * 4
)
told["ranks"] = [[rank.wait(), rank.mechanism] for rank in ranks]
try:
    Popen([sys.argv[1]], die_with_parent=True)
except OSError as error:
    told["refused"] = str(error)
print(json.dumps(told))
"""


@pytest.mark.skipif(EMULATOR is None, reason="QEMU's user mode is not installed (Debian: qemu-user)")
@pytest.mark.parametrize(("first", "plain"), [("clone", "subprocess"), ("posix_spawn", "posix_spawn")])
def test_under_emulation_the_standard_path_is_taken(first: str, plain: str) -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    done = subprocess.run(
        [str(EMULATOR), sys.executable, "-c", CODE, "/bin/true", cpu],
        env={**os.environ, "RANKSPAWN_MECHANISM": first},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["plain"] == [0, plain]
    assert told["bound"] == [0, "subprocess"]
    assert told["ranks"] == [[0, plain], [0, "subprocess"]] * 2
    assert "no clone with shared memory" in told["refused"]
    assert told["mechanisms"] == (0 if first == "clone" else 1)
