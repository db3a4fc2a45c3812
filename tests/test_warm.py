"""A warm start: ranks forked from a template are the launcher's children, born as those that are executed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rankspawn import Binding, MemoryPolicy, RankGroup, Template, launch
from rankspawn._place import glance
from rankspawn._procfs import children
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.processes import PATIENCE, eventually, has_ended, new_cgroup
from tests.support.sysfs_tree import Machine, write

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a warm start needs Linux"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
]

# What a rank is born with, as it sees it itself.
BIRTH = """
import json, os, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limits = open("/proc/self/limits").read()
json.dump({
    "argv": sys.argv, "cwd": os.getcwd(), "parent": os.getppid(),
    "leads": [os.getsid(0), os.getpgid(0)] == [os.getpid()] * 2,
    "cpus": sorted(os.sched_getaffinity(0)), "policy": open("/proc/self/numa_maps").readline().split()[1],
    "streams": [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)],
    "open": len(os.listdir("/proc/self/fd")) - 1, "umask": status["Umask"].strip(),
    "signals": [status[name].strip() for name in ("SigBlk", "SigIgn", "SigCgt")],
    "cmdline": open("/proc/self/cmdline").read().split(chr(0))[:-1], "limits": limits,
    "comm": open("/proc/self/comm").read(),
    "environ": sorted(open("/proc/self/environ").read().split(chr(0))[:-1]),
    "variables": {name: value for name, value in os.environ.items()},
}, sys.stdout)
"""
PYTHON = [sys.executable, "-I", "-S"]
PER_LAUNCH = ("MASTER_PORT", "RANKSPAWN_CALL_NS", "TORCHELASTIC_ERROR_FILE")


def births(folder: Path, nprocs: int = 2, **options: Any) -> list[dict[str, Any]]:
    script = folder.parent / "birth.py"
    script.write_text(BIRTH)
    with launch([*PYTHON, str(script), "word"], nprocs, log_dir=folder, **options) as group:
        assert group.wait(PATIENCE) == (0,) * nprocs
        told = [json.loads(Path(files.stdout).read_text()) for files in group.files or ()]
        pids, mechanisms = group.pids(), {rank.mechanism for rank in group.ranks}
    for rank, one in enumerate(told):
        assert one.pop("parent") == os.getpid()
        assert [Path(name).name for name in one.pop("streams")] == ["null", "stdout.log", "stderr.log"] or rank >= 0
        one["mechanisms"] = mechanisms
        for name in PER_LAUNCH:
            one["variables"].pop(name, None)
        one["environ"] = [pair for pair in one["environ"] if not pair.startswith(PER_LAUNCH)]
    assert len(set(pids)) == nprocs
    return told


def test_a_warm_rank_is_born_as_a_cold_one(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    options: dict[str, Any] = {
        "bindings": [Binding({cpus[0]}, MemoryPolicy("preferred", {0})), Binding({cpus[-1]})],
        "cwd": tmp_path, "rank_env": [{"A": "0"}, {"A": "1"}],
    }  # fmt: skip
    cold = births(tmp_path / "cold", **options)
    warm = births(tmp_path / "warm", warm=["json"], **options)
    assert [one.pop("mechanisms") for one in (*cold, *warm)] == [{"clone"}] * 2 + [{"warm"}] * 2
    assert warm == cold


def test_a_template_is_kept(tmp_path: Path) -> None:
    before = children()
    with Template(["json"]) as template:
        for turn in range(3):
            births(tmp_path / f"{turn}", warm=template)
        (told,) = template.report()
        assert told["ranks"] == 6 and told["refused"] is None and list(told["modules"]) == ["json"]
    assert children() == before


def test_a_template_for_one_launch_ends_when_its_ranks_have_been_forked() -> None:
    before = children()
    with Template(["json"], lasts=False) as template:
        with launch([*PYTHON, "-c", "import time; time.sleep(600)"], 2, warm=template) as group:
            assert {rank.mechanism for rank in group.ranks} == {"warm"}
            assert template.report()[0]["pid"] not in children()
            assert group.wait_any(0.1) == []
            group.kill()
        with pytest.raises(ValueError, match="the template is closed"):
            launch([*PYTHON, "-c", ""], 2, warm=template)
    assert children() == before


# What runs beside the ranks of ``rankspawn run``, once they are there.
BESIDE = """
import contextlib, json, os, pathlib, sys, time
def beside():
    tasks = pathlib.Path(f"/proc/{os.getppid()}/task").glob("*/children")
    found = []
    for pid in [pid for task in tasks for pid in task.read_text().split()]:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.append(pathlib.Path(f"/proc/{pid}/comm").read_text().strip())
    return sorted(found)
