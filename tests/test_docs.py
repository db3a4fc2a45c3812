"""The documentation: its blocks run, each page is in the contents, and the reference is complete. See pages.py."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

import rankspawn
from docs.docstrings import entries, names_of, paragraphs
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
        ("install.md", "installs what these tests run from"),
        ("run.md", "needs two machines"),
        ("slurm-mpi.md", "needs a host of this name"),
    }
    assert len(MARKED) == 5


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


# Names that need no entry, or that a sentence describes; and the parameters of classes that users do not make.
SAID_OTHERWISE = {
    "BindingError": {"step", "binding"},
    "RankGroup": {"resources", "keep_going", "grace", "cgroup", "guard", "called_ns", "run_id"},
    "SubprocessHandler": {"proc"},
    "get_subprocess_handler": {*inspect.signature(rankspawn.get_subprocess_handler).parameters},
}


@pytest.mark.parametrize("name", sorted({*rankspawn.__all__} - {"AffinityMode"}))
def test_docstring_speaks_of_each_parameter(name: str) -> None:
    """The docstring also speaks of each attribute."""
    described = getattr(rankspawn, name)
    text = inspect.getdoc(described)
    assert text
    said = {term for one in paragraphs(text) for terms, _ in entries(one, names_of(described)) for term in terms}
    wanted = {one for one in getattr(described, "__annotations__", ()) if not one.startswith("_")}
    called = described.__init__ if isinstance(described, type) else described
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    wanted |= {one.name for one in inspect.signature(called).parameters.values() if one.kind not in kinds}
    assert wanted - said - {"self", "mechanism", "return"} - SAID_OTHERWISE.get(name, set()) == set()
