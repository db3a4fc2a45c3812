"""Whether there is what ranks shall run, said before they are started; why a program that is there cannot be run."""

from __future__ import annotations

import errno
import os

from .options import CommandError
from .vocabulary import nearest


def check_script(path: str) -> None:
    """Raise CommandError for a SCRIPT that is not there: each rank would start an interpreter to say so."""
    if path == "-" or os.path.exists(path):
        return
    folder, name = os.path.split(path)
    try:
        others = os.listdir(folder or ".")
    except OSError:
        others = []
    raise CommandError(f"{path}: {os.strerror(errno.ENOENT)}{nearest(name, others)}", 2)  # the interpreter's status


def check_folder_of(path: str | None) -> None:
    """Raise CommandError where a file shall be written into a folder that is not there; None is no file."""
    if path and not os.path.isdir(os.path.dirname(path) or "."):
        raise CommandError(f"{path}: {os.strerror(errno.ENOENT)}")


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
            return f" ({path} is there: what loads it, its ELF interpreter, is not)"
        words = line[2:].strip(b" \t\n").split()
        named = os.fsdecode(words[0]) if words else ""
        returns = ": its first line ends with a carriage return, as in a file from Windows" if b"\r" in line else ""
        named += "\\r" if line.endswith(b"\r\n") and len(words) == 1 else ""
        return f" ({path} is there: its interpreter {named} is not{returns})"
    return ""
