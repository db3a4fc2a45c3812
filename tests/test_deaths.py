"""Why ranks have died: each cause is made to happen, and its line is in the failure, its text and the report."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rankspawn import Failure, Popen, launch
from rankspawn._end import deaths
from rankspawn._end.deaths import Deaths
from rankspawn._output.words import why_by_words
from tests.support.launchers import completed
from tests.support.processes import writable_cgroups

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what Linux says of deaths")

# A rank lives a moment, so that what is counted before is counted before.
LIVES = "import ctypes, os, resource, signal, sys, time\ntime.sleep(0.5)\n"
NO_CORE = "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"


def fails(code: str, folder: Path | None = None) -> Failure:
    """The failure of a rank that runs this code."""
    with launch([sys.executable, "-c", LIVES + code], 1, log_dir=folder) as group:
        group.wait(60)
        (failure,) = group.failures()
        its = group.report()["attempts"][0]["ranks"][0]["exit"]
        assert its is not None and its["why"] in (failure.why, "")
    assert not failure.why or f"\n  why: {failure.why}" in str(failure) or failure.output is not None
    return failure


def why_no_log() -> str:
    """Why the kernel's log says nothing of processes here, or ""."""
    if deaths._link("/proc/self/ns/pid") != deaths._FIRST_PID_NAMESPACE:
        return "the kernel's log has numbers of the first PID namespace, and this is another one"
    return "" if deaths._read_log("/dev/kmsg") else "this user may not read the kernel's log"


needs_log = pytest.mark.skipif(why_no_log() != "", reason=why_no_log())


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def limited() -> Iterator[Path]:
    """A cgroup of either version with a limit of memory."""
    for kind, name in (("cgroup2", "memory.max"), ("cgroup", "memory.limit_in_bytes")):
        for root in writable_cgroups(kind, "memory" if kind == "cgroup" else ""):
            folder = root / f"rankspawn-tests-{os.getpid()}"
            try:
                folder.mkdir()
            except OSError:
                continue
            try:
                if (folder / name).exists():
                    (folder / name).write_text(str(64 << 20))
                    yield folder
                    return
            finally:
                folder.rmdir()
    pytest.skip("no cgroup with a limit of memory can be made here")


OUT_OF_MEMORY = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from rankspawn import launch
from rankspawn._end import deaths
if sys.argv[2] == "counts":
    deaths._read_log = lambda path: []
ranks = sys.argv[3].split(",")
code = "import os, time; time.sleep(0.8); os.environ['RANK'] in %r and bytearray(200 << 20); time.sleep(60)" % (ranks,)
with launch([sys.executable, "-c", code], 2, keep_going=len(ranks) > 1) as group:
    group.wait()
for failure in group.failures():
    print(failure.returncode, failure.why)
