"""What needs no torch of ``rankspawn.torchrun``: what it imports, and what it says without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rankspawn import torchrun
from rankspawn._cli import main as _cli


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)


def test_import_does_not_import_torch() -> None:
    done = python("import sys, rankspawn.torchrun; sys.exit('torch' in sys.modules)")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["script.py"], ["--help"]], ids=str)
def test_no_torch(arguments: list[str]) -> None:
    done = python(
        "import sys\nsys.modules['torch'] = None\nfrom rankspawn.torchrun import main\n"
        f"sys.exit(main({arguments}, prog='this'))"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("this: torch is not installed (")
    assert done.stderr.count("\n") == 1


def test_the_command_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own parser handles options, help and errors."""
    passed: list[object] = []
    monkeypatch.setattr(torchrun, "main", lambda *args, **options: passed.append((args, options)) or 7)
    assert _cli.main(["torchrun", "--help", "--", "x.py", "--nproc-per-node"]) == 7
    assert passed == [((["--help", "--", "x.py", "--nproc-per-node"],), {"prog": "rankspawn torchrun"})]


def test_install_without_torch() -> None:
    done = python("import sys\nsys.modules['torch'] = None\nfrom rankspawn.torchrun import install\ninstall()")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr.splitlines()[-1]
