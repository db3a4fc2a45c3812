"""Why the kernel does not execute a file that exists.

execve(2) has the same errors for the file and for its interpreter, so the error does not say which of the two is meant.
"""

from __future__ import annotations

import errno
import os


def why_unexecuted(error: OSError, program: str) -> str:
    """Say why an existing program was not executed: a space and text in parentheses; "" if nothing can be said.

    Args:
        error: The error of the start.
        program: The program's path, or a name to find in PATH.
    """
    if error.errno not in (errno.ENOENT, errno.EACCES, errno.ENOEXEC):
        return ""
    paths = [program] if "/" in program else [os.path.join(one, program) for one in os.get_exec_path()]
    for path in filter(os.path.isfile, paths):
        try:
            with open(path, "rb") as file:
                line = file.readline(256)
        except OSError:
            return ""
        why = {errno.ENOENT: _missing, errno.EACCES: _refused, errno.ENOEXEC: _unknown}[error.errno](line, path)
        return f" ({path} {why})" if why else ""
    if "/" not in program and os.path.isfile(program):
        return f" (it is not in PATH; did you mean ./{program}?)"
    return ""


def _missing(line: bytes, path: str) -> str:
    if not line.startswith(b"#!"):
        return "exists, but its ELF interpreter, which loads it, does not"
    named = _interpreter(line)
    returns = ""
    if b"\r" in line:  # at the end of the line nobody sees it
        returns = ": its first line ends with a carriage return, as in a file from Windows"
        named += "\\r" if len(line[2:].split()) == 1 else ""
    return f"exists, but its interpreter {named} does not{returns}"


def _refused(line: bytes, path: str) -> str:
    named = _interpreter(line)
    if not named or not os.access(path, os.X_OK) or (os.path.isfile(named) and os.access(named, os.X_OK)):
        return ""
    return f"may be executed, but its interpreter {named} may not"


def _unknown(line: bytes, path: str) -> str:
    if not line:
        return "is an empty file"
    if line.startswith(b"\x7fELF"):
        return "is not a program for this machine"
    return "is no program, and has no #! line that names its interpreter"


def _interpreter(line: bytes) -> str:
    words = line[2:].strip(b" \t\r\n").split() if line.startswith(b"#!") else []
    return os.fsdecode(words[0]) if words else ""