Path(sys.argv[1]).parent.joinpath("cgroup.procs").write_text(str(os.getpid()))
"""


@pytest.mark.parametrize("how", [pytest.param("log", marks=needs_log), "counts"])
@pytest.mark.parametrize("ranks", ["1", "0,1"])
def test_a_limit_of_memory_that_is_hit(limited: Path, how: str, ranks: str) -> None:
    """In a launcher of its own, which is in the cgroup, too; as in a container, where the log cannot be read."""
    done = completed([sys.executable, "-c", OUT_OF_MEMORY, str(limited), how, ranks])
    told = [line for line in done.stdout.splitlines() if line.startswith("-9 out of memory: ")]
    assert len(told) == len(ranks.split(",")), done
    for line in told:
        if how == "log":
            assert re.search(
                rf"the kernel has killed it when it had [\d.]+ MiB, because cgroup \S*{limited.name} was at its limit",
                line,
            )
        else:
            limit = f"the limit of {limited} is 64 MiB"
            assert re.search(rf"the kernel has killed \d process(es)? in its cgroup \({limit}", line)


def test_a_kill_that_is_not_for_memory() -> None:
    failure = fails("os.kill(os.getpid(), signal.SIGKILL)\n")
    if any(count is not None for count in Deaths(0)._before):
        assert failure.why.startswith("no out-of-memory kill was counted in its cgroup")
    assert "out of memory" not in failure.why


def test_a_kill_by_this_launcher_needs_no_reason() -> None:
    with launch(["sleep", "300"], 2) as group:
        group.wait_any(0.1)
        group.kill()
        assert [failure.why for failure in group.failures()] == ["", ""]


# ---- limits and cores -----------------------------------------------------------------------------------------------


def test_cpu_time_is_over() -> None:
    burn = NO_CORE + "resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass\n"
    failure = fails(burn)
    assert failure.returncode == -signal.SIGXCPU
    assert failure.why.startswith("it has reached its limit of CPU time, 1 s (ulimit -St); no core was written")
    failure = fails("signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n" + burn)
    assert failure.returncode == -signal.SIGKILL
    assert failure.why == "it has reached its limit of CPU time, 2 s (ulimit -Ht)"


def test_a_signal_that_only_looks_like_a_limit() -> None:
    code = NO_CORE + "resource.setrlimit(resource.RLIMIT_CPU, (500, 600))\nos.kill(os.getpid(), signal.SIGXCPU)\n"
    assert fails(code).why == ""


def test_a_file_is_too_large(tmp_path: Path) -> None:
    failure = fails(
        NO_CORE + "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"open({str(tmp_path / 'large')!r}, 'wb').write(bytes(8192))\n"
    )
    assert failure.why == "a file has reached its size limit of 4 KiB (ulimit -f); no core was written: ulimit -c is 0"


def test_a_core_is_named(tmp_path: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern[:1] in "|@/":
        pytest.skip(f"core_pattern is {pattern}")
    code = f"os.chdir({str(tmp_path)!r})\nhard = resource.getrlimit(resource.RLIMIT_CORE)[1]\n"
    failure = fails(code + "resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))\nos.abort()\n")
    cores = [*tmp_path.iterdir()]
    if not cores:
        pytest.skip("no core can be written here")
    assert failure.why == f"core dumped to {cores[0].name} in the directory that it ran in"


@pytest.mark.parametrize(
    ("pattern", "uses_pid", "where"),
    [
        ("|/usr/lib/systemd/systemd-coredump %P %u", "0", "to /usr/lib/systemd/systemd-coredump: coredumpctl info 7"),
        ("|/usr/share/apport/apport -p%p", "0", "to /usr/share/apport/apport"),
        ("@/run/coredump.socket", "0", "to the socket /run/coredump.socket"),
        ("/var/cores/core.%p", "1", "to /var/cores/core.7"),
        ("core", "1", "to core.7 in the directory that it ran in"),
    ],
)
def test_where_cores_go(tmp_path: Path, pattern: str, uses_pid: str, where: str) -> None:
    folder = tmp_path / "sys" / "kernel"
    folder.mkdir(parents=True)
    (folder / "core_pattern").write_text(pattern + "\n")
    (folder / "core_uses_pid").write_text(uses_pid + "\n")
    assert deaths._where_cores_go(7, str(tmp_path)) == where


# ---- the kernel's log -----------------------------------------------------------------------------------------------


@needs_log
def test_an_invalid_access_is_said_with_its_place() -> None:
    if Path("/proc/sys/debug/exception-trace").read_text().strip() != "1":
        pytest.skip("the kernel logs no invalid accesses")
    failure = fails(NO_CORE + "ctypes.string_at(0)\n")
    assert failure.returncode == -signal.SIGSEGV
    assert re.match(r"segfault at 0 ip \S+ sp \S+ error \d+( in .*)?; no core was written", failure.why)


def entry(text: str, ago: float = 0.0) -> str:
    return f"3,1,{int(1e6 * (time.monotonic() - ago))},-;{text}\n SUBSYSTEM=pci\n"


OF_MEMORY = (
    "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/jobs/7,task=sh,pid=PID,uid=0",
    "Memory cgroup out of memory: Killed process PID (sh) total-vm:220000kB, anon-rss:65536kB, file-rss:8kB",
)
AN_ACCESS = ("python[PID]: segfault at 0 ip 00007f12 sp 00007ffd error 4 in libc.so.6[7f12,1000]",)


@pytest.mark.parametrize(
    ("sig", "logged", "why"),
    [
        (
            signal.SIGKILL,
            OF_MEMORY,
            "out of memory: the kernel has killed it when it had 64 MiB, because cgroup /jobs/7 was at its limit",
        ),
        (signal.SIGSEGV, AN_ACCESS, "segfault at 0 ip 00007f12 sp 00007ffd error 4 in libc.so.6[7f12,1000]"),
    ],
)
@pytest.mark.parametrize("whose", ["its", "another's", "of another PID namespace"])
def test_what_the_log_says_of_a_process(
    tmp_path: Path, whose: str, sig: signal.Signals, logged: Sequence[str], why: str
) -> None:
    """By a file that stands for the kernel's log, and a link that stands for this process's PID namespace."""
    (tmp_path / "self" / "ns").mkdir(parents=True)
    namespace = "pid:[4026532758]" if whose == "of another PID namespace" else deaths._FIRST_PID_NAMESPACE
    (tmp_path / "self" / "ns" / "pid").symlink_to(namespace)
    log = tmp_path / "kmsg"
    with Popen(["/bin/sh", "-c", f"ulimit -c 0; kill -{int(sig)} $$"], cwd=tmp_path) as rank:
        os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)
        pid = rank.pid + (whose == "another's")
        log.write_text("".join(entry(text.replace("PID", str(pid))) for text in logged))
        found = Deaths(time.monotonic_ns(), proc=str(tmp_path), log=str(log)).why({0: (rank, -sig, ())})[0]
    assert found.removesuffix("; no core was written: ulimit -c is 0") == (why if whose == "its" else "")


@pytest.mark.parametrize("own", [True, False])
def test_a_fault_of_a_gpu_is_said_of_whom_it_names(tmp_path: Path, own: bool) -> None:
    """By a file that stands for the kernel's log."""
    log = tmp_path / "kmsg"
    with Popen(["/bin/sh", "-c", "kill -ABRT $$"], cwd=tmp_path) as rank:
        os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)
        whose = rank.pid if own else rank.pid + 1
        fault = f"NVRM: Xid (PCI:0000:3b:00): 31, pid={whose}, name=python, Ch 00000008, MMU Fault"
        fallen = "NVRM: Xid (PCI:0000:5e:00): 79, GPU has fallen off the bus."
        log.write_text(
            entry("usb 1-1: new device") + entry(fault) + entry(fallen) + entry(fault.replace("31", "13"), 3600)
        )
        why = Deaths(time.monotonic_ns(), log=str(log)).why({0: (rank, -signal.SIGABRT, ())})[0]
    told = why.split("; ")
    mmu = f"GPU 0000:3b:00 has reported Xid 31: pid={whose}, name=python, Ch 00000008, MMU Fault"
    told = [one for one in told if "core" not in one]
    assert told == [*([mmu] if own else []), "GPU 0000:5e:00 has reported Xid 79: GPU has fallen off the bus."]


