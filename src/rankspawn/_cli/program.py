"""Checks before the start whether the script exists, and says why an existing program cannot be executed."""

from __future__ import annotations

import errno
import os

from .options import USAGE, CommandError
from .vocabulary import nearest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_LAUNCHERS = frozenset(
    "--nproc-per-node --nnodes --node-rank --standalone --rdzv-backend --rdzv-endpoint --rdzv-id --max-restarts"
    " --numa-binding --local-ranks-filter".split()
)


def check_script(path: str) -> None:
    """Raise CommandError if SCRIPT does not exist. Otherwise each rank would start an interpreter just to say so."""
    if path == "-" or os.path.exists(path):
        return
    folder, name = os.path.split(path)
    try:
        others = os.listdir(folder or ".")
    except OSError:
        others = []
    raise CommandError(
        f"{path}: {os.strerror(errno.ENOENT)}{nearest(name, others)}", USAGE
    )  # the interpreter's status, too


def check_folder_of(path: str | None) -> None:
    """Raise CommandError if the folder of a file to write does not exist; None stands for no file."""
    if path and not os.path.isdir(os.path.dirname(path) or "."):
        raise CommandError(f"{path}: {os.strerror(errno.ENOENT)}", USAGE)


def unmeant(script: Sequence[str], is_module: bool) -> list[str]:
    """Find the launcher's options after SCRIPT that cannot be SCRIPT's own, because its text does not name them.

    A script has no use for these options. An installed module is not checked, because it may be a launcher itself, as
    torch.distributed.run is.

    Args:
        script: SCRIPT and its arguments.
        is_module: Whether SCRIPT is a module's name.
    """
    words = [word.partition("=")[0] for word in script[1:]]
    found = [word for word in dict.fromkeys(words) if word.replace("_", "-") in _LAUNCHERS]
    if not found:
        return []
    path = script[0]
    if is_module:
        path = path.replace(".", "/")
        path = f"{path}/__main__.py" if os.path.isdir(path) else f"{path}.py"
    try:
        if not os.path.isfile(path):  # a pipe's text can be read once only
            return []
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read().replace("_", "-")
    except OSError:
        return []
    return [word for word in found if word.strip("-").replace("_", "-") not in text]


def missing_interpreter(error: OSError, program: str) -> str:
    """Say which interpreter is missing if the program itself exists; "" for any other error.

    execve(2) fails with the same error in both cases, and nobody sees a carriage return at the end of a line.
    """
    if error.errno != errno.ENOENT:
        return ""
    paths = [program] if "/" in program else [os.path.join(one, program) for one in os.get_exec_path()]
    for path in filter(os.path.isfile, paths):
        try:
            with open(path, "rb") as file:
                line = file.readline(256)
        except OSError:
            return ""
        if not line.startswith(b"#!"):
            return f" ({path} exists, but its ELF interpreter, which loads it, does not)"
        words = line[2:].strip(b" \t\n").split()
        named = os.fsdecode(words[0]) if words else ""
        returns = ": its first line ends with a carriage return, as in a file from Windows" if b"\r" in line else ""
        named += "\\r" if line.endswith(b"\r\n") and len(words) == 1 else ""
        return f" ({path} exists, but its interpreter {named} does not{returns})"
    return ""
