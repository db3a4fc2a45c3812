"""What ``rankspawn torchrun`` can do for workers that torchrun cannot: a guard, a cgroup, places, a warm start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._binding import AffinityMode
from .._frozen import Frozen
from .handler import warn

if TYPE_CHECKING:
    from .._binding import Binding
    from .._end.orphans import Orphans
    from .._group.record import Record
    from .._warm.template import Template
    from .numa_options import NumaOptions


class Extras(Frozen):
    """The arguments of rankspawn.torchrun.install(), beside numa_options.

    Attributes:
        guard: Whether a guard ends what programs leave behind; None: where one can run.
        cgroup: A delegated cgroup v2, in which a new cgroup for the programs is made; "auto" finds it; None for none.
        devices: The accelerators in local-rank order, as --devices names them; None: the visible ones.
        reserve_cores: Cores of the machine left free.
        template: The Template that ranks are forked from instead of executed; None for none.
        stacks: Whether to take the stacks of programs before they are ended because others have failed.
        record: The record for a report; None for no report.
        orphans: Reaps what this process has adopted; None if it leaves that to other code.
    """

    guard: bool | None = None
    cgroup: str | None = None
    devices: str | None = None
    reserve_cores: int = 0
    template: Template | None = None
    stacks: bool = False
    record: Record | None = None
    orphans: Orphans | None = None

    def after_orphans(self, seconds: float) -> float:
        """Reap orphans, if it is time to look for them. Returns the shorter of ``seconds`` and the time until then."""
        if self.orphans is None:
            return seconds
        self.orphans.reap()
        due = self.orphans.left()
        return seconds if due is None else min(seconds, due)

    @property
    def place(self) -> bool:
        """Whether these options decide where ranks go, beyond the visible device of each rank."""
        return self.devices is not None or self.reserve_cores > 0

    def template_of_functions(self, method: str, nprocs: int) -> Template | None:
        """What processes that run functions are forked from; None, and a line with the reason, where they are not.

        Args:
            method: Their start method.
            nprocs: How many.

        Raises:
            RuntimeError: They cannot be forked, and the template is required.
        """
        template = self.template
        if template is None:
            return None
        if method != "spawn":
            why = f"they are functions with the start method {method}, and only spawn has a warm start"
        elif template.modules is True:
            why = "they are functions, which do not say what they import; name the modules, as by --preload"
        else:
            return template
        template.leave_cold(dict.fromkeys(range(nprocs), why))
        return None

    def bindings(self, nprocs: int, options: NumaOptions) -> list[Binding | None]:
        """Place all ranks of this machine.

        Args:
            nprocs: How many.
            options: How to place them; torch's own options have no memory policy.

        Raises:
            PlacementError: A rank cannot be placed, and no fallback was asked for.
        """
        from .._place.devices import parse_devices
        from .._place.plan import plan
        from .._place.topology import Topology

        ranks = plan(
            Topology.read(),
            AffinityMode(options.affinity_mode),
            nprocs=nprocs,
            devices=None if self.devices is None else parse_devices(self.devices),
            reserve_cores=self.reserve_cores,
            memory_policy=getattr(options, "memory_policy", None),
            required=not options.should_fall_back_if_binding_fails,
        )
        for note in dict.fromkeys(note for rank in ranks for note in rank.notes):
            warn("%s", note)
        bindings = [rank.binding for rank in ranks]
        return [None if one.cpus is None and one.memory is None else one for one in bindings]


def new_record(report: str | None, timeline: str | None) -> Record:
    """Make an empty record.

    Args:
        report: The file for the report; None for none.
        timeline: The file for the drawing; None for none.
    """
    from .._group.record import Record

    return Record(report, timeline)


def new_orphans() -> Orphans:
    """What reaps the orphans of a command whose torch may have other children, too."""
    from .._end.orphans import Orphans, of_other_sessions

    return Orphans(of_other_sessions)
