"""The placement options of every command that places ranks, and the plan that follows from them."""

from __future__ import annotations

import argparse
from functools import partial

from .._binding import MEMORY_MODES, AffinityMode, PlacementError
from .._frozen import Frozen
from .._place.topology import Topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._binding import MemoryMode
    from .._place.plan import Placed

AUTO_BINDS = "binding each rank to its NUMA node (auto; --numa-binding none leaves ranks unbound)"
"""What a command prints when its default binds ranks."""


USAGE = 2
"""The exit status of wrong usage: the user must change the command line. argparse uses the same status."""


class CommandError(Exception):
    """The command cannot do what the user wants.

    Args:
        message: The text for the user.
        status: The command's exit status: 1 if the system refuses something, USAGE if the user must change the
            command line.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def add_placement_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that PlacementOptions has, in a group of their own."""
    modes = ["auto", *(mode.value for mode in AffinityMode), "none"]
    group = parser.add_argument_group("placement")
    group.add_argument(
        "--numa-binding",
        "--numa_binding",
        choices=modes,
        default="auto",
        metavar="MODE",
        help=f"{', '.join(modes)} (default: auto, which binds each rank to its NUMA node if that leaves no node idle)",
    )
    group.add_argument(
        "--memory-policy",
        choices=MEMORY_MODES,
        metavar="MODE",
        help="how memory is placed on the nodes of each rank: "
        + ", ".join(MEMORY_MODES)
        + " (default: the inherited policy)",
    )
    group.add_argument(
        "--devices",
        metavar="LIST",
        help='accelerators in local-rank order, "pci:0000:3b:00.0,...", or "none" (default: all visible ones)',
    )
    group.add_argument(
        "--reserve-cores", type=natural, default=0, metavar="N", help="how many cores to leave free (default: 0)"
    )
    group.add_argument(
        "--threads-per-core",
        type=positive,
        metavar="N",
        help="how many hardware threads of each core to use (default: all)",
    )
    group.add_argument(
        "--cpus",
        metavar="LISTS",
        help='CPUs by hand: one list for each rank, "0-3:4-7", or one for all (default: by --numa-binding)',
    )
    group.add_argument(
        "--mems", metavar="LISTS", help='memory nodes by hand, in the same form: "0:1" (default: by --numa-binding)'
    )
    group.add_argument(
        "--numa-binding-optional",
        action="store_true",
        help="start a rank unbound, with a warning, if it cannot be placed or bound (default: an error); a wrong --cpus"
        " or --mems is always an error",
    )


def natural(text: str) -> int:
    """Read a non-negative integer, for argparse."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected a non-negative integer, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """Read a positive integer, for argparse."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Read a number of seconds, for argparse."""
    try:
        found = float(text)
    except ValueError:
        found = -1
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")
    return found


class PlacementOptions(Frozen):
    """The values of the options of add_placement_options().

    Attributes:
        numa_binding: "auto", "none", or one of torch's four modes.
        memory_policy: The option's mode; None, here and below, if the user did not give the option.
        devices: The text of the option.
        reserve_cores: The number; 0 if the user did not give the option.
        threads_per_core: A positive number.
        cpus: The text of the option.
        mems: The text of the option.
        numa_binding_optional: Whether a rank that cannot be placed or bound runs unbound.
    """

    numa_binding: str
    memory_policy: MemoryMode | None
    devices: str | None
    reserve_cores: int
    threads_per_core: int | None
    cpus: str | None
    mems: str | None
    numa_binding_optional: bool

    @classmethod
    def read(cls, args: argparse.Namespace) -> PlacementOptions:
        """Take them from the parsed command line."""
        return cls(**{name: getattr(args, name) for name in cls.__match_args__})

    @property
    def say_only_mode(self) -> bool:
        """Whether --numa-binding is the only placement option."""
        others = self.memory_policy, self.devices, self.reserve_cores, self.threads_per_core, self.cpus, self.mems
        return not any(others)

    @property
    def auto_decides(self) -> bool:
        """Whether mode auto decides where ranks go: by default, without --cpus and --mems."""
        return self.numa_binding == "auto" and self.cpus is None and self.mems is None

    def auto_binds(self, ranks: Sequence[Placed]) -> bool:
        """Whether mode auto has bound the ranks to nodes."""
        return self.auto_decides and len({rank.binding.cpus for rank in ranks}) > 1


def placement(options: PlacementOptions, topology: Topology, nprocs: int | None) -> tuple[Placed, ...]:
    """Place the ranks by the options. Every command calls this function.

    Args:
        options: The options.
        topology: The machine.
        nprocs: How many ranks there are. None: one for each device; one in all with --cpus, --mems or no binding.

    Raises:
        PlacementError: The options contradict each other, or a rank cannot be placed and is required to be.
    """
    from .._place.auto import plan_auto, unbound
    from .._place.lists import plan_lists
    from .._place.plan import plan

    required = not options.numa_binding_optional
    if options.cpus is not None or options.mems is not None:
        mode = "" if options.numa_binding == "auto" else options.numa_binding
        _refuse_beside(
            "--cpus and --mems, which already say where ranks go", options, numa_binding=mode, memory_policy=None
        )
        memory: MemoryMode = options.memory_policy or "bind"
        return plan_lists(
            topology, nprocs or 1, cpus=options.cpus, mems=options.mems, memory_policy=memory, required=required
        )
    if options.numa_binding == "none":
        _refuse_beside("--numa-binding none, which leaves ranks unbound", options, numa_binding="")
        return unbound(topology, nprocs or 1)
    devices = None
    if options.devices is not None:
        from .._place.devices import parse_devices

        devices = parse_devices(options.devices)
    plan_by_mode = (
        plan_auto if options.numa_binding == "auto" else partial(plan, numa=options.numa_binding, required=required)
    )
    return plan_by_mode(
        topology,
        nprocs=nprocs,
        devices=devices,
        reserve_cores=options.reserve_cores,
        threads_per_core=options.threads_per_core,
        memory_policy=options.memory_policy,
    )


def _refuse_beside(what: str, options: PlacementOptions, **others: str | None) -> None:
    """Raise PlacementError if an option excludes ``what``; ``others`` replaces the values of some options."""
    for name in ("numa_binding", "memory_policy", "devices", "reserve_cores", "threads_per_core"):
        if given := others.get(name, getattr(options, name)):
            raise PlacementError(f"--{name.replace('_', '-')} {given} cannot be combined with {what}")
