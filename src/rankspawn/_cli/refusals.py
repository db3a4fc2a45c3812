"""Which parts of the ranks' bindings the system refused: one line for each part, for all ranks together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._ids import format_ids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .._group.group import RankGroup
    from .._start.outcome import RefusedStep


def refusals(group: RankGroup, first_rank: int) -> Iterator[str]:
    """Yield a line for each step that the system refused, with the RANKs that run without it."""
    ranks: dict[RefusedStep, list[int]] = {}
    for number, rank in enumerate(group.ranks, start=first_rank):
        for step in rank.binding_report.refused:
            ranks.setdefault(step, []).append(number)
    for step, numbers in ranks.items():
        which = f"rank{'s' * (len(numbers) > 1)} {format_ids(numbers)}"
        yield f"{which}: the system refused {step}{step.why and ': '}{step.why}"
