"""The version, the changelog, its fragments and git's tag say the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def disagreements(version: str, released: list[str], fragments: list[str], tags: list[str]) -> list[str]:
    """What must be set right: ``released`` are the changelog's headings, newest first; ``tags`` are this commit's."""
    found = []
    if tags:
        if tags != [f"v{version}"]:
            found.append(f"the tag is {', '.join(tags)}, and the version {version}")
        if released[:1] != [version]:
            found.append(f"CHANGELOG.md does not begin with {version}: towncrier build --version {version}")
        if fragments:
            found.append(f"not in CHANGELOG.md: {', '.join(fragments)}")
    elif fragments and version in released:
        found.append(f"{version} is released: pyproject.toml needs the next version")
    return found


@pytest.mark.parametrize(
    ("version", "released", "fragments", "tags", "wrong"),
    [
        ("0.1.0", [], ["1.feature.md"], [], 0),  # before the first release
        ("0.1.0", ["0.1.0"], [], ["v0.1.0"], 0),  # a release
        ("0.1.0", ["0.1.0"], [], [], 0),  # right before its tag, or right after
        ("0.2.0", ["0.1.0"], ["2.bugfix.md"], [], 0),  # on the way to the next
        ("0.1.0", ["0.1.0"], ["2.bugfix.md"], [], 1),
        ("0.2.0", ["0.2.0", "0.1.0"], [], ["v0.1.0"], 1),
        ("0.2.0", ["0.1.0"], [], ["v0.2.0"], 1),
        ("0.2.0", ["0.2.0"], ["2.bugfix.md"], ["v0.2.0"], 1),
        ("0.2.0", ["0.1.0"], ["2.bugfix.md"], ["v0.1.0"], 3),
    ],
)
def test_what_disagrees(version: str, released: list[str], fragments: list[str], tags: list[str], wrong: int) -> None:
    assert len(disagreements(version, released, fragments, tags)) == wrong


def fragments() -> list[str]:
    return sorted(path.name for path in (ROOT / "changelog.d").glob("*.md") if path.name != "README.md")


def test_release(version: str) -> None:
    changelog = ROOT / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8") if changelog.exists() else ""
    released = re.findall(r"^## (\S+) \(", text, re.MULTILINE)
    listed = subprocess.run(["git", "tag", "--points-at", "HEAD", "v*"], cwd=ROOT, capture_output=True, text=True)
    tags = listed.stdout.split() if (ROOT / ".git").exists() else []
    assert disagreements(version, released, fragments(), tags) == []


def test_every_fragment_gets_into_the_changelog(version: str) -> None:
    if not fragments():
        pytest.skip("no fragments: a release has just been made")
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", version]
    draft = " ".join(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    for name in fragments():
        begins = " ".join((ROOT / "changelog.d" / name).read_text(encoding="utf-8").split())[:40]
        assert begins in draft, name
