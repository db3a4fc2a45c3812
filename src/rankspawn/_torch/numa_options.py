"""``NumaOptions``, a real dataclass, as torch's is: torch calls ``dataclasses.asdict`` on it.

It has a module of its own, so that only its users import ``dataclasses``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from .._binding import check_memory_policy
from .._public import public

if TYPE_CHECKING:
    from .._binding import AffinityMode, MemoryMode, MemoryPolicy


@dataclass(frozen=True)
@public
class NumaOptions:
    """How ranks are placed: torch's ``NumaOptions`` and a memory policy.

    Attributes:
        affinity_mode: How to choose a rank's CPUs from its device.
        should_fall_back_if_binding_fails: Start the rank unbound, with a warning, if it cannot be bound.
        memory_policy: A mode, applied to the nodes of the rank's own CPUs, or one MemoryPolicy for every rank. None
            keeps the kernel's default: the node of the CPU that first touches a page.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``memory_policy`` is the name of no mode.
    """

    affinity_mode: AffinityMode
    should_fall_back_if_binding_fails: bool = False
    memory_policy: MemoryMode | MemoryPolicy | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.affinity_mode, Enum):  # torch's AffinityMode is another class than ours
            mode = self.affinity_mode
            raise TypeError(f"affinity_mode: expected an AffinityMode, got {mode!r}; AffinityMode({mode!r}) makes one")
        check_memory_policy(self.memory_policy)
