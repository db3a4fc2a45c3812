"""torchrun with its ranks started by rankspawn: ``python -m rankspawn.torchrun`` takes every argument of torchrun.

The agent, the rendezvous, the error files and the restarts are torch's own (torch.distributed.elastic, 2.4 and newer).
In a program that launches by itself (``elastic_launch``, ``LaunchConfig``), ``install()`` does the same.
"""

from __future__ import annotations

import gc
import os
import sys
from argparse import SUPPRESS, Action, ArgumentTypeError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._binding import MEMORY_MODES, AffinityMode, PlacementError
from ._start.outcome import BindingError
from ._torch.early import early_template, respelt
from ._torch.numa_options import NumaOptions
from ._torch.seams import MULTIPROCESSING, SEAMS

if TYPE_CHECKING:
    import argparse

    from ._warm.template import Template

__all__ = ["install", "installed", "main", "uninstall"]

_REPLACED = (
    (f"{MULTIPROCESSING}.api", "get_subprocess_handler"),
    (MULTIPROCESSING, "SubprocessContext"),
    (MULTIPROCESSING, "MultiprocessContext"),
    ("torch.distributed.launcher.api", "LocalElasticAgent"),
    (f"{MULTIPROCESSING}.errors", "get_error_handler"),
)
"""Where torch looks up the names that ``_torch.elastic`` replaces."""
_REPLACED_IF_THERE = ("torch.distributed.elastic.rendezvous.api", "get_free_port")
"""In torch 2.4 and newer, and no seam: where it is missing, no port is held."""

_torchs: dict[tuple[str, str], Any] = {}
"""What was there before; empty when nothing is installed."""


def install(
    numa_options: NumaOptions | None = None,
    guard: bool | None = None,
    *,
    cgroup: str | None = None,
    devices: str | None = None,
    reserve_cores: int = 0,
    template: Template | None = None,
    stacks: bool = False,
) -> None:
    """From now on, torch elastic in this process starts and watches its ranks through rankspawn, until uninstall().

    Where somebody else has replaced torch's ``get_subprocess_handler``, before or after, as NVIDIA's ft_launcher does
    for its logs, ranks that are programs are started through that function, bound all the same; they do not die with
    this process, and have no guard.

    Args:
        numa_options: How ranks are bound that are launched without options of their own (``LaunchConfig.numa_options``,
            torch's or ours); the memory policy also for ranks whose options are torch's, which have none. Installing
            again only replaces these.
        guard: Whether a guard ends what ranks that are programs leave behind in their sessions, when they have ended
            and when this process is killed; None: where a guard can run.
        cgroup: A delegated cgroup v2, in which one is made for the ranks of each attempt that are programs; it ends all
            in it when they have ended. "auto" finds a delegated cgroup. With it there is a guard.
        devices: For ranks that are bound: the accelerators in local-rank order, as ``--devices`` of ``rankspawn run``;
            None for those that are visible.
        reserve_cores: For ranks that are bound: cores of the machine that are left free.
        template: What ranks are forked from: a warm start. The caller closes it. Ranks that are functions are forked
            from it where it names its modules and their start method is spawn; a RuntimeWarning says why else.
        stacks: Log what the other ranks do, of those that are programs, before they are ended because one has failed
            (two seconds at most), in one line; all of it is in ``stacks.txt`` beside the ranks' folders of logs.

    Raises:
        ModuleNotFoundError: There is no torch.
        ImportError: In this torch one of SEAMS is not as expected. Nothing has been changed.
    """
    if not _torchs:
        differences = [difference for seam in SEAMS if (difference := seam.difference())]
        if differences:
            version = import_module("torch").__version__
            raise ImportError(
                f"rankspawn.torchrun does not know torch {version}: {'; '.join(differences)}."
                " A newer rankspawn is needed, or something else has replaced parts of torch first",
                name="torch",
            )
    from ._torch import elastic, extras

    elastic.default_numa_options = numa_options
    elastic.extras = extras.Extras(guard, cgroup, devices, reserve_cores, template, stacks)
    for module, name in _replaced():
        place = import_module(module)
        present = getattr(place, name)
        if present is elastic.TORCHS_HANDLER or (name != "get_subprocess_handler" and (module, name) not in _torchs):
            _torchs[module, name] = present
        if present is _torchs.get((module, name)):  # else it is ours, or somebody else's, which ours go through
            setattr(place, name, getattr(elastic, name))


def _replaced() -> tuple[tuple[str, str], ...]:
    module, name = _REPLACED_IF_THERE
    return (*_REPLACED, _REPLACED_IF_THERE) if hasattr(import_module(module), name) else _REPLACED


def uninstall() -> None:
    """Give torch its own back; running ranks are left alone. Does nothing when nothing is installed."""
    elastic = sys.modules.get("rankspawn._torch.elastic")
    for (module, name), torchs in _torchs.items():
        place = import_module(module)
        if getattr(place, name) is getattr(elastic, name):  # else somebody has replaced it since, and keeps it
            setattr(place, name, torchs)
    _torchs.clear()


@contextmanager
def installed(
    numa_options: NumaOptions | None = None,
    guard: bool | None = None,
    *,
    cgroup: str | None = None,
    devices: str | None = None,
    reserve_cores: int = 0,
    template: Template | None = None,
    stacks: bool = False,
) -> Iterator[None]:
    """Install for the length of a ``with`` block, for all threads of the process; afterwards all is as before.

    Args:
        numa_options: As of install(), as all the others.
        guard: Whether there is a guard.
        cgroup: The delegated cgroup.
        devices: The accelerators.
        reserve_cores: Cores left free.
        template: What programs are forked from.
        stacks: Whether it is looked at what programs do.
    """
    inside = bool(_torchs)
    elastic: Any = import_module("rankspawn._torch.elastic") if inside else None
    before = (elastic.default_numa_options, elastic.extras) if inside else None
    install(
        numa_options, guard, cgroup=cgroup, devices=devices, reserve_cores=reserve_cores, template=template,
        stacks=stacks,
    )  # fmt: skip
    try:
        yield
    finally:
        if before is None:
            uninstall()
        else:
            install()
            elastic.default_numa_options, elastic.extras = before


