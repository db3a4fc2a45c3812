"""Tests that take minutes: launchers killed at any moment, many ranks, concurrent groups. ``make test-storm``."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.support.processes import new_cgroup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="death signals, the guard and cgroups are Linux's")

MARK = "RANKSPAWN_STORM_MARK"

# Starts and ends groups for as long as it lives; says when the first begins. A rank has a child in its own process
# group, and one in a group of its own (timeout makes one).
LAUNCHER = """
import os, random, sys, time
from rankspawn import launch
children, options = sys.argv[1] == "children", eval(sys.argv[2])
script = "timeout 300 sleep 300 & sleep 300 & wait" if children else "exec sleep 300"
os.write(1, b".")
while True:
    with launch(["/bin/sh", "-c", script], 16, grace=1.0, **options):
        time.sleep(random.uniform(0, 0.02))
"""


# The same with ranks that are forked from a template, which is made anew after a few groups.
WARM_LAUNCHER = """
import os, random, sys, time
from rankspawn import Template, launch
children, options = sys.argv[1] == "children", eval(sys.argv[2])
script = "import subprocess, time; kept = [subprocess.Popen(['sleep', '300']) for _ in range(2)]; time.sleep(300)"
script = script if children else "import time; time.sleep(300)"
os.write(1, b".")
while True:
    with Template(["json", "decimal"], required=True) as template:
        for _ in range(3):
            with launch([sys.executable, "-S", "-c", script], 8, grace=1.0, warm=template, **options):
                time.sleep(random.uniform(0, 0.05))
"""

# Ends when its stdin does. Whoever of its processes is killed, it goes on, and has no child in the end.
SURVIVOR = """
import os, random, select, sys, time, warnings
from contextlib import suppress
from rankspawn import Template, launch
from rankspawn._procfs import children
warnings.simplefilter("ignore")
os.write(1, b".")
warm = cold = 0
while not select.select([0], [], [], 0)[0]:
    # A group whose guard is killed before its ranks start does not start.
    with suppress(BrokenPipeError), Template(["json", "decimal"]) as template:
        for _ in range(3):
            with launch([sys.executable, "-S", "-c", "import time; time.sleep(300)"], 4, grace=1.0, warm=template,
                        keep_going=True, **eval(sys.argv[1])) as group:
                time.sleep(random.uniform(0, 0.05))
                for rank in group.ranks:
                    warm, cold = warm + (rank.mechanism == "warm"), cold + (rank.mechanism != "warm")
