"""``plan`` takes the command line of ``run``: what it makes of SCRIPT, and of the options that place no rank."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from .vocabulary import respelt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._warm.find import Found


def respelt_for_plan(plan: argparse.ArgumentParser, words: Sequence[str]) -> Sequence[str]:
    """Have ``plan`` take the whole command line of ``run`` if it is one, and respell it as for ``run``.

    The options of ``run`` are added only then, because importing them takes a third of the command's time.
    """
    are_own = _are_own(plan, words)
    if not are_own or any(name.startswith("PET_") for name in os.environ):
        from .run import add_run_line

        add_run_line(plan)
    if are_own:
        return words
    # In a line of `run`, SCRIPT is no value of --warm, and all words after it are its own.
    return ["--warm=" if word == "--warm" else word for word in respelt(plan, words)]


def _are_own(plan: argparse.ArgumentParser, words: Sequence[str]) -> bool:
    """Whether the words are options of ``plan``, not abbreviated, and their values."""
    rest = iter(words)
    for word in rest:
        name, has_value, _ = word.partition("=")
        option = plan._option_string_actions.get(name)
        if option is None:
            return False
        if not has_value and option.nargs != 0:
            next(rest, None)
    return True


def warm_start(args: argparse.Namespace, words: Sequence[str]) -> tuple[Found | None, str]:
    """What a warm start would preload, and for which script; None if the command line asks for none.

    The script is the value of --warm or, in a line of ``run``, SCRIPT, with which ``words`` begin.
    """
    if args.warm is None and args.preload is None:
        return None, ""
    words = [args.warm] if args.warm else words
    if not words:
        args.parser.error(f"--{'warm' if args.preload is None else 'preload'} needs SCRIPT")
    from .._warm.find import Found, find
    from .settings import command_of

    return Found(args.preload) if args.preload else find(command_of(words, args), os.getcwd()), words[0]
