"""``rankspawn ps``: the ranks of running jobs, by rankspawn's launchers and by others."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankspawn import launch
from rankspawn._end.guard import Guard
from rankspawn._output.noted import noted, read_noted
from rankspawn._stacks.now import jobs_now
from tests.support.launchers import LAUNCHER, SLEEP, completed, in_ranks, launched
from tests.support.processes import eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="procfs")


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder / "rankspawn"


def job_of(launcher: int) -> dict[str, Any]:
    """What ps says of this launcher's job."""
    done = completed([*LAUNCHER, "ps", "--json"])
    assert (done.returncode, done.stderr) == (0, "")
    (job,) = [job for job in json.loads(done.stdout) if job["launcher"] == launcher]
    return dict(job)


def test_the_ranks_of_a_job(runtime: Path, tmp_path: Path) -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    options = ["--nproc-per-node", "2", "--cpus", cpu, "--log-dir", str(tmp_path / "logs")]
    code = SLEEP.replace("say(os.getpid())", "print('epoch', os.environ['RANK'], flush=True)")
    with launched(in_ranks(code, *options)) as job:
        logs = tmp_path / "logs"
        eventually(lambda: len([one for one in logs.glob("latest/*/*/stdout.log") if one.read_text()]) == 2)
        about = job_of(job.process.pid)
        assert [(rank["rank"], rank["asked"], rank["cpus"], rank["strays"]) for rank in about["ranks"]] == [
            (0, cpu, cpu, 0),
            (1, cpu, cpu, 0),
        ]
        for rank in about["ranks"]:
            assert rank["state"] in "RSD" and rank["threads"] >= 1 and rank["rss"] > 1 << 20
            assert rank["cpu"] > 0 and rank["delay"] >= 0 and 0 <= rank["silent"] <= rank["age"] + 1
            assert rank["last_line"] == f"epoch {rank['rank']}" and rank["stdout"].endswith("stdout.log")
        assert about["world"] == "2" and "rankspawn" in about["command"]
        text = completed([*LAUNCHER, "ps"]).stdout
        assert f"2 of 2 ranks, launcher {job.process.pid}: " in text and "epoch 1" in text
        job.process.send_signal(signal.SIGTERM)
        job.end()
    assert [*runtime.iterdir()] == []


@pytest.mark.parametrize("command", [["ps"], ["dump"], ["dump", "--folded"]], ids=" ".join)
def test_names_that_the_locale_or_a_terminal_cannot_show(command: list[str], runtime: Path, tmp_path: Path) -> None:
    script = tmp_path / "pr\u00e9t.py"
    script.write_text(
        "import os, time\ndef pr\u00eate():\n    os.write(1, b'here')\n    time.sleep(120)\npr\u00eate()\n"
    )
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    job = [*LAUNCHER, "run", str(script), "one\ntwo\x1b[31m", "x" * 999]
    with subprocess.Popen(job, stdout=subprocess.PIPE) as launcher:
        try:
            assert launcher.stdout is not None and launcher.stdout.read(4) == b"here"
            about = [str(launcher.pid)] if command[0] == "dump" else []
            done = subprocess.run([*LAUNCHER, *command, *about], env=environ, capture_output=True, timeout=60)
        finally:
            launcher.terminate()
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout and b"Traceback" not in done.stdout
    if command == ["ps"]:
        (line,) = [one for one in done.stdout.splitlines() if b"launcher %d:" % launcher.pid in one]
        assert rb"pr\xe9t.py one\ntwo\x1b[31m xxx" in line and len(line) < 300 and line.endswith(b"x ...")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_threads_that_have_left_their_binding_are_marked(runtime: Path) -> None:
    cpu, other = sorted(os.sched_getaffinity(0))[:2]
    code = f"import os\nos.sched_setaffinity(0, {{{other}}})\n" + SLEEP
    with launched(in_ranks(code, "--cpus", str(cpu))) as job:
        job.hear(1)
        (rank,) = job_of(job.process.pid)["ranks"]
        assert (rank["asked"], rank["cpus"], rank["strays"]) == (str(cpu), str(other), rank["threads"])
        assert f"{other} ! asked {cpu}, {rank['threads']} threads" in completed([*LAUNCHER, "ps"]).stdout


def test_ranks_of_another_launcher(runtime: Path) -> None:
    variables = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "other"}
    with subprocess.Popen(["sleep", "300"], env={**os.environ, **variables}) as rank:
        eventually(lambda: Path(f"/proc/{rank.pid}/comm").read_text() == "sleep\n")
        about = job_of(os.getpid())
        rank.kill()
    assert (about["job"], about["world"]) == ("other", "8")
    assert [(one["rank"], one["pid"], one["asked"]) for one in about["ranks"]] == [(3, rank.pid, None)]


def test_notes_are_this_users_alone(runtime: Path) -> None:
    with launched(in_ranks(SLEEP)) as job:
        job.hear(1)
        (note,) = runtime.iterdir()
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700 and stat.S_IMODE(note.stat().st_mode) == 0o600


