"""The blocks of the pages that need torch, and perhaps more that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pages import PROGRAMS, Block, missing, run


@pytest.mark.parametrize("block", [block for block in PROGRAMS if "torch" in block.needs()], ids=str)
def test_block(block: Block, tmp_path: Path) -> None:
    if lacking := missing(block):
        pytest.skip(f"needs {', '.join(sorted(lacking))}")
    run(block, tmp_path)