def test_without_a_log_nothing_is_said_of_it(tmp_path: Path) -> None:
    with Popen(["/bin/sh", "-c", "kill -TERM $$"]) as rank:
        os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)
        assert Deaths(0, log=str(tmp_path / "none")).why({0: (rank, -15, ())}) == {0: ""}


# ---- its own words --------------------------------------------------------------------------------------------------

TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "train.py", line 3, in <module>',
    "    step()",
    "ValueError: bad batch",
]


@pytest.mark.parametrize(
    ("returncode", "lines", "why"),
    [
        (1, TRACEBACK, "ValueError: bad batch"),
        (1, [*TRACEBACK, "Exception ignored in atexit", "bye"], "ValueError: bad batch"),
        (1, [*TRACEBACK[:3], "torch.OutOfMemoryError: no", "W: more"], "torch.OutOfMemoryError: no"),
        (1, [*TRACEBACK[:3], "KeyboardInterrupt"], "KeyboardInterrupt"),
        (1, ["Error: nothing"], ""),
        (-9, TRACEBACK, ""),
        (3, [], ""),
    ],
)  # fmt: skip
def test_the_last_traceback_is_a_reason(returncode: int, lines: Sequence[str], why: str) -> None:
    assert why_by_words(returncode, None, lines) == why


def test_an_exception_is_told_when_it_is_not_quoted_last(tmp_path: Path) -> None:
    failure = fails(
        "import atexit\natexit.register(print, 'bye', file=sys.stderr)\nraise KeyError('weights')\n", tmp_path
    )
    assert failure.why == "KeyError: 'weights'"
    place = f"<string>:{LIVES.count(chr(10)) + 3}"
    assert f"\n  why: KeyError: 'weights' ({place})\n" in str(failure)
    failure = fails("raise KeyError('weights')\n", tmp_path)
    assert failure.why == "KeyError: 'weights'" and "why:" not in str(failure)


def test_a_command_that_a_wrapper_does_not_find(tmp_path: Path) -> None:
    with launch(["env", "no-such-program"], 1, log_dir=tmp_path) as group:
        group.wait(60)
        (failure,) = group.failures()
    assert failure.why.startswith("127 usually means that a shell or wrapper (env, timeout, numactl) did not find its")
    assert failure.why.endswith("No such file or directory")


@pytest.mark.parametrize(
    "said",
    [
        "./a.out: error while loading shared libraries: libcudart.so.12: cannot open shared object file: No such file",
        "Error loading shared library libcudart.so.12: No such file or directory (needed by ./a.out)",
    ],
    ids=["glibc", "musl"],
)
def test_a_shared_library_that_is_missing(said: str) -> None:
    assert why_by_words(127, None, [said, "Error relocating ./a.out: f: symbol not found"]) == said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_rank_that_another_users_process_has_killed() -> None:
    with launch(["sleep", "300"], 1) as group:
        group.wait_any(0.1)
        group.wait_any(0.1)
        subprocess.run(["kill", "-9", str(group.pids()[0])], check=True)
        group.wait(60)
        (failure,) = group.failures()
    assert failure.sent == frozenset() and "out of memory" not in failure.why
