"""The pages' blocks of code that need torch, and perhaps more that is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.pages import PROGRAMS, Block, missing, run

# A DataLoader's queue has a daemon thread, which drops the queue's semaphore while the interpreter ends. If that thread
# is stopped after it has unlinked the semaphore and before it has told the resource tracker, the tracker reports a
# leak. This happens with the stock context as with ours (1 of 48 runs each, four at once on 2 cores, CPython 3.11.7 and
# torch 2.13.0).
NOT_OF_THE_PAGE = "ignore:resource_tracker"


@pytest.mark.parametrize("block", [block for block in PROGRAMS if "torch" in block.needs()], ids=str)
def test_block(block: Block, tmp_path: Path) -> None:
    if lacking := missing(block):
        pytest.skip(f"needs {', '.join(sorted(lacking))}")
    run(block, tmp_path, {**os.environ, "PYTHONWARNINGS": NOT_OF_THE_PAGE})
