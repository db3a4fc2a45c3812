"""``NumaOptions``, a real dataclass, as torch's is: torch calls ``dataclasses.asdict`` on it.

In a module of its own, so that only its users import ``dataclasses``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._public import public

if TYPE_CHECKING:
    from .._binding import AffinityMode, MemoryMode, MemoryPolicy


@dataclass(frozen=True)
@public
class NumaOptions:
    """How ranks are placed: torch's ``NumaOptions`` and a memory policy.

    Attributes:
        affinity_mode: How CPUs follow from the rank's device.
        should_fall_back_if_binding_fails: Start the rank unbound, with a warning, where it cannot be bound.
        memory_policy: A mode, applied over the nodes of the rank's own CPUs, or a whole MemoryPolicy for every rank
            alike; None leaves memory to the kernel's default, which is local to the CPU that touches first.
    """

    affinity_mode: AffinityMode
    should_fall_back_if_binding_fails: bool = False
    memory_policy: MemoryMode | MemoryPolicy | None = None
