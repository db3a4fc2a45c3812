"""Which modules a command imports before it does anything else."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Sequence


def modules_of(command: Sequence[str], cwd: str) -> list[str]:
    """Find what a command's script imports at its top, of what is installed.

    Args:
        command: ``python SCRIPT``.
        cwd: The folder that it starts in.

    Returns:
        The names of modules.
    """
    from .command import python_command

    parsed = python_command(command)
    if isinstance(parsed, str) or parsed.kind == "-m":
        return []
    text = parsed.target
    if parsed.kind == "script":
        with open(os.path.join(cwd, parsed.target), encoding="utf-8") as file:
            text = file.read()
    found: list[str] = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.append(node.module)
    return [name for name in found if importlib.util.find_spec(name.partition(".")[0])]
