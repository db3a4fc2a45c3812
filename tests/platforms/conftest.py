"""A folder to build and work in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that children of other users may enter: pytest's own folders are closed to them."""
    with tempfile.TemporaryDirectory(prefix="rankspawn-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
