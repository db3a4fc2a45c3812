"""rankspawn starts the ranks of a job, each born bound to its CPUs and memory."""

# Type checkers know the name. typing's own is not taken: importing typing would cost more than all else here.
TYPE_CHECKING = False

if TYPE_CHECKING:
    __version__: str

    from ._binding import AffinityMode, Binding, BindingError, BindingReport, MemoryPolicy
    from ._context import get_context
    from ._group import RankGroup
    from ._handler import SubprocessHandler, get_subprocess_handler
    from ._launch import Job, launch
    from ._numa_options import NumaOptions
    from ._placement import PlacementError, place
    from ._popen import Popen
    from ._topology import Topology

__all__ = [
    "AffinityMode",
    "Binding",
    "BindingError",
    "BindingReport",
    "Job",
    "MemoryPolicy",
    "NumaOptions",
    "PlacementError",
    "Popen",
    "RankGroup",
    "SubprocessHandler",
    "Topology",
    "get_context",
    "get_subprocess_handler",
    "launch",
    "place",
]

_MODULES = {
    "launch": "_launch",
    "Job": "_launch",
    "RankGroup": "_group",
    "get_context": "_context",
    "Popen": "_popen",
    "SubprocessHandler": "_handler",
    "get_subprocess_handler": "_handler",
    "NumaOptions": "_numa_options",
    "Topology": "_topology",
    "PlacementError": "_placement",
    "place": "_placement",
}
"""Where public names are that do not stand in ``_binding``."""

if not TYPE_CHECKING:  # With it, a type checker would take any name for one of ours.

    def __getattr__(name):
        # Imported when first used (PEP 562): a program that only starts processes needs no reader of topologies, and
        # the commands that look at a machine need nothing that starts a process.
        if name == "__version__":  # as installed; it stands in pyproject.toml
            from importlib.metadata import version

            return version(__name__)
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_MODULES.get(name, '_binding')}"), name)
        globals()[name] = value  # the next use finds it without us
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
