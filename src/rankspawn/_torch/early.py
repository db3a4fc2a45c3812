"""torchrun --warm: the template begins to import while this process imports torch for its own parser.

The code here searches the arguments before the parser can read them. A wrong guess costs one import: a rank that does
not fit this template gets another one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._warm.template import Template

# Those of torchrun's options, and of ours, that take no value.
_FLAGS = {
    "-h", "--help", "--standalone", "-m", "--module", "--no-python", "--run-path", "--virtual-local-rank", "--warm",
    "--guard", "--no-guard", "--stacks",
}  # fmt: skip


@contextmanager
def early_template(arguments: Sequence[str]) -> Iterator[Template | None]:
    """Make the template that --warm or --preload asks for, and begin its imports; None if neither is given."""
    options, script = _split(arguments)
    preload = options.get("--preload")
    if "--warm" not in options and preload is None:
        yield None
        return
    from .._warm.command import module_names
    from .._warm.template import Template

    try:
        names = None if preload is None else module_names(preload)
    except ValueError:
        yield None  # the parser reports it
        return
    if names is None and "--run-path" in options and script:  # a function runs the script
        from .._warm.find import find

        names = find([os.environ.get("PYTHON_EXEC", sys.executable), script[0]], os.getcwd()).modules
    with Template(True if names is None else names) as template:
        binds = options.keys() & {"--numa-binding", "--no-python", "--run-path"}
        if script and not binds:
            is_module = ["-m"] if options.keys() & {"-m", "--module"} else []
            python = os.environ.get("PYTHON_EXEC", sys.executable)
            template.begin(
                [python, "-u", *is_module, *script], _environment(options), guard="--no-guard" not in options
            )
        yield template


def respelt(arguments: Sequence[str]) -> list[str]:
    """Rewrite ``--warm MODULES`` as ``--warm --preload=MODULES``, because --warm may stand alone."""
    place = len(arguments) - len(_split(arguments)[1])
    for number, word in enumerate(arguments[:place]):
        if word == "--warm" and number + 1 < len(arguments):
            from .._warm.command import are_modules

            names = arguments[number + 1]
            if not are_modules(names):
                continue
            return [*arguments[: number + 1], f"--preload={names}", *arguments[number + 2 :]]
    return list(arguments)


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options, with dashes for underscores, and the script with its arguments."""
    options: dict[str, str] = {}
    left = list(arguments)
    while left and left[0].startswith("-") and left[0] != "--":
        name, equals, value = left.pop(0).partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        elif len(name) > 2:  # -t3
            name, equals, value = name[:2], "=", name[2:]
        if name not in _FLAGS and not equals and left:
            value = left.pop(0)
        options[name] = value
    return options, left[1:] if left[:1] == ["--"] else left


def _environment(options: dict[str, str]) -> dict[str, str]:
    """The variables that the agent will add to its environment and that imports may read."""
    env = dict(os.environ)
    if options.get("--nproc-per-node", "1") != "1":
        env.setdefault("OMP_NUM_THREADS", "1")
    return env
