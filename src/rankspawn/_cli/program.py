"""Whether there is what ranks shall run, said before they are started; why a program that is there cannot be run."""

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
    """Raise CommandError for a SCRIPT that is not there: each rank would start an interpreter to say so."""
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
    """Raise CommandError where a file shall be written into a folder that is not there; None is no file."""
    if path and not os.path.isdir(os.path.dirname(path) or "."):
        raise CommandError(f"{path}: {os.strerror(errno.ENOENT)}", USAGE)


def unmeant(script: Sequence[str], is_module: bool) -> list[str]:
    """Find the launcher's options behind SCRIPT that SCRIPT cannot have meant, because its text does not name them.

    These options are about what a script does not decide. A program that is not a file here says nothing of itself: a
    module that is installed, as torch.distributed.run, may be a launcher.

    Args:
        script: SCRIPT and its arguments.
        is_module: Whether it is a module's name.
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
    """Say which interpreter a program lacks that is there itself; "" where that is not the error.

    execve(2) has one error for both, and a line that ends with a carriage return looks like any other.
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
