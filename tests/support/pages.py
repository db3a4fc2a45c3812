"""The code blocks of README.md and docs/, run as they stand.

A ``python`` block is a program. A ``python`` block that begins with the comment ``# NAME.py`` is a file, which the
later blocks of its page can use. Where a ``text`` block comes right after a program, it shows what the program prints.
One bash runs those lines of a ``console`` block that begin with ``$``; the lines below a command, if any, show what it
prints, errors included. Lines may be printed in any order, because ranks write in any order. ``...`` stands for any
text, and alone on a line for any lines.

The tests add only this: a script and two programs, for commands whose page shows none, and, for ``rankspawn plan`` and
``topology``, a machine that is the same everywhere.

The comment ``<!-- not run: WHY -->`` in the line above a block keeps the block from being run.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

from tests.support.sysfs_tree import Gpu, Machine, write

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECONDS = 120

_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- not run: (.*) -->\n\Z")

# What a block needs, by a word of its commands or by a module that it imports. Torch, Slurm and MPI have their own make
# targets.
_NEEDS = {
    "make": "make, which runs these tests",
    "torchrun": "torch",
    "rankspawn.torchrun": "torch",
    "srun": "Slurm",
    "mpirun": "MPI",
    "mpiexec": "MPI",
}
_NOT_MODULES = {"make, which runs these tests", "Slurm", "MPI", "two CPUs"}

# Two sockets of two nodes, 64 cores with two threads each, eight GPUs in pairs.
MACHINE = Machine(
    sockets=2, nodes=2, caches=2, cores=8, threads=2,
    gpus=tuple(Gpu(i // 2, f"0000:{bus}:00.0") for i, bus in enumerate("18 2a 3a 5d 9a ab ba db".split())),
)  # fmt: skip

STAND_INS = {"train.py": "import os\n", "prog": "#!/bin/sh\n", "solver": "#!/bin/sh\n"}

_PRELUDE = """
rankspawn() {
  case $1 in
    plan|topology) command rankspawn "$@" --sysfs "$PAGE_MACHINE";;
    bind) LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 command rankspawn "$@";;
    *) command rankspawn "$@";;
  esac
}
"""


@dataclass(frozen=True)
class Block:
    """page: the file that it is in. line: the line of its fence. mark: why it is not run, or "". output: what it
    prints; None where that is not checked."""

    page: Path
    line: int
    language: str
    text: str
    output: str | None
    mark: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name that the block is saved under; None for a program."""
        named = re.match(r"# (\w+\.py)\n", self.text)
        return named[1] if named and self.language == "python" else None

    def needs(self) -> set[str]:
        """What the block needs beside rankspawn, in words."""
        if self.language == "python":
            return {_NEEDS.get(name, name) for name in imported(self.text)}
        commands = [word for command, _ in commands_of(self.text) for word in shlex.split(command, comments=True)]
        found = {_NEEDS[word] for word in commands if word in _NEEDS}
        found.update(*(other.needs() for other in blocks_of(self.page) if other.file in commands))
        if "exclusive" in commands and {"run", "bind"} & {*commands} and len(os.sched_getaffinity(0)) < 2:
            found.add("two CPUs")
        return found


def imported(code: str) -> set[str]:
    """The packages that a program imports, without the standard library and rankspawn; "rankspawn.torchrun" is kept,
    because it needs torch."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    packages = {name if name == "rankspawn.torchrun" else name.partition(".")[0] for name in names}
    return packages - {"rankspawn", *sys.stdlib_module_names}


def blocks_of(page: Path) -> list[Block]:
    """The page's blocks of code, in order. Other fences (``text``, drawings, directives) hold no code."""
    text = page.read_text(encoding="utf-8")
    found = []
    fences = list(_FENCE.finditer(text))
    for fence, behind in zip_longest(fences, fences[1:]):
        if fence[2] not in ("python", "console"):
            assert fence[2] in ("", "text") or fence[2].startswith("{"), f"{page}: what is a block of {fence[2]}?"
            continue
        output = None
        if behind and behind[2] == "text" and fence[2] == "python" and not text[fence.end() : behind.start()].strip():
            output = behind[3]
        mark = _MARK.search(text, 0, fence.start())
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, fence[2], fence[3], output, mark[1] if mark else ""))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
MARKED = [block for block in BLOCKS if block.mark]
PROGRAMS = [block for block in BLOCKS if not block.mark and not block.file]


def commands_of(console: str) -> list[tuple[str, str]]:
    """The commands of a block, and the lines below each."""
    found: list[tuple[str, str]] = []
    for part in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        end = next(number for number, line in enumerate(lines, 1) if not line.endswith("\\\n"))
        found.append(("".join(lines[:end]), "".join(lines[end:])))
    return found


def missing(block: Block, *have: str) -> set[str]:
    """What the block needs that neither this interpreter nor ``have`` has."""
    modules = {need for need in block.needs() if need not in _NOT_MODULES and find_spec(need)}
    return block.needs() - modules - {*have}


def run(block: Block, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Run the block in ``folder``, which is empty. Raises AssertionError with what differs from the page."""
    machine = folder / "machine"
    if "plan" in block.text or "topology" in block.text:
        write(machine, MACHINE)
    for name, text in STAND_INS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for other in blocks_of(block.page):
        if other.file and other.line < block.line:
            (folder / other.file).write_text(other.text)
    environ = {
        **environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{folder}:{environ['PATH']}",
        "PAGE_MACHINE": str(machine),
        "COLUMNS": "100",
    }
    if block.language == "python":
        (folder / "page.py").write_text(block.text)
        status, told = _run([sys.executable, "page.py"], folder, environ)
        assert status == 0, told
        if block.output is not None:
            compare(block.output, told)
        return
    commands = commands_of(block.text)
    script = _PRELUDE + "".join(
        f"{command}\nstatus=$?; echo; echo '= '$status; (exit $status)\n" for command, _ in commands
    )
    _, told = _run(["bash", "-c", script], folder, environ)
    parts = re.split(r"\n= (\d+)\n", told)
    outcomes = list(zip(parts[::2], map(int, parts[1::2]), strict=False))
    assert len(outcomes) == len(commands), told
    following = [command for command, _ in commands[1:]] + [""]
    for (command, expected), (output, status), then in zip(commands, outcomes, following, strict=True):
        assert status == 0 or then.startswith("echo $?"), f"{command}exit status {status}\n{output}"
        if expected:
            compare(expected, output)


def _run(command: list[str], folder: Path, environ: Mapping[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=SECONDS,
    )  # fmt: skip
    return done.returncode, done.stdout


def compare(expected: str, output: str) -> None:
    """Assert that each expected line was printed, and no other lines except empty ones."""
    left = [line for line in output.splitlines() if line.strip()]
    for line in filter(str.strip, expected.splitlines()):
        if line == "...":
            continue
        pattern = ".*".join(map(re.escape, line.rstrip().split("...")))
        found = next((one for one in left if re.fullmatch(pattern, one.rstrip())), None)
        assert found is not None, f"not printed: {line}\nprinted:\n{output}"
        left.remove(found)
    assert "..." in expected.splitlines() or not left, f"not on the page: {left}"


__all__ = ["BLOCKS", "MARKED", "PROGRAMS", "Block", "compare", "missing", "run"]
