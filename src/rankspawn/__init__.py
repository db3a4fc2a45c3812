"""rankspawn starts the ranks of a job, each born bound to its CPUs and memory."""

from typing import TYPE_CHECKING, Any

from ._binding import AffinityMode, Binding, BindingError, BindingReport, MemoryPolicy, NumaOptions
from ._handler import SubprocessHandler, get_subprocess_handler
from ._popen import Popen

if TYPE_CHECKING:
    from ._placement import place
    from ._topology import Topology

__all__ = [
    "AffinityMode",
    "Binding",
    "BindingError",
    "BindingReport",
    "MemoryPolicy",
    "NumaOptions",
    "Popen",
    "SubprocessHandler",
    "Topology",
    "get_subprocess_handler",
    "place",
]


def __getattr__(name: str) -> Any:
    # Imported when first used: a program that only starts processes needs no reader of topologies.
    if name == "Topology":
        from ._topology import Topology

        return Topology
    if name == "place":
        from ._placement import place

        return place
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
