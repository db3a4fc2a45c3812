"""Finds out which engine this installation and machine have, and encodes bindings for the kernel."""

from __future__ import annotations

import errno
import os
import sys
from functools import cache

from .._binding import Binding
from .outcome import GRANTED_IN_PART, BindingError, RefusedStep

EXTENSION_ERROR: str | None = None
"""Why this installation has no engine; None if it has one."""
_IS_PURE = False
try:
    import rankspawn._spawn as _spawn  # "from . import" would call a missing extension a circular import
except ImportError as error:
    EXTENSION_ERROR = str(error)
    _IS_PURE = isinstance(error, ModuleNotFoundError)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Set

# MPOL_* of linux/mempolicy.h.
_MPOL = {
    "default": 0,
    "preferred": 1,
    "bind": 2,
    "interleave": 3,
    "local": 4,
    "preferred-many": 5,
    "weighted-interleave": 6,
}


@cache
def mechanisms() -> tuple[int, ...]:
    """The engine's mechanisms in the order in which they are tried; none for the standard library's own path.

    The environment variable RANKSPAWN_MECHANISM (clone, posix_spawn, subprocess) names the first, for tests and
    comparisons. It is read once. Raises ValueError for another value.
    """
    wanted = os.environ.get("RANKSPAWN_MECHANISM", "clone" if sys.platform == "linux" else "posix_spawn")
    if wanted not in ("clone", "posix_spawn", "subprocess"):
        raise ValueError(f"RANKSPAWN_MECHANISM={wanted!r}: expected clone, posix_spawn or subprocess")
    if _IS_PURE and sys.platform in ("linux", "darwin"):
        import warnings

        warnings.warn(
            f"rankspawn is installed without its engine ({EXTENSION_ERROR}): plain subprocess starts processes, later"
            " and slower, and memory policies, cgroup and die_with_parent are refused; get a C compiler and Python's"
            " headers and install again, see `rankspawn doctor`",
            RuntimeWarning,
            stacklevel=2,
        )
    if EXTENSION_ERROR is not None or wanted == "subprocess":
        return ()
    # QEMU's user mode and WSL1 run the call as a fork, from which the child's report would never arrive.
    clone = (_spawn.CLONE,) if _spawn.clone_is_honoured() else ()
    return clone if wanted == "clone" else (_spawn.POSIX_SPAWN, *clone)


def why_no_engine() -> str:
    if EXTENSION_ERROR is not None:
        return f"the extension is not in this installation ({EXTENSION_ERROR})"
    return "RANKSPAWN_MECHANISM, preexec_fn or this system (no clone with shared memory) rules it out here"


def masks(binding: Binding) -> tuple[bytes | None, int, bytes | None]:
    """``binding`` encoded for the engine: CPU mask, policy's number (-1: none), node mask.

    The result is kept in the binding, which never changes, because hashing it for a cache takes longer than the rest of
    a start.
    """
    kept: tuple[bytes | None, int, bytes | None] | None = binding.__dict__.get("_masks")
    if kept is None:
        cpus = None if binding.cpus is None else _spawn.pack_ids(binding.cpus)
        memory = binding.memory
        mode = -1 if memory is None else _MPOL[memory.mode]
        nodes = _spawn.pack_ids(memory.nodes) if memory is not None and memory.nodes else None
        kept = binding.__dict__["_masks"] = (cpus, mode, nodes)
    return kept


def bind_process(pid: int, binding: Binding) -> tuple[RefusedStep, ...]:
    """Set the CPU mask of a running process by psutil. A memory policy is always refused.

    Returns the refused steps. Raises BindingError for the first refused step of a required binding.
    """
    refused = []
    if binding.memory is not None:
        refused.append(RefusedStep("set_mempolicy", errno.ENOTSUP))
    if binding.cpus is not None and (code := _set_affinity(pid, binding.cpus)):
        refused.append(RefusedStep("sched_setaffinity", code))
    return _checked(binding, refused)


def _checked(binding: Binding, refused: list[RefusedStep]) -> tuple[RefusedStep, ...]:
    if refused and binding.required:
        step, code = refused[0].step, refused[0].errno
        lacks_engine = step == "set_mempolicy" and code == errno.ENOTSUP
        raise BindingError.refused(
            step, code, binding, f"it needs rankspawn's engine: {why_no_engine()}" if lacks_engine else ""
        )
    return tuple(refused)


def _set_affinity(pid: int, cpus: Set[int]) -> int:
    """Set the mask of a running process. Return 0, or the errno of the refusal."""
    try:
        import psutil
    except ImportError:  # a sub-interpreter cannot import it
        return errno.ENOTSUP
    try:
        process = psutil.Process(pid)
        process.cpu_affinity(sorted(cpus))
        return 0 if cpus <= set(process.cpu_affinity()) else GRANTED_IN_PART
    except psutil.NoSuchProcess:
        return 0
    except psutil.AccessDenied:
        return errno.EPERM
    except AttributeError:  # psutil has no cpu_affinity on macOS
        return errno.ENOTSUP
    except ValueError:  # psutil raises it for CPUs that do not exist or are not allowed
        return errno.EINVAL


def bind_thread(binding: Binding) -> tuple[RefusedStep, ...]:
    """Bind the calling thread, and so what it will start. Return the refused steps of an optional binding.

    Raises BindingError for a refused step of a required binding.
    """
    refused: list[RefusedStep] = []
    if binding.cpus is not None:
        try:
            os.sched_setaffinity(0, binding.cpus)
            code = 0 if binding.cpus.issubset(os.sched_getaffinity(0)) else GRANTED_IN_PART
        except OSError as error:
            code = error.errno or errno.EINVAL
        if code:
            refused.append(RefusedStep("sched_setaffinity", code))
    if binding.memory is not None:
        code = errno.ENOTSUP if EXTENSION_ERROR is not None else _spawn.set_mempolicy(*masks(binding)[1:])
        if code:
            refused.append(RefusedStep("set_mempolicy", code))
    return _checked(binding, refused)