print(children(), warm, cold)
"""


def left_behind(mark: str) -> dict[int, str]:
    """The processes that carry the mark in their environment, zombies left out."""
    found = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if f"{MARK}={mark}".encode() in Path("/proc", pid, "environ").read_bytes().split(b"\0"):
                found[int(pid)] = Path("/proc", pid, "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def kill_a_launcher(
    random_moment: float, children: bool, options: dict[str, object], program: str = LAUNCHER
) -> dict[int, str]:
    """Kill a launcher. The processes that are left a second later."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-c", program, "children" if children else "alone", repr(options)]
    with subprocess.Popen(command, env={**os.environ, MARK: mark}, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.read(1) == b"."
        time.sleep(random_moment)
        launcher.kill()
        assert launcher.wait() == -signal.SIGKILL
    until = time.monotonic() + 1.0
    while (left := left_behind(mark)) and time.monotonic() < until:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


@pytest.mark.parametrize(
    ("what", "times"),
    [("ranks, by their death signal", 200), ("children too, by the guard", 200), ("children too, by the cgroup", 60)],
)
def test_a_killed_launcher_leaves_nothing(what: str, times: int, request: pytest.FixtureRequest) -> None:
    seed = random.randrange(1 << 32)
    moments = random.Random(seed)
    options: dict[str, object] = {"guard": True} if "guard" in what else {}
    if "cgroup" in what:
        options = {"cgroup": str(request.getfixturevalue("own_cgroup"))}
    for turn in range(times):
        left = kill_a_launcher(moments.uniform(0, 0.15), "children" in what, options)
        assert left == {}, f"turn {turn} of seed {seed}"


@pytest.mark.parametrize("guard", [False, True])
def test_a_killed_launcher_leaves_nothing_of_a_warm_start(guard: bool) -> None:
    seed = random.randrange(1 << 32)
    moments = random.Random(seed)
    for turn in range(int(os.environ.get("RANKSPAWN_STORM_TURNS", "250"))):
        left = kill_a_launcher(moments.uniform(0, 0.8), guard, {"guard": guard}, WARM_LAUNCHER)
        assert left == {}, f"turn {turn} of seed {seed}"


def children_of(pid: int) -> list[int]:
    """The children of all threads of a process, but for those that are known to be guards."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:
            continue
    return [child for child in found if "guard" not in name_of(child)]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("guard", [False, True])
def test_importers_templates_and_ranks_are_killed(guard: bool) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    mark = uuid.uuid4().hex
    with subprocess.Popen(
        [sys.executable, "-c", SURVIVOR, repr({"guard": guard})],
        env={**os.environ, MARK: mark}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as launcher:  # fmt: skip
        assert launcher.stdin is not None and launcher.stdout is not None
        assert launcher.stdout.read(1) == b"."
        killed = 0
        while killed < int(os.environ.get("RANKSPAWN_STORM_TURNS", "250")):
            time.sleep(chance.uniform(0, 0.8))
            assert launcher.poll() is None, f"seed {seed}"
            if victims := children_of(launcher.pid):
                try:
                    os.kill(chance.choice(victims), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                killed += 1
        launcher.stdin.close()
        said = launcher.stdout.read().decode().split()
        assert launcher.wait() == 0, f"seed {seed}"
    assert said[0] == "set()", f"children are left: {said}, seed {seed}"
    assert int(said[-2]) > 0
    assert left_behind(mark) == {}


@pytest.fixture
def own_cgroup() -> object:
    with new_cgroup() as path:
        yield path
        until = time.monotonic() + 2.0
        while any(entry.is_dir() for entry in Path(path).iterdir()) and time.monotonic() < until:
            time.sleep(0.05)
        assert [entry.name for entry in Path(path).iterdir() if entry.is_dir()] == []


SOAK = """
import gc, json, os, sys
from rankspawn import Binding, launch
ranks, group = int(sys.argv[1]), 64
bindings = [Binding({cpu}) for cpu in sorted(os.sched_getaffinity(0))]
bindings = [bindings[rank % len(bindings)] for rank in range(group)]

def state():
    gc.collect()
    with open("/proc/self/status") as status:
        said = dict(line.split(":", 1) for line in status)
    children = [name for task in os.listdir("/proc/self/task")
                for name in open(f"/proc/self/task/{task}/children").read().split()]
    return {"rss": int(said["VmRSS"].split()[0]), "threads": int(said["Threads"]), "fds": os.listdir("/proc/self/fd"),
            "children": children}

done, after = 0, None
while done < ranks:
    with launch(["/bin/true"], group, bindings=bindings) as ranks_of_one:
        assert ranks_of_one.wait() == (0,) * group
    done += group
    if after is None and done >= ranks // 10:
        after = state()
print(json.dumps([after, state(), done]))
"""


def test_a_hundred_thousand_ranks() -> None:
    done = subprocess.run([sys.executable, "-c", SOAK, "100000"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    after_a_tenth, at_the_end, ranks = json.loads(done.stdout)
    assert ranks >= 100_000
    for what in ("threads", "fds", "children"):
        assert at_the_end[what] == after_a_tenth[what]
    # In KiB: a leak of 24 bytes with each rank would exceed it.
    assert at_the_end["rss"] - after_a_tenth["rss"] < 2048


# Threads start and end groups at once, and every way of ending is met by signals: of other threads, and in the main
# thread by a handler that raises at any moment. Ends with what it has after a tenth of the time, and at the end.
MEDLEY = """
import gc, json, os, random, signal, sys, threading, time, warnings
from contextlib import suppress
from rankspawn import Binding, launch
warnings.simplefilter("ignore")
seconds, chance = float(sys.argv[1]), random.Random(int(sys.argv[2]))
CPUS = sorted(os.sched_getaffinity(0))
COMMANDS = [
    ["/bin/true"],
    ["/bin/sleep", "300"],
    ["/bin/sh", "-c", "timeout 300 sleep 300 & sleep 300 & wait"],
    ["/bin/sh", "-c", "trap '' TERM HUP; sleep 300 & sleep 300"],
    ["/bin/sh", "-c", "echo line; exit 3"],
]

class Struck(Exception):
    pass

def strike(*_):
    raise Struck

signal.signal(signal.SIGALRM, strike)
sys.unraisablehook = lambda unraisable: None  # a finalizer was struck
count = 0

def one_group():
    global count
    bindings = [Binding({chance.choice(CPUS)}) if chance.random() < 0.5 else None for _ in range(8)]
    with launch(
        chance.choice(COMMANDS), 8, bindings=bindings, guard=chance.random() < 0.5, grace=0.02, keep_going=True,
        signal_to=chance.choice(["session", "group", "rank"]), capture_output=chance.random() < 0.2,
    ) as group:
        what = chance.randrange(6)
        if what == 0:
            group.stop()
        elif what == 1:
            group.kill()
        elif what == 2 and threading.current_thread() is not threading.main_thread():  # strike would break the timer
            teller = threading.Timer(0.003, group.stop, [signal.SIGINT])
            teller.start()
            with suppress(TimeoutError):
                group.wait(0.01)
            teller.join()
        elif what == 3:
            group.send_signal(chance.choice([signal.SIGSTOP, signal.SIGUSR1, signal.SIGCONT]))
        elif what == 4:
            with suppress(TimeoutError):
                group.wait(chance.uniform(0, 0.01))
    count += 1

def groups(until):
    while time.monotonic() < until:
        one_group()

def struck_groups(until):
    while time.monotonic() < until:
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0005, 0.05))
                one_group()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Struck:
            pass

