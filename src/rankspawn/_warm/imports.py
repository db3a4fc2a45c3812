"""What the importer does: it imports modules, and finds out whether ranks can be forked from it.

A module keeps what it saw, opened and started when it was imported. The code here looks, in the process itself, for
what a forked rank would share with the others, or would have otherwise than an executed process.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from os import _exit
from typing import Any

from .. import _spawn
from .variables import Recorder

_ACCELERATOR = re.compile(
    r"/dev/(nvidia|kfd|dri/|infiniband/|gdrdrv|accel|neuron|habanalabs|davinci|hpu|xpu|vfio/)|/dev/shm/nccl-"
)
# An open descriptor of these is one object in all ranks: what one rank reads or waits for, another loses.
_SHARED = re.compile(r"(socket:|pipe:|anon_inode:\[?(eventpoll|eventfd|inotify|timerfd|signalfd|io_uring|userfaultfd))")

# Threads that a library ends or makes again by itself around a fork.
_FORK_SAFE_THREADS = {"jemalloc_bg_thd"}
_OPENMP = re.compile(r"/lib(gomp|omp|iomp5)[^/]*\.so")
_OPENBLAS = re.compile(r"/[^/]*openblas[^/]*\.so")
# Seconds that a thread may take to end: a joined thread has left Python, but perhaps not the kernel.
_THREAD_ENDS = 0.5


handlers_before: dict[int, Any] = {}
"""The handler of each signal before the imports, by its number; rank.py finds by them what imports have set."""
handlers_after: dict[int, Any] = {}


def prepare(modules: Sequence[str], *, proc: str = "/proc") -> dict[str, Any]:
    """Import ``modules`` in this process, and find out whether ranks can be forked from it.

    It writes the output that the imports left in buffers, ends OpenMP's pools of threads, and has the garbage collector
    ignore all present objects (gc.freeze). Call it once, in the main thread, with sys.path[0] as a rank's imports have
    it, where they have one (not with ``-I`` and ``-P``). It is removed then, because each rank puts its own there.

    Args:
        modules: Names of modules, in the order in which they are imported. A module that cannot be imported is left
            out.
        proc: Where proc(5) is.

    Returns:
        What can be sent as JSON:

        - ``modules``: the seconds that each import took, by name;
        - ``failed``: by name of a module that could not be imported, the last line of the traceback;
        - ``environment``: the variables that this process was executed with; ``environment_read``: which of them were
          read, by name, and the module that was being imported; ``environment_copied``: the modules that took all at
          once; ``environment_written``: values that have been set since, None for a variable that was removed;
        - ``files``: of each module that is new, the file and its st_mtime_ns;
        - ``threads``: names of native threads that stay;
        - ``notes``: remarks for the reader, in sentences;
        - ``refused``: None, or why no rank can be forked from this process, in one sentence.
    """
    handlers_before.update({number: signal.getsignal(number) for number in signal.valid_signals()})
    descriptors = set(_descriptors(proc))
    threads = set(_threads(proc))
    known = set(sys.modules)
    recorder = Recorder(proc)
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    with recorder.recording():
        _import_all(modules, seconds, failed)
    notes: list[str] = []
    pools = _end_openmp(proc, notes)
    _flush()
    prepared = {
        "modules": seconds,
        "failed": failed,
        "environment": recorder.before,
        "environment_read": recorder.read,
        "environment_copied": recorder.copied,
        "environment_written": recorder.written,
        "files": _files(known),
        "threads": [name for tid, name in _threads(proc).items() if tid not in threads],
        "openmp": pools,
        "notes": notes,
        "refused": _refusal(proc, descriptors, threads),
    }
    gc.enable()
    gc.freeze()
    handlers_after.update({number: signal.getsignal(number) for number in signal.valid_signals()})
    # A rank that has not become its program yet dies of the signal, as an interpreter that has just been executed does.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return prepared


def _import_all(modules: Sequence[str], seconds: dict[str, float], failed: dict[str, str]) -> None:
    has_folder = not (sys.flags.isolated or getattr(sys.flags, "safe_path", False))
    folder = sys.path[0] if has_folder else None
    # Nothing that imports make becomes garbage, and looking for it takes a sixth of their time.
    gc.disable()
    try:
        for name in modules:
            began = time.monotonic()
            try:
                importlib.import_module(name)
            except (Exception, SystemExit) as error:
                failed[name] = traceback.format_exception_only(type(error), error)[-1].strip()
            else:
                seconds[name] = round(time.monotonic() - began, 3)
    finally:
        # Imports may have put folders of their own in front of it.
        if folder is not None and folder in sys.path:
            sys.path.remove(folder)


def _refusal(proc: str, descriptors: set[tuple[int, str]], threads: set[int]) -> str | None:
    """Why no rank can be forked from this process, in one sentence; None where ranks can."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "this Python runs without a GIL, for which a warm start has not been tried"
    if sys.gettrace() or sys.getprofile() or _monitoring():
        return "a tracer or profiler (coverage, a debugger) runs in the interpreter from its start"
    opened = {target for number, target in set(_descriptors(proc)) - descriptors}
    for target in sorted(opened | set(_mapped(proc))):
        if _ACCELERATOR.match(target):
            return f"an import has opened {target}: an accelerator's driver does not survive a fork"
    for target in sorted(opened):
        if _SHARED.match(target):
            return f"an import has left {target} open, which all ranks would share"
    if alive := [one for one in threading.enumerate() if one is not threading.main_thread()]:
        return f"an import has started the Python thread {alive[0].name!r}, which no forked rank would have"
    stay = _unsafe_threads(proc, threads)
    if stay and any(map(_OPENBLAS.search, _mapped(proc))):
        _fork_once()
    until = time.monotonic() + _THREAD_ENDS
    while stay and time.monotonic() < until:
        time.sleep(0.001)
        stay = _unsafe_threads(proc, threads)
    if stay:
        return f"an import has started a native thread ({stay[0]!r}), which no forked rank would have"
    if _has_children():
        return "an import has started a process, which would be a child of no rank"
    return None


