"""A warm start beside a cold one: ``python benchmarks/warm.py``, as ratios within one run.

Eight ranks import torch and say when they have: executed, forked from a new template, and forked from it again. What is
measured is the time from the call of launch() until the last of them is ready; the time from a rank's death until all
ranks of the restart are ready; and the memory of all ranks, each page divided by those that share it (Pss of proc(5)),
after the imports and after one step of an optimizer. Then whole commands: examples/ddp_digits.py with four ranks, under
torchrun and under ours, in turn.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rankspawn import RankGroup, Template, launch

MODULES = ["torch", "torch.distributed", "torch.nn.parallel", "torch._dynamo"]
IMPORTS = "import torch, torch.distributed, torch.nn.parallel"
STEP = """
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(4, 64)).sum().backward()
optimizer.step()
"""
READY = """
import os, time
now = time.monotonic_ns()
ready = os.open(os.environ["RS_READY"], os.O_WRONLY)
os.write(ready, b"%20d\\n" % now)
os.close(ready)
time.sleep(600)
"""
LINE = 21


class Bench:
    """Launches of one script, and when its ranks are ready.

    Args:
        folder: For the scripts, and the FIFO that ranks write to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fifo = folder / "ready"
        os.mkfifo(fifo)
        self.ready = os.open(fifo, os.O_RDWR)
        self.env = {**os.environ, "RS_READY": str(fifo), "OMP_NUM_THREADS": "1"}

    def last_ready(self, count: int) -> int:
        """When the last of ``count`` ranks was ready (CLOCK_MONOTONIC, ns)."""
        return max(int(os.read(self.ready, LINE)) for _ in range(count))

    @contextmanager
    def launched(self, count: int, warm: Any, body: str = "", **options: Any) -> Iterator[tuple[RankGroup, float]]:
        """A group, and the seconds from the call until its last rank was ready."""
        script = self.folder / "rank.py"
        script.write_text(f"{IMPORTS}\n{body}\n{READY}")
        called = time.monotonic_ns()
        with launch([sys.executable, str(script)], count, warm=warm, env=self.env, **options) as group:
            seconds = (self.last_ready(count) - called) / 1e9
            how = {rank.mechanism for rank in group.ranks}
            assert how == ({"warm"} if warm else {"clone"}), how
            yield group, seconds
            group.kill()

    def seconds(self, count: int, warm: Any, turns: int = 1) -> float:
        found = []
        for _ in range(turns):
            with self.launched(count, warm) as (_, seconds):
                found.append(seconds)
            time.sleep(0.5)
        return median(found)

    def restart(self, count: int, warm: Any) -> float:
        """Seconds from a rank's death until all ranks of the next attempt are ready."""
        with self.launched(count, warm, max_restarts=1, grace=5.0) as (group, _):
            waiting = threading.Thread(target=group.wait)
            killed = time.monotonic_ns()
            os.kill(group.ranks[0].pid, signal.SIGKILL)
            waiting.start()
            seconds = (self.last_ready(count) - killed) / 1e9
            group.stop(signal.SIGKILL)
            waiting.join()
        return seconds

    def memory(self, count: int, warm: Any, body: str) -> float:
        """MiB of all ranks."""
        with self.launched(count, warm, body) as (group, _):
            return sum(map(pss, group.pids())) / 1024


def pss(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        return next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--many", type=int, default=64, help="ranks of one template, beside the others")
    parser.add_argument("--commands", action="store_true", help="only the whole commands")
    options = parser.parse_args()
    if not options.commands:
        with tempfile.TemporaryDirectory() as name:
            measure(Bench(Path(name)), options.ranks, options.turns, options.many)
    commands(options.turns)


def commands(turns: int) -> None:
    """Whole commands, each beside torchrun's of the same turn.

    Every second turn has the other order, because a machine that becomes slower or faster meanwhile favours one of two
    that always come one after the other.
    """
    job = ["--nproc-per-node", "4", str(Path(__file__).parent.parent / "examples" / "ddp_digits.py"), "--epochs", "2"]
    ways = {
        "rankspawn run": ["rankspawn", "run"],
        "rankspawn torchrun --warm": ["rankspawn.torchrun", "--warm"],
        "rankspawn run --warm": ["rankspawn", "run", "--warm"],
        "torchrun": ["torch.distributed.run"],
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        for name, words in [*ways.items()][:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", *words, *job], check=True, capture_output=True)
            took[name].append(time.perf_counter() - began)
    for name, seconds in took.items():
        show(f"{name} of the DDP example", median(seconds), "s")
        if name != "torchrun":
            goal = 2.5 if name == "rankspawn run --warm" else None
            ratios = [ref / own for own, ref in zip(seconds, took["torchrun"], strict=True)]
            show(
                f"  torchrun / that, from {min(ratios):.2f} to {max(ratios):.2f}",
                median(ratios),
                "",
                goal,
                at_least=True,
            )


def measure(bench: Bench, ranks: int, turns: int, many: int) -> None:
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {ranks} ranks")
    one = bench.seconds(1, False)
    cold = bench.seconds(ranks, False)
    show("one rank alone, executed: ready after", one, "s")
    show("all ranks executed: ready after", cold, "s")
    with Template(MODULES, required=True) as template:
        first = bench.seconds(ranks, template)
        again = bench.seconds(ranks, template, turns)
        (told,) = template.report()
        imports = sum(told["modules"].values())
        show("imports of the template", imports, "s")
        show("forked from a new template: ready after", first, "s")
        show("  / the imports", first / imports, "", 1.1)
        show("forked from it again: ready after", again, "s")
        show("  all ranks executed / that", cold / again, "", 50, at_least=True)
        of_many = bench.seconds(many, template)
        show(f"{many} ranks of it, each / {ranks} ranks, each", of_many / many / (again / ranks), "", 1.0)
        restarted, as_cold = bench.restart(ranks, template), bench.restart(ranks, False)
        show("a rank dies: all are ready again after", restarted, "s", 0.25)
        show("  all are executed again after", as_cold, "s")
        show("  that / forked", as_cold / restarted, "")
        for what, body in (("imports", ""), ("one step", STEP)):
            of_cold, of_warm = bench.memory(ranks, False, body), bench.memory(ranks, template, body)
            show(f"memory after {what}: executed", of_cold, "MiB")
            show("  forked / executed", of_warm / of_cold, "", 0.3)


def show(what: str, value: float, unit: str, goal: float | None = None, *, at_least: bool = False) -> None:
    verdict = ""
    if goal is not None:
        good = value >= goal if at_least else value <= goal
        verdict = f"{'>=' if at_least else '<='} {goal:g}: {'pass' if good else 'FAIL'}"
    print(f"{what:48} {value:10.3f} {unit:4} {verdict}", flush=True)


if __name__ == "__main__":
    main()
