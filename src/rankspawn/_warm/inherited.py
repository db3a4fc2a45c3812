"""What a process inherits from its parent, apart from what a start sets: limits, ids, namespaces.

A forked rank inherits it from its template, and an executed rank from the launcher. The two are the same unless the
launcher's own has changed since its template was made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

_OF_STATUS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid_for_children", "time_for_children", "user", "uts")


def inherited(root: str = "/proc/self/") -> dict[str, str]:
    """What a child would inherit from this process now, by name."""
    found = {name: value for name, value in _status(root).items() if name in _OF_STATUS}
    for line in _text(root, "limits").splitlines()[1:]:
        found[line[:26].strip()] = " ".join(line[26:].split()[:2])
    for name in ("cgroup", "oom_score_adj", "coredump_filter"):
        found[name] = _text(root, name).strip()
    for name in _NAMESPACES:
        try:
            found[f"{name} namespace"] = os.readlink(f"{root}ns/{name}")
        except OSError:
            continue  # this kernel has no such namespace
    found["nice"] = str(os.getpriority(os.PRIO_PROCESS, 0))
    found["scheduler"] = str(os.sched_getscheduler(0))
    return found


def umask(root: str = "/proc/self/") -> int:
    """This process's umask, which no system call reads without changing it.

    Raises:
        OSError: The kernel does not show it (before Linux 4.7).
    """
    try:
        return int(_status(root)["Umask"], 8)
    except KeyError:
        raise OSError("the kernel does not show the umask") from None


def closed_streams() -> str | None:
    """Say which of this process's streams is closed; None if none is."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        with suppress(OSError):
            os.fstat(fd)
            continue
        return f"the launcher's {name} is closed"
    return None


def difference(was: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Say what has changed; None if nothing has."""
    for name in [*was, *now]:
        if was.get(name) != now.get(name):
            return f"{name} of the launcher was {was.get(name)} when the template was made, and is {now.get(name)}"
    return None


def _status(root: str) -> dict[str, str]:
    lines = (line.partition(":") for line in _text(root, "status").splitlines())
    return {name: " ".join(value.split()) for name, _, value in lines}


def _text(root: str, name: str) -> str:
    try:
        with open(root + name, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
