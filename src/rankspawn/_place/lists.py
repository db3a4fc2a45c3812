"""Ranks placed by hand: the lists of ``--cpus`` and ``--mems``."""

from __future__ import annotations

from collections.abc import Iterable

from .._binding import Binding, MemoryPolicy, PlacementError
from .._ids import format_ids, parse_ids
from .openmp import threads_of_ranks
from .plan import Placed
from .topology import Topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._binding import MemoryMode


def plan_lists(
    topology: Topology,
    nprocs: int,
    *,
    cpus: str | None = None,
    mems: str | None = None,
    memory_policy: MemoryMode = "bind",
    allowed_cpus: Iterable[int] | None = None,
    required: bool = True,
) -> tuple[Placed, ...]:
    """Place ranks by hand.

    Args:
        topology: The machine.
        nprocs: How many ranks there are.
        cpus: ``--cpus``: a list for each rank, separated by colons ("0-3:4-7"), or one list for all.
        mems: ``--mems``: nodes in the same form.
        memory_policy: The mode of the policy over the nodes of ``mems``.
        allowed_cpus: The CPUs that ranks may use, instead of the topology's own.
        required: Whether a refused binding fails the start.

    Raises:
        PlacementError: A list is malformed, the number of lists is wrong, or ranks may not use an id.
    """
    usable = topology.allowed_cpus if allowed_cpus is None else frozenset(allowed_cpus) & topology.cpus
    cpu_lists = _lists("--cpus", cpus, nprocs, usable)
    mem_lists = _lists("--mems", mems, nprocs, topology.allowed_nodes)
    threads = threads_of_ranks(topology, usable, cpu_lists)
    ranks = []
    for rank, (ids, nodes) in enumerate(zip(cpu_lists, mem_lists, strict=True)):
        try:
            policy = None if nodes is None else MemoryPolicy(memory_policy, nodes)
        except ValueError as error:
            raise PlacementError(f"--mems {mems!r}, rank {rank}: {error}") from None
        on = [node.id for node in topology.nodes if ids is not None and node.cpus & ids]
        ranks.append(Placed(Binding(ids, policy, required), None, on[0] if len(on) == 1 else None, threads[rank]))
    return tuple(ranks)


def _lists(flag: str, text: str | None, nprocs: int, usable: frozenset[int]) -> list[frozenset[int] | None]:
    """Read the lists of an option, one for each rank; None for each rank if the user did not give the option."""
    if text is None:
        return [None] * nprocs
    parts = text.split(":")
    if len(parts) not in (1, nprocs):
        raise PlacementError(f"{flag} {text!r} has {len(parts)} lists for {nprocs} ranks: give one each or one for all")
    found: list[frozenset[int] | None] = []
    for rank, part in enumerate(parts):
        try:
            ids = parse_ids(part)
        except ValueError as error:
            raise PlacementError(f"{flag} {text!r}, rank {rank}: {error}") from None
        if not ids or not ids <= usable:
            wrong = f"{format_ids(ids - usable)} may not be used" if ids else "the list is empty"
            raise PlacementError(f"{flag} {text!r}, rank {rank}: {wrong} (allowed: {format_ids(usable)})")
        found.append(ids)
    return found if len(found) == nprocs else found * nprocs
