"""Why ranks have died: what the kernel counts, limits and logs, in one line for each. Facts, and no guesses.

It looks at a rank after its end was seen and before it is reaped, because the kernel still has its limits and times
then. It reads the counters of out-of-memory kills before that, too, at the first look at the ranks, so they must be
cheap.
"""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress

from .._cgroups import Hierarchy, own_hierarchies
from .._procfs import read_stat

TYPE_CHECKING = False  # typing's own costs more than this module

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from .._start.popen import Popen

# The pid namespace that the kernel's log counts in: PROC_PID_INIT_INO of include/linux/proc_ns.h.
_FIRST_PID_NAMESPACE = "pid:[4026531836]"

# The signals whose default action is to dump core.
_CORE = ("SIGQUIT", "SIGILL", "SIGABRT", "SIGFPE", "SIGSEGV", "SIGBUS", "SIGSYS", "SIGTRAP", "SIGXCPU", "SIGXFSZ")

_SLACK_NS = 2_000_000_000  # between the clock of the kernel's log and CLOCK_MONOTONIC
_ENOUGH = 0.8  # share of a limit: the CPU time in /proc lags behind the time that the kernel compares
_MOST_LOG = 1 << 23

_KILLED = r"(?i)out of memory: Killed process (\d+) .*?anon-rss:(\d+)kB(?:.*?shmem-rss:(\d+)kB)?"
_OOM = r"oom-kill:constraint=(\w+),.*?(?:oom_memcg=([^,]*),.*?)?pid=(\d+),"
_XID = r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+), (.*)"
_XID_PID = r"pid='?(\d+)'?"


