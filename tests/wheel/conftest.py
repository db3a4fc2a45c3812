"""What `make sdist` and `make wheel` have built."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return found[1]


@pytest.fixture(scope="session")
def sdist(version: str) -> Path:
    (path,) = (ROOT / "dist").glob("*.tar.gz")
    assert path.name == f"rankspawn-{version}.tar.gz"
    return path
