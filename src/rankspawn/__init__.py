"""rankspawn starts the ranks of a job, each born bound to its CPUs and memory."""

from ._binding import AffinityMode, Binding, BindingError, BindingReport, MemoryPolicy, NumaOptions
from ._handler import SubprocessHandler, get_subprocess_handler
from ._popen import Popen

__all__ = [
    "AffinityMode",
    "Binding",
    "BindingError",
    "BindingReport",
    "MemoryPolicy",
    "NumaOptions",
    "Popen",
    "SubprocessHandler",
    "get_subprocess_handler",
]
