"""The jobs of whole groups: many ranks started and reaped, watched, and ended, by us and by others."""

from __future__ import annotations

import importlib
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from shutil import which
from time import perf_counter_ns
from typing import Any

from job import RANK_ENV, Job, Place, Skip, allow_fds, binding_to, module, pretend_device, reaped


def bindings(place: Place, ranks: int) -> list[Any]:
    """Each rank bound to one of this process's CPUs in turn, as the floor's crew binds them."""
    cpus = sorted(os.sched_getaffinity(0))
    distinct = [binding_to(place, {cpu}) for cpu in cpus]
    return [distinct[rank % len(distinct)] for rank in range(ranks)]


def launch_job(place: Place, *, ranks: int, bound: bool = True, guard: bool = False) -> Job:
    """``launch``, from the call to the end of the ``with`` block: all ranks are reaped, and nobody is left."""
    launch = module("rankspawn").launch
    argv = [place.programs["tiny"]]
    where = {"bindings": bindings(place, ranks)} if bound else {}
    allow_fds(ranks + 64)

    def once() -> int:
        began = perf_counter_ns()
        with launch(argv, ranks, guard=guard, **where) as group:
            statuses = group.wait()
        took = perf_counter_ns() - began
        if any(statuses):
            raise RuntimeError(f"the ranks ended with {statuses}")
        return took

    return once


def numactl_loop_job(place: Place, *, ranks: int) -> Job:
    """A loop of ``subprocess.Popen`` of numactl, and a wait for each."""
    numactl = which("numactl")
    if numactl is None:
        raise Skip("numactl is not installed")
    memory = [f"--membind={place.node}"] if place.node >= 0 else []
    cpus = sorted(os.sched_getaffinity(0))
    argvs = [
        [numactl, f"--physcpubind={cpus[rank % len(cpus)]}", *memory, place.programs["tiny"]] for rank in range(ranks)
    ]

    def once() -> int:
        began = perf_counter_ns()
        started = [subprocess.Popen(argv, start_new_session=True) for argv in argvs]
        for process in started:
            reaped(process)
        return perf_counter_ns() - began

    return once


def context_job(place: Place, *, ranks: int) -> Job:
    """torch's SubprocessContext with node binding, until it says that all have ended."""
    module("torch")
    multiprocessing = importlib.import_module("torch.distributed.elastic.multiprocessing")
    numa = importlib.import_module("torch.numa.binding")
    if which("numactl") is None:
        raise Skip("torch's handler needs numactl, which is not installed")
    pretend_device()
    logging.getLogger("torch").setLevel(logging.ERROR)
    options = numa.NumaOptions(affinity_mode=numa.AffinityMode.NODE)

    def once() -> int:
        specs = multiprocessing.DefaultLogsSpecs(log_dir=tempfile.mkdtemp(dir=place.logs))
        began = perf_counter_ns()
        context = multiprocessing.start_processes(
            name="bench",
            entrypoint=place.programs["tiny"],
            args=dict.fromkeys(range(ranks), ()),
            envs={rank: {**RANK_ENV, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)},
            logs_specs=specs,
            numa_options=options,
        )
        # torch's own period, a second, would be most of the time.
        result = context.wait(period=0.0001)
        took = perf_counter_ns() - began
        if result is None or result.is_failed():
            raise RuntimeError(f"torch's ranks failed: {result}")
        return took

    return once


def command_job(place: Place, *, command: tuple[str, ...]) -> Job:
    """Another launcher's command, which starts as many of the tiny program as it says."""
    program = which(command[0])
    if program is None:
        raise Skip(f"{command[0]} is not installed")
    argv = [program, *command[1:], place.programs["tiny"]]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    def once() -> int:
        began = perf_counter_ns()
        # The tiny program does not call MPI_Init; the launchers start and reap it all the same.
        try:
            done = subprocess.run(argv, env=environment, capture_output=True, timeout=30, check=False)
        except subprocess.TimeoutExpired:
            raise Skip(f"{command[0]} did not end within 30 s") from None
        took = perf_counter_ns() - began
        if done.returncode:
            why = done.stderr.decode(errors="replace").partition("\n")[0]
            raise Skip(f"{command[0]} ended with status {done.returncode}: {why[:80]}")
        return took

    return once


def run_job(place: Place, *, ranks: int) -> Job:
    """``rankspawn run`` with the start of its interpreter, to stand beside commands of others."""
    source = str(os.path.dirname(os.path.dirname(module("rankspawn").__file__)))
    code = f"import sys; sys.path.insert(0, {source!r}); from rankspawn.__main__ import main; sys.exit(main())"
    argv = [sys.executable, "-I", "-c", code, "run", "--nproc-per-node", str(ranks), "--no-python"]

    def once() -> int:
        began = perf_counter_ns()
        subprocess.run([*argv, place.programs["tiny"]], check=True)
        return perf_counter_ns() - began

    return once


def group_notice_job(place: Place, *, ranks: int) -> Job:
    """From the instant before the exit of one rank among many to the return of ``wait_any``."""
    launch = module("rankspawn").launch
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)

    def command(rank: int) -> list[str]:
        if rank:
            return ["sleep", "120"]
        return [place.programs["last_words"], str(random.randint(300, 400))]

    def once() -> int:
        saved = os.dup(1)
        os.dup2(writer, 1)
        try:
            group = launch(command, ranks)
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        with group:
            group.wait_any(30)
            now = perf_counter_ns()
            took = now - int.from_bytes(os.read(reader, 8), sys.byteorder)
            group.kill()
        return took

    return once


def group_idle_job(place: Place, *, ranks: int, api: str, seconds: float = 1.0) -> Job:
    """The CPU time that a launcher takes while it watches ranks that do nothing, for each second of it.

    torch's agent looks at its context every 0.1 s (its monitor_interval).
    """
    launch = module("rankspawn").launch

    def ours() -> int:
        with launch(["sleep", "120"], ranks) as group:
            group.wait_any(0.5)  # once in a launch, a moment after its start, the kernel's counters are read
            began = time.process_time_ns()
            group.wait_any(seconds)
            used = time.process_time_ns() - began
            group.kill()
        return round(used / seconds)

    if api == "rankspawn":
        return ours
    module("torch")
    multiprocessing = importlib.import_module("torch.distributed.elastic.multiprocessing")
    logging.getLogger("torch").setLevel(logging.CRITICAL)

    def theirs() -> int:
        context = multiprocessing.start_processes(
            name="bench",
            entrypoint="sleep",
            args=dict.fromkeys(range(ranks), ("120",)),
            envs=dict.fromkeys(range(ranks), RANK_ENV),
            logs_specs=multiprocessing.DefaultLogsSpecs(),
        )
        began, until = time.process_time_ns(), time.monotonic() + seconds
        while time.monotonic() < until:
            context.wait(0)
            time.sleep(0.1)
        used = time.process_time_ns() - began
        context.close()
        return round(used / seconds)

    return theirs


def group_terminate_job(place: Place, *, ranks: int) -> Job:
    """``terminate()`` of ranks that SIGTERM ends, until all are reaped and nobody is left in their sessions."""
    launch = module("rankspawn").launch

    def once() -> int:
        with launch(["sleep", "120"], ranks) as group:
            group.wait_any(0.1)
            began = perf_counter_ns()
            group.terminate()
            return perf_counter_ns() - began

    return once


JOBS = {
    "launch": launch_job,
    "numactl_loop": numactl_loop_job,
    "context": context_job,
    "command": command_job,
    "run": run_job,
    "group_notice": group_notice_job,
    "group_idle": group_idle_job,
    "group_terminate": group_terminate_job,
}
