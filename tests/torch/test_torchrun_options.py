"""What ``rankspawn torchrun`` has beside torchrun's options: those of ``rankspawn run``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankspawn._ids import format_ids
from tests.support.processes import has_ended, new_cgroup

pytest.importorskip("torch.distributed.run", reason="torch is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")

TORCHRUN = [sys.executable, "-m", "rankspawn", "torchrun", "--standalone"]
ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}

# A worker says where it runs, and whether the port of its rank 0 is held for a server.
WORKER = """
import json, os, socket, subprocess, sys
port = int(os.environ["MASTER_PORT"])
with socket.socket() as plain:
    try:
        plain.bind(("127.0.0.1", port))
        held = False
    except OSError:
        held = True
if os.environ["RANK"] == "0":
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
left = subprocess.Popen(["setsid", "sleep", "120"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
said = [sorted(os.sched_getaffinity(0)), held, left.pid]
os.write(1, (json.dumps(said) + "\\n").encode())
sys.exit(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1")
"""


def torchrun(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "worker.py").write_text(WORKER)
    command = [*TORCHRUN, *options, "worker.py"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=folder, env={**ENVIRONMENT, **environment}
    )


def test_a_report_places_a_cgroup_and_a_held_port(tmp_path: Path) -> None:
    """All at once, because each job takes the time of an import of torch; the first attempt fails."""
    mask = sorted(os.sched_getaffinity(0))
    if len(mask) < 2:
        pytest.skip("needs two CPUs")
    with new_cgroup() as parent:
        done = torchrun(
            tmp_path, "--nproc-per-node", "2", "--max-restarts", "1", "--report", "report.json",
            "--timeline", "job.svg", "--numa-binding", "node", "--devices", "none", "--reserve-cores", "1",
            "--cgroup", str(parent), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not [path for path in parent.iterdir() if path.is_dir()]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == 4
    for cpus, held, left in said:
        assert held
        assert mask[0] not in cpus and {*cpus} < {*mask}
        assert has_ended(left), "it left its rank's session, and not the cgroup"
    report = json.loads((tmp_path / "report.json").read_text())
    ends = [[rank["exit"]["status"] for rank in attempt["ranks"]] for attempt in report["attempts"]]
    assert len(ends) == 2 and ends[0][1] == 1 and ends[1] == [0, 0]
    bound = {rank["binding"]["effective"]["cpus"] for attempt in report["attempts"] for rank in attempt["ranks"]}
    assert bound == {format_ids(cpus) for cpus, _, _ in said}
    assert report["attempts"][1]["ranks"][0]["exited"] > 0
    assert (tmp_path / "job.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--devices", "none"], "--devices needs --numa-binding"),
        (["--reserve-cores", "1"], "--reserve-cores needs --numa-binding"),
        (
            ["--hang-timeout", "60"],
            "--hang-timeout: only torch's agent ends and restarts workers; use `rankspawn run` for this option",
        ),
        (["--report", "nowhere/r.json"], "nowhere/r.json: there is no such folder"),
    ],
)
def test_wrong_usage(options: list[str], words: str, tmp_path: Path) -> None:
    done = torchrun(tmp_path, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"rankspawn torchrun: error: {words}\n")


def test_a_cgroup_that_is_none_is_said(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--cgroup", str(tmp_path / "none"))
    assert done.returncode == 1
    assert str(tmp_path / "none") in done.stderr


def test_what_only_torchrun_has_may_be_abbreviated_as_there(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--t", "3", "--re", "3", "--no-", "/bin/echo")
    assert done.returncode == 0 and "worker.py" in done.stdout, done.stderr


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    script = tmp_path / "crlf.sh"
    script.write_bytes(b"#!/bin/sh\r\ntrue\r\n")
    script.chmod(0o755)
    done = torchrun(tmp_path, "--no-python", str(script))
    assert done.returncode == 1
    if sys.version_info >= (3, 11):
        assert "its interpreter /bin/sh\\r does not" in done.stderr