class Deaths:
    """The deaths of the ranks of one group.

    Args:
        since_ns: CLOCK_MONOTONIC when the ranks were asked for; older entries of the log are ignored.
        cgroup: The directory of the cgroup v2 that they were born in; None for this process's own.
        proc: Where procfs is mounted.
        log: The kernel's log.
        counts: Whether no rank has ended yet, so that the present counts are those from before any death.
    """

    def __init__(
        self,
        since_ns: int,
        cgroup: str | None = None,
        proc: str = "/proc",
        log: str = "/dev/kmsg",
        *,
        counts: bool = True,
    ) -> None:
        self._since_us = (since_ns - _SLACK_NS) // 1000
        self._proc, self._log = proc, log
        self._counters = [*_memory_cgroups(proc, cgroup)]
        self._before = [_oom_kills(folder) if counts else None for folder in self._counters]
        self._entries: list[str] | None = None

    def why(self, ended: Mapping[int, tuple[Popen, int, Collection[int]]]) -> dict[int, str]:
        """Why ranks have died, each in one line; "" where no fact is known, or where this launcher has ended it.

        Args:
            ended: By number, ranks that have ended and have not been reaped: the rank, its returncode, and the signals
                that this launcher has sent it.
        """
        self._entries = None
        return {number: self._why(*death) for number, death in ended.items()}

    def _why(self, rank: Popen, returncode: int, sent: Collection[int]) -> str:
        sig = -returncode if returncode < 0 else returncode - 128 if 128 < returncode < 193 else 0
        if sig in sent:
            return ""
        told = []
        if sig == getattr(signal, "SIGKILL", None):
            told.append(self._why_killed(rank, itself=returncode < 0))
        elif sig:
            told.append(_limit(rank.pid, sig, self._proc))
            told.append(self._fault(rank.pid))
        if sig or os.path.exists(f"{self._proc}/driver/nvidia"):
            told += self._gpu_faults(rank.pid)
        told = [*filter(None, told)]
        if returncode < 0 and _name(sig) in _CORE and (core := self._core(rank, alone=not told)):
            told.append(core)
        return "; ".join(told)

    def _why_killed(self, rank: Popen, *, itself: bool) -> str:
        """Who sent SIGKILL, to the rank itself or to what it ran."""
        by_log = self._oom_by_log(rank.pid) if itself else ""
        if by_log:
            return by_log
        counted = False
        for folder, before in zip(self._counters, self._before, strict=True):
            now = _oom_kills(folder)
            if now is None or before is None:
                continue
            counted = True
            if now > before:
                killed = f"{now - before} process" + "es" * (now - before > 1)
                return f"out of memory: the kernel has killed {killed} in its cgroup{self._limits_text()}"
        if not itself:
            return ""
        hard = _limits(rank.pid, "RLIMIT_CPU")[1]
        if hard is not None and (reached := _cpu_time_used(rank.pid, hard, "-Ht", self._proc)):
            return reached
        if counted:
            return "no out-of-memory kill was counted in its cgroup, and the kernel does not say who sent it"
        return ""

    def _limits_text(self) -> str:
        """The limits of the cgroup and of those above it."""
        limits = [(_limit_of(folder), folder) for folder in self._counters]
        told = [f"the limit of {folder} is {_bytes(limit)}" for limit, folder in limits if limit is not None]
        return f" ({', '.join(told)})" if told else ", which has no limit of its own: the machine's memory was full"

    def _oom_by_log(self, pid: int) -> str:
        """What the log says of an out-of-memory kill of this process."""
        cause = used = ""
        for text in self._texts(by_pid=True):
            if (found := re.search(_OOM, text)) and int(found[3]) == pid:
                where = found[2]
                cause = f"cgroup {where} was at its limit{self._size_of(where)}" if where else "the machine was full"
            elif (found := re.search(_KILLED, text)) and int(found[1]) == pid:
                used = f" when it had {_bytes(1024 * (int(found[2]) + int(found[3] or 0)))}"
        if not cause and not used:
            return ""
        return f"out of memory: the kernel has killed it{used}" + (f", because {cause}" if cause else "")

    def _size_of(self, path: str) -> str:
        """The limit of a cgroup, which the log names by its path below the mount."""
        folder = next((one for one in self._counters if path != "/" and one.endswith(path)), "")
        limit = _limit_of(folder) if folder else None
        return "" if limit is None else f" of {_bytes(limit)}"

    def _fault(self, pid: int) -> str:
        """The kernel's line about an invalid access: the address, and the library or program of the instruction."""
        start = re.compile(rf"\[{pid}\]:? (segfault|general protection|trap|bad frame|unhandled)\b.*")
        for text in self._texts(by_pid=True):
            if found := start.search(text):
                return found[0].partition("]")[2].lstrip(": ")
        return ""

    def _gpu_faults(self, pid: int) -> list[str]:
        """The GPU faults that name this process, or no process."""
        told = []
        for text in self._texts(by_pid=False):
            if found := re.search(_XID, text):
                whose = re.search(_XID_PID, found[3])
                if whose is None or int(whose[1]) == pid:
                    told.append(f"GPU {found[1]} has reported Xid {found[2]}: {found[3].strip()}")
        return told[:3]

    def _core(self, rank: Popen, *, alone: bool) -> str:
        """Where its core dump is. A missing one is no cause by itself."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            if rank.pidfd is None:
                ended = os.waitid(os.P_PID, rank.pid, flags)
            else:
                ended = os.waitid(os.P_PIDFD, rank.pidfd, flags)
        except OSError:  # other code has reaped it
            return ""
        if ended is None or (alone and ended.si_code != os.CLD_DUMPED):
            return ""
        if ended.si_code != os.CLD_DUMPED:
            limit = _limits(rank.pid, "RLIMIT_CORE")[0]
            return "no core was written: ulimit -c is 0" if limit == 0 else "no core was written"
        return f"core dumped {_where_cores_go(rank.pid, self._proc)}"

    def _texts(self, *, by_pid: bool) -> Iterator[str]:
        """The texts of the log since the ranks were asked for.

        Args:
            by_pid: Whether they name processes by number: in another PID namespace these are other processes.
        """
        if by_pid and _link(f"{self._proc}/self/ns/pid") != _FIRST_PID_NAMESPACE:
            return
        if self._entries is None:
            self._entries = _read_log(self._log)
        for entry in self._entries:
            fields, _, text = entry.partition(";")
            stamp = fields.split(",")
            if len(stamp) > 2 and stamp[2].isdecimal() and int(stamp[2]) >= self._since_us:
                yield text


def _memory_cgroups(proc: str, own: str | None) -> Iterator[str]:
    """The directories that limit memory: of the cgroup, and of those above it, up to what is mounted."""
    with suppress(OSError):
        for one in own_hierarchies(proc):
            if one.inside is None or not one.has("memory"):
                continue
            if own is None or one.controllers:
                yield from one.upwards()
            elif own.startswith(one.point):
                yield from Hierarchy((), one.point, own[len(one.point) :]).upwards()


def _oom_kills(folder: str) -> int | None:
    """How many processes in a cgroup and below it were killed out of memory; None where the kernel does not count."""
    for name in ("memory.events", "memory.oom_control"):  # version 2, and version 1
        for line in _text(f"{folder}/{name}").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def _limit_of(folder: str) -> int | None:
    """The limit of memory in bytes, None where there is none."""
    text = (_text(f"{folder}/memory.max") or _text(f"{folder}/memory.limit_in_bytes")).strip()
    return int(text) if text.isdecimal() and int(text) < 1 << 60 else None


def _limit(pid: int, sig: int, proc: str) -> str:
    """The limit that the process exceeded, where the kernel sent this signal because of it."""
    if _name(sig) == "SIGXFSZ" and (limit := _limits(pid, "RLIMIT_FSIZE")[0]) is not None:
        return f"a file has reached its size limit of {_bytes(limit)} (ulimit -f)"
    # With the signal the kernel has raised the soft limit by a second.
    if _name(sig) == "SIGXCPU" and (limit := _limits(pid, "RLIMIT_CPU")[0]) is not None:
        return _cpu_time_used(pid, limit - 1, "-St", proc)
    return ""


def _cpu_time_used(pid: int, limit: int, option: str, proc: str) -> str:
    """That a process has used its CPU time; "" where it has not, so that another process sent the signal."""
    try:
        used = read_stat(f"{proc}/{pid}").cpu_seconds
    except OSError:
        return ""
    if used < _ENOUGH * limit:
        return ""
    # Not how much it has used: that is counted in ticks, and may be a little less.
    return f"it has reached its limit of CPU time, {limit} s (ulimit {option})"


def _limits(pid: int, name: str) -> tuple[int | None, int | None]:
    """The soft and the hard limit of a process (prlimit(2)); None if there is no limit, or if it cannot be read."""
    try:
        import resource

        both = resource.prlimit(pid, getattr(resource, name))
    except (ImportError, AttributeError, OSError):
        return None, None
    soft, hard = (None if one == resource.RLIM_INFINITY else one for one in both)
    return soft, hard


def _where_cores_go(pid: int, proc: str) -> str:
    """Where the kernel has put a core, by core_pattern (core(5))."""
    folder = os.path.join(proc, "sys", "kernel")
    pattern = _text(f"{folder}/core_pattern").strip()
    if pattern.startswith("|"):
        program = pattern[1:].split(" ")[0]
        hint = f": coredumpctl info {pid}" if "systemd-coredump" in program else ""
        return f"to {program}{hint}"
    if pattern.startswith("@"):
        return f"to the socket {pattern.lstrip('@')}"
    name = pattern.replace("%p", str(pid)).replace("%P", str(pid)).replace("%%", "%")
    if "%p" not in pattern and _text(f"{folder}/core_uses_pid").strip() == "1":
        name += f".{pid}"
    return f"to {name}" if name.startswith("/") else f"to {name} in the directory that it ran in"


def _read_log(path: str) -> list[str]:
    """The entries of the kernel's log: "6,339,5140900,-;text"; none where it may not be read."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return []
    data = bytearray()
    try:
        while len(data) < _MOST_LOG:
            try:
                part = os.read(fd, 1 << 16)
            except BrokenPipeError:  # entries were overwritten meanwhile; the next read has the oldest that is left
                continue
            if not part:
                break
            data += part
    except OSError:  # BlockingIOError: that was the last one
        pass
    finally:
        os.close(fd)
    return [line for line in data.decode(errors="replace").splitlines() if line[:1].isdigit()]


def _name(sig: int) -> str:
    try:
        return signal.Signals(sig).name
    except ValueError:
        return ""


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count // size} {unit}"
    return f"{count} bytes"


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