def test_a_killed_launchers_note_is_removed_by_its_guard(runtime: Path) -> None:
    if why := Guard.why_not():
        pytest.skip(why)
    with launched(in_ranks(SLEEP)) as job:
        job.hear(1)
        assert len([*runtime.iterdir()]) == 1
        job.process.kill()
        job.end()
        eventually(lambda: [*runtime.iterdir()] == [])


def test_a_guard_whose_launcher_lives_leaves_its_note(runtime: Path) -> None:
    with noted(()):
        with launch(["true"], 1) as group:
            group.wait(60)
        assert len([*runtime.iterdir()]) == 1


def test_a_killed_launchers_note_is_removed_by_the_next_look(runtime: Path) -> None:
    with launched(in_ranks(SLEEP, "--no-guard")) as job:
        job.hear(1)
        job.process.kill()
        job.end()
    assert len([*runtime.iterdir()]) == 1
    assert read_noted() == {}
    assert [*runtime.iterdir()] == []


def test_nothing_is_noted_where_others_may_write(runtime: Path) -> None:
    runtime.mkdir()
    runtime.chmod(0o777)
    with noted(()):
        assert [*runtime.iterdir()] == []


@pytest.mark.parametrize("place", ["", "relative", "/no/such/folder"])
def test_without_a_place_nothing_is_noted(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", place)
    with noted(()):
        assert read_noted() == {}


def test_watch_looks_again_until_it_is_interrupted(runtime: Path) -> None:
    with launched([*LAUNCHER, "ps", "--watch", "0.05"]) as ps:
        assert ps.stdout.readline() and ps.stdout.readline()
        ps.process.send_signal(signal.SIGINT)
        assert ps.end() in (-signal.SIGINT, 128 + signal.SIGINT)
        assert "Traceback" not in ps.stderr.read()


# As the kernel writes it on a machine with two nodes, shortened: one file, a heap, a huge page, and a shared library.
NUMA_MAPS = """\
55d0c8e00000 default file=/usr/bin/python3.11 mapped=10 mapmax=3 N0=4 N1=6 kernelpagesize_kB=4
55d0c9a00000 bind:0 heap anon=300 dirty=300 active=0 N0=200 N1=100 kernelpagesize_kB=4
7f3a00000000 bind:0 anon=2 dirty=2 N1=2 kernelpagesize_kB=2048
7f3b00000000 default file=/usr/lib/libN9=7.so mapped=5 N0=5 kernelpagesize_kB=4
7ffd00000000 default
"""


@pytest.mark.parametrize(("node_of_cpu", "far"), [(0, (6 + 100) * 4096 + (2 << 21)), (1, (4 + 200 + 5) * 4096)])
def test_pages_on_other_nodes(tmp_path: Path, node_of_cpu: int, far: int) -> None:
    """The process is real, and so are its files in procfs but for numa_maps, which says the same with one node."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": f"pages-{os.getpid()}"}
    with subprocess.Popen(["sleep", "300"], env={**os.environ, **variables}) as rank:
        try:
            eventually(lambda: Path(f"/proc/{rank.pid}/comm").read_text() == "sleep\n")
            proc, nodes = tmp_path / "proc", tmp_path / "node"
            (proc / str(rank.pid)).mkdir(parents=True)
            for name in ("stat", "environ", "schedstat", "statm", "task", "fd", "cmdline", "comm"):
                (proc / str(rank.pid) / name).symlink_to(f"/proc/{rank.pid}/{name}")
            (proc / "uptime").symlink_to("/proc/uptime")
            (proc / str(rank.pid) / "numa_maps").write_text(NUMA_MAPS)
            for node in (0, 1):
                (nodes / f"node{node}").mkdir(parents=True)
                (nodes / f"node{node}" / "cpulist").write_text("0-1023\n" if node == node_of_cpu else "\n")
            (job,) = jobs_now({}, pages=True, proc=str(proc), nodes=str(nodes))
            assert [one.off_node for one in job.ranks] == [far]
            (job,) = jobs_now({}, proc=str(proc), nodes=str(nodes))
            assert [one.off_node for one in job.ranks] == [None]
        finally:
            rank.kill()


def test_pages_of_a_rank_here(runtime: Path) -> None:
    with launched(in_ranks(SLEEP)) as job:
        job.hear(1)
        jobs = json.loads(completed([*LAUNCHER, "ps", "--pages", "--json"]).stdout)
        (rank,) = [rank for one in jobs if one["launcher"] == job.process.pid for rank in one["ranks"]]
        here = Path(f"/proc/{rank['pid']}/numa_maps").exists() and Path("/sys/devices/system/node/node0").exists()
        assert (rank["off_node"] is not None) == here
        if here and not Path("/sys/devices/system/node/node1").exists():
            assert rank["off_node"] == 0
