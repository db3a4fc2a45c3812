"""Arrows go one way: which module of ours may import which, and what `import rankspawn` may cost."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rankspawn
from tests.support.sysfs_tree import Machine, write

SOURCE = Path(__file__).parent.parent / "src" / "rankspawn"

# Each room, and the rooms that it may import: the picture in CONTRIBUTING.md. A module that lies beside the rooms
# is a room of its own. `__init__` hands out what is public, so it may import all that is.
BASE = {"_binding", "_cgroups", "_frozen", "_ids", "_procfs", "_public"}
ROOMS: dict[str, set[str]] = {
    "_frozen": set(),
    "_ids": set(),
    "_public": set(),
    "_canvas": set(),
    "_spawn": set(),
    "_binding": {"_frozen", "_ids", "_public"},
    "_cgroups": {"_frozen"},
    "_procfs": {"_frozen"},
    "_place": {"_canvas", *BASE},
    "_start": {"_spawn", *BASE},
    "_end": {"_cgroups", "_procfs", "_start", "_spawn"},
    "_stacks": {"_start", *BASE},
    "_output": {"_start", "_end", "_stacks", "_canvas", *BASE},
    "_warm": {"_start", "_spawn", "_end", "_output", *BASE},
    "_group": {"_canvas", "_place", "_start", "_end", "_stacks", "_output", "_warm", *BASE},
    "_multiprocessing": {"_place", "_start", "_spawn", "_warm", *BASE},
    "_torch": {"_place", "_start", "_end", "_stacks", "_group", "_multiprocessing", "_warm", *BASE},
    "torchrun": {"_torch", "_start", "_warm", *BASE},
    "_cli": {
        "torchrun",
        "_place",
        "_start",
        "_spawn",
        "_end",
        "_stacks",
        "_output",
        "_group",
        "_warm",
        "__init__",
        *BASE,
    },
    "__main__": {"_cli"},
    "__init__": {"_place", "_start", "_stacks", "_output", "_group", "_multiprocessing", "_torch", "_warm", *BASE},
}

# What a module may import though it is less than its room may: module -> the modules of ours, and why.
NEVERS: dict[str, tuple[set[str], str]] = {
    "_multiprocessing.forked": ({"_spawn"}, "every process that a fork server forks loads it"),
}
"""At import; what stands in a function or under TYPE_CHECKING is loaded when it is used, or never."""

# The private names of another room's objects that may be used: what each is for stands above Started's attributes.
PRIVATE_NAMES_OF_POPEN = {
    "_born",
    "_child_created",
    "_executed_ns",
    "_handle_exitstatus",
    "_leads_group",
    "_refused",
    "_waitpid_lock",
}

# Of the standard library's objects, where ours have names that are spelt alike.
PRIVATE_NAMES_OF_OTHERS = {"_reader"}  # multiprocessing.SimpleQueue's

# Nothing of these is needed to start a rank, and each would add to every launcher's start.
HEAVY = {"asyncio", "numpy", "psutil", "pynvml", "torch"}

# The time of `rankspawn plan` is that of its imports: these were the most expensive, and are not needed.
SLOW = {"dataclasses", "importlib.metadata", "inspect", "shutil", "subprocess", "typing", "rankspawn._cli.run"}
if sys.version_info[:2] == (3, 14):
    SLOW -= {"dataclasses", "inspect"}  # argparse imports them itself there, for its colours

# By subject, in the order of the README.
PUBLIC = {
    "launch",
    "Job",
    "RankGroup",
    "Template",
    "RankFiles",
    "RankLine",
    "Failure",
    "RanksFailedError",
    "Stacks",
    "GroupReport",
    "Popen",
    "create_subprocess_exec",
    "SubprocessHandler",
    "get_subprocess_handler",
    "get_context",
    "Binding",
    "BindingError",
    "BindingReport",
    "MemoryPolicy",
    "AffinityMode",
    "NumaOptions",
    "PlacementError",
    "Topology",
    "TopologyError",
    "place",
}


def name_of(path: Path) -> str:
    """A module's name within the package: "_end.guard"; a room's door is "_end"."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Path]:
    found = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
    found["_spawn"] = SOURCE / "_spawn.pyi"
    assert len(found) > 60, "the tests below must see every module"
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def imports_of_ours(module: str, source: str, *, at_import: bool = False) -> set[str]:
    """The modules of this package that ``source`` imports anywhere, inside functions and under TYPE_CHECKING too.

    at_import: only what is imported when the module is.
    """
    tree = ast.parse(source)
    later = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            later |= set(ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if at_import and node in later:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[2] for alias in node.names if room(alias.name) == "rankspawn"]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_door = modules()[module].stem == "__init__" and module != "__init__"
                within = module.split(".") if is_door else module.split(".")[:-1]
                folder = within[: len(within) - node.level + 1]
                base = ".".join(["rankspawn", *folder, *filter(None, [node.module])])
            if room(base) == "rankspawn":
                base = base.partition(".")[2]
                # `from . import x` may name a module; a public name taken from the package is an arrow to __init__.
                names = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
                names = [name if name in modules() else base for name in names]
        found |= {name or "__init__" for name in names}
    return found


@functools.cache
def graph() -> dict[str, set[str]]:
    return {module: imports_of_ours(module, path.read_text()) for module, path in modules().items()}


