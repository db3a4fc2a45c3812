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

# Each module and what it may import of ours. A new module gets a row here, and with it a place in the picture in
# CONTRIBUTING.md. `__init__` re-exports, so it may import all that are public through it.
PLACES = {"_binding", "_devices", "_topology", "_placement"}
ARROWS: dict[str, set[str]] = {
    "__init__": {"_launch", "_group", "_handler", "_context", "_numa_options", "_popen", *PLACES},
    "__main__": {"_cli"},
    "_cli": {
        "__init__",
        "_run",
        "_bind",
        "torchrun",
        "_options",
        "_show",
        "_doctor",
        "_engine",
        "_progress",
        "_topology",
    },
    "_run": {"_attempt", "_launch", "_logs", "_report", "_progress", "_signals", "_step"}
    | {"_options", "_openmp", "_engine", *PLACES},
    "_attempt": {"_launch", "_group", "_logs", "_tee", "_failure", "_report", "_timeline", "_progress", "_signals"}
    | {"_options", *PLACES},
    "_bind": {"_step", "_options", "_openmp", "_engine", *PLACES},
    "_progress": {"_group", "_binding"},
    "_signals": {"_group"},
    "torchrun": {"_elastic", "_numa_options", "_topology", "_binding"},
    "_elastic": {"_crew", "_context", "_handler", "_watch", "_engine", "_popen", "_numa_options", "_binding"},
    "_doctor": {"_popen", "_engine", "_spawn", *PLACES},
    "_show": {"_options", "_openmp", "_svg", *PLACES},
    "_options": PLACES,
    "_svg": PLACES,
    "_launch": {"_crew", "_group", "_ending", "_cgroup", "_guard", "_logs", "_tee", "_engine", "_popen", *PLACES}
    | {"_arguments"},
    "_group": {
        *{"_watch", "_ending", "_cgroup", "_logs", "_failure", "_report", "_processes"},
        *{"_popen", "_binding"},
    },
    "_watch": {"_popen"},
    "_step": {"_sysfs", "_frozen", "_binding"},
    "_ending": {"_sessions", "_watch", "_processes", "_popen"},
    "_timeline": {"_report", "_svg", "_binding"},
    "_report": {"_processes", "_popen", "_binding"},
    "_processes": set(),
    "_failure": {"_logs", "_binding", "_popen", "_frozen"},
    "_tee": {"_logs"},
    "_logs": {"_frozen"},
    "_handler": {"_arguments", "_popen", "_engine", "_placement", "_topology", "_visible", "_numa_options", "_binding"},
    "_crew": {"_ending", "_popen", "_engine", "_arguments", "_spawn", "_binding"},
    "_context": {"_context_popen", "_binding"},
    "_context_popen": {"_popen", "_engine", "_spawn", "_forked", "_binding"},
    "_forked": {"_spawn"},
    "_popen": {"_arguments", "_engine", "_spawn", "_binding"},
    # The guard's own process loads these three, and nothing else of ours.
    "_guard": {"_cgroup", "_popen", "_sessions"},
    "_cgroup": set(),
    "_sessions": set(),
    "_arguments": set(),
    "_engine": {"_spawn", "_binding"},
    "_placement": {"_machine", "_devices", "_topology", "_openmp", "_binding", "_frozen"},
    "_machine": {"_devices", "_topology", "_binding"},
    "_openmp": {"_topology", "_binding"},
    "_devices": {"_topology", "_visible", "_sysfs", "_binding"},
    "_visible": {"_sysfs", "_binding", "_frozen"},
    "_topology": {"_sysfs", "_binding", "_frozen"},
    "_sysfs": {"_binding"},
    "_numa_options": {"_binding"},
    "_binding": {"_frozen"},
    "_frozen": set(),
    "_spawn": set(),
}

# Nothing of these is needed to start a rank, and each would add to every launcher's start.
HEAVY = {"asyncio", "numpy", "psutil", "pynvml", "rich", "torch"}

# The time of `rankspawn plan` is that of its imports: these were the most expensive, and are not needed.
SLOW = {"dataclasses", "importlib.metadata", "inspect", "shutil", "subprocess", "typing", "rankspawn._cli.run"}
if sys.version_info[:2] == (3, 14):
    SLOW -= {"dataclasses", "inspect"}  # argparse imports them itself there, for its colours

# By subject, in the order of the README.
PUBLIC = {
    "launch",
    "Job",
    "RankGroup",
    "Popen",
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
    "place",
}


def imports_of_ours(source: str) -> set[str]:
    """The modules of this package that ``source`` imports anywhere, inside functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "rankspawn"]
        elif isinstance(node, ast.ImportFrom):
            module = f"rankspawn.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            if module == "rankspawn":
                names = [f"rankspawn.{alias.name}" for alias in node.names]
            elif module.startswith("rankspawn."):
                names = [module]
        for name in names:
            # `import rankspawn`, or a public name taken from the package, is an arrow to __init__.
            module = f"{name}.".split(".")[1]
            is_module = any((SOURCE / f"{module}{suffix}").exists() for suffix in (".py", ".pyx", ".pyi"))
            found.add(module if is_module else "__init__")
    return found


@functools.cache
def graph() -> dict[str, set[str]]:
    return {path.stem: imports_of_ours(path.read_text()) for path in sorted(SOURCE.glob("*.py"))}


def test_every_module_has_a_place_in_the_picture() -> None:
    assert graph().keys() - ARROWS.keys() == set()


@pytest.mark.parametrize("module", sorted(graph()))
def test_arrows(module: str) -> None:
    assert graph()[module] - ARROWS.get(module, set()) == set(), f"{module} imports what it may not"


def test_the_picture_has_no_circle() -> None:
    assert list(graphlib.TopologicalSorter(ARROWS).static_order())


def test_the_extension_imports_nothing_of_ours() -> None:
    text = (SOURCE / "_spawn.pyx").read_text()
    assert re.findall(r"^\s*(?:from|c?import)\s+(?:rankspawn|\.).*", text, re.MULTILINE) == []
    assert imports_of_ours((SOURCE / "_spawn.pyi").read_text()) == set()


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
        assert getattr(rankspawn, name).__module__.startswith("rankspawn"), name
