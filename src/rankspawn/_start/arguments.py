"""Popen's arguments, encoded for the engine."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Mapping
from typing import Any


def command_and_program(args: Any, executable: Any, shell: bool) -> tuple[list[Any], Any]:
    """The argument list and the program, from Popen's args, executable and shell, as subprocess makes them."""
    if type(args) is list and executable is None and not shell:
        return args, args[0]
    command: list[Any]
    if isinstance(args, (str, bytes)):
        command = [args]
    elif isinstance(args, os.PathLike):
        if shell:
            raise TypeError("path-like args is not allowed when shell is true")
        command = [args]
    else:
        command = list(args)
    if shell:
        command = ["/system/bin/sh" if hasattr(sys, "getandroidapilevel") else "/bin/sh", "-c", *command]
        if executable:
            command[0] = executable
    return command, command[0] if executable is None else executable


def candidates(program: Any, env: Mapping[Any, Any] | None) -> tuple[str | bytes, ...]:
    """The paths to execute, in order. A name without a folder is tried in each folder of the child's PATH."""
    if type(program) is str and "/" in program:
        return (program,)
    name = os.fsencode(program)
    if b"/" in name:
        return (name,)
    try:
        folders = os.get_exec_path(env)
    except AttributeError:
        for pair in (env or {}).items():
            for part in pair:
                os.fsencode(part)  # TypeError for a value that no environment can hold
        raise
    return tuple(os.path.join(os.fsencode(folder), name) for folder in folders)


def variable(env: Mapping[Any, Any], name: str) -> str | None:
    """The value of a variable; None if it is not set. Names and values of ``env`` may be bytes."""
    for key, value in env.items():
        if os.fsdecode(key) == name:
            return os.fsdecode(value)
    return None


def named_by_text(env: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """``env`` itself; if some of its names are bytes, a copy in which they are text.

    To a dict, bytes and text are different names; to a process, they are the same. When one environment is merged into
    another, each variable must have one name. ``python -bb`` forbids comparing bytes and text.
    """
    if all(type(name) is str for name in env):
        return env
    return {os.fsdecode(name) if isinstance(name, bytes) else name: value for name, value in env.items()}


def callers_environment() -> dict[str, str]:
    """A copy of os.environ. Its own copy() fails if another thread removes a variable meanwhile."""
    while True:
        try:
            return dict(os.environ)
        except KeyError:
            continue


def is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False  # opening it will raise the error


def is_path(stream: object) -> bool:
    return isinstance(stream, os.PathLike) and not hasattr(stream, "fileno")


def cgroup_descriptor(cgroup: str | os.PathLike[str] | int) -> tuple[int, bool]:
    """A descriptor of the cgroup's directory, and whether this function opened it."""
    if isinstance(cgroup, int):
        if cgroup < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return cgroup, False
    return os.open(cgroup, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), True
