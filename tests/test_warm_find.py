"""What ``warm=True`` preloads: what a program imports at its top, of installed packages."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

from rankspawn._cli import vocabulary
from rankspawn._cli.warm import add_warm_options
from rankspawn._torch import early
from rankspawn._warm.find import Found, find

# Packages that are installed wherever these tests run.
SOURCE = """
from __future__ import annotations
import os, sys
from typing import TYPE_CHECKING
import pytest
{}
"""


@pytest.fixture
def found(tmp_path: Path):
    def look(text: str) -> Found:
        (tmp_path / "train.py").write_text(SOURCE.format(text))
        return find([sys.executable, "-u", "train.py"], str(tmp_path))

    return look


def test_packages_are_found_and_the_standard_library_is_not(found) -> None:
    assert found("import psutil") == Found(("pytest", "psutil"))


def test_submodules_are_found_as_they_are_written(found) -> None:
    # pytest's own modules lie in _pytest; `fixture` is no module.
    assert found("import _pytest.config\nfrom _pytest import nodes, hookimpl").modules == (
        "pytest", "_pytest.config", "_pytest", "_pytest.nodes",
    )  # fmt: skip


@pytest.mark.parametrize(
    "around",
    [
        "try:\n    import psutil\nexcept ImportError:\n    sys.exit('psutil is needed')",
        "with suppress(ImportError):\n    import psutil",
        "if sys.version_info >= (3, 8):\n    import psutil",
        "if TYPE_CHECKING:\n    import nothing\nelse:\n    import psutil",
        'log = logging.getLogger(__name__)\n"text"\nSIZE: int = 3\ndef f(): return g()\nclass C: pass\nimport psutil',
    ],
)
def test_what_an_import_may_stand_in_or_behind(found, around: str) -> None:
    assert found(around) == Found(("pytest", "psutil"))


@pytest.mark.parametrize(
    "before",
    [
        'os.environ["CUDA_VISIBLE_DEVICES"] = "0"',
        "setup()",
        "x = setup()",
        "if os.name == 'posix':\n    pass",
        "del os.x",
    ],
)
def test_the_search_ends_where_something_is_done(found, before: str) -> None:
    assert found(f"{before}\nimport psutil") == Found(
        ("pytest",), (("psutil", "line 6 of train.py does something before it is imported"),)
    )


def test_the_programs_own_modules_are_read_and_not_preloaded(found, tmp_path: Path) -> None:
    (tmp_path / "psutil.py").write_text("")  # hides the installed one, as at run time
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").write_text("from . import layers\n")
    (tmp_path / "model" / "layers.py").write_text("from .. import missing\nimport _pytest.nodes\nimport model\n")
    own = "it is in the program's own folder, and may be edited between two starts"
    assert found("import psutil\nfrom model import Net") == Found(
        ("pytest", "_pytest.nodes"), (("psutil", own), ("model", own))
    )


def test_a_module_of_the_program_that_does_something_ends_the_search(found, tmp_path: Path) -> None:
    (tmp_path / "setup_paths.py").write_text("\nimport sys\nsys.path.append('x')\n")
    said = found("import setup_paths\nimport psutil").left_out
    assert dict(said)["psutil"] == "line 3 of setup_paths.py does something before it is imported"


def test_what_is_not_installed_is_said(found) -> None:
    assert found("import psutil, no_such_package").left_out == (("no_such_package", "it is not installed"),)


def test_module_and_code(tmp_path: Path) -> None:
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__init__.py").write_text("import psutil\n")
    (tmp_path / "tool" / "__main__.py").write_text("from . import part\nimport pytest\n")
    (tmp_path / "tool" / "part.py").write_text("import _pytest.nodes\n")
    assert find([sys.executable, "-m", "tool"], str(tmp_path)).modules == ("psutil", "_pytest.nodes", "pytest")
    assert find([sys.executable, "-c", "import psutil; import pytest"], str(tmp_path)).modules == ("psutil", "pytest")
    assert find([sys.executable, "tool"], str(tmp_path)).modules[-1] == "pytest"


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("import (")
    missing = find([sys.executable, "missing.py"], str(tmp_path))
    assert missing == Found((), ((str(tmp_path / "missing.py"), "it cannot be read: No such file or directory"),))
    assert "cannot be parsed" in dict(find([sys.executable, "wrong.py"], str(tmp_path)).left_out)["wrong.py"]
    assert find(["/bin/sh", "-c", "true"], str(tmp_path)).modules == ()
    assert find([sys.executable, "-m", "no_such_module"], str(tmp_path)).left_out == (
        ("no_such_module", "it cannot be found"),
    )


def test_packages_of_another_interpreter_are_taken_as_written(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import one.two\nfrom three import four\nimport torch\n")
    (tmp_path / "python3").symlink_to(os.path.realpath(sys.executable))
    assert find([str(tmp_path / "python3"), "train.py"], str(tmp_path)).modules == (
        "one.two", "three", "torch", "torch._dynamo",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--warm", "json", "x.py"], ["--warm", "--preload=json", "x.py"]),
        (["--warm", "json,nowhere", "x.py"], ["--warm", "--preload=json,nowhere", "x.py"]),
        (["--warm", "json.decoder", "-m", "x"], ["--warm", "--preload=json.decoder", "-m", "x"]),
        (["--warm", "x.py", "json"], ["--warm", "x.py", "json"]),
        (["--warm", "email", "json"], ["--warm", "email", "json"]),  # a file of this name is here
        (["--warm", "nowhere"], ["--warm", "nowhere"]),
        (["--nproc-per-node", "2", "--warm"], ["--nproc-per-node", "2", "--warm"]),
        (["x.py", "--warm", "json"], ["x.py", "--warm", "json"]),
    ],
)
def test_the_word_behind_warm(
    words: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "email").touch()
    parser = argparse.ArgumentParser()
    parser.add_argument("--nproc-per-node")
    add_warm_options(parser)
    assert vocabulary.respelt(parser, words) == expected
    assert early.respelt(words) == expected
