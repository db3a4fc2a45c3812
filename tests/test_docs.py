"""The documentation: its blocks run, each page is in the contents, and the reference is complete. See pages.py."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

import rankspawn
from tests.support.pages import BLOCKS, MARKED, PAGES, PROGRAMS, ROOT, Block, missing, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the pages bind processes")


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_block(block: Block, tmp_path: Path) -> None:
    if lacking := missing(block):
        pytest.skip(f"needs {', '.join(sorted(lacking))}")
    run(block, tmp_path)


def test_blocks_that_are_never_run() -> None:
    """The page gives the reason of each. A new one has to be added to this list."""
    assert {(block.page.name, block.mark) for block in MARKED} == {
        ("cleanup.md", "needs systemd and a user's session"),
        ("containers.md", "needs a container engine"),
        ("README.md", "installs what these tests run from"),
        ("install.md", "installs what these tests run from"),
        ("tutorial.md", "installs what these tests run from"),
        ("run.md", "needs two machines"),
        ("slurm-mpi.md", "needs a host of this name"),
        ("warm.md", "needs torch"),
    }
    assert len(MARKED) == 8


def test_files_that_a_page_shows_are_used() -> None:
    for block in BLOCKS:
        if block.file:
            later = "".join(other.text for other in BLOCKS if other.page == block.page and other.line > block.line)
            assert block.file in later or f" -m {block.file.removesuffix('.py')}" in later, block


def test_each_page_is_in_the_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES[1:]} - {"index"}
    assert {page for page in pages if f"\n{page}\n" not in index} == set()


# ---- the reference --------------------------------------------------------------------------------------------------

REFERENCE = (ROOT / "docs" / "reference.rst").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", rankspawn.__all__)
def test_reference_has(name: str) -> None:
    assert any(f".. auto{kind}:: {name}" in REFERENCE for kind in ("class", "function", "exception"))
    assert ".. automodule:: rankspawn.torchrun" in REFERENCE


# Names that a sentence describes, and the parameters of classes that users do not make.
SAID_OTHERWISE = {
    "BindingError": {"step", "binding"},
    "RankGroup": {"started", "resources", "keep_going", "grace", "signal_to", "restarts", "last", "on_line", "hang"},
    "SubprocessHandler": {"proc"},
    "get_subprocess_handler": {*inspect.signature(rankspawn.get_subprocess_handler).parameters},
}
_SECTION = re.compile(r"^(?:Args|Attributes):\n((?: {4,}.*\n|\n)+)", re.MULTILINE)
_SEVERAL = re.compile(r"^ {4}\w+(?:, \w+)+: ", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\*{0,2}\w+)(?: \(.*?\))?: \S", re.MULTILINE)


def described(docstring: str) -> list[str]:
    """The names of the entries in the sections Args and Attributes of a docstring in Google style."""
    return [name.lstrip("*") for section in _SECTION.findall(docstring + "\n") for name in _ENTRY.findall(section)]


@pytest.mark.parametrize("name", sorted({*rankspawn.__all__} - {"AffinityMode"}))
def test_docstring_speaks_of_each_parameter(name: str) -> None:
    """The docstring also speaks of each attribute."""
    thing = getattr(rankspawn, name)
    text = inspect.getdoc(thing)
    assert text
    wanted = {one for one in getattr(thing, "__annotations__", ()) if not one.startswith("_")}
    called = thing.__init__ if isinstance(thing, type) else thing
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    wanted |= {one.name for one in inspect.signature(called).parameters.values() if one.kind not in kinds}
    wanted -= {"self", "mechanism", "return"} | SAID_OTHERWISE.get(name, set())
    assert wanted - {*described(text)} == set()


SOURCES = sorted((ROOT / "src" / "rankspawn").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_docstrings_speak_of_parameters_that_there_are(path: Path) -> None:
    """A function whose docstring has a section Args has an entry in it for each parameter, in order, and no other."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            for section in _SECTION.findall(f"{ast.get_docstring(node) or ''}\n"):
                assert not _SEVERAL.search(section), f"{path}:{node.lineno}: an entry of {node.name} has several names"
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node) or ""
        args = node.args
        names = [arg.arg for arg in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if arg]
        if "Args:\n" in text:
            wanted = [name for name in names if name not in ("self", "cls")]
            assert described(text) == wanted, f"{path}:{node.lineno}: {node.name}"
