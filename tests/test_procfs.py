"""What procfs says of a process, beside what the process says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from rankspawn._procfs import read_stat

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no procfs")

# Names itself (PR_SET_NAME), tells its numbers, and sleeps with a second thread.
PROGRAM = """
import ctypes, os, signal, threading
ctypes.CDLL(None).prctl(15, b"a) R 1 (b\\xff")
threading.Thread(target=signal.sigwait, args=[[signal.SIGUSR1]], daemon=True).start()
print(os.getppid(), os.getpgid(0), os.getsid(0), flush=True)
signal.pause()
"""


def test_each_field_is_the_processs_own() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", PROGRAM], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            told = [int(word) for word in process.stdout.readline().split()]
            after = time.clock_gettime(time.CLOCK_BOOTTIME)
            deadline = time.monotonic() + 30
            while (stat := read_stat(f"/proc/{process.pid}")).state != "S" and time.monotonic() < deadline:
                time.sleep(0.001)
            assert (stat.name, stat.state, stat.threads) == ("a) R 1 (b\\xff", "S", 2)
            assert [stat.parent, stat.group, stat.session] == told == [os.getpid(), process.pid, process.pid]
            ticks = os.sysconf("SC_CLK_TCK")
            assert before - 1 / ticks <= stat.started / ticks <= after
            assert 0 <= stat.cpu_seconds < 30
            for tid in os.listdir(f"/proc/{process.pid}/task"):
                assert read_stat(f"/proc/{process.pid}/task/{tid}").parent == os.getpid()
        finally:
            process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert read_stat(f"/proc/{process.pid}").state == "Z"
    with pytest.raises(FileNotFoundError):
        read_stat(f"/proc/{process.pid}")


def test_the_time_of_the_cpu_is_all_of_it() -> None:
    until = time.process_time() + 0.1
    while time.process_time() < until:
        os.stat("/")
    before = time.process_time()
    counted = read_stat("/proc/self").cpu_seconds
    # User and system time are counted in whole ticks each.
    assert before - 2 / os.sysconf("SC_CLK_TCK") <= counted <= time.process_time()