def main(arguments: Sequence[str] | None = None, prog: str = "python -m rankspawn.torchrun") -> int:
    """Do what torchrun's command does.

    Args:
        arguments: Those of torchrun; None is those of this process.
        prog: What messages call the command.

    Returns:
        0 as exit status; or 1, with a message, where there is no torch or the workers cannot be bound as asked.

    Raises:
        Exception: What torchrun's command raises, too: ChildFailedError, SignalException.
    """
    arguments = respelt(sys.argv[1:] if arguments is None else arguments)
    with early_template(arguments) as template:
        return _with_template(arguments, prog, template)


def _with_template(arguments: Sequence[str], prog: str, template: Template | None) -> int:
    try:
        run = _import_run()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        print(f"{prog}: torch is not installed ({error}): python -m pip install torch", file=sys.stderr)
        return 1
    parser: argparse.ArgumentParser = run.get_args_parser()
    parser.prog = prog
    _add_options(parser)
    options = parser.parse_args(arguments)
    if template is not None and not (options.warm or options.preload):
        template = None  # it was an argument of the script's
    numa_options = None
    if options.numa_binding:
        # torch gets the option as well: without one it initializes CUDA in this process, to see whether to bind.
        numa_options = NumaOptions(AffinityMode(options.numa_binding), memory_policy=options.memory_policy)
    else:
        for option in ("memory_policy", "devices", "reserve_cores"):
            if getattr(options, option):
                parser.error(f"--{option.replace('_', '-')} needs --numa-binding")
    for path in filter(None, (options.report, options.timeline)):
        if not os.path.isdir(os.path.dirname(path) or "."):
            parser.error(f"{path}: there is no such folder")
    try:
        with installed(
            numa_options,
            options.guard,
            cgroup=options.cgroup,
            devices=options.devices,
            reserve_cores=options.reserve_cores,
            template=template,
            stacks=options.stacks,
        ):
            with _recorded(options.report, options.timeline, prog):
                run.record(run.run)(options)
    except (PlacementError, BindingError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    return 0


class _OfRunAlone(Action):
    """An option that ``rankspawn run`` has, and torch's agent leaves no place for."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        parser.error(f"{given[-1]}: only torch's agent ends and restarts workers; use `rankspawn run` for this option")


def _modules(text: str) -> tuple[str, ...]:
    from ._warm.command import module_names

    try:
        return module_names(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``rankspawn torchrun`` has beside torchrun's."""
    from argparse import BooleanOptionalAction

    if "--numa-binding" not in parser._option_string_actions:  # torch before 2.9
        modes = [mode.value for mode in AffinityMode]
        parser.add_argument(
            "--numa-binding", "--numa_binding", choices=modes, help="Options of rankspawn, which binds each worker."
        )
    group = parser.add_argument_group("of rankspawn")
    add = group.add_argument
    add(
        "--memory-policy", "--memory_policy", choices=MEMORY_MODES, metavar="MODE",
        help=f"with --numa-binding: over each worker's own nodes; {', '.join(MEMORY_MODES)}",
    )  # fmt: skip
    add(
        "--devices",
        metavar="LIST",
        help='with --numa-binding: accelerators in local-rank order, "pci:...,..." or "none"',
    )
    add(
        "--reserve-cores",
        type=int,
        default=0,
        metavar="N",
        help="with --numa-binding: how many cores to leave free (default: 0)",
    )
    add(
        "--guard", action=BooleanOptionalAction,
        help="end also the processes that workers started, when workers end or torchrun is killed"
        " (default: on if possible)",
    )  # fmt: skip
    add("--cgroup", metavar="DIR", help="make a cgroup for the workers in DIR, a delegated cgroup v2; auto finds one")
    add(
        "--warm", action="store_true",
        help="fork workers from a process that has already imported what the script imports at its top",
    )  # fmt: skip
    add("--preload", type=_modules, metavar="LIST", help="the same, but with these modules: torch,torch._dynamo")
    add(
        "--stacks",
        action="store_true",
        help="when a worker has failed, log what the others are doing before they are ended",
    )
    add("--hang-timeout", "--hang_timeout", "--on-hang", "--on_hang", action=_OfRunAlone, help=SUPPRESS)
    add("--report", metavar="FILE.json", help="write times, bindings and exit statuses of each worker")
    add("--timeline", metavar="FILE", help="draw the workers' times (FILE.svg), or trace them for Perfetto (FILE.json)")


@contextmanager
def _recorded(report: str | None, timeline: str | None, prog: str) -> Iterator[None]:
    """Record what is started while the block runs, and write the files at its end. One that cannot be is said."""
    if not (report or timeline):
        yield
        return
    from ._torch import elastic, extras

    record = extras.new_record(report, timeline)
    elastic.extras = elastic.extras.replace(record=record)
    try:
        yield
    finally:
        try:
            record.write()
        except OSError as error:
            print(f"{prog}: {error.filename}: {error.strerror}", file=sys.stderr)


def _import_run() -> Any:
    """torch.distributed.run, imported for good.

    The objects of torch's import live until this process ends. Searching them for garbage takes a tenth of the import,
    and most of the time of the interpreter's shutdown.
    """
    gc.disable()
    try:
        return import_module("torch.distributed.run")
    finally:
        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    sys.exit(main())
