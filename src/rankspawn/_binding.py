"""A rank's binding as plain frozen data, which is checked when it is made. Nothing here touches the machine."""

from __future__ import annotations

from enum import Enum

from ._frozen import Frozen
from ._ids import format_ids
from ._public import public

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal

    MemoryMode = Literal["default", "local", "bind", "preferred", "preferred-many", "interleave", "weighted-interleave"]
    ModeName = Literal["node", "socket", "exclusive", "core-complex"]
    NumaMode = Literal["auto", "none", "node", "socket", "exclusive", "core-complex"]

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

# No kernel supports more (the largest NR_CPUS is 8192, MAX_NUMNODES is 1024). A larger id is a mistake. It is refused,
# because a mask for it could take gigabytes.
_MAX_CPU = 1 << 16
_MAX_NODE = 1 << 12


def _checked_ids(what: str, ids: Iterable[int], limit: int) -> frozenset[int]:
    """Check that ``ids`` are integers in ``range(limit)``; ``what`` names them in the error."""
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"{what}: expected a set of integers, got {ids!r}")
    try:
        found = frozenset(ids)
    except TypeError:
        one_is = f"; one is {{{ids}}}" if isinstance(ids, int) else ""
        raise TypeError(f"{what}: expected a set of integers, got {ids!r}{one_is}") from None
    for one in found:
        if isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"{what}: expected a set of integers, got {one!r} in it")
        if not 0 <= one < limit:
            raise ValueError(f"{what}: {one} is outside 0 to {limit - 1}")
    return found


@public
class AffinityMode(str, Enum):
    """How the CPUs of a rank follow from its device, with the names and meanings of torch.numa.binding."""

    NODE = "node"
    """All CPUs of the NUMA node that the device is on."""

    SOCKET = "socket"
    """All CPUs of that node's socket."""

    EXCLUSIVE = "exclusive"
    """Cores of that node for this rank alone: equal shares; the first ranks get one core more if some are left over."""

    CORE_COMPLEX = "core-complex"
    """The CPUs of one last-level cache of that node; each rank gets its own cache if there are enough."""


@public
class MemoryPolicy(Frozen):
    """A NUMA memory policy, as in set_mempolicy(2).

    Args:
        mode: "default", "local", "bind", "preferred", "preferred-many" (Linux 5.15), "interleave" or
            "weighted-interleave" (Linux 6.9).
        nodes: NUMA node ids. None for "default" and "local", exactly one for "preferred", one or more for the others.

    Raises:
        ValueError: The mode is unknown, or the nodes do not fit it.
        TypeError: An id is not an int.
    """

    mode: MemoryMode
    nodes: frozenset[int]

    def __init__(self, mode: MemoryMode, nodes: Iterable[int] = frozenset()) -> None:
        if mode not in MEMORY_MODES:
            raise ValueError(f"memory policy: expected one of {', '.join(MEMORY_MODES)}, got {mode!r}")
        nodes = _checked_ids("memory nodes", nodes, _MAX_NODE)
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


@public
class Binding(Frozen):
    """The CPUs and the memory policy that a process has from birth.

    Args:
        cpus: Logical CPU ids, as in sched_setaffinity(2); at least one. None leaves the inherited mask alone.
        memory: The memory policy; None leaves the inherited policy alone.
        required: If True, a refused step fails the start with BindingError. If False, the process starts anyway, and
            its report names the refused steps.

    Raises:
        ValueError: ``cpus`` is empty, or an id is out of range.
        TypeError: An id is not an int, or ``memory`` is not a MemoryPolicy.
    """

    cpus: frozenset[int] | None
    memory: MemoryPolicy | None
    required: bool

    def __init__(self, cpus: Iterable[int] | None, memory: MemoryPolicy | None = None, required: bool = True) -> None:
        if cpus is not None:
            cpus = _checked_ids("cpus", cpus, _MAX_CPU)
            if not cpus:
                raise ValueError("cpus is empty: a process needs a CPU; None leaves its mask alone")
        if memory is not None and not isinstance(memory, MemoryPolicy):
            raise TypeError(f"memory: expected a MemoryPolicy or None, got {memory!r}")
        super().__init__(cpus, memory, required)

    def __str__(self) -> str:
        cpus = "inherited" if self.cpus is None else format_ids(self.cpus)
        return f"cpus {cpus}, memory {'inherited' if self.memory is None else self.memory}"


@public
class PlacementError(ValueError):
    """No placement can be made. The message names the file or option, its value, and what to do."""