expected, until = json.loads(sys.argv[1]), time.monotonic() + 60
while beside() != expected and time.monotonic() < until:
    time.sleep(0.01)
assert beside() == expected, beside()
os.write(1, b"as expected")
"""


@pytest.mark.parametrize("restarts", [0, 1])
def test_run_keeps_its_template_for_restarts_alone(restarts: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(BESIDE)
    name = Path(sys.executable).name[:15]
    names = ["rankspawn-guard"] * (1 + restarts) + [name] * (1 + restarts)  # the rank, the template, and its own guard
    done = subprocess.run(
        [
            sys.executable, "-m", "rankspawn", "run", "--warm", "json", f"--max-restarts={restarts}", str(script),
            json.dumps(sorted(names)),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "as expected"), done.stderr


def test_restarts_use_the_template() -> None:
    script = "import os, sys; sys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] == '0')"
    with launch([*PYTHON, "-c", script], 2, warm=["json"], max_restarts=1) as group:
        assert group.wait(PATIENCE) == (0, 0)
    attempts = group.report()["attempts"]
    assert [rank["mechanism"] for one in attempts for rank in one["ranks"]] == ["warm"] * 4
    assert [[told["ranks"] for told in one["templates"]] for one in attempts] == [[2], [4]]


def test_each_node_has_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    monkeypatch.setattr(glance, "homes", lambda cpus_of_ranks: [min(one) for one in cpus_of_ranks])
    bindings = [Binding({cpus[0]}), Binding({cpus[1]}), Binding({cpus[0]})]
    with Template(["json"]) as template:
        with launch([*PYTHON, "-c", ""], 3, warm=template, bindings=bindings) as group:
            assert group.wait(PATIENCE) == (0, 0, 0)
        assert [(told["cpus"], told["ranks"]) for told in template.report()] == [(str(cpus[0]), 2), (str(cpus[1]), 1)]


def test_homes(tmp_path: Path) -> None:
    root = f"{write(tmp_path, Machine(sockets=2, nodes=1, caches=1, cores=2, threads=1))}/"
    assert glance.homes([{0}, {0, 1}, {2, 3}, {1, 2}, None], root) == [0, 0, 1, None, None]


def test_a_launch_by_another_thread() -> None:
    """The template, and so the death signal of the ranks, does not depend on the thread that launches."""
    groups: list[RankGroup] = []
    with Template(["json"]) as template:
        code = "import time; time.sleep(1000)"
        starter = threading.Thread(
            target=lambda: groups.append(launch([*PYTHON, "-c", code], 2, warm=template, die_with_parent=True))
        )
        starter.start()
        starter.join()
        with groups[0] as group:
            assert {rank.mechanism for rank in group.ranks} == {"warm"}
            assert group.wait_any(0.3) == []


def test_how_a_warm_rank_ends() -> None:
    script = (
        "import os, sys, time; rank = int(os.environ['RANK']); rank == 2 and os.kill(os.getpid(), 11); sys.exit(rank)"
    )
    with launch([*PYTHON, "-c", script], 3, warm=["json"], keep_going=True) as group:
        assert group.wait(PATIENCE) == (0, 1, -signal.SIGSEGV)
    report = group.report()["attempts"][0]
    assert [rank["mechanism"] for rank in report["ranks"]] == ["warm"] * 3
    assert [template["ranks"] for template in report["templates"]] == [3]
    assert all(rank["rusage"] and rank["rusage"]["user"] < 1 for rank in report["ranks"])


def test_ranks_live_on_when_the_template_is_killed() -> None:
    with Template(["json"]) as template:
        with launch([*PYTHON, "-c", "import time; time.sleep(1000)"], 2, warm=template, grace=0.1) as group:
            pid = template.report()[0]["pid"]
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert group.wait_any(0.3) == []
            with launch([*PYTHON, "-c", ""], 1, warm=template) as other:
                assert other.wait(PATIENCE) == (0,)
                assert other.ranks[0].mechanism == "warm"
        assert [told["refused"] for told in template.report()] == ["the template has ended", None]


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists()
    or tuple(map(int, os.uname().release.split(".")[:2])) < (6, 1),
    reason="needs MADV_COLLAPSE of Linux 6.1",
)
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer's memory is not collapsed")
def test_a_template_that_lasts_has_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.py").write_text("kept = b'x' * (16 << 20)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def huge() -> int:
        with open(f"/proc/{template.report()[0]['pid']}/smaps_rollup") as rollup:
            return next(int(line.split()[1]) for line in rollup if line.startswith("AnonHugePages:"))

    with Template(["large"]) as template:
        for _ in range(2):
            with launch(
                [*PYTHON[:1], "-c", "import large; assert large.kept == b'x' * (16 << 20)"], 2, warm=template
            ) as group:
                assert group.wait(PATIENCE) == (0, 0)
            eventually(lambda: huge() >= 8 << 10)
        assert template.report()[0]["ranks"] == 4


# A seccomp filter that answers clone3(2), whose number is the same on all processors, with ENOSYS, as Docker's does.
WITHOUT_CLONE3 = """
import ctypes, struct
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 435), (0x06, 0, 0, 0x00050000 | 38), (0x06, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("=HBBI", *step) for step in steps)
kept = ctypes.create_string_buffer(code)
program = struct.pack("@HP", 4, ctypes.addressof(kept))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0) == 0, "PR_SET_SECCOMP"
assert libc.syscall(435, 0, 0) == -1 and ctypes.get_errno() == 38
"""


@pytest.mark.parametrize("clone", ["clone3", "clone"])
@pytest.mark.parametrize("in_cgroup", [False, True], ids=["", "cgroup"])
def test_a_template_without_clone3(
    clone: str, in_cgroup: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "preloaded.py").write_text(WITHOUT_CLONE3 if clone == "clone" else "")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {}
        if in_cgroup:
            options["cgroup"] = stack.enter_context(new_cgroup())
        with Template(["preloaded"], required=True) as template:
            for turn in range(2):
                code = "print(open('/proc/self/cgroup').read(), open('/proc/thread-self/comm').read(), end='')"
                with launch(
                    [sys.executable, "-c", code], 2, warm=template, log_dir=tmp_path / f"{turn}", **options
                ) as group:
                    assert group.wait(PATIENCE) == (0, 0)
                    assert {rank.mechanism for rank in group.ranks} == {"warm"}
                    told = {Path(files.stdout).read_text() for files in group.files or ()}
                own = Path("/proc/self/cgroup").read_text()
                assert all((own in text) == (not in_cgroup) for text in told), told


def test_a_guard_ends_what_warm_ranks_have_started() -> None:
    launcher = """
import os, sys
from rankspawn import launch
code = "import os, subprocess; kept = subprocess.Popen(['sleep', '1000']); os.write(1, b'%d\\\\n' % kept.pid)"
code += "; kept.wait()"
with launch([sys.executable, "-S", "-c", code], 2, warm=["json"]) as group:
    assert {rank.mechanism for rank in group.ranks} == {"warm"}
    group.wait()
"""
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
    for pid in pids:
        eventually(lambda: has_ended(pid))  # noqa: B023 - it is called at once
