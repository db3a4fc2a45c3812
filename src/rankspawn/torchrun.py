"""torchrun, but rankspawn starts its ranks: ``python -m rankspawn.torchrun`` takes every argument of torchrun.

The agent, the rendezvous, the error files and the restarts are torch's own (torch.distributed.elastic, 2.4 and newer).
``install()`` does the same in a program that launches by itself (``elastic_launch``, ``LaunchConfig``).
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
"""In torch 2.4 and newer. It is no seam: if it is missing, no port is held."""

_torchs: dict[tuple[str, str], Any] = {}
"""torch's own objects, which install() has replaced; empty if nothing is installed."""


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

    Other code may replace torch's ``get_subprocess_handler``, before or after, as NVIDIA's ft_launcher does for its
    logs. Then ranks that are programs start through that function. They are bound all the same, but they do not die
    with this process, and have no guard.

    Args:
        numa_options: The binding of ranks without options of their own (``LaunchConfig.numa_options``, torch's or
            ours). Its memory policy also applies to ranks with torch's options, which have none. Installing again only
            replaces these settings.
        guard: Whether a guard ends the processes that ranks (programs) leave in their sessions, both when the ranks
            have ended and when this process is killed. None: if a guard can run.
        cgroup: A delegated cgroup v2; "auto" finds one. Each attempt makes a cgroup in it for the ranks that are
            programs. When these have ended, everything left in it is ended. It implies a guard.
        devices: For bound ranks: the accelerators in local-rank order, as ``--devices`` of ``rankspawn run``; None for
            the visible ones.
        reserve_cores: For bound ranks: how many cores of the machine to leave free.
        template: The template from which ranks are forked (a warm start). The caller closes it. Ranks that are
            functions are forked from it if it names its modules and their start method is spawn. If they cannot be, a
            RuntimeWarning says why.
        stacks: When a rank has failed, log in one line what the other ranks (programs) do, before they are ended. This
            takes two seconds at most. All stacks are in ``stacks.txt`` beside the ranks' log folders.

    Raises:
        ModuleNotFoundError: torch is not installed.
        ImportError: In this torch, one of SEAMS is not as expected. Nothing was changed.
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
        if present is _torchs.get((module, name)):  # else it is ours already, or other code's, through which ours goes
            setattr(place, name, getattr(elastic, name))


def _replaced() -> tuple[tuple[str, str], ...]:
    module, name = _REPLACED_IF_THERE
    return (*_REPLACED, _REPLACED_IF_THERE) if hasattr(import_module(module), name) else _REPLACED


def uninstall() -> None:
    """Restore torch's own functions. Running ranks keep running. Does nothing if nothing is installed."""
    elastic = sys.modules.get("rankspawn._torch.elastic")
    for (module, name), torchs in _torchs.items():
        place = import_module(module)
        if getattr(place, name) is getattr(elastic, name):  # else other code has replaced it since, and keeps its own
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
    """Install while a ``with`` block runs, for all threads of the process. Afterwards everything is as before.

    Args:
        numa_options: As for install(), like all other arguments.
        guard: Whether there is a guard.
        cgroup: The delegated cgroup.
        devices: The accelerators.
        reserve_cores: Cores left free.
        template: The template from which ranks are forked.
        stacks: Whether to log what the other ranks do when one has failed.
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
        arguments: torchrun's arguments; None takes those of this process.
        prog: The command's name in messages.

    Returns:
        The exit status, 0. It is 1, after a message, if torch is not installed or the workers cannot be bound as asked.

    Raises:
        Exception: Whatever torchrun's command raises, such as ChildFailedError and SignalException.
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
    torchs = frozenset(parser._option_string_actions)
    _add_options(parser)
    _prefer(parser, torchs)
    options = parser.parse_args(arguments)
    if template is not None and not (options.warm or options.preload):
        template = None  # --warm was an argument of the script
    numa_options = None
    if options.numa_binding:
        # torch gets the option, too, because without it torch initializes CUDA in this process to decide about binding.
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
            _adopt_orphans()
            with _recorded(options.report, options.timeline, prog):
                run.record(run.run)(options)
    except (PlacementError, BindingError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    return 0


class _OfRunAlone(Action):
    """An option of ``rankspawn run`` that torch's agent leaves no place for."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        parser.error(f"{given[-1]}: only torch's agent ends and restarts workers; use `rankspawn run` for this option")


def _modules(text: str) -> tuple[str, ...]:
    from ._warm.command import module_names

    try:
        return module_names(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``rankspawn torchrun`` has in addition to torchrun's."""
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


def _prefer(parser: argparse.ArgumentParser, torchs: frozenset[str]) -> None:
    """Have an abbreviation that fits one of torchrun's own options stand for it, as without our options."""
    find: Any = parser._get_option_tuples

    def fitting(word: str) -> list[Any]:
        found: list[Any] = find(word)
        own = [one for one in found if one[1] in torchs]
        return own if len(own) == 1 else found

    parser._get_option_tuples = fitting  # type: ignore[method-assign, assignment]


def _adopt_orphans() -> None:
    """Have the agent reap orphans, if this process is the first of a container, or a subreaper."""
    from ._torch import elastic, extras

    elastic.extras = elastic.extras.replace(orphans=extras.new_orphans())


@contextmanager
def _recorded(report: str | None, timeline: str | None, prog: str) -> Iterator[None]:
    """Record the starts while the block runs, and write the files at its end. If that fails, print a line."""
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
    """Import torch.distributed.run without the garbage collector.

    The objects of torch's import live until this process ends. To search them for garbage would take a tenth of the
    import, and most of the interpreter's shutdown.
    """
    gc.disable()
    try:
        return import_module("torch.distributed.run")
    finally:
        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    sys.exit(main())