def _monitoring() -> bool:
    monitoring: Any = getattr(sys, "monitoring", None)
    return monitoring is not None and any(map(monitoring.get_tool, range(6)))


def _unsafe_threads(proc: str, before: set[int]) -> list[str]:
    """The names of new native threads, except those that are known to survive a fork."""
    own = _threads(proc)
    return [name for tid, name in own.items() if tid not in before and name not in _FORK_SAFE_THREADS]


def _fork_once() -> None:
    """Fork a process that ends at once.

    OpenBLAS ends its pool before a fork (pthread_atfork) and makes a new one when it needs it. Its threads have the
    name of the process, as most libraries' have: those that are left after a fork are not OpenBLAS's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of the threads
        pid = os.fork()
    if not pid:
        _exit(0)
    with suppress(ChildProcessError):  # the imports ignore SIGCHLD, so nothing is left of it
        os.waitpid(pid, 0)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _end_openmp(proc: str, notes: list[str]) -> list[str]:
    """End the pools of all OpenMP libraries: a rank that is forked while a pool has threads waits for them for ever.

    Returns the libraries' files.
    """
    libraries = [path for path in _mapped(proc) if _OPENMP.search(path)]
    for path in libraries:
        ended = _spawn.end_openmp(os.fsencode(path))
        if ended is None:
            notes.append(f"{path} cannot end its threads (it has no omp_pause_resource_all)")
        elif not ended:
            notes.append(f"{path} did not end its threads when it was asked to (omp_pause_resource_all)")
    return libraries


def _flush() -> None:
    """Write the buffered output now, because each rank would write it again."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None and not stream.closed:
            stream.flush()
    _spawn.flush_streams_of_c()


def _files(known: set[str]) -> dict[str, int]:
    """The source files of modules that are not in ``known``, and when they last changed."""
    files = {}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if name not in known and isinstance(path, str) and not name.startswith("rankspawn."):
            try:
                files[path] = os.stat(path).st_mtime_ns
            except OSError:
                pass  # a module in an archive, or one that an import has made
    return files


def _descriptors(proc: str) -> Iterator[tuple[int, str]]:
    for name in os.listdir(f"{proc}/self/fd"):
        try:
            yield int(name), os.readlink(f"{proc}/self/fd/{name}")
        except FileNotFoundError:
            pass  # the folder's own descriptor


def _threads(proc: str) -> dict[int, str]:
    """The name of each thread, by its number."""
    names = {}
    for tid in os.listdir(f"{proc}/self/task"):
        try:
            with open(f"{proc}/self/task/{tid}/comm") as file:
                names[int(tid)] = file.read().strip()
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended
    return names


def _mapped(proc: str) -> list[str]:
    """The files that are mapped, each once."""
    with open(f"{proc}/self/maps") as file:
        return list(dict.fromkeys(line[line.index("/") :].rstrip("\n") for line in file if "/" in line))
