"""torch's own TCPStore listens on the port that a launcher holds for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch.distributed", reason="torch is not installed")

STORE = r"""
import os, socket, sys
import torch.distributed as dist
port = int(os.environ["MASTER_PORT"])
if os.environ["RANK"] == "0":
    with socket.socket() as plain:
        try:
            plain.bind(("127.0.0.1", port))
            sys.exit("nobody holds the port")
        except OSError:
            pass
dist.init_process_group("gloo")
seen = [None] * dist.get_world_size()
dist.all_gather_object(seen, dist.get_rank())
# One write: `python -u` would write each word of a print by itself, between those of the other rank.
os.write(1, f"{os.environ['MASTER_ADDR']} {seen}\n".encode())
# Both have written by now: the launcher ends the other rank as soon as one has failed.
dist.barrier()
dist.destroy_process_group()
# Not sys.exit: torch's gloo threads may still let go of tensors, and abort where the interpreter is ending.
os._exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
"""


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
def test_ranks_meet_at_a_held_port_in_each_attempt(address: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(STORE)
    command = [sys.executable, "-m", "rankspawn", "run", "--nproc-per-node", "2", "--max-restarts", "1"]
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        [*command, "--master-addr", address, str(script)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{address.strip('[]')} [0, 1]"] * 4
