"""What is in the sdist: all that is in the repository, and nothing that was built."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent.parent

# Useful only in a clone.
ONLY_IN_GIT = {".ci", ".github", ".gitignore", ".readthedocs.yaml"}


@pytest.fixture(scope="module")
def files(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {str(PurePosixPath(*PurePosixPath(member.name).parts[1:])) for member in archive if member.isfile()}


def test_sdist_has_what_the_repository_has(files: set[str]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to the source")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.splitlines() if name.split("/")[0] not in ONLY_IN_GIT}
    assert tracked - files == set()
    made = {name for name in files - tracked if not name.startswith("src/rankspawn.egg-info/")}
    assert made == {"PKG-INFO", "setup.cfg"}


def test_sdist_has_nothing_that_was_built(files: set[str]) -> None:
    built = {name for name in files if name.endswith((".so", ".o", ".pyc")) or name.startswith("build/")}
    generated = {name for name in files if name.startswith("src/") and name.endswith((".c", ".h"))}
    assert (built, generated) == (set(), set())
