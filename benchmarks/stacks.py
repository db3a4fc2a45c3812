"""What it costs to look at ranks: ``python benchmarks/stacks.py``.

Stacks of eight ranks that have imported torch, where it is installed, and of 64 that have imported nothing: how long a
look takes; and the longest time for which a rank that computes did not run, with a look and in as long a time without
one. Then ``rankspawn ps`` of 64 ranks beside a bare interpreter, and launches with the looks and the watch for hangs
beside launches without, in turn.
"""

from __future__ import annotations

import argparse
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from rankspawn import RankGroup, launch

# Each rank has eight bytes of a file: 1 when it is ready, then the longest time in which it did not run, in ns. Whoever
# writes 1 there has it begin again.
RANK = """
import mmap, os, struct, sys, time
{imports}
at = 8 * int(os.environ["RANK"])
with open(sys.argv[1], "r+b") as file:
    told = mmap.mmap(file.fileno(), 0)
told[at:at + 8] = struct.pack("=q", 1)
last = time.monotonic_ns()
while True:
    now = time.monotonic_ns()
    if now - last > struct.unpack("=q", told[at:at + 8])[0]:
        told[at:at + 8] = struct.pack("=q", now - last)
    last = now
    {pause}
"""


class Ranks:
    """Ranks that run, and what they say of themselves."""

    def __init__(self, group: RankGroup, told: mmap.mmap) -> None:
        self.group, self._told = group, told

    def begin(self) -> None:
        self._told[:] = struct.pack("=q", 1) * len(self.group)

    def longest(self) -> float:
        """The longest time for which one of them did not run, in milliseconds."""
        return max(one for (one,) in struct.iter_unpack("=q", self._told[:])) / 1e6

    def are_ready(self) -> bool:
        return all(one for (one,) in struct.iter_unpack("=q", self._told[:]))


@contextmanager
def running(count: int, imports: str = "", pause: str = "pass") -> Iterator[Ranks]:
    with tempfile.TemporaryDirectory() as name:
        script, shared = Path(name) / "rank.py", Path(name) / "told"
        script.write_text(RANK.format(imports=imports, pause=pause))
        shared.write_bytes(bytes(8 * count))
        with open(shared, "r+b") as file, mmap.mmap(file.fileno(), 0) as told:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            with launch([sys.executable, str(script), str(shared)], count, env=env) as group:
                ranks = Ranks(group, told)
                while not ranks.are_ready():
                    group.poll()
                    time.sleep(0.05)
                yield ranks
                group.kill()


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def look(count: int, imports: str, goal: float, turns: int) -> None:
    what = f"{count} ranks" + (" with torch" if imports else "")
    with running(count, imports, "time.sleep(0.01)") as ranks:
        ranks.group.dump(10.0)  # programs and libraries come from the disk the first time
        took = [ranks.group.dump(10.0) for _ in range(turns)]
        seen = sum(process.has_frames for process in took[-1].processes)
        show(f"stacks of {what}, which sleep", median(one.seconds for one in took), "s", goal)
        show("  ranks of which there are Python frames", seen, "")


def stopped(count: int, imports: str) -> None:
    with running(count, imports) as ranks:
        ranks.group.dump(10.0)
        ranks.begin()
        found = ranks.group.dump(10.0)
        longest = ranks.longest()
        ranks.begin()
        time.sleep(found.seconds)
        show(f"{count} ranks that compute: stacks", found.seconds, "s", 1.0)
        show("  the longest a rank did not run meanwhile", longest, "ms")
        show("  and in as long a time without a look", ranks.longest(), "ms")
        show("  the difference", longest - ranks.longest(), "ms", 50)


def ps(count: int, turns: int) -> None:
    bare, whole = [], []
    command = [sys.executable, "-m", "rankspawn", "ps"]
    with running(count, pause="time.sleep(0.05)"):
        for _ in range(turns):
            bare.append(seconds(lambda: subprocess.run([sys.executable, "-c", ""], check=True)))
            whole.append(seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)))
    show(f"rankspawn ps of {count} ranks", 1000 * median(whole), "ms")
    more = median(one - other for one, other in zip(whole, bare, strict=True))
    show("  more than a bare interpreter", 1000 * more, "ms", 100)


def launches(count: int, turns: int) -> None:
    def with_all() -> None:
        with launch(["true"], count, stacks=True, hang_timeout=600.0) as group:
            group.wait()

    def without() -> None:
        with launch(["true"], count) as group:
            group.wait()

    with_all()
    without()
    ratios = []
    for turn in range(turns):
        both = (with_all, without) if turn % 2 else (without, with_all)
        took = {call: seconds(call) for call in both}
        ratios.append(took[with_all] / took[without])
    show(f"launch of {count} with looks and watch / without", median(ratios), "", 1.01)


def show(what: str, value: float, unit: str, goal: float | None = None) -> None:
    verdict = "" if goal is None else f"<= {goal:g}: {'pass' if value <= goal else 'FAIL'}"
    print(f"{what:48} {value:10.3f} {unit:4} {verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--many", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    imports = "import torch" if find_spec("torch") else ""
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}")
    look(options.ranks, imports, 1.0, options.turns)
    stopped(options.ranks, imports)
    look(options.many, "", 3.0, options.turns)
    ps(options.many, options.turns)
    launches(options.ranks, 40 * options.turns)


if __name__ == "__main__":
    main()