def state():
    gc.collect()
    until = time.monotonic() + 5
    while True:
        with open("/proc/self/status") as status:
            said = dict(line.split(":", 1) for line in status)
        children = [name for task in os.listdir("/proc/self/task")
                    for name in open(f"/proc/self/task/{task}/children").read().split()]
        if said["Threads"].strip() == "1" and not children or time.monotonic() > until:
            return {"rss": int(said["VmRSS"].split()[0]), "threads": int(said["Threads"]),
                    "fds": os.listdir("/proc/self/fd"), "children": children, "groups": count}
        time.sleep(0.01)

def run(seconds):
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=groups, args=[until]) for _ in range(4)]
    for thread in threads:
        thread.start()
    struck_groups(until)
    for thread in threads:
        thread.join()
    return state()

print(json.dumps([run(seconds / 10), run(seconds * 9 / 10)]))
"""


def test_concurrent_groups_and_signals() -> None:
    mark, seed = uuid.uuid4().hex, random.randrange(1 << 32)
    seconds = os.environ.get("RANKSPAWN_STORM_SECONDS", "60")
    command = [sys.executable, "-c", MEDLEY, seconds, str(seed)]
    done = subprocess.run(command, env={**os.environ, MARK: mark}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    after_a_tenth, at_the_end = json.loads(done.stdout.splitlines()[-1])  # ranks have written lines before it
    print(after_a_tenth, at_the_end)
    assert at_the_end["children"] == [] and at_the_end["threads"] == 1, f"seed {seed}"
    assert at_the_end["fds"] == after_a_tenth["fds"], f"seed {seed}"
    assert left_behind(mark) == {}, f"seed {seed}"
    # In KiB, and for each group less than a hundred bytes in half an hour.
    assert at_the_end["rss"] - after_a_tenth["rss"] < 4096, f"seed {seed}"
