"""What a job's report says of real ranks, and the file that it is written to."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from rankspawn import Binding, MemoryPolicy, Popen
from rankspawn._end.processes import ProcessTree
from rankspawn._ids import parse_ids
from rankspawn._output.form import GroupReport, RankReport
from rankspawn._output.report import Attempt, group_report, rank_report
from rankspawn._output.usage import usage_now
from rankspawn._output.write import write_report, write_text
from tests.support.state import in_child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")

MIB = 1 << 20


def conforms(value: object, hint: Any, where: str = "report") -> None:
    """Fails unless ``value`` is what the type ``hint`` promises: the keys of a TypedDict, no more and no fewer."""
    origin = typing.get_origin(hint)
    if typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint)
        assert isinstance(value, dict) and value.keys() == hints.keys(), where
        for name, kind in hints.items():
            conforms(value[name], kind, f"{where}.{name}")
    elif origin is list:
        assert isinstance(value, list), where
        for number, one in enumerate(value):
            conforms(one, typing.get_args(hint)[0], f"{where}[{number}]")
    elif origin is dict:
        assert isinstance(value, dict), where
        assert all(type(key) is str and type(one) is str for key, one in value.items()), where
    elif origin in (types.UnionType, typing.Union):
        (kind,) = set(typing.get_args(hint)) - {type(None)}
        if value is not None:
            conforms(value, kind, where)
    else:
        assert type(value) is hint, f"{where} is {value!r}, not {hint}"


@contextmanager
def started(*command: str, number: int = 0, **options: Any) -> Iterator[Running]:
    """A rank, killed with its session at the end of the block unless it was seen to end."""
    called = time.monotonic_ns()
    rank = Popen(list(command), start_new_session=True, **options)
    try:
        yield Running(number, rank, called)
    finally:
        if rank.returncode is None:
            rank.send_signal_group(signal.SIGKILL)
        rank.wait()
        for stream in (rank.stdin, rank.stdout):
            if stream is not None:
                stream.close()


class Running:
    """A rank, and what a group would note about it."""

    def __init__(self, number: int, rank: Popen, called_ns: int) -> None:
        self.number, self.rank, self.called_ns = number, rank, called_ns
        self.effective: Binding | None = None
        self.usage: resource.struct_rusage | None = None

    def report(self, **facts: Any) -> RankReport:
        known = {"exited_ns": None, "returncode": None, "usage": None, "effective": self.effective}
        told = rank_report(self.number, self.rank, called_ns=self.called_ns, **{**known, **facts})
        conforms(told, RankReport)
        return told

    def ended(self, **facts: Any) -> RankReport:
        """Its report once it has ended by itself."""
        _, status, self.usage = os.wait4(self.rank.pid, 0)
        self.rank.returncode = os.waitstatus_to_exitcode(status)
        facts = {"exited_ns": time.monotonic_ns(), "usage": self.usage, "core": os.WCOREDUMP(status), **facts}
        return self.report(returncode=self.rank.returncode, **facts)


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def test_a_bound_rank() -> None:
    cpu = max(os.sched_getaffinity(0))
    status = Path("/proc/self/status").read_text()
    (mems,) = (line.split()[1] for line in status.splitlines() if line.startswith("Mems_allowed_list:"))
    node = min(parse_ids(mems))
    # Not required: a container's seccomp profile, or a kernel without NUMA, may refuse the policy.
    binding = Binding({cpu}, MemoryPolicy("bind", {node}), required=False)
    with started("/bin/cat", stdin=subprocess.PIPE, binding=binding) as one:
        refused = bool(one.rank.binding_report.refused)
        now = one.report()["binding"]
        one.effective = one.rank.binding_report.effective
        assert one.rank.stdin is not None
        one.rank.stdin.close()
        told = one.ended()
    assert told["mechanism"] == one.rank.mechanism and told["pid"] == one.rank.pid and told["rank"] == 0
    assert now["asked"] == {"cpus": str(cpu), "memory": f"bind:{node}"}
    assert now["required"] is False
    assert now["effective"] is not None and now["effective"]["cpus"] == str(cpu)
    if not refused:
        assert now["effective"]["memory"] == f"bind:{node}"
        assert now["refused"] == []
    assert told["binding"] == now, "what was noted while it ran is what the report of its end says"


def test_an_unbound_rank_has_what_it_inherits() -> None:
    with started("/bin/cat", stdin=subprocess.PIPE) as one:
        binding = one.report()["binding"]
    assert binding["asked"] is None and binding["required"] is False and binding["refused"] == []
    assert binding["effective"] is not None
    assert parse_ids(binding["effective"]["cpus"] or "") == os.sched_getaffinity(0)


def test_a_refused_optional_binding() -> None:
    with started("/bin/true", binding=Binding({5000}, required=False)) as one:
        told = one.ended()
    assert told["binding"] == {
        "asked": {"cpus": "5000", "memory": None},
        "required": False,
        "effective": None,  # nobody looked before it ended
        "refused": [{"step": "sched_setaffinity", "errno": 22, "name": "EINVAL", "text": os.strerror(errno.EINVAL)}],
    }
    assert told["exit"] == {"returncode": 0, "status": 0, "signal": None, "core": False, "why": ""}


def test_a_rank_that_fails() -> None:
    with started("/bin/sh", "-c", "exit 7") as one:
        assert one.ended()["exit"] == {"returncode": 7, "status": 7, "signal": None, "core": False, "why": ""}


@pytest.mark.parametrize(
    ("sig", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 3, f"signal {signal.SIGRTMIN + 3}")]
)
def test_a_rank_that_a_signal_ended(sig: int, name: str) -> None:
    with started("/bin/sleep", "60") as one:
        one.rank.send_signal(sig)
        told = one.ended(core=None)
    assert told["exit"] == {"returncode": -sig, "status": None, "signal": name, "core": None, "why": ""}
    assert told["now"] is None


def test_times_are_seconds_from_the_call() -> None:
    with started("/bin/sleep", "0.2") as one:
        still = one.report()
        told = one.ended()
    assert still["exited"] is None and still["exit"] is None
    # The clock is the kernel's, and a sleep never ends early.
    assert told["exited"] is not None and told["exited"] > 0.2
    if one.rank.mechanism == "subprocess":
        assert told["executed"] is None, "the standard library does not note it"
    else:
        assert told["executed"] is not None and 0 < told["executed"] < told["exited"]
    with started("/bin/true") as one:
        assert rank_report(
            3, one.rank, called_ns=5 * 10**9, exited_ns=7_250_000_000, returncode=0, effective=None, usage=None
        )["exited"] == pytest.approx(2.25)


def test_what_a_rank_used() -> None:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = own + 64 * MIB
    code = f"import time; held = bytearray({size}); end = time.process_time() + 0.2\nwhile time.process_time() < end: 0"
    with started(*python(code)) as one:
        used = one.ended()["rusage"]
    assert used is not None
    assert used["user"] + used["system"] >= 0.2
    assert used["max_rss"] is not None and size < used["max_rss"] < size + 256 * MIB
    assert used["minor_faults"] > 64 * MIB // os.sysconf("SC_PAGE_SIZE") // 1024  # huge pages take fewer


def test_the_launchers_own_peak_is_not_reported_as_a_ranks() -> None:
    """execve(2) keeps the launcher's peak in ru_maxrss, however little the rank itself needs."""
    with started("/bin/true") as one:
        used = one.ended()["rusage"]
        assert used is not None and used["max_rss"] is None
    assert one.usage is not None
    assert one.usage.ru_maxrss * 1024 > 8 * MIB, "this kernel says what the program used: so may the report"


