"""The torch functions that rankspawn relies on, and whether the installed torch has them as expected."""

from __future__ import annotations

from importlib import import_module
from inspect import signature, unwrap
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from types import CodeType

MULTIPROCESSING = "torch.distributed.elastic.multiprocessing"
SERVER = "torch.distributed.elastic.agent.server"


class Seam(NamedTuple):
    """A torch function that rankspawn relies on.

    takes: its parameters; "[one]" may be missing, and "..." stands for any others.
    names: what its code looks up. Replacing or overriding a name has an effect only while the code looks it up.
    """

    module: str
    function: str
    takes: str = "..."
    names: tuple[str, ...] = ()

    def difference(self) -> str | None:
        """What differs in the installed torch, as text."""
        try:
            found = attrgetter(self.function)(import_module(self.module))
        except (ImportError, AttributeError) as error:
            return f"{self.module}.{self.function} is not there ({error})"
        words = self.takes.split()
        required = {word for word in words if word != "..." and not word.startswith("[")}
        takes = set(signature(found).parameters)
        if not required <= takes or ("..." not in words and not takes <= {word.strip("[]") for word in words}):
            return f"{self.module}.{self.function} takes ({' '.join(signature(found).parameters)}), not ({self.takes})"
        if self.names and (missing := set(self.names) - _names(unwrap(found).__code__)):
            return f"{self.module}.{self.function} does not use {', '.join(sorted(missing))}"
        return None


SEAMS = (
    # torch's own: other code may have replaced it in .api.
    Seam(
        f"{MULTIPROCESSING}.subprocess_handler",
        "get_subprocess_handler",
        "entrypoint args env stdout stderr local_rank_id [numa_options]",
    ),
    Seam(
        f"{MULTIPROCESSING}.api",
        "SubprocessContext._start",
        "self",
        ("get_subprocess_handler", "subprocess_handlers", "entrypoint", "args", "envs", "stdouts", "stderrs", "nprocs"),
    ),
    Seam(f"{MULTIPROCESSING}.api", "SubprocessContext._poll", "self", ("_failures", "close")),
    Seam(
        f"{MULTIPROCESSING}.api", "SubprocessContext._close", "self death_sig timeout", ("subprocess_handlers", "proc")
    ),
    Seam(f"{MULTIPROCESSING}.api", "MultiprocessContext._start", "self", ("_pc", "start_processes", "start_method")),
    Seam(f"{MULTIPROCESSING}.api", "MultiprocessContext._poll", "self", ("_pc", "_ret_vals", "_return_values")),
    Seam("torch.multiprocessing", "start_processes", "start_method ...", ("get_context",)),
    Seam("torch.multiprocessing", "ProcessContext.__init__", "self processes error_files", ("sentinels",)),
    Seam(f"{MULTIPROCESSING}.api", "PContext.wait", "self timeout period", ("_poll",)),
    Seam(MULTIPROCESSING, "start_processes", names=("SubprocessContext", "MultiprocessContext")),
    Seam(f"{SERVER}.local_elastic_agent", "LocalElasticAgent", "spec ..."),
    Seam(f"{SERVER}.local_elastic_agent", "LocalElasticAgent._monitor_workers", "self worker_group", ("_pcontext",)),
    Seam(f"{SERVER}.api", "WorkerSpec", "monitor_interval ..."),
    Seam(f"{SERVER}.api", "SimpleElasticAgent._invoke_run", names=("monitor_interval", "sleep", "_monitor_workers")),
    Seam("torch.distributed.launcher.api", "launch_agent", names=("LocalElasticAgent",)),
)
"""As found in torch 2.4 to 2.15."""


def _names(code: CodeType) -> set[str]:
    """What a function's code looks up, in its comprehensions too."""
    inner = (constant for constant in code.co_consts if hasattr(constant, "co_names"))
    return {*code.co_names}.union(*map(_names, inner))
