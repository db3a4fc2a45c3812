"""Splits a command into the Python interpreter's own options and what it runs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from .._frozen import Frozen

_INTERPRETER = re.compile(r"python(?:[23](?:\.\d+)?t?)?$")
_WITH_VALUE = "WX"  # options whose value may be the next word
_ALONE = "bBdEIOPqsSuv"
# Interactive mode, skipping the first line, and options that only print something.
_REFUSED = re.compile(r"[ihVx?]")


class PythonCommand(Frozen):
    """A command that is ``python [FLAGS] SCRIPT | -m MODULE | -c CODE [ARGUMENTS]``.

    Attributes:
        python: The interpreter.
        flags: Its own options.
        kind: "script", "-m" or "-c".
        target: The script, the module, or the code.
        arguments: The words after it.
    """

    python: str
    flags: tuple[str, ...]
    kind: str
    target: str
    arguments: tuple[str, ...]


def python_command(command: Sequence[str]) -> PythonCommand | str:
    """Split a command. Returns a sentence that says why if the command does not run a Python program."""
    words = list(command)
    python = words.pop(0)
    if not _INTERPRETER.match(os.path.basename(python)):
        return f"expected a command that is `python SCRIPT`, got {python!r}"
    flags: list[str] = []
    while words:
        word = words.pop(0)
        if word == "-" or not word.startswith("-"):
            if word == "-":
                break
            return PythonCommand(python, tuple(flags), "script", word, tuple(words))
        if word.startswith("--"):
            if word != "--check-hash-based-pycs" or not words:
                return f"the interpreter's option {word!r} cannot be used in a warm start"
            flags += [word, words.pop(0)]
            continue
        ends = _last_flag(word)
        if isinstance(ends, str):
            return ends
        kept, kind = word[:ends].rstrip("-"), word[ends : ends + 1]
        if kept:
            flags.append(kept)
        if not kind:
            continue
        value = word[ends + 1 :] or (words.pop(0) if words else "")
        if kind in _WITH_VALUE:
            flags += [f"-{kind}", value]
        else:
            return PythonCommand(python, tuple(flags), f"-{kind}", value, tuple(words))
    return "a program that is read from standard input cannot be started warm"


def _last_flag(word: str) -> int | str:
    """The index in ``word``, as "-Bum", of the option that takes a value; the length of ``word`` if none does."""
    for place, letter in enumerate(word[1:], 1):
        if letter in _WITH_VALUE or letter in "mc":
            return place
        if letter not in _ALONE:
            why = "is for programs that are not started warm" if _REFUSED.match(letter) else "is not known here"
            return f"the interpreter's option -{letter} {why}"
    return len(word)


def module_names(text: str) -> tuple[str, ...]:
    """Split names of modules at the commas.

    Raises:
        ValueError: ``text`` has something other than names of modules.
    """
    names = text.split(",")
    if not all(re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name) for name in names):
        raise ValueError(f"expected names of modules, as torch,torch._dynamo, got {text!r}")
    return tuple(dict.fromkeys(names))


def are_modules(word: str) -> bool:
    """Whether the word behind ``--warm`` names modules, as in ``--warm torch,torch._dynamo train.py``.

    The option may stand alone, so that the next word may be the script. The word is a script if such a file exists, if
    its name ends as a script's does, or if no such module is installed.
    """
    try:
        names = module_names(word)
    except ValueError:
        return False
    if "," in word:
        return True
    from importlib.util import find_spec

    return not word.endswith(".py") and not os.path.exists(word) and find_spec(names[0].partition(".")[0]) is not None


def first_folder(command: PythonCommand, cwd: str) -> str:
    """What the interpreter puts in front of sys.path for this command, unless an option forbids it.

    Args:
        command: What it runs.
        cwd: The absolute folder that it starts in.
    """
    if command.kind == "-c":
        return ""
    if command.kind == "-m":
        return cwd
    path = os.path.join(cwd, command.target)
    return path if os.path.isdir(path) else os.path.dirname(os.path.realpath(path))
