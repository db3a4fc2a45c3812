"""A warm start costs nothing where none is asked for: by what is loaded, started and asked of the kernel, not by time.

Whatever is expected to be absent is seen in a warm start by the same look: one that finds nothing proves nothing alone.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.processes import PATIENCE

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a warm start needs Linux"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
]

# Two launches, of which the second restarts its ranks; and what the launcher is and has before, meanwhile and after.
LAUNCHES = """
import json, os, sys, threading, time
from pathlib import Path
import rankspawn

def look():
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return {
        "modules": any(name.startswith("rankspawn._warm") for name in sys.modules),
        "threads": len(threading.enumerate()),
        "tasks": len(os.listdir("/proc/self/task")),
        "children": sorted(Path(f"/proc/{pid}/comm").read_text().strip() for pid in children),
    }

python, warm = [sys.executable, "-S", "-c"], json.loads(sys.argv[1])
seen = [look()]
with rankspawn.Template(warm) if warm else open(os.devnull) as template:
    options = {"warm": template} if warm else {}
    with rankspawn.launch([*python, "import time; time.sleep(600)"], 2, guard=True, **options) as group:
        seen.append(look())
        group.kill()
    fails_once = "import os, sys; sys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] == '0')"
    with rankspawn.launch([*python, fails_once], 2, guard=True, max_restarts=1, **options) as group:
        assert group.wait(60) == (0, 0)
        assert len(group.report()["attempts"]) == 2
until = time.monotonic() + 10
while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < until:
    time.sleep(0.001)  # the engine's threads leave the kernel a moment after the ranks that they made
seen.append(look())
print(json.dumps(seen))
"""


def launches(warm: list[str], *before: str) -> list[dict[str, Any]]:
    """Run LAUNCHES in an interpreter of its own, behind the words ``before``: what it has seen, three times."""
    command = [*before, sys.executable, "-c", LAUNCHES, json.dumps(warm)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE * 2, check=False)
    if before and "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr.splitlines()[-9:]
    return list(json.loads(done.stdout))


def test_a_cold_launcher_has_only_its_ranks_and_the_guard() -> None:
    before, meanwhile, after = launches([])
    alone = {"modules": False, "threads": 1, "tasks": 1, "children": []}
    assert before == after == alone
    # The engine's own threads: each of those that made a rank stays until the rank has ended.
    assert meanwhile.pop("tasks") in (1, 2, 3)
    rank = meanwhile["children"][0]
    assert {**meanwhile, "tasks": 1} == {**alone, "children": [rank, rank, "rankspawn-guard"]}


def test_what_a_warm_launcher_has_is_seen() -> None:
    before, meanwhile, after = launches(["json"])
    assert not before["modules"] and meanwhile["modules"] and after["modules"]
    assert len(meanwhile["children"]) > 3


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (Debian, Ubuntu: apt-get install strace)")
def test_what_is_asked_of_the_kernel(tmp_path: Path) -> None:
    """A warm start makes a socket pair and shared memory, adopts, and is loaded from files of its own; a cold one does
    nothing of that, and executes its ranks and guards alone."""
    signs = ["socketpair(", "memfd_create(", "prctl(PR_SET_CHILD_SUBREAPER", "rankspawn/_warm"]
    found, executed = {}, {}
    for name, warm in (("cold", []), ("warm", ["json"])):
        log = tmp_path / name
        traced = "--trace=file,process,socketpair,memfd_create,prctl"
        launches(warm, "strace", "-f", "-qq", "-o", str(log), traced)
        lines = log.read_text().splitlines()
        starts = [match for line in lines if (match := re.match(r'(\d+) +execve\("(.*?)", .*[\d>]$', line))]
        programs = {match[1] for match in starts} - {lines[0].split()[0]}
        own = [line for line in lines if line.split()[0] not in programs]
        found[name] = [sign for sign in signs if any(sign in line for line in own)]
        executed[name] = [Path(match[2]).name for match in starts]
    assert found == {"cold": [], "warm": signs}
    # The launcher; and of each of three attempts, a guard and two ranks.
    python = executed["cold"][0]
    assert sorted(executed["cold"]) == sorted([python, *["rankspawn-guard", python, python] * 3])


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import rankspawn; [getattr(rankspawn, name) for name in rankspawn.__all__ if name != 'Template']"],
        ["-c", "import rankspawn.torchrun as it; it.respelt(['--nproc-per-node', '2', 'train.py'])"],
        ["-m", "rankspawn", "run", "--nproc-per-node", "2", "--no-python", "true"],
        ["-m", "rankspawn", "bind", "--local-rank", "0", "--nproc-per-node", "1", "true"],
        ["-m", "rankspawn", "plan", "--nproc-per-node", "2"],
        ["-m", "rankspawn", "ps"],
    ],
    ids=["names", "torchrun", "run", "bind", "plan", "ps"],
)
def test_no_entry_imports_it(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr.splitlines()[-9:]
    names = re.findall(r"^import time: .*\| +(rankspawn\S*)$", done.stderr, re.MULTILINE)
    assert len(names) > 3
    assert [name for name in names if name.startswith("rankspawn._warm")] == []
