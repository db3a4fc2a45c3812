"""The form of a job's report, which --report writes, as types."""

from __future__ import annotations

from typing import TypedDict

from .._public import public
from .usage import Usage

VERSION = 1
"""The version of the report's form. It changes when a field goes or gets another meaning, not when one is added."""


class Placement(TypedDict):
    """Where a process is bound.

    Attributes:
        cpus: The CPUs as the kernel lists them, "0-3,8"; None if the mask was not asked for, or if there is none.
        memory: The policy, "bind:0-1", "local"; None if it was not asked for, or if the system does not show it.
    """

    cpus: str | None
    memory: str | None


class Refusal(TypedDict):
    """One optional step of a start that the system refused.

    Attributes:
        step: The system call.
        errno: The number of its error.
        name: The name of its error ("EPERM").
        text: Its error in words.
    """

    step: str
    errno: int
    name: str
    text: str


class BindingFacts(TypedDict):
    """A rank's binding.

    Attributes:
        asked: What the launch asked for; None for a rank that inherits its binding.
        required: Whether a refused binding would have failed the launch.
        effective: The binding that the kernel had for the rank when the launcher last looked. If the rank had ended
            before the first look: the binding that it was born with. None if neither is known.
        refused: The steps that the system refused of a binding that is not required.
    """

    asked: Placement | None
    required: bool
    effective: Placement | None
    refused: list[Refusal]


class Exit(TypedDict):
    """How a rank ended.

    Attributes:
        returncode: As ``Popen.returncode``.
        status: What it exited with (0 to 255 on POSIX), or None.
        signal: The name of the signal that ended it, or None.
        core: Whether the signal left a core dump; None if that is not known.
        why: What the kernel says about the death, in one line; "" if it says nothing.
    """

    returncode: int
    status: int | None
    signal: str | None
    core: bool | None
    why: str


class ResourceUsage(TypedDict):
    """What an ended rank has used, including children that it waited for: getrusage(2).

    Attributes:
        user: CPU seconds in user mode.
        system: CPU seconds in the kernel.
        max_rss: The peak of resident bytes of the largest process among them; None if the kernel's figure is that of
            the launcher, because Linux keeps it across execve(2).
        minor_faults: Page faults without reading from a device.
        major_faults: Page faults that read from a device.
        voluntary_switches: Context switches because the rank waited.
        involuntary_switches: Context switches because another process got the CPU.
        blocks_in: Reads of file systems that reached a device, on Linux in units of 512 bytes.
        blocks_out: Writes of file systems that reached a device, in the same units.
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
    """What a rank that still runs uses when the report is made.

    Attributes:
        children: How many descendants of it run. The other figures are of the rank's process alone.
    """

    children: int


class FrameReport(TypedDict):
    """A call in Python that has not returned.

    Attributes:
        function: Its name.
        file: The path of its source.
        line: Where it is; 0 where that is not known.
    """

    function: str
    file: str
    line: int


class ThreadReport(TypedDict):
    """What a thread did.

    Attributes:
        tid: Its number.
        name: The kernel's name for it.
        state: The letter of proc(5), "" where the kernel was not asked.
        wchan: The kernel's function that it slept in, or "".
        call: The system call that it was in, or "".
        kernel: Its stack in the kernel, the innermost function first; empty where it may not be read.
        frames: Its calls in Python, the innermost first.
    """

    tid: int
    name: str
    state: str
    wchan: str
    call: str
    kernel: list[str]
    frames: list[FrameReport]


class ProcessReport(TypedDict):
    """What a process of a rank did.

    Attributes:
        rank: The RANK that it belongs to.
        pid: Its number.
        command: Its command line.
        by: What read the Python frames: "py-spy", "Python 3.14"; "" if nothing did.
        problem: Why there are no Python frames, or "".
        threads: Its threads, the first thread first.
    """

    rank: int | None
    pid: int
    command: str
    by: str
    problem: str
    threads: list[ThreadReport]


class StacksReport(TypedDict):
    """A look at what all ranks did.

    Attributes:
        taken: The wall clock, ISO 8601 with its zone.
        because: The reason for the look.
        seconds: How long it took.
        folded: The look in one line.
        notes: What could not be seen, why, and what to do.
        processes: What was seen.
    """

    taken: str
    because: str
    seconds: float
    folded: str
    notes: list[str]
    processes: list[ProcessReport]


class RankReport(TypedDict):
    """One rank of one attempt. Times are seconds from the call that launched the attempt.

    Attributes:
        rank: Its number.
        pid: Its process id.
        mechanism: How it was started: "clone", "posix_spawn", "subprocess", or "warm" for a rank that was forked from a
            template.
        executed: When it had executed its program; None if that was not noted.
        exited: When the launcher saw its end; None while it runs.
        binding: The binding that was asked for, and the one that it had.
        exit: How it ended; None while it runs.
        rusage: What it used; None while it runs, or if the kernel was not asked.
        now: What it uses; None once it has ended.
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


class TemplateReport(TypedDict):
    """A process that has imported modules once, and from which ranks were forked.

    Attributes:
        pid: Its process id.
        seconds: From its start until ranks could be forked from it.
        modules: The seconds that each import took, by the module's name.
        failed: Why a module could not be imported, by its name.
        environment_read: The variables that the imports read: by name, the module that read it.
        cpus: The CPUs that it was bound to, as the kernel lists them; None where it was not bound.
        ranks: How many ranks have been forked from it, in all launches.
        refused: Why no more ranks could be forked from it; None if they could.
    """

    pid: int
    seconds: float
    modules: dict[str, float]
    failed: dict[str, str]
    environment_read: dict[str, str]
    cpus: str | None
    ranks: int
    refused: str | None


class AttemptReport(TypedDict):
    """One start of the whole group.

    Attributes:
        attempt: 0, and one more for each restart.
        called: Seconds from the first attempt's launch call to this one's.
        started: The wall clock at the call, ISO 8601 with its zone.
        duration: Seconds from the call until the last rank was seen to end, or until the report.
        ranks: In rank order.
        stacks: The looks at what the ranks did, before they were ended and on request, in order.
        templates: The templates of a warm start, as they were when the ranks had been started; empty for a cold start.
    """

    attempt: int
    called: float
    started: str
    duration: float
    ranks: list[RankReport]
    stacks: list[StacksReport]
    templates: list[TemplateReport]


@public
class GroupReport(TypedDict):
    """A whole job on this machine.

    Attributes:
        version: Of this form, see VERSION.
        rankspawn: The version of the package; None in a tree that is not installed.
        host: This machine's name.
        command: What each rank runs.
        nprocs: How many ranks.
        job: "run_id", and the batch system's variables that name the job, by their names.
        duration: Seconds from the first launch call until the last rank of the last attempt was seen to end, or until
            the report.
        attempts: In order.
    """

    version: int
    rankspawn: str | None
    host: str
    command: list[str]
    nprocs: int
    job: dict[str, str]
    duration: float
    attempts: list[AttemptReport]
