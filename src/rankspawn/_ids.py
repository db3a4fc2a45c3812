"""Sets of ids as the kernel writes them: "0-3,8" in lists, "ff,00000003" in masks."""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_RUN = re.compile(r"\s*([0-9]{1,6})(?:-([0-9]{1,6}))?\s*")


def format_ids(ids: Iterable[int]) -> str:
    """Write ids in the kernel's list format: ``{0, 1, 2, 5}`` gives "0-2,5"; no ids give ""."""
    runs: list[list[int]] = []
    for one in sorted(ids):
        if runs and one == runs[-1][1] + 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def name_ranks(ranks: Iterable[int]) -> str:
    """Write ranks in words: ``{3}`` gives "rank 3", ``{0, 1, 2}`` gives "ranks 0-2"; no ranks give ""."""
    ids = format_ids(ranks)
    return ids and ("rank " if ids.isdecimal() else "ranks ") + ids


def parse_ids(text: str) -> frozenset[int]:
    """Read a kernel list such as "0-2,5"; blank text gives no ids. Raises ValueError, with the text, for other text."""
    ids: set[int] = set()
    stripped = text.strip(" \t\n\0")
    for part in stripped.split(",") if stripped else ():
        run = _RUN.fullmatch(part)
        if run is None or int(run[2] or run[1]) < int(run[1]):
            raise ValueError(f"not a list of ids like 0-3,8: {text!r}")
        ids.update(range(int(run[1]), int(run[2] or run[1]) + 1))
    return frozenset(ids)


def parse_mask(text: str) -> frozenset[int]:
    """Read a kernel mask: hexadecimal words of 32 bits, the highest first ("1,00000003" is 0, 1 and 32).

    Raises:
        ValueError: The text is not such a mask.
    """
    bits = 0
    for word in text.split(","):
        value = int(word, 16)
        if not 0 <= value < 1 << 32 and "," in text:
            raise ValueError(f"not a word of 32 bits: {word!r}")
        bits = bits << 32 | value
    if bits < 0:
        raise ValueError(f"not a mask: {text!r}")
    return frozenset(i for i, bit in enumerate(reversed(f"{bits:b}")) if bit == "1")
