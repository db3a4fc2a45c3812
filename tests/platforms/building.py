"""Builds the engine and its C test with a platform's compiler, and reads what a run of the test prints."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENGINE = sorted((ROOT / "csrc").glob("*.c"))
SEARCH = sorted((ROOT / "csrc" / "search").glob("*.c"))  # Linux only
CHECK = [HERE / name for name in ("engine_check.c", "one.c", "many.c", "born.c")]

WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wvla")
MODES = ("clone3", "clone", "oldest", "posix_spawn")

# The checks that may be skipped, because the machine of the tests may refuse them, or the emulator does not know them.
MAY_BE_REFUSED = {"cgroup", "memory policy"}


def tool(name: str) -> str:
    """A program that `make test-platforms` installs; the test fails without it."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/lib/wine")  # Debian's place of wine64
    if path is None:
        pytest.fail(f"{name} is not here: make test-platforms installs it, as root on Debian", pytrace=False)
    return path


def run(command: Sequence[object], *, timeout: float = 120) -> str:
    """What a command prints. When its status is not 0, the test fails with the whole output."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def compile_each(compiler: Sequence[str], sources: Iterable[Path], folder: Path, *options: str) -> list[Path]:
    """The objects of the sources; warnings are errors."""
    folder.mkdir(exist_ok=True)
    optimised = () if any(option.startswith("-O") for option in options) else ("-O2",)
    flags = ("-std=c11", *optimised, *options, *WARNINGS, "-iquote", ROOT / "csrc")
    objects = []
    for source in sources:
        objects.append(built := folder / f"{source.stem}.o")
        run([*compiler, *flags, "-c", source, "-o", built])
    return objects


def build_check(
    compiler: Sequence[str], folder: Path, *options: str, check: Sequence[str] = (), link: Sequence[str] = ()
) -> Path:
    """engine_check: the engine is compiled with ``options``, the check's own sources with ``options`` and ``check``."""
    objects = compile_each(compiler, [*ENGINE, *SEARCH], folder, *options)
    objects += compile_each(compiler, CHECK, folder, *options, *check)
    program = folder / "engine_check"
    run([*compiler, *options, *objects, "-Wl,--wrap=clone3_to_child", "-pthread", *link, "-o", program])
    return program


@dataclass
class Said:
    """What engine_check printed. counts: how many checks of each mode passed, failed and were skipped."""

    text: str
    shares_memory: bool
    counts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    impossible: set[str] = field(default_factory=set)

    def all_passed(self, modes: Iterable[str], may_be_skipped: Iterable[str] = ()) -> None:
        """Assert that these modes and no others ran, that each made as many checks, and that none failed."""
        assert self.counts.keys() == set(modes) and "FAILED" not in self.text, self.text
        assert {sum(count) for count in self.counts.values()} == {max(map(sum, self.counts.values()))}, self.text
        assert all(passed > 10 and failed == 0 for passed, failed, _ in self.counts.values()), self.text
        assert self.skipped <= set(may_be_skipped), self.text


def said(text: str) -> Said:
    """Read what one run, or several runs after each other, printed."""
    result = Said(text, "clone shares memory: yes" in text)
    for mode, passed, failed, skipped in re.findall(r"^(\w+): (\d+) passed, (\d+) failed, (\d+) skipped", text, re.M):
        result.counts[mode] = int(passed), int(failed), int(skipped)
    result.skipped = set(re.findall(r"^skipped \w+: ([^:]+):", text, re.M))
    result.impossible = set(re.findall(r"^(\w+): not possible here", text, re.M))
    return result


def run_check(program: Path, folder: Path, *modes: str, through: Sequence[str] = ()) -> Said:
    """Run engine_check in a new folder; what it printed, whatever its status."""
    folder.mkdir()
    command = [*through, str(program), *(["--through", through[0]] if through else []), str(folder), *modes]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, start_new_session=True
    )
    assert not list(folder.iterdir()), done.stdout
    assert not done.stderr, done.stderr
    return said(done.stdout)
