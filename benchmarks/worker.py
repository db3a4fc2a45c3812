"""The process that measures: a JSON request a line on stdin, a JSON reply a line on stdout.

``harness`` starts one per situation (few or many open fds, a small or large memory, other variables) and gives them
short blocks of work in turns, so that competitors meet the same noise. Every job returns nanoseconds (CLOCK_MONOTONIC).
"""

from __future__ import annotations

import builtins
import gc
import importlib
import importlib.util
import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from shutil import which
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Any

import groups
from job import RANK_ENV, Job, Place, Skip, allow_fds, binding_to, module, pretend_device, reaped


def popen_job(
    place: Place, *, api: str = "subprocess", bound: bool = False, env: bool = False, stdio: str = "inherit"
) -> Job:
    """``Popen(..., start_new_session=True)``, call to reaped. stdio: "inherit", "null", "files" or "pipes"."""
    popen = module(api).Popen
    argv = [place.programs["tiny"]]
    keywords: dict[str, Any] = {"start_new_session": True}
    if bound:
        keywords["binding"] = binding_to(place, {place.cpu})
    if env:
        keywords["env"] = {**os.environ, **RANK_ENV}
    if stdio == "null":
        keywords.update(dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL))
    elif stdio == "pipes":
        keywords.update(dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE))
    logs = (place.logs / f"{api}.out", place.logs / f"{api}.err")

    def plain() -> int:
        began = perf_counter_ns()
        process = popen(argv, **keywords)
        return reaped(process) - began

    def piped() -> int:
        began = perf_counter_ns()
        process = popen(argv, **keywords)
        took = reaped(process) - began
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()
        return took

    def files_by_parent() -> int:
        # A caller of subprocess (and torch's handler) opens and closes log files so.
        began = perf_counter_ns()
        with open(logs[0], "w") as out, open(logs[1], "w") as err:
            process = popen(argv, stdout=out, stderr=err, **keywords)
        return reaped(process) - began

    def files_by_child() -> int:
        began = perf_counter_ns()
        process = popen(argv, stdout=logs[0], stderr=logs[1], **keywords)
        return reaped(process) - began

    if stdio == "files":
        return files_by_parent if api == "subprocess" else files_by_child
    return piped if stdio == "pipes" else plain


def extension_job(place: Place) -> Job:
    """The extension called as ``Popen(binding=...)`` calls it, and waitpid: the rest is the cost of Popen itself."""
    module("rankspawn")
    inside = module("rankspawn._start.popen")
    extension: Any = inside._spawn
    if extension is None:
        raise Skip("rankspawn is installed without its extension")
    calls: list[tuple[Any, ...]] = []

    def recorded(*arguments: Any) -> Any:
        calls.append(arguments)
        return extension.spawn(*arguments)

    # Record the arguments of a real call, so that this code knows only the first of them, their owner.
    inside._spawn = SimpleNamespace(**{**vars(extension), "spawn": recorded})
    try:
        popen_job(place, api="rankspawn", bound=True)()
    finally:
        inside._spawn = extension
    if not calls:
        raise Skip("Popen does not call _spawn.spawn here")
    spawn, arguments = extension.spawn, calls[0][1:]

    def once() -> int:
        owner = SimpleNamespace()
        began = perf_counter_ns()
        spawn(owner, *arguments)
        os.waitpid(owner.pid, 0)
        return perf_counter_ns() - began

    return once


def numactl_job(place: Place, *, env: bool = False) -> Job:
    """``subprocess.Popen`` of numactl, which binds itself and then executes the program."""
    numactl = which("numactl")
    if numactl is None:
        raise Skip("numactl is not installed")
    argv = [numactl, f"--physcpubind={place.cpu}"]
    if place.node >= 0:
        argv.append(f"--membind={place.node}")
    argv.append(place.programs["tiny"])
    keywords: dict[str, Any] = {"env": {**os.environ, **RANK_ENV}} if env else {}

    def once() -> int:
        began = perf_counter_ns()
        process = subprocess.Popen(argv, start_new_session=True, **keywords)
        return reaped(process) - began

    return once


def handler_job(place: Place, *, api: str, logs: bool = False) -> Job:
    """``SubprocessHandler`` with the NUMA option "node" of the same library: torch's, or ours."""
    if api == "torch":
        module("torch")
        handlers = importlib.import_module("torch.distributed.elastic.multiprocessing.subprocess_handler")
        numa = importlib.import_module("torch.numa.binding")
        if which("numactl") is None:
            raise Skip("torch's handler needs numactl, which is not installed")
        pretend_device()
    else:
        handlers = numa = module(api)
    options = numa.NumaOptions(affinity_mode=numa.AffinityMode.NODE)
    out, err = (str(place.logs / f"{api}-handler.{end}") for end in ("out", "err")) if logs else (None, None)

    def once() -> int:
        began = perf_counter_ns()
        handler = handlers.SubprocessHandler(place.programs["tiny"], (), RANK_ENV, out, err, 0, options)
        took = reaped(handler.proc) - began
        if logs and api == "torch":  # its close() would signal a group that is gone; ours holds nothing open
            handler._stdout.close()
            handler._stderr.close()
        return took

    return once


