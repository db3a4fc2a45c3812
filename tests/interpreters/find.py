"""Finds the CPythons of this machine.

This module needs only the standard library of the oldest of them, so that any of them can run it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

OLDEST = (3, 10)

# What an interpreter is asked about itself. `executable` shows what is behind a virtual environment or a shim of pyenv.
ASK = """
import importlib.util, json, os, sys, sysconfig
header = os.path.join(sysconfig.get_path("include"), "Python.h")
print(json.dumps({
    "implementation": sys.implementation.name,
    "version": list(sys.version_info[:2]),
    "flags": getattr(sys, "abiflags", ""),
    "full": sys.version.split()[0],
    "executable": os.path.realpath(sys.executable),
    "lacks": {
        "CPython's tests": not (importlib.util.find_spec("test") and importlib.util.find_spec("test.test_subprocess")),
        "its headers": not os.path.exists(header),
        "venv": not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")),
    },
}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A CPython to test with.

    tag: its full version with its ABI flags, such as ``3.13.0`` or, for a free-threaded build, ``3.13.0t``.
    name: the same without the last number: ``3.13``, ``3.13t``.
    """

    executable: str
    version: tuple[int, int]
    tag: str
    name: str


def find_interpreters(named: list[str], *, with_tests: bool) -> tuple[list[Interpreter], list[str]]:
    """The interpreters to test with, oldest first, and a message for each one that is passed over.

    named: these and no others; without them, those on PATH and among pyenv's versions.
    with_tests: CPython's tests are needed. Of several installations of one version, the first that has all that is
        needed is taken, because distributions often package tests and headers separately.
    """
    candidates: list[Path] = [Path(name) for name in named]
    if not named:
        pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
        folders = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
        folders += sorted((pyenv / "versions").glob("*/bin"))
        for folder in folders:
            if folder.is_dir():
                candidates += [p for p in sorted(folder.iterdir()) if re.fullmatch(r"python3(\.\d+t?)?", p.name)]
    found: dict[str, Interpreter] = {}
    passed_over: dict[str, str] = {}
    for candidate in candidates:
        try:
            # -I: the answer must not depend on the folder or the environment that this runs in.
            answer = subprocess.run(
                [str(candidate), "-I", "-c", ASK], capture_output=True, text=True, timeout=60, check=True
            )
            facts = json.loads(answer.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            if named:
                raise SystemExit(f"{candidate}: not a usable interpreter: {error}") from error
            continue  # For example a version manager's shim for a version that is not installed.
        tag, executable = facts["full"] + facts["flags"], facts["executable"]
        version = (facts["version"][0], facts["version"][1])
        lacks = [what for what, lacking in facts["lacks"].items() if lacking and (with_tests or "tests" not in what)]
        if facts["implementation"] != "cpython":
            passed_over[executable] = f"{executable}: {facts['implementation']}, not CPython"
        elif version < OLDEST:
            passed_over[executable] = f"{executable}: Python {tag} is older than {OLDEST[0]}.{OLDEST[1]}"
        elif lacks:
            passed_over[executable] = f"{executable}: Python {tag} comes without {' and '.join(lacks)}"
        elif tag not in found:
            name = f"{version[0]}.{version[1]}{facts['flags']}"
            found[tag] = Interpreter(executable, version, tag, name)
    return sorted(found.values(), key=lambda i: (i.version, i.tag)), sorted(passed_over.values())
