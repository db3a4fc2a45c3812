"""Checks before the start whether the script exists."""

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
    if not folder:
        from shutil import which

        if which(name):
            raise CommandError(f"{path}: {os.strerror(errno.ENOENT)}; to run the program, pass --no-python", USAGE)
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
