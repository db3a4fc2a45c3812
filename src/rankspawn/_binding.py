"""What a rank is bound to: plain frozen data, checked when it is made.

Nothing here touches the machine, except ``BindingReport.effective``, which reads a running process back.
"""

from __future__ import annotations

import errno
import os
import re
from enum import Enum

from ._frozen import Frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal

    MemoryMode = Literal["default", "local", "bind", "preferred", "preferred-many", "interleave", "weighted-interleave"]

MEMORY_MODES: tuple[MemoryMode, ...] = (
    "default",
    "local",
    "bind",
    "preferred",
    "preferred-many",
    "interleave",
    "weighted-interleave",
)
_MODES_WITHOUT_NODES = ("default", "local")

# No kernel is built for more (the largest NR_CPUS is 8192, MAX_NUMNODES is 1024); a larger id is a
# mistake, and a mask of gigabytes is not the way to say so.
_MAX_CPU = 1 << 16
_MAX_NODE = 1 << 12

_RUN = re.compile(r"\s*([0-9]{1,6})(?:-([0-9]{1,6}))?\s*")


def _ids(what: str, ids: Iterable[int], limit: int) -> frozenset[int]:
    """``ids`` as a frozenset of whole numbers in ``range(limit)``; ``what`` names them in the error."""
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"{what} must be a set of int, not {type(ids).__name__}")
    found = frozenset(ids)
    for one in found:
        if isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"{what} must be a set of int, not of {type(one).__name__}")
        if not 0 <= one < limit:
            raise ValueError(f"{what}: {one} is outside 0 to {limit - 1}")
    return found


class AffinityMode(str, Enum):
    """How the CPUs of a rank follow from its device; the names and meanings of torch.numa.binding."""

    NODE = "node"
    """All CPUs of the NUMA node that the device is on."""

    SOCKET = "socket"
    """All CPUs of that node's socket."""

    EXCLUSIVE = "exclusive"
    """Cores of that node which no other rank has: an equal share, and one core more for the first where uneven."""

    CORE_COMPLEX = "core-complex"
    """The CPUs of one last-level cache of that node, another one for each rank while there are enough."""


class MemoryPolicy(Frozen):
    """A NUMA memory policy, as in set_mempolicy(2).

    mode: one of "default", "local", "bind", "preferred", "preferred-many" (Linux 5.15), "interleave",
        "weighted-interleave" (Linux 6.9).
    nodes: NUMA node ids. Empty for "default" and "local", exactly one for "preferred", one or more for
        the others.

    Raises ValueError for an unknown mode, or nodes that do not fit the mode; TypeError for ids that are not int.
    """

    mode: MemoryMode
    nodes: frozenset[int]

    def __init__(self, mode: MemoryMode, nodes: Iterable[int] = frozenset()) -> None:
        if mode not in MEMORY_MODES:
            raise ValueError(f"memory policy {mode!r} is none of {', '.join(MEMORY_MODES)}")
        nodes = _ids("memory nodes", nodes, _MAX_NODE)
        if mode in _MODES_WITHOUT_NODES:
            if nodes:
                raise ValueError(f"memory policy {mode!r} takes no nodes")
        elif not nodes:
            raise ValueError(f"memory policy {mode!r} needs at least one node")
        elif mode == "preferred" and len(nodes) != 1:
            raise ValueError("memory policy 'preferred' takes one node; 'preferred-many' takes several")
        super().__init__(mode, nodes)

    def __str__(self) -> str:
        return f"{self.mode}:{format_ids(self.nodes)}" if self.nodes else self.mode


class Binding(Frozen):
    """Where a process is born.

    cpus: logical CPU ids, as in sched_setaffinity(2), not empty; None leaves the inherited mask alone.
    memory: the memory policy; None leaves the inherited policy alone.
    required: True makes a refused step fail the spawn with BindingError; False starts the process all the
        same, and the report names what was refused.

    Raises ValueError for an empty set or an id out of range; TypeError for ids that are not int.
    """

    cpus: frozenset[int] | None
    memory: MemoryPolicy | None
    required: bool

    def __init__(self, cpus: Iterable[int] | None, memory: MemoryPolicy | None = None, required: bool = True) -> None:
        if cpus is not None:
            cpus = _ids("cpus", cpus, _MAX_CPU)
            if not cpus:
                raise ValueError("cpus is empty: a process needs a CPU; None leaves its mask alone")
        if memory is not None and not isinstance(memory, MemoryPolicy):
            raise TypeError(f"memory must be a MemoryPolicy, not {type(memory).__name__}")
        super().__init__(cpus, memory, required)

    def __str__(self) -> str:
        cpus = "inherited" if self.cpus is None else format_ids(self.cpus)
        return f"cpus {cpus}, memory {'inherited' if self.memory is None else self.memory}"


