"""Competitors timed in turns, in short blocks, so that their ratios hold on a machine that is shared and noisy.

A ``Case`` says what is timed and in which ``Situation``; ``Bench`` keeps one measuring process per situation and hands
the blocks out. Absolute times change with the machine's mood; only ratios of cases measured in one ``Bench.interleave``
count.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / ".cache" / "benchmarks"
CSRC = HERE.parent / "csrc"
ENGINE = [str(path) for folder in (CSRC, CSRC / "search") for path in sorted(folder.glob("*.c"))]
PROGRAMS = {
    "floor": ("-O2", "-pthread"),
    "tiny": ("-O2", "-nostdlib", "-static", "-fno-stack-protector"),
    "last_words": ("-O2",),
    "ends": ("-O2",),
    "engine": ("-O2", "-pthread", "-iquote", str(CSRC), *ENGINE),
}


ALL_CPUS = 0


class Unable(Exception):
    """A case cannot run on this machine; the text says why."""


@dataclass(frozen=True)
class Situation:
    """The state of the measuring process: open fds, touched memory, CPUs (ALL_CPUS: what it has), extra variables."""

    fds: int = 10
    touch_mib: int = 0
    cores: int = 1
    variables: tuple[tuple[str, str], ...] = ()
    name: str = ""  # tells apart situations that are otherwise alike, such as one where torch is loaded


@dataclass(frozen=True)
class Case:
    """One competitor. job: a key of ``worker.JOBS``, or "floor"; options: that job's keywords."""

    label: str
    job: str
    options: tuple[tuple[str, Any], ...] = ()
    situation: Situation = Situation()


@dataclass(frozen=True)
class Group:
    """Cases timed in turns: ``blocks`` times each, ``rounds`` samples a time, after ``warmup`` that are dropped."""

    name: str
    cases: tuple[Case, ...]
    blocks: int = 60
    rounds: int = 20
    warmup: int = 3


@dataclass
class Timings:
    """Nanoseconds by case and block, and the cases that could not run, with the reason."""

    blocks: dict[Case, list[list[int]]] = field(default_factory=dict)
    unable: dict[Case, str] = field(default_factory=dict)

    def samples(self, case: Case) -> list[int]:
        self._check(case)
        return [sample for block in self.blocks[case] for sample in block]

    def median(self, case: Case) -> float:
        return median(self.samples(case))

    def ratio(self, case: Case, base: Case) -> tuple[float, float, float]:
        """(median, lower and upper quartile) of case / base, block by block: neighbours in time are compared."""
        return _quartiles([ours / theirs for ours, theirs in self._pairs(case, base)])

    def difference(self, case: Case, base: Case) -> tuple[float, float, float]:
        """The same for case - base, in nanoseconds."""
        return _quartiles([ours - theirs for ours, theirs in self._pairs(case, base)])

    def _pairs(self, case: Case, base: Case) -> list[tuple[float, float]]:
        """The median of each block of both."""
        self._check(case)
        self._check(base)
        pairs = zip(self.blocks[case], self.blocks[base], strict=True)
        return [(median(ours), median(theirs)) for ours, theirs in pairs]

    def _check(self, case: Case) -> None:
        if case in self.unable:
            raise Unable(self.unable[case])


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return middle, low, high