SEVERAL = """
import subprocess, sys, threading, time
held = bytearray(96 << 20)
for _ in range(2):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
subprocess.Popen(["/bin/sh", "-c", "/bin/sleep 60 & wait"], stdout=subprocess.DEVNULL)
end = time.process_time() + 0.2
while time.process_time() < end: pass
print("ready", flush=True)
time.sleep(60)
"""


def test_a_rank_that_still_runs() -> None:
    with started(*python(SEVERAL), stdout=subprocess.PIPE, text=True) as one:
        assert one.rank.stdout is not None and one.rank.stdout.readline() == "ready\n"
        while len(ProcessTree().descendants(one.rank.pid)) < 2:
            time.sleep(0.01)  # until the shell has its own child
        told = one.report(tree=ProcessTree())
        alone = one.report()
    now = told["now"]
    assert now is not None and alone["now"] is not None
    assert (now["threads"], now["children"]) == (3, 2)
    assert alone["now"]["children"] == 2
    assert now["user"] + now["system"] >= 0.19  # the clock of psutil counts in hundredths
    assert 96 * MIB < now["rss"] < 512 * MIB
    assert told["rusage"] is None and told["exit"] is None


def test_a_rank_that_has_ended_uses_nothing_reaped_or_not() -> None:
    with started("/bin/true") as one:
        os.waitid(os.P_PID, one.rank.pid, os.WEXITED | os.WNOWAIT)
        assert usage_now(one.rank.pid) is None
        assert one.report()["now"] is None
        one.rank.wait()
        assert usage_now(one.rank.pid) is None
        one.rank.pid = os.getpid()  # the number has passed on to another process
        told = one.report()
        assert told["now"] is None and told["binding"]["effective"] is None


