"""Small promises about the source that a reader relies on and no linter checks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "rankspawn"
MODULES = sorted(SOURCE.rglob("*.py"))
C_FILES = sorted((ROOT / "csrc").rglob("*.[ch]"))
CYTHON_FILES = sorted([*SOURCE.glob("*.pyx"), *SOURCE.glob("*.px[di]")])

MOST_PYTHON_LINES = 400
MOST_C_LINES = 500

# Names that gather whatever has no place.
NO_PLACE = {"utils", "util", "compat", "errors", "backends", "helpers", "common", "misc"}

# A sysfs or procfs path in code makes it untestable on data: it belongs in one default argument, whose root a test
# replaces. What is left has its reason here: (module, literal) -> why.
PATHS_WITH_A_REASON: dict[tuple[str, str], str] = {
    (
        "_start/outcome.py",
        "/proc/",
    ): "BindingReport.effective reads the started process itself back, not a machine's tree",
    ("_cli/doctor.py", "/proc/self/stat"): "doctor speaks of the process that it is, and of no other machine",
}


def names(paths: list[Path]) -> list[str]:
    """Each path as people name it: a module by its room, "_end/guard.py"."""
    return [path.relative_to(SOURCE if SOURCE in path.parents else ROOT).as_posix() for path in paths]


def test_all_of_the_source_is_seen() -> None:
    assert len(MODULES) > 60
    assert len(C_FILES) > 10 and len(CYTHON_FILES) > 4


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_python_module_is_short(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines < MOST_PYTHON_LINES


@pytest.mark.parametrize("path", [*C_FILES, *CYTHON_FILES], ids=names([*C_FILES, *CYTHON_FILES]))
def test_c_and_cython_files_are_short(path: Path) -> None:
    assert path.read_text().count("\n") < MOST_C_LINES


@pytest.mark.parametrize("path", C_FILES, ids=names(C_FILES))
def test_c_file_says_what_it_is(path: Path) -> None:
    assert path.read_text().startswith("/* ")


@pytest.mark.parametrize("path", C_FILES, ids=names(C_FILES))
def test_c_knows_no_python(path: Path) -> None:
    assert "Python.h" not in path.read_text()


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_python_module_says_what_it_is(path: Path) -> None:
    assert path.stem.strip("_") not in NO_PLACE
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_no_generated_c_beside_the_source() -> None:
    assert names(sorted((ROOT / "src").rglob("*.c"))) == []


def kernel_paths(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string that is a path under /sys or /proc, but in docstrings and default arguments."""
    excused = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                excused.update(map(id, ast.walk(default)) if default else ())
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            excused.add(id(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in excused:
            if re.match("/(sys|proc)(/|$)", node.value):
                yield node.lineno, node.value


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_kernel_paths_come_in_through_a_parameter(path: Path) -> None:
    found = {text for _, text in kernel_paths(ast.parse(path.read_text()))}
    assert found - {text for module, text in PATHS_WITH_A_REASON if module == names([path])[0]} == set()


def test_no_stale_reason() -> None:
    found = {(names([path])[0], text) for path in MODULES for _, text in kernel_paths(ast.parse(path.read_text()))}
    assert PATHS_WITH_A_REASON.keys() - found == set()


def test_workflows_and_ci_call_targets_that_there_are() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    callers = [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / ".ci" / "run"]
    if not (ROOT / ".github").is_dir():
        pytest.skip("an sdist has neither")
    call = re.compile(r"^(?:step|.* run:) .*\bmake (?:-k )?([a-z-]+)(?: [A-Z_]+=.*| .\$again.)?$", re.MULTILINE)
    called = {path.name: set(call.findall(path.read_text())) for path in callers}
    listed = re.search(r" target:\n((?: +- [a-z-]+\n)+)", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert listed
    called["ci.yml"] |= set(listed[1].replace("- ", "").split())
    assert {name: made - targets for name, made in called.items() if made - targets} == {}
    # What GitHub runs is what .ci/run runs, and the other way round. Interpreters GitHub has itself.
    assert called["ci.yml"] == called["run"] - {"test-interpreters", "test-cpython-forky"}
