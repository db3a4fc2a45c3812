"""A job's report as plain data: its ranks, with their times, bindings, exits and use of the machine."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .._end.processes import ProcessTree
from .._ids import format_ids
from .form import (
    VERSION,
    AttemptReport,
    Exit,
    GroupReport,
    Placement,
    RankReport,
    Refusal,
    ResourceUsage,
    StacksReport,
    TemplateReport,
    UsageNow,
)
from .usage import usage_now

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .._binding import Binding
    from .._stacks.take import Stacks
    from .._start.outcome import RefusedStep
    from .._start.popen import Popen

# The variables in which batch systems give the job and its step to the processes that they start.
_JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "FLUX_JOB_ID")


@dataclass(frozen=True)
class Attempt:
    """What a group knows about one attempt.

    Attributes:
        called_ns: CLOCK_MONOTONIC at the launch call.
        called_at: ``time.time()`` at the launch call.
        ranks: In rank order.
        stacks: In order.
        templates: The templates that ranks were forked from.
    """

    called_ns: int
    called_at: float
    ranks: Sequence[RankReport]
    stacks: Sequence[StacksReport] = ()
    templates: Sequence[TemplateReport] = ()


def rank_report(
    number: int,
    rank: Popen,
    *,
    called_ns: int,
    exited_ns: int | None,
    returncode: int | None,
    effective: Binding | None,
    usage: tuple[Any, ...] | None,
    core: bool | None = None,
    why: str = "",
    tree: ProcessTree | None = None,
) -> RankReport:
    """Make the report of one rank.

    Args:
        number: Its local rank.
        rank: The process.
        called_ns: CLOCK_MONOTONIC at the launch call.
        exited_ns: The same clock when the rank's end was seen; None while it runs.
        returncode: As ``Popen.returncode``, None while it runs; ``rank.returncode`` stays None until it is reaped.
        effective: What ``rank.binding_report.effective`` gave while it ran; None reads it now, unless the rank was
            reaped.
        usage: From wait4(2).
        core: Whether it dumped core; None where that is not known.
        why: What the kernel says about its death, or "".
        tree: All processes, read once for all ranks of a report; None reads them now.
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
        "exit": None if returncode is None else _exit(returncode, core, why),
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
    collected: Mapping[int, tuple[tuple[Any, ...], bool]],
    stacks: Iterable[Stacks] = (),
    templates: Sequence[TemplateReport] = (),
    why: Mapping[int, str] = MappingProxyType({}),
) -> Attempt:
    """Make the record of one start of all ranks.

    Args:
        ranks: The processes, by local rank.
        called_ns: As in rank_report().
        exited_ns: As in rank_report(), by local rank.
        returncodes: As in rank_report(), by local rank.
        effective: As in rank_report(), by local rank.
        collected: By local rank, what each reaped rank used (from wait4(2)), and whether it dumped core.
        stacks: The looks at what the ranks did.
        templates: The templates that ranks were forked from.
        why: What the kernel says about the deaths, by local rank.
    """
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
                why=why.get(number, ""),
                tree=tree,
            )
        )
    called_at = time.time() - (time.monotonic_ns() - called_ns) / 1e9
    return Attempt(called_ns, called_at, told, [stacks_report(look) for look in stacks], templates)


def group_report(
    attempts: Sequence[Attempt],
    *,
    command: Sequence[str | os.PathLike[str]],
    nprocs: int,
    run_id: str,
    env: Mapping[str, str] = os.environ,
) -> GroupReport:
    """Make the job's report.

    Args:
        attempts: In order, at least one.
        command: What each rank runs.
        nprocs: How many ranks.
        run_id: The job's name.
        env: Where the batch system's variables are looked up.
    """
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
                "stacks": list(one.stacks),
                "templates": list(one.templates),
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


def _placement(binding: Binding | None) -> Placement | None:
    if binding is None:
        return None
    return {
        "cpus": None if binding.cpus is None else format_ids(binding.cpus),
        "memory": None if binding.memory is None else str(binding.memory),
    }


def _refusal(refused: RefusedStep) -> Refusal:
    from .._start.outcome import text_of

    code = refused.errno
    return {"step": refused.step, "errno": code, "name": errno.errorcode.get(code, ""), "text": text_of(code)}


def _exit(returncode: int, core: bool | None, why: str) -> Exit:
    if returncode >= 0:
        return {"returncode": returncode, "status": returncode, "signal": None, "core": core, "why": why}
    try:
        name = signal.Signals(-returncode).name
    except ValueError:  # real-time signals other than the first and the last have no name
        name = f"signal {-returncode}"
    return {"returncode": returncode, "status": None, "signal": name, "core": core, "why": why}


def _rusage(fields: tuple[Any, ...]) -> ResourceUsage:
    import resource

    usage = resource.struct_rusage(fields)
    largest: int | None = usage.ru_maxrss
    # Linux: at its execve a process records the peak of the memory that it leaves (exec_mmap in fs/exec.c), which was
    # shared with us or copied from us. A figure that is not above ours says nothing about the rank.
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


def stacks_report(look: Stacks) -> StacksReport:
    """Make the report of one look at what processes do."""
    return {
        "taken": datetime.fromtimestamp(look.taken_at).astimezone().isoformat(timespec="milliseconds"),
        "because": look.because,
        "seconds": look.seconds,
        "folded": look.folded,
        "notes": list(look.notes),
        "processes": [
            {
                "rank": process.rank,
                "pid": process.pid,
                "command": process.command,
                "by": process.by,
                "problem": process.problem,
                "threads": [
                    {
                        "tid": thread.tid,
                        "name": thread.name,
                        "state": thread.state,
                        "wchan": thread.wchan,
                        "call": thread.call,
                        "kernel": list(thread.kernel),
                        "frames": [
                            {"function": frame.function, "file": frame.file, "line": frame.line}
                            for frame in thread.frames
                        ],
                    }
                    for thread in process.threads
                ],
            }
            for process in look.processes
        ],
    }


def _version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rankspawn")
    except PackageNotFoundError:
        return None
