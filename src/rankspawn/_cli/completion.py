"""``rankspawn completion``: a script by which a shell completes commands, options and their values."""

from __future__ import annotations

import argparse

from .options import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_FILES = frozenset("--svg --capture --report --timeline --warm".split())
_FOLDERS = frozenset("--log-dir --sysfs --cgroup".split())
_WORDS = {"--nproc-per-node": ("auto", "cpu", "gpu", "xpu"), "--stdin": ("all", "none")}
"""The words that an option accepts besides numbers."""


def add_completion_options(completion: argparse.ArgumentParser, whole: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the arguments of ``completion``; ``whole`` makes the parser of all commands with all their options."""
    completion.description = (
        "Prints a script by which a shell completes the commands, their options, the values that an option can have,"
        ' and files. It needs shtab: pip install "rankspawn[completion]".'
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), metavar="SHELL", help="bash, zsh or tcsh")
    completion.set_defaults(run=lambda args: _completion(args.shell, whole()))


def _completion(shell: str, parser: argparse.ArgumentParser) -> int:
    try:
        import shtab
    except ImportError:
        raise CommandError(
            'completion needs shtab, which is not installed: pip install "rankspawn[completion]"'
        ) from None

    for command in commands_of(parser).values():
        for action in command._actions:
            if action.nargs == 0:
                continue
            if words := next((_WORDS[name] for name in action.option_strings if name in _WORDS), None):
                action.choices = words
            if _FILES.intersection(action.option_strings) or action.dest == "command":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif _FOLDERS.intersection(action.option_strings):
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell))
    return 0


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Find the parsers of all commands, by their names."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}
