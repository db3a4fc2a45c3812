"""--warm: the template that ``run`` forks its ranks from, and what ``plan`` prints about it."""

from __future__ import annotations

import argparse
from contextlib import nullcontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from .._warm.find import Found
    from .._warm.template import Template


def add_warm_options(parser: argparse.ArgumentParser) -> None:
    """Add --warm and --preload.

    vocabulary.py respells ``--warm MODULES`` before the parser sees it, because --warm alone has no value.
    """
    add = parser.add_argument_group(
        "warm start", "Fork the ranks from a process that has already imported what they need."
    ).add_argument
    add(
        "--warm", action="store_true",
        help="import once what SCRIPT imports at its top (rankspawn plan --warm shows it); --warm LIST is"
        " --preload LIST (default: off)",
    )  # fmt: skip
    add(
        "--preload",
        type=_modules,
        metavar="LIST",
        help="import these modules once, instead of those of SCRIPT: torch,torch._dynamo",
    )


def _modules(text: str) -> tuple[str, ...]:
    from .._warm.command import module_names

    try:
        return module_names(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def template_for(
    warm: bool, preload: Sequence[str] | None, interrupt: Callable[[], object], *, lasts: bool
) -> AbstractContextManager[Template | None]:
    """The template of a job; None for a cold start. ``interrupt`` and ``lasts`` are those of Template."""
    if not warm and preload is None:
        return nullcontext()
    from .._warm.template import Template

    template = Template(True if preload is None else preload, lasts=lasts)
    template.interrupt = interrupt
    return template


def describe(one: Found, script: str) -> list[str]:
    """Lines that say which modules would be preloaded, which would not, and why."""
    if one.modules:
        lines = [f"a warm start of {script} preloads {', '.join(one.modules)}"]
    else:
        lines = [f"a warm start of {script} preloads nothing"]
    return [*lines, *(f"  not {name}: {why}" for name, why in one.left_out)]