def test_every_module_is_in_a_room_of_the_picture() -> None:
    assert {room(module) for module in graph()} == ROOMS.keys()


@pytest.mark.parametrize("module", sorted(graph()))
def test_rooms_import_what_they_may(module: str) -> None:
    others = {room(imported) for imported in graph()[module]} - {room(module)}
    assert others - ROOMS[room(module)] == set(), f"{module} imports what its room may not"


def test_no_room_may_import_what_none_of_its_modules_does() -> None:
    used: dict[str, set[str]] = {name: set() for name in ROOMS}
    for module, imported in graph().items():
        used[room(module)] |= {room(one) for one in imported}
    unused = {name: may - used[name] - BASE for name, may in ROOMS.items()}
    assert {name: may for name, may in unused.items() if may} == {}


def test_rooms_have_no_circle() -> None:
    assert list(graphlib.TopologicalSorter(ROOMS).static_order())


# Arrows against the others: module -> (what a method of it imports when it is called, and why).
BACKWARDS = {"_place.topology": ({"_place.drawing"}, "a machine draws itself, and only who draws knows how")}


def test_modules_have_no_circle() -> None:
    arrows = {module: imported - BACKWARDS.get(module, (set(), ""))[0] for module, imported in graph().items()}
    assert list(graphlib.TopologicalSorter(arrows).static_order())
    for module, (backwards, why) in BACKWARDS.items():
        assert backwards <= graph()[module], why
        assert not backwards & imports_of_ours(module, modules()[module].read_text(), at_import=True), why


def test_place_imports_no_subprocess() -> None:
    for module, path in modules().items():
        if room(module) == "_place":
            assert not re.search(r"^ *(?:import|from) (?:subprocess|multiprocessing)\b", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("module", sorted(NEVERS))
def test_nevers(module: str) -> None:
    allowed, why = NEVERS[module]
    assert imports_of_ours(module, modules()[module].read_text(), at_import=True) - allowed == set(), why


@pytest.mark.parametrize(
    "door", sorted(module for module in graph() if "." not in module and modules()[module].stem == "__init__")
)
def test_a_rooms_door_is_a_docstring_that_names_its_files(door: str) -> None:
    if door == "__init__":
        return
    tree = ast.parse(modules()[door].read_text())
    text = ast.get_docstring(tree)
    assert text and len(tree.body) == 1
    files = {path.stem for path in modules()[door].parent.glob("[!_]*.py")}
    assert files and {name for name in files if not re.search(rf"(?:^|  ){name}  +\S", text, re.MULTILINE)} == set()


def private_names(tree: ast.Module) -> set[str]:
    """Names with one underscore that are taken from objects other than ``self``, ``cls`` and what super() gives."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "_spawn")):
                found.add(node.attr)
    return found


def defined_in(tree: ast.Module) -> set[str]:
    """Private names that ``tree`` defines: its own classes' attributes and methods, its functions and variables."""
    found = {
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def test_no_room_uses_private_names_of_another() -> None:
    trees = {module: ast.parse(path.read_text()) for module, path in modules().items()}
    own: dict[str, set[str]] = {}
    for module, tree in trees.items():
        own.setdefault(room(module), set()).update(defined_in(tree))
    ours = set().union(*own.values())
    reached = {module: (private_names(tree) & ours) - own[room(module)] for module, tree in trees.items()}
    assert set().union(*reached.values()) == PRIVATE_NAMES_OF_POPEN | PRIVATE_NAMES_OF_OTHERS, reached
    text = modules()["_start.ending"].read_text()
    assert all(name in text for name in PRIVATE_NAMES_OF_POPEN)


def test_the_extension_imports_nothing_of_ours() -> None:
    for path in (SOURCE / "_spawn.pyx", *SOURCE.glob("*.px[di]")):
        assert re.findall(r"^\s*(?:from|c?import)\s+(?:rankspawn|\.).*", path.read_text(), re.MULTILINE) == []
    assert graph()["_spawn"] == set()


def test_import_is_light() -> None:
    script = "import json, sys, rankspawn; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert HEAVY.intersection(json.loads(done.stdout)) == set()


def test_a_plan_is_light(tmp_path: Path) -> None:
    # -I -S: what a site's own files import is not ours.
    script = "import sys; sys.path.append(sys.argv.pop(1)); from rankspawn._cli.main import main; main()"
    script += "; print(*sys.modules)"
    plan = ["plan", "--nproc-per-node", "2", "--sysfs", str(write(tmp_path, Machine()))]
    command = [sys.executable, "-I", "-S", "-c", script, str(SOURCE.parent), *plan]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert SLOW.isdisjoint(done.stdout.splitlines()[-1].split())


def test_version_is_looked_up_when_asked_for() -> None:
    script = "import sys, rankspawn; print('importlib.metadata' in sys.modules, rankspawn.__version__)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path += {sys.path!r}; {script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", importlib.metadata.version("rankspawn")]


def test_all_is_what_we_mean_to_promise() -> None:
    assert sorted(rankspawn.__all__) == sorted(PUBLIC)
    assert len(set(rankspawn.__all__)) == len(rankspawn.__all__)
    for name in rankspawn.__all__:
        assert getattr(rankspawn, name).__module__ == "rankspawn", f"tracebacks and pickles show where {name} is hidden"
