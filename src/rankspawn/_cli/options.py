"""The options that say where ranks go, for every command that places them, and the plan that they ask for."""

from __future__ import annotations

import argparse

from .._binding import MEMORY_MODES, AffinityMode, PlacementError
from .._frozen import Frozen
from .._place.topology import Topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._binding import MemoryMode
    from .._place.plan import Placed


class CommandError(Exception):
    """The command cannot do what it was asked; the message is for the user."""


def add_placement_options(parser: argparse.ArgumentParser) -> None:
    """Adds --numa-binding, --memory-policy, --devices, --reserve-cores, --threads-per-core, --cpus, --mems and
    --numa-binding-optional."""
    modes = [mode.value for mode in AffinityMode]
    group = parser.add_argument_group("placement")
    group.add_argument("--numa-binding", "--numa_binding", choices=modes, metavar="MODE", help=", ".join(modes))
    group.add_argument(
        "--memory-policy",
        choices=MEMORY_MODES,
        metavar="MODE",
        help="over the nodes of each rank: " + ", ".join(MEMORY_MODES),
    )
    group.add_argument(
        "--devices", metavar="LIST", help='accelerators in local-rank order, as "pci:0000:3b:00.0,..."; or "none"'
    )
    group.add_argument("--reserve-cores", type=int, default=0, metavar="N", help="cores of the machine left free")
    group.add_argument(
        "--threads-per-core", type=int, metavar="N", help="hardware threads used of each core; 1: no SMT"
    )
    group.add_argument("--cpus", metavar="LISTS", help='by hand, one list for each rank: "0-3:4-7"; or one for all')
    group.add_argument("--mems", metavar="LISTS", help='memory nodes by hand, likewise: "0:1" (policy: bind)')
    group.add_argument(
        "--numa-binding-optional", action="store_true", help="leave a rank unbound, and say so, if it cannot be placed"
    )


class PlacementOptions(Frozen):
    """What the options of add_placement_options() ask for, as they were given; None or 0 where one was not."""

    numa_binding: str | None
    memory_policy: MemoryMode | None
    devices: str | None
    reserve_cores: int
    threads_per_core: int | None
    cpus: str | None
    mems: str | None
    numa_binding_optional: bool

    @classmethod
    def read(cls, args: argparse.Namespace) -> PlacementOptions:
        """Those of the command line's arguments."""
        return cls(**{name: getattr(args, name) for name in cls.__match_args__})

    @property
    def is_asked(self) -> bool:
        """Whether they say where ranks go, by a mode or by hand."""
        return bool(self.numa_binding or self.cpus or self.mems)


def placement(options: PlacementOptions, topology: Topology, nprocs: int | None) -> tuple[Placed, ...]:
    """The ranks as the options ask; mode node where none does. Raises PlacementError."""
    from .._place.plan import plan, plan_lists

    required = not options.numa_binding_optional
    if options.cpus is not None or options.mems is not None:
        for flag, given in (
            ("--numa-binding", options.numa_binding),
            ("--devices", options.devices),
            ("--reserve-cores", options.reserve_cores),
            ("--threads-per-core", options.threads_per_core),
        ):
            if given:
                raise PlacementError(f"{flag} {given} does not go with --cpus and --mems, which say all by themselves")
        if nprocs is None:
            raise PlacementError("--cpus and --mems need the number of ranks: --nproc-per-node")
        memory: MemoryMode = options.memory_policy or "bind"
        return plan_lists(topology, nprocs, cpus=options.cpus, mems=options.mems, memory=memory, required=required)
    devices = None
    if options.devices is not None:
        from .._place.devices import parse_devices

        devices = parse_devices(options.devices)
    return plan(
        topology,
        options.numa_binding or AffinityMode.NODE,
        nprocs=nprocs,
        devices=devices,
        reserve_cores=options.reserve_cores,
        threads_per_core=options.threads_per_core,
        memory=options.memory_policy,
        required=required,
    )
