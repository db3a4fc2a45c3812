"""What the README says: its Python code runs, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rankspawn._cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_python() -> None:
    """Each block runs as it stands, and prints what the page says."""
    printed = []
    for block in blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        printed.append(done.stdout)
    group, one = printed
    assert "rank 0 of 2\n" in group and "rank 1 of 2\n" in group and "\n(0, 0)\n{'user':" in group
    assert "clone ()" in one and "Cpus_allowed_list:\t0" in one


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
