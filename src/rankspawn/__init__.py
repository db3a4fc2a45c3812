"""rankspawn starts the ranks of a job, each born bound to its CPUs and memory."""

# Type checkers know this name. It is not imported from typing, because that import would cost more than all the rest.
TYPE_CHECKING = False

if TYPE_CHECKING:
    __version__: str

    from ._binding import AffinityMode, Binding, MemoryPolicy, PlacementError
    from ._group.group import RankGroup
    from ._group.job import Job
    from ._group.launch import launch
    from ._multiprocessing.context import get_context
    from ._output.failure import Failure, RanksFailedError
    from ._output.form import GroupReport
    from ._output.lines import RankLine
    from ._output.logs import RankFiles
    from ._place.plan import place
    from ._place.sysfs import TopologyError
    from ._place.topology import Topology
    from ._stacks.take import Stacks
    from ._start.aio import create_subprocess_exec
    from ._start.outcome import BindingError, BindingReport
    from ._start.popen import Popen
    from ._torch.handler import SubprocessHandler, get_subprocess_handler
    from ._torch.numa_options import NumaOptions
    from ._warm.template import Template

__all__ = [
    "AffinityMode",
    "Binding",
    "BindingError",
    "BindingReport",
    "Failure",
    "GroupReport",
    "Job",
    "MemoryPolicy",
    "NumaOptions",
    "PlacementError",
    "Popen",
    "RankFiles",
    "RankGroup",
    "RankLine",
    "RanksFailedError",
    "Stacks",
    "SubprocessHandler",
    "Template",
    "Topology",
    "TopologyError",
    "create_subprocess_exec",
    "get_context",
    "get_subprocess_handler",
    "launch",
    "place",
]

_MODULES = {
    "AffinityMode": "_binding",
    "Binding": "_binding",
    "BindingError": "_start.outcome",
    "BindingReport": "_start.outcome",
    "Failure": "_output.failure",
    "GroupReport": "_output.form",
    "Job": "_group.job",
    "MemoryPolicy": "_binding",
    "NumaOptions": "_torch.numa_options",
    "PlacementError": "_binding",
    "Popen": "_start.popen",
    "RankFiles": "_output.logs",
    "RankGroup": "_group.group",
    "RankLine": "_output.lines",
    "RanksFailedError": "_output.failure",
    "Stacks": "_stacks.take",
    "SubprocessHandler": "_torch.handler",
    "Template": "_warm.template",
    "Topology": "_place.topology",
    "TopologyError": "_place.sysfs",
    "create_subprocess_exec": "_start.aio",
    "get_context": "_multiprocessing.context",
    "get_subprocess_handler": "_torch.handler",
    "launch": "_group.launch",
    "place": "_place.plan",
}
"""The module of each public name."""

if not TYPE_CHECKING:  # A type checker that saw __getattr__ would accept any name.

    def __getattr__(name):
        # A name is imported at its first use (PEP 562), because a program that only starts processes needs no reader of
        # topologies, and a command that looks at a machine starts no process.
        if name == "__version__":  # the installed package's; the number itself is in pyproject.toml
            from importlib.metadata import version

            return version(__name__)
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # the next use finds it without this function
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
