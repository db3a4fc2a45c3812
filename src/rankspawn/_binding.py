"""A rank's binding as plain frozen data, and checks of what says where ranks go. Nothing here touches the machine."""

from __future__ import annotations

from enum import Enum

from ._frozen import Frozen
from ._ids import format_ids
from ._public import public

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, Literal

    MemoryMode = Literal["default", "local", "bind", "preferred", "preferred-many", "interleave", "weighted-interleave"]
    ModeName = Literal["node", "socket", "exclusive", "core-complex"]
    NumaMode = Literal["auto", "none", "node", "socket", "exclusive", "core-complex"]
    Kind = tuple[str, Callable[[Any], bool]]

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


def is_integer(given: object) -> bool:
    """Whether it is an integer, also one of numpy; True and False are none."""
    return hasattr(type(given), "__index__") and not isinstance(given, bool)


def is_sequence(given: object) -> bool:
    """Whether it has items in an order; a text is not a sequence of its letters."""
    unordered = (str, bytes, dict, set, frozenset)
    return hasattr(type(given), "__iter__") and not isinstance(given, unordered)


def refuse_other_kinds(kinds: Mapping[str, Kind], given: Mapping[str, object]) -> None:
    """Raise TypeError for the first argument that has another type than ``kinds`` says."""
    for name, value in given.items():
        what, is_one = kinds[name]
        if not is_one(value):
            raise TypeError(f"{name}: expected {what}, got {value!r}")


def or_none(what: str, is_one: Callable[[Any], bool]) -> Kind:
    """The kind of an argument that may be left out."""
    return f"{what} or None", lambda given: given is None or is_one(given)


FLAG: Kind = "True or False", lambda given: isinstance(given, bool)

PLACEMENT_KINDS: dict[str, Kind] = {
    "nprocs": or_none("a positive integer", is_integer),
    "gpu_index": or_none("a non-negative integer", is_integer),
    "devices": or_none("a sequence of PCI addresses or Device objects, empty for no accelerators,", is_sequence),
    "allowed_cpus": or_none("CPU numbers", lambda given: is_sequence(given) or isinstance(given, (set, frozenset))),
    "reserve_cores": ("a non-negative integer", is_integer),
    "threads_per_core": or_none("a positive integer", is_integer),
    "required": FLAG,
}
"""The arguments of ``place`` that have no function of their own below: what each must be."""


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


def affinity_mode(numa: object, *others: str) -> AffinityMode:
    """The mode that ``numa`` names.

    Args:
        numa: An AffinityMode, ours or torch's (they are two classes), or the name of a mode.
        others: What the caller takes beside the modes, for the message.

    Raises:
        PlacementError: No mode has that name.
        TypeError: It is no name.
    """
    name = getattr(numa, "value", numa)
    modes = [mode.value for mode in AffinityMode]
    if isinstance(name, str) and name in modes:
        return AffinityMode(name)
    wrong = PlacementError if isinstance(name, str) else TypeError
    raise wrong(f"numa: expected one of {', '.join([*others, *modes])}, got {numa!r}")


def check_memory_policy(policy: object) -> None:
    """Raise TypeError or PlacementError if it is no MemoryPolicy, no mode of one, and not None."""
    if policy is None or isinstance(policy, MemoryPolicy):
        return
    if not isinstance(policy, str):
        raise TypeError(f"memory_policy: expected a mode or a MemoryPolicy, got {policy!r}")
    if policy not in MEMORY_MODES:
        raise PlacementError(f"memory_policy: expected one of {', '.join(MEMORY_MODES)}, got {policy!r}")


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