def notice_job(place: Place, *, api: str) -> Job:
    """From the instant before a child's exit to the return of ``wait(timeout=...)``, which was waiting long before."""
    popen = module(api).Popen
    reader, writer = os.pipe()

    def once() -> int:
        # A random time, because a waiter that polls must be met anywhere between two looks.
        milliseconds = str(random.randint(100, 200))
        process = popen([place.programs["last_words"], milliseconds], stdout=writer, start_new_session=True)
        process.wait(timeout=30)
        now = perf_counter_ns()
        return now - int.from_bytes(os.read(reader, 8), sys.byteorder)

    return once


def threads_job(place: Place, *, api: str, threads: int, batch: int = 200) -> Job:
    """``batch`` children started and reaped by ``threads`` threads; the time per child.

    Ours are bound to all CPUs of this process, and the scheduler spreads them: bound to one each, a single thread would
    often wait for a CPU that is busy with something else, which flatters the ratio.
    """
    popen = module(api).Popen
    argv = [place.programs["tiny"]]
    keywords = {} if api == "subprocess" else {"binding": binding_to(place, os.sched_getaffinity(0))}

    def once() -> int:
        gate = threading.Barrier(threads)
        begins: list[int] = []
        ends: list[int] = []

        def spawn(first: int) -> None:
            gate.wait()
            begins.append(perf_counter_ns())
            for _ in range(first, batch, threads):
                reaped(popen(argv, start_new_session=True, **keywords))
            ends.append(perf_counter_ns())

        crew = [threading.Thread(target=spawn, args=(first,)) for first in range(threads)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        if len(ends) != threads:
            raise RuntimeError("a spawning thread failed; its traceback is above")
        return (max(ends) - min(begins)) // batch

    return once


def support(name: str) -> Any:
    """A module of tests/support, loaded by its path: with tests/ on sys.path tests/torch would pass for torch."""
    source = Path(__file__).resolve().parent.parent / "tests" / "support" / f"{name}.py"
    if not source.exists():
        raise Skip(f"tests/support/{source.name} is not here")
    spec: Any = importlib.util.spec_from_file_location(name, source)
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@cache
def made_up_machine() -> tuple[tempfile.TemporaryDirectory[str], tuple[str, ...]]:
    """A sysfs tree of 2 sockets, 256 CPUs and 8 GPUs, and the GPUs' addresses. The tree is in memory, as sysfs is,
    where there is such a folder. The kernel's own files take longer to open and read, so that everything but reading
    weighs more here."""
    trees = support("sysfs_tree")
    memory = Path("/dev/shm")
    folder = tempfile.TemporaryDirectory(prefix="rankspawn-bench-", dir=memory if os.access(memory, os.W_OK) else None)
    gpus = tuple(trees.Gpu(node=number // 4) for number in range(8))
    machine = trees.Machine(sockets=2, caches=8, cores=8, threads=2, gpus=gpus, allowed="0-255")
    trees.write(Path(folder.name), machine)
    return folder, tuple(trees.address(number) for number in range(8))


def plan_job(place: Place, *, api: str = "rankspawn", whole: bool = False) -> Job:
    """The CPUs of 8 ranks on the made-up machine, mode exclusive. whole: the topology is read and the devices are found
    each time; torch reads what it needs for each rank in any case."""
    rankspawn = module("rankspawn")
    folder, addresses = made_up_machine()
    topology = rankspawn.Topology.read(folder.name)
    devices = module("rankspawn._place.devices").find_devices(topology)
    expected = [binding.cpus for binding in rankspawn.place(topology, "exclusive", nprocs=8, devices=devices)]

    def known() -> list[Any]:
        return [binding.cpus for binding in rankspawn.place(topology, "exclusive", nprocs=8, devices=devices)]

    def read() -> list[Any]:
        found = rankspawn.Topology.read(folder.name)
        return [binding.cpus for binding in rankspawn.place(found, "exclusive", nprocs=8)]

    plan = read if whole else known
    if api == "torch":
        plan = torch_plan(folder.name, addresses, topology.allowed_cpus)
    if plan() != expected or len(frozenset().union(*expected)) != 256:
        raise RuntimeError(f"{api} plans other CPUs on the made-up machine: {plan()}, not {expected}")

    def once() -> int:
        began = perf_counter_ns()
        plan()
        return perf_counter_ns() - began

    return once


def torch_plan(root: str, addresses: Iterable[str], allowed: Iterable[int]) -> Callable[[], list[Any]]:
    """torch's functions for each of the ranks, made to read below ``root``, where they see GPUs at ``addresses``."""
    module("torch")
    binding: Any = importlib.import_module("torch.numa.binding")
    numa = support("torch_numa")
    binding.torch = numa.seen_by_torch(addresses)
    binding.open = lambda path: builtins.open(root + path)
    binding.os = SimpleNamespace(
        path=os.path, listdir=lambda path: os.listdir(root + path), sched_getaffinity=lambda _pid: set(allowed)
    )
    cpus, count = numa.cpus_by_torch(binding), len(tuple(addresses))
    return lambda: [cpus("exclusive", rank) for rank in range(count)]


def files_job(place: Place) -> Job:
    """The files that a whole plan opens on the made-up machine, each read once by plain ``open``."""
    folder, _ = made_up_machine()
    tree = module("rankspawn._place.topology").Tree(folder.name)
    topology = module("rankspawn").Topology.read(tree)
    module("rankspawn._place.devices").find_devices(topology, tree=tree)
    paths = [f"{folder.name}/{path}" for path in tree.opened]

    def once() -> int:
        began = perf_counter_ns()
        for path in paths:
            with open(path) as file:
                file.read()
        return perf_counter_ns() - began

    return once


# Modules that importing the package must not load.
HEAVY = {"asyncio", "psutil", "pynvml", "torch"}


def interpreter_job(place: Place, *, code: str, light: bool = False) -> Job:
    """A Python that runs ``code`` and ends. light: code that may import nothing heavy.

    It is isolated (-I), so that no variable and no folder of the user's changes its start, and PYTHONDONTWRITEBYTECODE
    cannot keep it from having compiled files. -I leaves PYTHONPATH out too: our package is named by its folder.
    """
    if "rankspawn" in code:
        code = f"import sys; sys.path.insert(0, {str(Path(module('rankspawn').__file__).parent.parent)!r}); {code}"
    argv = [sys.executable, "-I", "-c", code]
    if light:
        listing = [*argv[:-1], f"{code}; sys.stderr.write(' '.join(sys.modules))"]
        loaded = subprocess.run(listing, stderr=subprocess.PIPE, text=True, check=True).stderr.split()
        if heavy := HEAVY.intersection(loaded):
            raise RuntimeError(f"{code!r} imports {', '.join(sorted(heavy))}")

    def once() -> int:
        began = perf_counter_ns()
        process = subprocess.Popen(argv)
        return reaped(process) - began

    return once


JOBS: dict[str, Callable[..., Job]] = {
    **groups.JOBS,
    "popen": popen_job,
    "extension": extension_job,
    "numactl": numactl_job,
    "handler": handler_job,
    "notice": notice_job,
    "threads": threads_job,
    "plan": plan_job,
    "files": files_job,
    "interpreter": interpreter_job,
}


def open_fds(count: int) -> list[int]:
    """Hold ``count`` fds open in all, as a busy server does: close-on-exec, which is how Python opens them."""
    opened = []
    hard = allow_fds(count + 64)
    try:
        while len(os.listdir("/proc/self/fd")) - 1 < count:  # one is the listing's own
            for _ in range(max(1, count - len(os.listdir("/proc/self/fd")))):
                opened.append(os.open(os.devnull, os.O_RDONLY))
        return opened
    except OSError as full:
        for fd in opened:
            os.close(fd)
        raise Skip(f"cannot hold {count} fds open (RLIMIT_NOFILE allows {hard}): {full.strerror}") from None


def touch(mib: int) -> mmap.mmap | None:
    """Memory that is really there, because every page has been written."""
    if not mib:
        return None
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    free = next(int(line.split()[1]) // 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    if free < mib + 512:
        raise Skip(f"{free} MiB of memory are free, {mib + 512} are needed")
    memory = mmap.mmap(-1, mib << 20)
    for offset in range(0, len(memory), mmap.PAGESIZE):
        memory[offset] = 1
    return memory


def main(settings: dict[str, Any]) -> None:
    place = Place(settings["cpu"], settings["node"], settings["programs"], Path(settings["logs"]))
    # Move the pipes to the harness away, so that no child has them, and make 0 and 1 what a service has there.
    requests = os.fdopen(os.dup(0), encoding="ascii")
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    null = os.open(os.devnull, os.O_RDWR)
    for target in (0, 1):
        os.dup2(null, target)
    os.close(null)

    os.sched_setaffinity(0, settings["cpus"])
    unable = ""
    try:
        open_fds(settings["fds"])
        kept = touch(settings["touch_mib"])  # noqa: F841  (held until the end)
    except Skip as why:
        unable = str(why)

    jobs: dict[str, Job] = {}
    gc.disable()  # a collection would strike one competitor and spare another; gc.collect() runs between blocks
    for line in requests:
        name, options, rounds = json.loads(line)
        key = json.dumps([name, options])
        reply: dict[str, Any]
        try:
            if unable:
                raise Skip(unable)
            if key not in jobs:
                jobs[key] = JOBS[name](place, **options)
                gc.collect()
                gc.freeze()
            job = jobs[key]
            reply = {"samples": [job() for _ in range(rounds)]}
        except Skip as why:
            reply = {"skip": str(why)}
        print(json.dumps(reply), file=replies, flush=True)
        gc.collect()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
