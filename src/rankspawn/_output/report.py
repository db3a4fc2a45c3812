"""What became of a job, as plain data for a file: its ranks, their times, bindings, ends and use of the machine."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypedDict

from .._end.processes import ProcessTree
from .._ids import format_ids
from .usage import Usage, usage_now

if TYPE_CHECKING:
    import resource
    from collections.abc import Mapping, Sequence

    from .._binding import Binding
    from .._start.outcome import RefusedStep
    from .._start.popen import Popen

VERSION = 1
"""Of the report's form: it changes when a field goes or means something else, not when one is added."""

# How batch systems name the job and its step in the environment of what they start.
_JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "FLUX_JOB_ID")


class Placement(TypedDict):
    """Where a process is bound.

    cpus: as the kernel lists them, "0-3,8"; None where the mask was not asked for, or where there is none.
    memory: the policy, "bind:0-1", "local"; None where it was not asked for, or where the system does not say.
    """

    cpus: str | None
    memory: str | None


class Refusal(TypedDict):
    """One optional step that the system refused: the call, its errno, that errno's name and its text."""

    step: str
    errno: int
    name: str
    text: str


class BindingFacts(TypedDict):
    """A rank's binding.

    asked: what the launch asked for; None for a rank that inherits.
    required: whether a refusal would have failed the launch.
    effective: what the kernel had for the rank when it was last looked at; None when it never was.
    refused: the steps of a binding that is not required.
    """

    asked: Placement | None
    required: bool
    effective: Placement | None
    refused: list[Refusal]


class Exit(TypedDict):
    """How a rank ended.

    returncode: as ``Popen.returncode``. status: what it exited with (0 to 255 on POSIX), or None. signal: the name of
    the signal that ended it, or None. core: whether that left a core dump; None where nobody looked.
    """

    returncode: int
    status: int | None
    signal: str | None
    core: bool | None


class ResourceUsage(TypedDict):
    """What a rank that has ended has used, with its children that it waited for: getrusage(2).

    user, system: CPU seconds. max_rss: the most bytes that were resident at a time, of the largest process among them;
    None where the kernel's figure is the launcher's: Linux carries the launcher's own over the execve(2).
    minor_faults, major_faults: page faults without and with reading. voluntary_switches, involuntary_switches: of
    context. blocks_in, blocks_out: reads and writes of file systems that reached a device, on Linux in units of 512
    bytes.
    """

    user: float
    system: float
    max_rss: int | None
    minor_faults: int
    major_faults: int
    voluntary_switches: int
    involuntary_switches: int
    blocks_in: int
    blocks_out: int


class UsageNow(Usage):
    """What a rank that still runs uses, at the moment of the report.

    children: how many processes that have come from it run, theirs included. The other figures are the rank's alone.
    """

    children: int


class RankReport(TypedDict):
    """One rank of one attempt. Times are seconds from the call that launched the attempt.

    rank: its number. pid: of the process. mechanism: how it was started: "clone", "posix_spawn" or "subprocess".
    executed: when it had become the program; None where that was not noted. exited: when the launcher saw its end; None
    while it runs. binding, exit: see there; exit is None while it runs. rusage: None while it runs, or where nobody
    asked the kernel for it. now: None once it has ended.
    """

    rank: int
    pid: int
    mechanism: str | None
    executed: float | None
    exited: float | None
    binding: BindingFacts
    exit: Exit | None
    rusage: ResourceUsage | None
    now: UsageNow | None


class AttemptReport(TypedDict):
    """One start of the whole group.

    attempt: 0, and one more for each restart. called: seconds from the first attempt's launch call to this one's.
    started: the wall clock at the call, ISO 8601 with its zone. duration: seconds from the call until the last rank was
    seen to end, or until the report. ranks: in rank order.
    """

    attempt: int
    called: float
    started: str
    duration: float
    ranks: list[RankReport]


class GroupReport(TypedDict):
    """A whole job on this machine.

    version: of this form, see VERSION. rankspawn: the version of the package; None in a tree that is not installed.
    host: this machine's name. command: what each rank runs. nprocs: how many ranks. job: "run_id", and the batch
    system's variables that name the job, by their names. duration: seconds from the first launch call until the last
    rank of the last attempt was seen to end, or until the report. attempts: in order.
    """

    version: int
    rankspawn: str | None
    host: str
    command: list[str]
    nprocs: int
    job: dict[str, str]
    duration: float
    attempts: list[AttemptReport]


@dataclass(frozen=True)
class Attempt:
    """What a group knows of one attempt.

    called_ns: of CLOCK_MONOTONIC at the launch call. called_at: ``time.time()`` then. ranks: in rank order.
    """

    called_ns: int
    called_at: float
    ranks: Sequence[RankReport]


def rank_report(
    number: int,
    rank: Popen,
    *,
    called_ns: int,
    exited_ns: int | None,
    returncode: int | None,
    effective: Binding | None,
    usage: resource.struct_rusage | None,
    core: bool | None = None,
    tree: ProcessTree | None = None,
) -> RankReport:
    """What is known of one rank.

    called_ns: CLOCK_MONOTONIC at the launch call. exited_ns: the same clock when the rank was seen to have ended, None
        while it runs. returncode: as Popen's, None while it runs; ``rank.returncode`` stays None until it is reaped.
    effective: what ``rank.binding_report.effective`` gave while it ran; None reads it now if the rank was not reaped.
    usage: from wait4(2). core: whether it dumped core, where known.
    tree: for several ranks of one report, so that all processes are looked at once.
    """
    executed_ns = rank._executed_ns
    report = rank.binding_report
    if effective is None and rank.returncode is None:
        effective = report.effective
    asked = report.requested
    return {
        "rank": number,
        "pid": rank.pid,
        "mechanism": rank.mechanism,
        "executed": None if executed_ns is None else (executed_ns - called_ns) / 1e9,
        "exited": None if exited_ns is None else (exited_ns - called_ns) / 1e9,
        "binding": {
            "asked": _placement(asked),
            "required": asked is not None and asked.required,
            "effective": _placement(effective),
            "refused": [_refusal(step) for step in report.refused],
        },
        "exit": None if returncode is None else _exit(returncode, core),
        "rusage": None if usage is None else _rusage(usage),
        "now": _now(rank.pid, tree) if returncode is None and rank.returncode is None else None,
    }


