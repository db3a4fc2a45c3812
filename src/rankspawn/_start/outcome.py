"""The outcome of a binding: the refused steps, and the mask and policy of a running process."""

from __future__ import annotations

import errno
import os
import re

from .._binding import Binding, MemoryPolicy
from .._frozen import Frozen
from .._ids import format_ids, parse_ids
from .._public import public


class RefusedStep(Frozen):
    """One step that the system refused: its name and its errno."""

    step: str
    errno: int

    def __str__(self) -> str:
        return f"{self.step}: {text_of(self.errno)}"

    @property
    def why(self) -> str:
        """Why the system may have refused it, and what to do; "" if unknown."""
        return _WHY.get((self.step, self.errno), "")


@public
class BindingReport(Frozen):
    """The requested binding of one process, and the refused steps.

    Attributes:
        requested: The binding given to Popen; None for none.
        refused: The optional steps that the system refused, in order.
        pid: The process that ``effective`` reads.
        late: Whether the CPU mask was set only after the start, and only on the process's main thread. What the process
            did before, and threads that it had made, were not bound. It is so on Windows, and if the system allows no
            thread.
    """

    requested: Binding | None
    refused: tuple[RefusedStep, ...]
    pid: int
    late: bool = False

    @property
    def effective(self) -> Binding | None:
        """The mask and policy that the process has now, from the kernel; None if it has ended, reaped or not.

        The policy is the one that /proc/PID/numa_maps (proc(5)) shows for memory without a policy of its own. It is
        None if the kernel has no NUMA support, or this user may not read the file.
        """
        if not hasattr(os, "sched_getaffinity"):
            return _effective_by_psutil(self.pid)
        try:
            cpus = frozenset(os.sched_getaffinity(self.pid))
        except ProcessLookupError:
            return None
        policy = _policy_of(self.pid)
        # Until an ended process is reaped, the kernel still has its mask, but not its memory.
        return None if _has_ended(self.pid) else Binding(cpus, policy)

    def at_birth(self, inherited: frozenset[int] | None) -> Binding | None:
        """Return the binding that the process was born with: the request, because the child checked what it got.

        Args:
            inherited: The CPUs of the thread that started it; None where the system has no masks.

        Returns:
            The mask and policy; the policy is None if none was requested. None if the process was bound late, or the
            system granted the request only in part.
        """
        if self.late or any(one.errno == GRANTED_IN_PART for one in self.refused):
            return None
        refused = {one.step for one in self.refused}
        asked = self.requested or Binding(None)
        cpus = None if "sched_setaffinity" in refused else asked.cpus
        memory = None if "set_mempolicy" in refused else asked.memory
        return Binding(inherited if cpus is None else cpus, memory)


@public
class BindingError(OSError):
    """The system refused to bind a process.

    Attributes:
        step: The refused call.
        binding: The requested binding.
    """

    step: str
    binding: Binding

    @classmethod
    def refused(cls, step: str, code: int, binding: Binding, why: str = "") -> BindingError:
        """Make the error of a refused step. Its text says why the system may refuse the step, and what to do.

        Args:
            step: The refused call.
            code: Its errno.
            binding: The requested binding.
            why: The reason to give instead of the usual one for the errno.

        Returns:
            The error, to be raised.
        """
        asked = f"cpus {format_ids(binding.cpus or ())}" if step == "sched_setaffinity" else f"{binding.memory}"
        why = why or RefusedStep(step, code).why
        error = cls(code, f"{step}: {text_of(code)} (asked: {asked}){why and ': '}{why}")
        error.step, error.binding = step, binding
        return error


GRANTED_IN_PART = errno.ERANGE
"""The errno for a step that the kernel did only in part (csrc/granted.h). Neither system call returns it."""


def text_of(code: int) -> str:
    """Say what the errno of a refused step means."""
    return "granted only in part" if code == GRANTED_IN_PART else os.strerror(code)


_WHY = {
    ("sched_setaffinity", GRANTED_IN_PART): (
        "the other CPUs are offline, absent, or outside this process's cpuset; leave them out, or make the binding"
        " optional"
    ),
    ("set_mempolicy", GRANTED_IN_PART): (
        "the other nodes are absent, have no memory, or are outside this process's cpuset (Mems_allowed_list in"
        " /proc/self/status); leave them out, or make the binding optional"
    ),
    ("sched_setaffinity", errno.ENOTSUP): "this system, or this installation without psutil, cannot set a CPU mask",
    ("set_mempolicy", errno.ENOTSUP): (
        "only rankspawn's engine can set it, and it did not start this process; `rankspawn doctor` says why"
    ),
    ("sched_setaffinity", errno.EINVAL): (
        "none of these CPUs is both online and in the cpuset that this process may use; see Cpus_allowed_list in"
        " /proc/self/status, or `rankspawn doctor`"
    ),
    ("sched_setaffinity", errno.EPERM): "a seccomp profile may gate it; allow it, or use required=False",
    ("set_mempolicy", errno.EPERM): (
        "a container's seccomp profile gates it on CAP_SYS_NICE; add --cap-add SYS_NICE, or memory=None"
    ),
    ("set_mempolicy", errno.EINVAL): (
        "a node is absent, has no memory, is outside this process's cpuset (Mems_allowed_list in /proc/self/status),"
        " or the kernel is too old for this mode"
    ),
    ("set_mempolicy", errno.ENOSYS): "this kernel is built without NUMA support; use memory=None",
}


def _effective_by_psutil(pid: int) -> Binding | None:
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        # psutil has no cpu_affinity on macOS, where there is none.
        return Binding(frozenset(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else None)
    except psutil.NoSuchProcess:
        return None


# How the kernel writes a policy (mpol_to_str in mm/mempolicy.c): a name, which may hold a space, then nodes.
# A text, as all patterns here that a usual launch does not need: the first use compiles it, not the import.
_POLICY = r"^[0-9a-f]+ (prefer \(many\)|weighted interleave|[a-z]+)(?:=[a-z|]+)?(?::([0-9,-]+))?(?: |$)"


_POLICY_MODES = {
    "prefer": "preferred",
    "prefer (many)": "preferred-many",
    "weighted interleave": "weighted-interleave",
}


def _has_ended(pid: int) -> bool:
    """Whether the process has ended, reaped or not (state Z or X of proc(5))."""
    from .._procfs import read_stat

    try:
        return read_stat(f"/proc/{pid}").state in "ZX"
    except OSError:
        pass  # it ended while it was read, or there is no /proc
    try:
        os.sched_getaffinity(pid)
    except ProcessLookupError:
        return True
    return False


def _policy_of(pid: int) -> MemoryPolicy | None:
    try:
        with open(f"/proc/{pid}/numa_maps", encoding="ascii", errors="replace") as maps:
            shown = re.match(_POLICY, maps.readline())
    except OSError:
        return None
    if shown is None:
        return None
    mode = _POLICY_MODES.get(shown[1], shown[1])
    return MemoryPolicy(mode, parse_ids(shown[2] or ""))  # type: ignore[arg-type]
