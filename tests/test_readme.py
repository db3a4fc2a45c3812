"""What the README says: its picture, its make targets and its commands. test_docs.py runs its code."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from rankspawn._cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_stays_short() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("picture", ["plan", "chart"])
def test_its_pictures_are_what_the_program_draws(picture: str) -> None:
    drawn = getattr(importlib.import_module("docs.pictures"), f"{picture}_svg")()
    assert (ROOT / "docs" / "_static" / f"{picture}.svg").read_text(encoding="utf-8") == drawn, "run: make pictures"
    assert "prefers-color-scheme: dark" in drawn
    assert f"docs/_static/{picture}.svg" in README


def test_its_figures_are_those_of_the_tables() -> None:
    """The tables in docs/ are what benchmarks have printed; the README rounds nothing of them."""
    tables = "".join(
        line
        for page in ("torchrun.md", "guide/warm.md")
        for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    )
    said = re.findall(r"([0-9.]*[0-9]) s\b", README)
    assert len(said) >= 4
    assert {one for one in said if not re.search(rf"\| {re.escape(one)}0* \|", tables)} == set()


def test_it_says_the_same_as_the_package_of_versions_and_platforms() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    installed = (ROOT / "docs" / "guide" / "install.md").read_text(encoding="utf-8")
    version = re.search(r'^version = "(\d+\.\d+)', project, re.MULTILINE)
    maturity = re.search(r"Development Status :: \d - (\w+)", project)
    pythons = re.findall(r"Python :: (3\.\d+)", project)
    assert version and maturity
    assert f"{maturity[1]}: {version[1]} is not released" in README
    assert f"{maturity[1].lower()}: {version[1]} is not released" in installed
    for page in (README, installed):
        assert f"{pythons[0]} to {pythons[-1]}" in page
        assert "ever run on real machines" in page.replace("\n", " ")
    # Those on which the tests were run, and no other.
    assert re.findall(r"Operating System :: (.*)\"", project) == ["POSIX :: Linux"]


def test_make_targets() -> None:
    named = set(re.findall(r"make ([a-z-]+)", README))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize("command", sorted(set(re.findall(r"\$ rankspawn ([a-z]+)", README))))
def test_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    options = set(re.findall(rf"\$ rankspawn {command} .*?(--[a-z-]+)", README))
    assert options <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