def test_what_descends_from_a_rank() -> None:
    with started("/bin/sh", "-c", "/bin/sh -c 'sleep 60 & wait' & sleep 60 & wait") as one:
        while len(found := ProcessTree().descendants(one.rank.pid)) < 3:
            time.sleep(0.01)
        assert len(found) == 3
        above = [one.rank.pid]
        for process in found:
            assert process.ppid() in above, "parents come first"
            above.append(process.pid)
        ours = [process.pid for process in ProcessTree().descendants(os.getpid())]
        assert set(above) <= set(ours)
        found[0].kill()
        while found[0] in ProcessTree().descendants(one.rank.pid):  # a zombie is no longer there
            time.sleep(0.01)
    assert ProcessTree().descendants(one.rank.pid) == []


def test_a_zombie_is_nobodys_descendant() -> None:
    with started("/bin/sh", "-c", "true & exec sleep 60") as one:
        rank = psutil.Process(one.rank.pid)
        while [child.status() for child in rank.children()] != [psutil.STATUS_ZOMBIE]:
            time.sleep(0.01)
        assert ProcessTree().descendants(one.rank.pid) == []


def test_a_stranger_is_nobodys_descendant() -> None:
    """Where orphans keep the pid of their parent, a rank may get a pid that strangers have as their parent's."""
    with started("/bin/sh", "-c", "sleep 60 & wait") as one:
        while not (found := ProcessTree().descendants(one.rank.pid)):
            time.sleep(0.01)
        (child,) = found
        us = psutil.Process()
        tree = ProcessTree()
        table = {one.rank.pid: [(us, us.create_time()), (child, child.create_time())]}
        table[child.pid] = [(us, us.create_time())]
        tree.__dict__["_started_by"] = table  # as such a system would describe these real processes
        born = psutil.Process(one.rank.pid).create_time()
        assert us.create_time() < born, "pytest is too young for this test"
        assert tree.descendants(one.rank.pid) == [child]
        assert tree.descendants(one.rank.pid, born) == [child]
        assert tree.descendants(one.rank.pid, child.create_time() + 0.001) == []
    # The rank and its pid are gone. Given the time of its birth, the tree that was read still leads to its child.
    assert tree.descendants(one.rank.pid) == []
    assert tree.descendants(one.rank.pid, born) == [child]


