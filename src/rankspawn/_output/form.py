"""The form of a job's report: what is in the file of --report, as types."""

from __future__ import annotations

from typing import TypedDict

from .usage import Usage

VERSION = 1
"""The version of the report's form. It changes when a field goes or means something else, not when one is added."""


class Placement(TypedDict):
    """Where a process is bound.

    Attributes:
        cpus: as the kernel lists them, "0-3,8"; None where the mask was not asked for, or where there is none.
        memory: the policy, "bind:0-1", "local"; None where it was not asked for, or where the system does not say.
    """

    cpus: str | None
    memory: str | None


class Refusal(TypedDict):
    """One optional step of a start that the system refused.

    Attributes:
        step: the system call.
        errno, name, text: its error, as a number, by name ("EPERM") and in words.
    """

    step: str
    errno: int
    name: str
    text: str


class BindingFacts(TypedDict):
    """A rank's binding.

    Attributes:
        asked: what the launch asked for; None for a rank that inherits its binding.
        required: whether a refusal would have failed the launch.
        effective: what the kernel had for the rank when the launcher last looked; None where it never looked.
        refused: the refused steps of a binding that is not required.
    """

    asked: Placement | None
    required: bool
    effective: Placement | None
    refused: list[Refusal]


class Exit(TypedDict):
    """How a rank ended.

    Attributes:
        returncode: as ``Popen.returncode``.
        status: what it exited with (0 to 255 on POSIX), or None.
        signal: the name of the signal that ended it, or None.
        core: whether that left a core dump; None where it is not known.
    """

    returncode: int
    status: int | None
    signal: str | None
    core: bool | None


class ResourceUsage(TypedDict):
    """What a rank that has ended has used, including children that it waited for: getrusage(2).

    Attributes:
        user, system: CPU seconds.
        max_rss: the peak of resident bytes of the largest process among them; None where the kernel's figure is the
            launcher's, which Linux carries over the execve(2).
        minor_faults, major_faults: page faults without and with reading from a device.
        voluntary_switches, involuntary_switches: context switches.
        blocks_in, blocks_out: reads and writes of file systems that reached a device, on Linux in units of 512 bytes.
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
        children: how many descendants of it run. The other figures are of the rank's process alone.
    """

    children: int


class RankReport(TypedDict):
    """One rank of one attempt. Times are seconds from the call that launched the attempt.

    Attributes:
        rank: its number.
        pid: its process id.
        mechanism: how it was started: "clone", "posix_spawn" or "subprocess".
        executed: when it had become the program; None where that was not noted.
        exited: when the launcher saw its end; None while it runs.
        binding: where it was to run, and where it ran.
        exit: how it ended; None while it runs.
        rusage: what it used; None while it runs, or where the kernel was not asked.
        now: what it uses; None once it has ended.
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

    Attributes:
        attempt: 0, and one more for each restart.
        called: seconds from the first attempt's launch call to this one's.
        started: the wall clock at the call, ISO 8601 with its zone.
        duration: seconds from the call until the last rank was seen to end, or until the report.
        ranks: in rank order.
    """

    attempt: int
    called: float
    started: str
    duration: float
    ranks: list[RankReport]


class GroupReport(TypedDict):
    """A whole job on this machine.

    Attributes:
        version: of this form, see VERSION.
        rankspawn: the version of the package; None in a tree that is not installed.
        host: this machine's name.
        command: what each rank runs.
        nprocs: how many ranks.
        job: "run_id", and the batch system's variables that name the job, by their names.
        duration: seconds from the first launch call until the last rank of the last attempt was seen to end, or until
            the report.
        attempts: in order.
    """

    version: int
    rankspawn: str | None
    host: str
    command: list[str]
    nprocs: int
    job: dict[str, str]
    duration: float
    attempts: list[AttemptReport]
