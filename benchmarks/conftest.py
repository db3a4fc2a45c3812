"""One ``Bench`` for the whole run of pytest, and the timings of each section taken once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# So that the modules beside this file are found where pytest's import mode leaves sys.path alone, too.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import Measured
from harness import Bench


@pytest.fixture(scope="session")
def measured() -> Iterator[Measured]:
    with Bench() as bench:
        yield Measured(bench)