def attempt(
    ranks: Sequence[Popen],
    *,
    called_ns: int,
    exited_ns: Mapping[int, int],
    returncodes: Mapping[int, int],
    effective: Mapping[int, Binding | None],
    collected: Mapping[int, tuple[Any, bool]],
) -> Attempt:
    """One start of all ``ranks``. By rank, as in rank_report(): what each was bound to, when and how it ended; and
    collected: what it used, and whether it dumped core."""
    tree = ProcessTree()
    told = []
    for number, rank in enumerate(ranks):
        usage, core = collected.get(number, (None, None))
        told.append(
            rank_report(
                number,
                rank,
                called_ns=called_ns,
                exited_ns=exited_ns.get(number),
                returncode=returncodes.get(number),
                effective=effective.get(number),
                usage=usage,
                core=core,
                tree=tree,
            )
        )
    called_at = time.time() - (time.monotonic_ns() - called_ns) / 1e9
    return Attempt(called_ns, called_at, told)


def group_report(
    attempts: Sequence[Attempt],
    *,
    command: Sequence[str | os.PathLike[str]],
    nprocs: int,
    run_id: str,
    env: Mapping[str, str] = os.environ,
) -> GroupReport:
    """The job's report; ``attempts`` in order, one at least. env: where the batch system's variables are looked for."""
    import socket

    first, now_ns = attempts[0].called_ns, time.monotonic_ns()
    told: list[AttemptReport] = []
    for number, one in enumerate(attempts):
        called = (one.called_ns - first) / 1e9
        ends = [rank["exited"] for rank in one.ranks]
        last = max((end for end in ends if end is not None), default=0.0)
        told.append(
            {
                "attempt": number,
                "called": called,
                "started": datetime.fromtimestamp(one.called_at).astimezone().isoformat(timespec="microseconds"),
                "duration": (now_ns - one.called_ns) / 1e9 if None in ends else last,
                "ranks": list(one.ranks),
            }
        )
    return {
        "version": VERSION,
        "rankspawn": _version(),
        "host": socket.gethostname(),
        "command": [os.fspath(word) for word in command],
        "nprocs": nprocs,
        "job": {"run_id": run_id, **{name: env[name] for name in _JOB_VARIABLES if name in env}},
        "duration": told[-1]["called"] + told[-1]["duration"],
        "attempts": told,
    }


def write_report(report: GroupReport, path: str | os.PathLike[str]) -> None:
    """Write ``report`` as JSON, as write_text() does."""
    write_text(json.dumps(report, indent=1) + "\n", path)


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a file so that nobody sees half of it, and so that after a failure what was there is still there.

    What is there and is no regular file (/dev/stdout, a FIFO, a symbolic link) is written as it stands, not replaced.

    Raises OSError, of the class that open() would raise, with ``path`` as its filename.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    beside = os.path.join(folder, f".{name}.{os.getpid()}.new")
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                with open(path, "w", encoding="utf-8") as file:
                    file.write(text)
                return
        try:
            with open(beside, "x", encoding="utf-8") as file:
                file.write(text)
            os.replace(beside, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def _placement(binding: Binding | None) -> Placement | None:
    if binding is None:
        return None
    return {
        "cpus": None if binding.cpus is None else format_ids(binding.cpus),
        "memory": None if binding.memory is None else str(binding.memory),
    }


def _refusal(refused: RefusedStep) -> Refusal:
    code = refused.errno
    return {"step": refused.step, "errno": code, "name": errno.errorcode.get(code, ""), "text": os.strerror(code)}


def _exit(returncode: int, core: bool | None) -> Exit:
    if returncode >= 0:
        return {"returncode": returncode, "status": returncode, "signal": None, "core": core}
    try:
        name = signal.Signals(-returncode).name
    except ValueError:  # a real-time signal between the first and the last has no name
        name = f"signal {-returncode}"
    return {"returncode": returncode, "status": None, "signal": name, "core": core}


def _rusage(usage: resource.struct_rusage) -> ResourceUsage:
    import resource

    largest: int | None = usage.ru_maxrss
    # Linux: at its execve a process notes the peak of the memory that it leaves (exec_mmap in fs/exec.c), which was
    # shared with us or copied from us. What is not above ours says nothing.
    if sys.platform == "linux" and usage.ru_maxrss <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
        largest = None
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "user": usage.ru_utime,
        "system": usage.ru_stime,
        "max_rss": None if largest is None else largest * unit,
        "minor_faults": usage.ru_minflt,
        "major_faults": usage.ru_majflt,
        "voluntary_switches": usage.ru_nvcsw,
        "involuntary_switches": usage.ru_nivcsw,
        "blocks_in": usage.ru_inblock,
        "blocks_out": usage.ru_oublock,
    }


def _now(pid: int, tree: ProcessTree | None) -> UsageNow | None:
    usage = usage_now(pid)
    if usage is None:
        return None
    return {**usage, "children": len((tree or ProcessTree()).descendants(pid))}


def _version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rankspawn")
    except PackageNotFoundError:
        return None