class Bench:
    """Builds the C programs, starts measuring processes as cases need them, and ends them when it is closed."""

    def __init__(self, cpu: int | None = None) -> None:
        self.cpu = max(os.sched_getaffinity(0)) if cpu is None else cpu
        self.programs = {name: str(build(name, flags)) for name, flags in PROGRAMS.items()}
        self._stack = ExitStack()
        self._logs = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rankspawn-bench-"))
        self._processes: dict[object, subprocess.Popen[str]] = {}
        self._best: dict[tuple[int, int, bool], tuple[str, int]] = {}
        self.node, self.node_note = self._usable_node()

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def interleave(self, group: Group, *, effort: float = 1.0) -> Timings:
        """Time the cases of ``group`` in turns. effort scales the number of blocks (at least 3 are run)."""
        timings = Timings()
        order = random.Random(0)  # the same shuffles every time: no case always follows the same neighbour
        for _ in range(max(3, round(group.blocks * effort))):
            for case in order.sample(group.cases, len(group.cases)):
                if case in timings.unable:
                    continue
                try:
                    samples = self._block(case, group.warmup + group.rounds)
                except Unable as why:
                    timings.unable[case] = str(why)
                else:
                    timings.blocks.setdefault(case, []).append(samples[group.warmup :])
        return timings

    def _block(self, case: Case, rounds: int) -> list[int]:
        if case.job == "floor":
            return [int(sample) for sample in self._ask(self._floor(**dict(case.options)), f"{rounds}").split()]
        if case.situation.cores > len(os.sched_getaffinity(0)):
            raise Unable(f"{case.situation.cores} CPUs are needed")
        request = json.dumps([case.job, dict(case.options), rounds])
        reply = json.loads(self._ask(self._worker(case.situation), request))
        if "skip" in reply:
            raise Unable(reply["skip"])
        samples: list[int] = reply["samples"]
        return samples

    @staticmethod
    def _ask(process: subprocess.Popen[str], line: str) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        print(line, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{process.args!r} ended with status {process.wait()}; its error is above")
        return answer

    def _floor(
        self, mode: str, ranks: int = 0, cores: int = 2, bound: bool = True, way: str = ""
    ) -> subprocess.Popen[str]:
        cpus = self.cpus(cores)
        if mode == "engine":
            return self._engine(way, ranks, cpus, bound)
        if mode == "ends":
            command = [self.programs["ends"], str(ranks)]
            return self._started((mode, ranks), command, cpus=cpus)  # the CPUs of our ranks
        if mode == "best":
            if (ranks, cores, bound) not in self._best:
                self._best[ranks, cores, bound] = self._best_floor(ranks, cpus, bound)
            return self._crew(*self._best[ranks, cores, bound], ranks, cpus)
        return self._started(mode, [self.programs["floor"], mode, str(self.cpu), str(self.node), self.programs["tiny"]])

    def _engine(self, way: str, ranks: int, cpus: Sequence[int], bound: bool) -> subprocess.Popen[str]:
        places = ("" if bound else "-") + ",".join(map(str, cpus))
        program = shutil.which("sleep") or "/bin/sleep" if way == "ends" else self.programs["tiny"]
        command = [self.programs["engine"], way, places, str(self.node), program, *([str(ranks)] if ranks else [])]
        return self._started(tuple(command), command)

    def _crew(self, mode: str, threads: int, ranks: int, cpus: Sequence[int]) -> subprocess.Popen[str]:
        places = ",".join(map(str, cpus))
        numbers = (self.programs["tiny"], str(ranks), str(threads))
        command = [self.programs["floor"], mode, places, str(self.node), *numbers]
        return self._started((mode, threads, ranks, places), command)

    def _best_floor(self, ranks: int, cpus: Sequence[int], bound: bool) -> tuple[str, int]:
        """The way and the number of threads by which the floor is the quickest here."""
        ways = [
            (mode, threads)
            for mode in (("crew", "homing") if bound else ("unbound",))
            for threads in (1, 2, 3, 4, 6, 8, 12, 16)
            if threads >= len(cpus) or mode != "homing"
        ]
        times: dict[tuple[str, int], list[int]] = {way: [] for way in ways}
        for _ in range(max(5, 512 // ranks)):
            for way in ways:
                times[way] += map(int, self._ask(self._crew(*way, ranks, cpus), "1").split())
        best = min(ways, key=lambda way: median(times[way]))
        for way in ways:
            if way != best:
                self._stop((*way, ranks, ",".join(map(str, cpus))))
        return best

    @property
    def facts(self) -> list[str]:
        """What was found out on the way."""
        return [
            f"the best floor of {ranks} {'bound' if bound else 'unbound'} ranks on"
            f" {len(self.cpus(cores))} CPUs: {mode}, {threads} threads"
            for (ranks, cores, bound), (mode, threads) in sorted(self._best.items())
        ]

    def _stop(self, key: object) -> None:
        process = self._processes.pop(key)
        assert process.stdin is not None
        process.stdin.close()
        process.wait()

    def cpus(self, cores: int) -> list[int]:
        """The CPUs of a situation with so many: the measuring one first."""
        others = sorted(os.sched_getaffinity(0) - {self.cpu})
        return [self.cpu, *(others if cores == ALL_CPUS else others[: cores - 1])]

    def _worker(self, situation: Situation) -> subprocess.Popen[str]:
        settings = {
            "cpu": self.cpu,
            "cpus": self.cpus(situation.cores),
            "node": self.node,
            "programs": self.programs,
            "logs": self._logs,
            "fds": situation.fds,
            "touch_mib": situation.touch_mib,
        }
        command = [sys.executable, str(HERE / "worker.py"), json.dumps(settings)]
        return self._started(situation, command, {**os.environ, **dict(situation.variables)})

    def _started(
        self, key: object, command: Sequence[str], env: Mapping[str, str] | None = None, cpus: Sequence[int] = ()
    ) -> subprocess.Popen[str]:
        if key not in self._processes:
            bind = functools.partial(os.sched_setaffinity, 0, cpus) if cpus else None
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, preexec_fn=bind
            )
            self._stack.enter_context(process)  # closes its stdin, which ends it, and waits
            self._processes[key] = process
        return self._processes[key]

    def _usable_node(self) -> tuple[int, str]:
        """The node of the measuring CPU, or -1 and the reason, where a memory policy cannot be set."""
        nodes = Path(f"/sys/devices/system/cpu/cpu{self.cpu}").glob("node[0-9]*")
        node = min((int(found.name.removeprefix("node")) for found in nodes), default=0)
        trial = subprocess.run(
            [self.programs["floor"], "clone", str(self.cpu), str(node), self.programs["tiny"], "1"],
            capture_output=True,
            text=True,
            check=False,
        )
        if trial.returncode == 0:
            return node, ""
        if "set_mempolicy" in trial.stderr:
            return -1, f"all without memory policy ({trial.stderr.strip()})"
        raise RuntimeError(f"the floor does not run here: {trial.stderr.strip()}")


def build(name: str, flags: Sequence[str]) -> Path:
    """Compile ``name``.c where it is newer than the program built last; the path of the program."""
    source, program = HERE / f"{name}.c", BUILD / name
    read = [source, *(path for flag in flags if flag.endswith(".c") for path in Path(flag).parent.glob("*.[ch]"))]
    if not program.exists() or program.stat().st_mtime < max(path.stat().st_mtime for path in read):
        BUILD.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC", "cc").split()
        fresh = program.with_suffix(f".{os.getpid()}")  # renamed when whole: two runs may build at once
        subprocess.run([*compiler, "-Wall", "-Wextra", "-Werror", *flags, str(source), "-o", str(fresh)], check=True)
        fresh.replace(program)
    return program
