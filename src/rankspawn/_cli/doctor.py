"""``rankspawn doctor``: what this machine allows, found by trying it on children that end at once."""

from __future__ import annotations

import os
import platform
import sys
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

from .._binding import MEMORY_MODES, Binding, MemoryPolicy, PlacementError
from .._end.delegated import own_cgroup
from .._end.guard import Guard
from .._end.sessions import why_blind
from .._ids import format_ids
from .._place.quota import cpu_quota
from .._place.topology import Topology
from .._stacks.take import can_look, take
from .._start.engine import EXTENSION_ERROR, mechanisms
from .._start.outcome import BindingError
from .._start.popen import Popen
from .show import JSON_VERSION, print_json

if TYPE_CHECKING:
    from .._binding import MemoryMode


def report(*, as_json: bool = False) -> int:
    """Print the report. Return 0 if ranks can be bound to CPUs at birth, else 1.

    Args:
        as_json: Print JSON: the same texts by the same names, and "bound_at_birth" for the status.
    """
    affinity = _affinity()
    lines = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
        "extension": _extension(),
        "mechanism": _mechanism(),
        "pidfd": _pidfd(),
        "group signal": _group_signal(),
        "cgroup at birth": _cgroup(),
        "guard": _guard(),
        "sessions": _sessions(),
        "Python stacks": _stacks(),
        "CPU affinity": affinity,
        **{f"memory {mode}": _memory(mode) for mode in MEMORY_MODES},
        **_machine(),
    }
    bound = bool(mechanisms()) and affinity.startswith("yes")
    if as_json:
        print_json({"version": JSON_VERSION, "bound_at_birth": bound, "findings": lines})
    else:
        width = max(map(len, lines))
        for name, line in lines.items():
            print(f"{name:<{width}}  {line}")
    return 0 if bound else 1


def _child(**options: Any) -> Popen:
    """Start a child that ends at once, and wait for it; ``options`` are those of Popen."""
    process = Popen([sys.executable, "-S", "-E", "-c", ""], stdin=-3, start_new_session=True, **options)
    process.wait()
    return process


def _extension() -> str:
    if EXTENSION_ERROR is not None:
        return f"missing: {EXTENSION_ERROR}; plain subprocess starts processes"
    from .. import _spawn

    return "built with libnuma" if _spawn.HAVE_LIBNUMA else "built without libnuma: own system calls, same result"


def _mechanism() -> str:
    if EXTENSION_ERROR is None and not mechanisms():
        return "subprocess, because RANKSPAWN_MECHANISM says so or clone shares no memory here (QEMU user mode, WSL1)"
    return str(_child().mechanism)


def _pidfd() -> str:
    return "no: a wait with a timeout polls" if _child().pidfd is None else "yes"


def _group_signal() -> str:
    process = _child()
    code = process._pidfd.send_signal(0, True) if process.pidfd is not None else None
    if code in (0, 3):  # ESRCH: the kernel knows the call, and the group has no process left
        return "free of races, even after the leader was reaped"
    return "only until the leader is reaped (Linux 6.9 and later: also afterwards)"


def _cgroup() -> str:
    folder = own_cgroup()
    if folder is None:
        return "no: this process is in no mounted cgroup v2"
    try:
        _child(cgroup=folder)
    except OSError as error:
        return f"no: {error} ({folder})"
    return f"yes, tried in {folder}"


def _guard() -> str:
    lack = Guard.why_not()
    if lack:
        return f"no: {lack}"
    try:
        Guard.start().close()
    except OSError as error:
        return f"no: {error}"
    if not os.path.exists("/proc/self/stat"):
        return "yes; without /proc it tries every process id to find the ranks' processes, which takes a second"
    return "yes"


def _sessions() -> str:
    if not hasattr(os, "getsid"):
        return "not on this system"
    why = why_blind(os.getpid())
    if why:
        return f"no: {why}; only --cgroup ends what ranks start in process groups of their own"
    return "the processes of a rank's session can be found"


def _stacks() -> str:
    if not can_look():
        return "not on this system, or there is no /proc"
    code = "import sys; print(flush=True); sys.stdin.read()"
    with Popen([sys.executable, "-S", "-E", "-c", code], stdin=PIPE, stdout=PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        seen = take({child.pid: None}, "rankspawn doctor")
        child.kill()
    for process in seen.processes:
        if any(thread.frames for thread in process.threads):
            return f"can be read by {'the standard library' if process.by.startswith('Python') else process.by}"
    reasons = [note.removeprefix("Python stacks could not be read: ") for note in seen.notes]
    reasons += [process.problem for process in seen.processes if process.problem]
    return f"no: {'; '.join(reasons)}"


def _affinity() -> str:
    if not hasattr(os, "sched_getaffinity"):
        return "not on this system"
    return _tried(Binding({min(os.sched_getaffinity(0))}))


def _memory(mode: MemoryMode) -> str:
    try:
        node = min(Topology.read().allowed_nodes)
        return _tried(Binding(None, MemoryPolicy(mode, frozenset() if mode in ("default", "local") else {node})))
    except (PlacementError, ValueError) as error:
        return f"unknown: {error}"


def _tried(binding: Binding) -> str:
    try:
        _child(binding=binding)
    except BindingError as error:
        return f"refused: {error.strerror}"
    return f"yes, tried with {binding}"


def _machine() -> dict[str, str]:
    try:
        topology = Topology.read()
    except PlacementError as error:
        return {"NUMA nodes": f"unknown: {error}"}
    nodes = (f"{node.id} (CPUs {format_ids(node.cpus) or 'none'})" for node in topology.nodes)
    return {
        "NUMA nodes": ", ".join(nodes),
        "inherited CPUs": format_ids(topology.allowed_cpus),
        "inherited nodes": format_ids(topology.allowed_nodes),
        "CPU quota": str(cpu_quota() or "none"),
    }
