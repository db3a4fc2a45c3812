"""What the tests of commands that reap orphans share."""

from __future__ import annotations

SUBREAPER = "import ctypes; assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0"

# For ranks: orphans write their numbers to a pipe, and end; the rank fails if nobody reaps them.
AWAIT_REAPER = """
import os, sys, time
def await_reaper(reading, count):
    told = b""
    while told.count(b" ") < count:
        told += os.read(reading, 4096)
    left = set(map(int, told.split()))
    until = time.monotonic() + 40
    while left and time.monotonic() < until:
        time.sleep(0.02)
        for pid in [*left]:
            try:
                os.kill(pid, 0)  # a zombie has its number still
            except ProcessLookupError:
                left.remove(pid)
    if left:
        sys.exit(f"{len(left)} of the orphans were not reaped")
"""
