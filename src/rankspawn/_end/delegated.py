"""A delegated cgroup, found or asked for: ``cgroup="auto"``.

The service manager decides which cgroup this process may divide (systemd's "Control Group APIs and Delegation"). A
user's session is not delegated, and the user cannot move processes out of it. The user's own service manager can: it
makes a scope unit, puts this process into it, and hands the scope over (Delegate=yes).
"""

from __future__ import annotations

import errno
import os
import shutil
import time

from .._cgroups import own_hierarchies
from .cgroup import new_name

_SCOPE_SECONDS = 5.0  # a manager that has not moved us by then is stuck
_START = (
    "busctl --user --quiet call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager"
    " StartTransientUnit ssa(sv)a(sa(sv))"
).split()


def delegated_cgroup(proc: str = "/proc") -> str:
    """Find a cgroup v2 in which this process may make cgroups; ask the user's systemd for one where there is none.

    It takes this process's cgroup if that belongs to this user, as in a container or in a unit with Delegate=yes. Else
    the user's systemd makes a scope and moves this whole process to it. Else root takes this process's cgroup.

    Args:
        proc: The mounted procfs.

    Returns:
        The directory.

    Raises:
        OSError: ENOTSUP; the message says what was tried.
    """
    tried = []
    own = own_cgroup(proc)
    if own is None:
        tried.append("no cgroup v2 with this process in it is mounted")
    elif os.geteuid() != 0 and _is_writable(own):
        return own
    elif os.geteuid() != 0:
        tried.append(f"this process's own cgroup {own} is not this user's")
    lack = "no cgroup v2" if own is None else _enter_scope(own, proc)
    if not lack:
        own = own_cgroup(proc)
    if own is not None and _is_writable(own):
        return own
    tried.append(f"the user's systemd: {lack}" if lack else f"the scope's cgroup {own} cannot be written")
    raise OSError(
        errno.ENOTSUP,
        f'cgroup "auto" finds no delegated cgroup: {"; ".join(tried)}. Start the launcher by systemd-run --user --scope'
        " -p Delegate=yes, or name a delegated directory",
    )


def own_cgroup(proc: str = "/proc") -> str | None:
    """Find the directory of the cgroup v2 that this process is in; None where it cannot be seen (cgroups(7))."""
    try:
        hierarchies = own_hierarchies(proc)
    except OSError:
        return None
    for one in reversed(hierarchies):  # the last one covers those before it
        if not one.controllers and one.inside is not None:
            found = next(one.upwards())
            if os.path.exists(f"{found}/cgroup.procs"):
                return found
    return None


def _is_writable(folder: str) -> bool:
    """Whether this user may make cgroups in ``folder`` and move processes there."""
    return os.access(folder, os.W_OK | os.X_OK) and os.access(f"{folder}/cgroup.procs", os.W_OK)


def _enter_scope(own: str, proc: str) -> str:
    """Have the user's systemd move this process to a delegated scope; returns why it could not, or ""."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime or not os.path.exists(f"{runtime}/systemd/private"):
        return "none runs (XDG_RUNTIME_DIR has no systemd/private)"
    if shutil.which("busctl") is None:
        return "its command busctl is not on PATH"
    import subprocess

    from .._start.popen import Popen

    properties = ["2", "PIDs", "au", "1", str(os.getpid()), "Delegate", "b", "true", "0"]
    with Popen(
        [*_START, f"{new_name()}.scope", "fail", *properties],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as call:
        try:
            said = call.communicate(timeout=_SCOPE_SECONDS)[1]
        except subprocess.TimeoutExpired:
            call.kill()
            return "it does not answer"
    if call.returncode:
        return said.strip() or f"busctl ended with {call.returncode}"
    end = time.monotonic() + _SCOPE_SECONDS
    while own_cgroup(proc) == own:  # the call returns before the unit's job has run
        if time.monotonic() >= end:
            return "it made a scope and did not move this process to it"
        time.sleep(0.002)
    return ""