def test_numbers_in_a_circle_have_an_end() -> None:
    us = psutil.Process()
    tree = ProcessTree()
    tree.__dict__["_started_by"] = {us.pid: [(us, us.create_time())]}
    assert tree.descendants(us.pid) == [us]


def two_attempts() -> GroupReport:
    """Two real attempts of two ranks; the second one's last rank still runs when the report is made."""
    attempts = []
    for last in ("exit 3", "sleep 60"):
        called_ns, called_at = time.monotonic_ns(), time.time()
        with started("/bin/true") as first, started("/bin/sh", "-c", last, number=1) as second:
            first.called_ns = second.called_ns = called_ns
            ranks = [first.ended(), second.ended() if last == "exit 3" else second.report()]
            attempts.append(Attempt(called_ns, called_at, ranks))
            env = {"SLURM_JOB_ID": "4711", "HOME": "/root"}
            report = group_report(attempts, command=["train", Path("a")], nprocs=2, run_id="mine", env=env)
    return report


def test_the_report_of_a_job(tmp_path: Path) -> None:
    before = datetime.now().astimezone()
    report = two_attempts()
    after = datetime.now().astimezone()
    conforms(report, GroupReport)
    write_report(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["version"] == 1
    assert report["command"] == ["train", "a"] and report["nprocs"] == 2
    assert report["host"] == os.uname().nodename
    assert report["job"] == {"run_id": "mine", "SLURM_JOB_ID": "4711"}
    first, second = report["attempts"]
    assert (first["attempt"], second["attempt"]) == (0, 1)
    assert first["called"] == 0 < first["duration"] <= second["called"]
    assert first["duration"] == max(rank["exited"] or 0 for rank in first["ranks"])
    ended, runs = second["ranks"]
    assert runs["exit"] is None and ended["exited"] is not None and second["duration"] > ended["exited"]
    assert report["duration"] == second["called"] + second["duration"]
    for one in report["attempts"]:
        assert before <= datetime.fromisoformat(one["started"]) <= after
        assert [rank["rank"] for rank in one["ranks"]] == [0, 1]


def test_the_report_of_no_ranks_and_of_odd_words(tmp_path: Path) -> None:
    report = group_report([Attempt(0, 0.0, [])], command=["caf\udce9", 'a"b'], nprocs=0, run_id="", env={})
    conforms(report, GroupReport)
    write_report(report, tmp_path / "r")
    assert json.loads((tmp_path / "r").read_text())["command"] == ["caf\udce9", 'a"b']
    assert report["duration"] == 0


def test_a_file_is_made_as_open_makes_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    old = os.umask(0o027)
    try:
        write_text("one\n", path)
    finally:
        os.umask(old)
    assert path.read_text() == "one\n" and path.stat().st_mode & 0o777 == 0o640
    with path.open() as reader:
        write_text("two\n", str(path))
        assert reader.read() == "one\n", "who reads the old one goes on reading the old one"
    assert path.read_text() == "two\n"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def over_the_limit() -> tuple[object, ...]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError) as caught:
            write_text("x" * 100_000, path)
        return caught.value.errno, caught.value.filename

    assert in_child(over_the_limit) == (errno.EFBIG, str(path))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_the_error_names_the_path_as_it_was_given(tmp_path: Path) -> None:
    # Through a link, so that a bug in write_text cannot replace the machine's own device.
    (tmp_path / "full").symlink_to("/dev/full")
    for path, code in (
        (tmp_path / "none" / "report.json", errno.ENOENT),
        (tmp_path, errno.EISDIR),
        (tmp_path / "full", errno.ENOSPC),
    ):
        with pytest.raises(OSError) as caught:
            write_text("text", path)
        assert (caught.value.errno, caught.value.filename) == (code, str(path))
    assert os.listdir(tmp_path) == ["full"]


def test_what_is_no_regular_file_is_written_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_text("new", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    reading, writing = os.pipe()
    try:
        write_text("through", f"/dev/fd/{writing}")
        assert os.read(reading, 100) == b"through"
    finally:
        os.close(reading)
        os.close(writing)
