"""``rankspawn torchrun`` beside torchrun, whole jobs, and where their time goes: ``python benchmarks/torchrun.py``.

Both run ``--nproc-per-node 8 --numa-binding node`` with an empty script and with ``import torch``, in turns, and then
scripts that leave at once, for the time from the end of the last worker to the end of the launcher. torchrun needs
numactl, and a device: where torch sees none, it is told the address of some PCI device, as in the other benchmarks.
Before these come whole commands as a user types them, without binding: torchrun, ``rankspawn torchrun``, and
``rankspawn run``, which has no agent. ``--commands`` measures them alone.
torch's rendezvous sleeps for a random time of up to 0.3 s; the generator is seeded, so that both sleep as long.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

LAUNCHERS = ("torchrun", "rankspawn")
BODIES = {"empty script": "", "import torch": "import torch"}
RANK = """
import os, time
began = time.monotonic_ns()
{body}
with open(os.environ["RS_MARKS"], "a") as marks:
    marks.write(f'["rank began", {{began}}]\\n["rank ended", {{time.monotonic_ns()}}]\\n')
{end}
"""
# Name, and the marks that it lies between; of the ranks' marks the last is meant.
STAGES = (
    ("interpreter of the agent", "called", "entered"),
    ("imports of the agent", "entered", "imported"),
    ("arguments, agent, rendezvous", "imported", "met"),
    ("starting 8 workers", "met", "spawned"),
    ("interpreters of the workers", "spawned", "rank began"),
    ("their script", "rank began", "rank ended"),
    ("ends of the workers, noticed", "rank ended", "noticed"),
    ("end of the agent", "noticed", "gone"),
    ("all", "called", "gone"),
)
Marks = dict[str, int]


def mark(name: str) -> None:
    with open(os.environ["RS_MARKS"], "a") as marks:
        marks.write(f'["{name}", {time.monotonic_ns()}]\n')


def launcher(name: str, arguments: Sequence[str]) -> None:
    """Run a job as the command does, in a process of its own, and note how far it has come."""
    mark("entered")
    module: Any = importlib.import_module("torch.distributed.run" if name == "torchrun" else "rankspawn.torchrun")
    if name == "torchrun":
        from job import pretend_device

        prepare()
        pretend_device()
    else:  # which imports torch when it is called
        between(module, "_import_run", None, prepare)
    sys.exit(module.main(arguments))


def prepare() -> None:
    """Note that torch is imported, and have torch's functions note how far they come."""
    mark("imported")
    random.seed(0)
    contexts: Any = importlib.import_module("torch.distributed.elastic.multiprocessing.api")
    agents: Any = importlib.import_module("torch.distributed.elastic.agent.server.api")
    between(contexts.PContext, "start", functools.partial(mark, "met"), functools.partial(mark, "spawned"))
    between(agents.SimpleElasticAgent, "_exit_barrier", functools.partial(mark, "noticed"), None)


def between(place: Any, name: str, before: Callable[[], None] | None, after: Callable[[], None] | None) -> None:
    """Call ``before`` and ``after`` around each call of a function."""
    function: Callable[..., Any] = getattr(place, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        returned = function(*args, **kwargs)
        if after is not None:
            after()
        return returned

    setattr(place, name, wrapped)


def job(name: str, script: Path, options: Sequence[str]) -> Marks:
    """One job, from the call of the launcher to its end: the time of each mark."""
    told = script.with_name("marks")
    told.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--launcher", name, *options, str(script)]
    environment = {**os.environ, "RS_MARKS": str(told), "OMP_NUM_THREADS": "1"}
    called = time.monotonic_ns()
    subprocess.run(command, env=environment, check=True)
    marks = {"called": called, "gone": time.monotonic_ns()}
    for line in told.read_text().splitlines():
        what, when = json.loads(line)
        marks[what] = max(when, marks.get(what, 0))
    return marks


def in_turns(script: Path, options: Sequence[str], rounds: int) -> dict[str, list[Marks]]:
    found: dict[str, list[Marks]] = {name: [] for name in LAUNCHERS}
    for number in range(rounds + 1):
        for name in LAUNCHERS if number % 2 else reversed(LAUNCHERS):
            marks = job(name, script, options)
            if number:  # the first warms the caches
                found[name].append(marks)
    return found


def took(marks: Marks, first: str, last: str) -> float:
    return (marks[last] - marks[first]) / 1e6


def table(title: str, found: dict[str, list[Marks]], stages: Sequence[tuple[str, str, str]]) -> list[str]:
    lines = [
        f"| {title} | torchrun, ms | rankspawn, ms | torchrun / rankspawn (quartiles) |",
        "| --- | --- | --- | --- |",
    ]
    for stage, first, last in stages:
        theirs, ours = ([took(marks, first, last) for marks in found[name]] for name in LAUNCHERS)
        low, middle, high = quantiles([their / our for their, our in zip(theirs, ours, strict=True)], n=4)
        ratio = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        lines.append(f"| {stage} | {median(theirs):,.1f} | {median(ours):,.1f} | {ratio} |")
    return lines


def commands(script: Path, workers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each command that starts ``workers`` ranks, in turns."""
    ways = {
        "torchrun": "torch.distributed.run",
        "rankspawn torchrun": "rankspawn.torchrun",
        "rankspawn run": "rankspawn run",
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, module in ways.items():
            command = [sys.executable, "-m", *module.split(), "--nproc-per-node", str(workers), str(script)]
            called = time.perf_counter()
            subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
            if number:  # the first warms the caches
                found[name].append(time.perf_counter() - called)
    return found


def table_of_commands(title: str, found: dict[str, list[float]]) -> list[str]:
    lines = [f"| {title} | seconds | torchrun / that |", "| --- | --- | --- |"]
    for name, seconds in found.items():
        ratio = median(their / our for their, our in zip(found["torchrun"], seconds, strict=True))
        lines.append(f"| {name} | {median(seconds):.2f} | {ratio:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="jobs of each launcher and script (default 10)")
    parser.add_argument("--workers", type=int, default=8, help="(default 8)")
    parser.add_argument("--commands", action="store_true", help="only the whole commands")
    options = parser.parse_args()
    arguments = ["--nproc-per-node", str(options.workers), "--numa-binding", "node"]
    with tempfile.TemporaryDirectory(prefix="torchrun-") as folder:
        script = Path(folder, "rank.py")
        os.environ["TMPDIR"] = folder  # torch leaves a folder of logs there for each job
        print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {options.workers} workers\n")
        for title, body in BODIES.items():
            script.write_text(f"{body}\n")
            print("\n".join(table_of_commands(title, commands(script, options.workers, options.rounds))), flush=True)
            print()
        if options.commands:
            return
        for title, body in BODIES.items():
            script.write_text(RANK.format(body=body, end=""))
            print("\n".join(table(title, in_turns(script, arguments, options.rounds), STAGES)), flush=True)
            print()
        script.write_text(RANK.format(body="", end="os._exit(0)"))
        exits = [
            ("last worker's exit to the agent's knowing", "rank ended", "noticed"),
            ("last worker's exit to the launcher's", "rank ended", "gone"),
        ]
        found = in_turns(script, ["--nproc-per-node", "1"], 2 * options.rounds)
        print("\n".join(table("one worker that leaves at once", found, exits)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--launcher"]:
        launcher(sys.argv[2], sys.argv[3:])
    else:
        main()
