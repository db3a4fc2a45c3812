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


def test_its_picture_is_what_the_program_draws() -> None:
    drawn = importlib.import_module("docs.pictures").plan_svg()
    assert (ROOT / "docs" / "_static" / "plan.svg").read_text(encoding="utf-8") == drawn, "run: make pictures"


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