class RefusedStep(Frozen):
    """One step that the system refused: its name, the errno and what the errno says."""

    step: str
    errno: int

    def __str__(self) -> str:
        return f"{self.step}: {os.strerror(self.errno)}"


class BindingReport(Frozen):
    """What was asked for one process, and what was refused.

    requested: the binding given to Popen; None where none was.
    refused: the optional steps that the system refused, in order.
    pid: the process that ``effective`` reads.
    """

    requested: Binding | None
    refused: tuple[RefusedStep, ...]
    pid: int

    @property
    def effective(self) -> Binding | None:
        """The mask and policy that the process has now, from the kernel; None when it has ended.

        The policy is the one that /proc/PID/numa_maps shows for memory without a policy of its own
        (proc(5)); it is None where the kernel has no NUMA support or the file may not be read.
        """
        if not hasattr(os, "sched_getaffinity"):
            return _effective_by_psutil(self.pid)
        try:
            cpus = frozenset(os.sched_getaffinity(self.pid))
        except ProcessLookupError:
            return None
        return Binding(cpus, _policy_of(self.pid))


class BindingError(OSError):
    """The system refused to bind a process. ``step`` names the refused call; ``binding`` is what was asked."""

    step: str
    binding: Binding

    @classmethod
    def refused(cls, step: str, code: int, binding: Binding) -> BindingError:
        """The error for ``step`` refused with errno ``code``: why it may be so, and what to do."""
        asked = f"cpus {format_ids(binding.cpus or ())}" if step == "sched_setaffinity" else f"{binding.memory}"
        why = _WHY.get((step, code), "")
        error = cls(code, f"{step}: {os.strerror(code)} (asked: {asked}){why and ': '}{why}")
        error.step, error.binding = step, binding
        return error


_WHY = {
    ("sched_setaffinity", errno.EINVAL): (
        "none of these CPUs is both online and in the cpuset that this process may use; see Cpus_allowed_list in"
        " /proc/self/status, or `rankspawn doctor`"
    ),
    ("sched_setaffinity", errno.EPERM): "a seccomp profile may gate it; allow it, or use required=False",
    ("set_mempolicy", errno.EPERM): (
        "a container's seccomp profile gates it on CAP_SYS_NICE; add --cap-add SYS_NICE, or memory=None"
    ),
    ("set_mempolicy", errno.EINVAL): (
        "a node is absent, has no memory, is outside this process's cpuset (Mems_allowed_list in /proc/self/status),"
        " or the kernel is too old for this mode"
    ),
    ("set_mempolicy", errno.ENOSYS): "this kernel is built without NUMA support; use memory=None",
}


def format_ids(ids: Iterable[int]) -> str:
    """Ids as the kernel lists them: ``{0, 1, 2, 5}`` gives "0-2,5"; nothing gives ""."""
    runs: list[list[int]] = []
    for one in sorted(ids):
        if runs and one == runs[-1][1] + 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_ids(text: str) -> frozenset[int]:
    """The ids of a kernel list such as "0-2,5"; blank text gives none. ValueError, with the text, for anything else."""
    ids: set[int] = set()
    stripped = text.strip(" \t\n\0")
    for part in stripped.split(",") if stripped else ():
        run = _RUN.fullmatch(part)
        if run is None or int(run[2] or run[1]) < int(run[1]):
            raise ValueError(f"not a list of ids like 0-3,8: {text!r}")
        ids.update(range(int(run[1]), int(run[2] or run[1]) + 1))
    return frozenset(ids)


def _effective_by_psutil(pid: int) -> Binding | None:
    import psutil

    try:
        process = psutil.Process(pid)
        # psutil has no cpu_affinity on macOS, where there is none.
        return Binding(frozenset(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else None)
    except psutil.NoSuchProcess:
        return None


# How the kernel writes a policy (mpol_to_str in mm/mempolicy.c): a name, which may hold a space, then nodes.
_POLICY = re.compile(r"^[0-9a-f]+ (prefer \(many\)|weighted interleave|[a-z]+)(?:=[a-z|]+)?(?::([0-9,-]+))?(?: |$)")
_POLICY_MODES = {
    "prefer": "preferred",
    "prefer (many)": "preferred-many",
    "weighted interleave": "weighted-interleave",
}


def _policy_of(pid: int) -> MemoryPolicy | None:
    try:
        with open(f"/proc/{pid}/numa_maps", encoding="ascii", errors="replace") as maps:
            shown = _POLICY.match(maps.readline())
    except OSError:
        return None
    if shown is None:
        return None
    mode = _POLICY_MODES.get(shown[1], shown[1])
    return MemoryPolicy(mode, parse_ids(shown[2] or ""))  # type: ignore[arg-type]
