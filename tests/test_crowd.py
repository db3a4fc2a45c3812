"""Members are found wherever their numbers lie: among those of ranks, which are asked for one by one, and around them.

In a PID namespace of its own the script chooses the number of each process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rankspawn._end import way as _way
from rankspawn._end import without
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.processes import PATIENCE

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sessions as Linux has them"),
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK),
        reason="needs root, and a kernel that lets root choose numbers (CONFIG_CHECKPOINT_RESTORE)",
    ),
]

SCRIPT = """
import json, os, signal, sys, threading, time
from rankspawn._end import way as _way, without
if sys.argv[1] == "python":
    _way.way = without
from rankspawn._end.sessions import members

def fork(number):
    with open("/proc/sys/kernel/ns_last_pid", "w") as last:
        last.write(str(number - 1))
    pid = os.fork()
    assert pid in (0, number), (pid, number)
    return pid

class Sessions:
    def __init__(self, leaders):
        self.leaders, self.members = set(), set()
        for number in leaders:
            self.add(number)

    def add(self, number, *members):
        # A leader that has ended, and members of its session that live.
        reader, writer = os.pipe()
        if fork(number) == 0:
            os.setsid()
            for member in members:
                if fork(member) == 0:
                    os.setpgid(0, 0)
                    os.write(writer, b"!")
                    while True:
                        signal.pause()
            os._exit(0)
        for _ in members:
            os.read(reader, 1)
        os.close(reader), os.close(writer)
        os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT)
        self.leaders.add(number)
        self.members.update(members)

    def look(self):
        ended = set(self.leaders)
        found = members(ended, ended)
        return {"found": sorted(found.items()), "are_empty": _way.way.are_empty(ended, ended)}

    def reap(self, number):
        os.waitpid(number, 0)

    def end(self):
        for pid in self.members:
            os.kill(pid, signal.SIGKILL)
        while True:
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return

def case(leaders, *also):
    sessions = Sessions(leaders)
    for leader, *members in also:
        sessions.add(leader, *members)
    seen = sessions.look()
    sessions.end()
    return seen

def signalled_with_threads(leaders):
    # A leader that lives, and two of whose threads have numbers among those of the others.
    sessions = Sessions(leaders)
    reader, writer = os.pipe()
    number = leaders[-1] + 1
    if fork(number) == 0:
        os.setsid()
        signal.signal(signal.SIGUSR1, lambda *_: os.write(writer, b"1"))
        signal.signal(signal.SIGUSR2, lambda *_: os.write(writer, b"2"))
        for tid in (leaders[0] + 1, leaders[3] + 1):
            with open("/proc/sys/kernel/ns_last_pid", "w") as last:
                last.write(str(tid - 1))
            thread = threading.Thread(target=time.sleep, args=(1000,), daemon=True)
            thread.start()
            assert thread.native_id == tid
        os.write(writer, b"0")
        while True:
            signal.pause()
    told = os.read(reader, 1)
    everybody = {*leaders, number}
    _way.way.signal_members(everybody, [signal.SIGUSR1], True)  # all but the leaders
    os.kill(number, signal.SIGUSR2)
    while not told.endswith(b"2"):
        told += os.read(reader, 1)
    seen = {"found": sorted(members(everybody, set(leaders)).items()), "are_empty": False, "told": told.decode()}
    sessions.members.add(number)
    sessions.end()
    return seen

def reused_by_a_member(leaders):
    sessions = Sessions(leaders)
    sessions.reap(leaders[2])
    sessions.add(leaders[-1] + 1, leaders[2])
    seen = sessions.look()
    sessions.end()
    return seen

def reused_by_a_stranger(leaders):
    sessions = Sessions(leaders)
    sessions.reap(leaders[2])
    reader, writer = os.pipe()
    if fork(leaders[2]) == 0:
        os.setsid()
        os.write(writer, b"!")
        while True:
            signal.pause()
    os.read(reader, 1)
    seen = sessions.look()
    sessions.members.add(leaders[2])
    sessions.end()
    return seen

crowd, far = range(1000, 1040, 2), range(3000, 3040, 2)
json.dump({
    "nobody": case(crowd),
    "in a gap": case(crowd, (1040, 1011)),
    "behind the last": case(crowd, (1040, 1041)),
    "before the first": case(crowd, (1040, 999)),
    "far below": case(crowd, (1040, 500)),
    "far above": case(crowd, (1040, 2000)),
    "between two crowds": case([*crowd, *far], (1040, 2000)),
    "in both, and around": case([*crowd, *far], (1040, 1003, 3005, 400, 4000)),
    "in a wide gap": case(range(1000, 3000, 100), (3000, 1550)),
    "threads in the gaps": signalled_with_threads(crowd),
    "among few": case(range(1000, 1006, 2), (1006, 1003)),
    "a reaped one's number is a member's": reused_by_a_member(crowd),
    "a reaped one's number is a stranger's": reused_by_a_stranger(crowd),
}, sys.stdout)
"""

# By case, the members: pid and session.
EXPECTED: dict[str, list[list[int]]] = {
    "nobody": [],
    "in a gap": [[1011, 1040]],
    "behind the last": [[1041, 1040]],
    "before the first": [[999, 1040]],
    "far below": [[500, 1040]],
    "far above": [[2000, 1040]],
    "between two crowds": [[2000, 1040]],
    "in both, and around": [[400, 1040], [1003, 1040], [3005, 1040], [4000, 1040]],
    "in a wide gap": [[1550, 3000]],
    "threads in the gaps": [[1039, 1039]],
    "among few": [[1003, 1006]],
    "a reaped one's number is a member's": [[1004, 1039]],
    "a reaped one's number is a stranger's": [],
}


@pytest.mark.parametrize("way", ["engine", "python"])
def test_members_wherever_their_numbers_lie(way: str) -> None:
    if way == "engine" and (EXTENSION_ERROR is not None or _way.way is without):
        pytest.skip("the engine does not search here")
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", SCRIPT, way],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    if "unshare failed" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no PID namespace with a procfs of its own can be made here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert {name: one["found"] for name, one in seen.items()} == EXPECTED
    assert seen["threads in the gaps"]["told"] == "02"  # no signal went to a thread, and so to its process
    # Python's search cannot tell that there is certainly nobody.
    certain = {name for name, one in seen.items() if one["are_empty"]}
    assert certain == ({name for name, found in EXPECTED.items() if not found} if way == "engine" else set())
