"""What the engine's objects refer to: the child half to nothing that could lock, and no object in a circle to another.

And how the extension is linked.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.elf import weaknesses

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the clone mechanism is Linux's"),
    pytest.mark.skipif(shutil.which("nm") is None or shutil.which("gcc") is None, reason="needs gcc and binutils"),
]

# Each is here for a reason; whatever allocates, locks, prints, or may run the dynamic linker is not.
ALLOWED = {
    "syscall": "the raw system call; sets errno and nothing else",
    "__errno_location": "address of errno: thread-local, no lock",
    "_exit": "exit_group(2)",
    "set_mempolicy": "libnuma's, a bare system call",
    "memset": "made by the compiler from an initialiser",
    "memcpy": "made by the compiler from a struct assignment",
    "__stack_chk_fail": "called when the stack is already overwritten; ends the process",
    "_GLOBAL_OFFSET_TABLE_": "not a function",
}

HARDENED = ["-fPIC", "-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]


def have_numa_headers() -> bool:
    done = subprocess.run(["gcc", "-E", "-include", "numaif.h", "-xc", "/dev/null"], capture_output=True)
    return done.returncode == 0


def compiled(source: Path, folder: Path, *options: str) -> Path:
    """The object of one of the engine's files."""
    built = folder / f"{source.stem}.o"
    compiling = ["gcc", "-std=c11", *options, "-iquote", "csrc", "-c", str(source), "-o", str(built)]
    subprocess.run(compiling, cwd=ROOT, check=True)
    return built


def symbols(built: Path, *which: str) -> set[str]:
    """The names that nm lists of an object: "-u" those that it needs, "-g --defined-only" those that it has."""
    listed = subprocess.run(["nm", *which, str(built)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listed.splitlines() if line.strip()}


@pytest.mark.parametrize("libnuma", [False, True], ids=["shim", "libnuma"])
@pytest.mark.parametrize("options", [["-O2"], ["-O3", *HARDENED], ["-O0"]], ids=["O2", "hardened", "O0"])
def test_child_calls_nothing_that_could_lock(tmp_path: Path, options: list[str], libnuma: bool) -> None:
    if libnuma and not have_numa_headers():
        pytest.skip("numaif.h is not installed")
    macros = ["-DRANKSPAWN_HAVE_LIBNUMA=1"] if libnuma else []
    # The child's stack is small and has no guard page: no large frame, and none whose size is known only at run time.
    frames = ["-Wframe-larger-than=4096", "-Wvla", "-Walloca", "-Werror"]
    undefined = symbols(compiled(ROOT / "csrc" / "child.c", tmp_path, *options, *frames, *macros), "-u")
    assert "syscall" in undefined, "this was not the child half"
    assert undefined - ALLOWED.keys() == set()


def test_no_objects_refer_to_each_other_in_a_circle(tmp_path: Path) -> None:
    """spawn.h opens with a list of csrc/'s files, in which each file uses only files below it."""
    opening = (ROOT / "csrc" / "spawn.h").read_text().partition("*/")[0]
    listed = [name for name in re.findall(r"^ \*   (\S+)  ", opening, re.MULTILINE) if name.endswith(".c")]
    sources = sorted((ROOT / "csrc").glob("*.c"))
    assert sorted(listed) == [source.name for source in sources]
    objects = {source.name: compiled(source, tmp_path, "-O0") for source in sources}  # no reference is optimised away
    home = {symbol: name for name, built in objects.items() for symbol in symbols(built, "-g", "--defined-only")}
    uses = {
        name: {home[symbol] for symbol in symbols(built, "-u") if symbol in home} for name, built in objects.items()
    }
    assert uses["spawn.c"] == {"clone.c", "posix.c"}, "these are not the engine's objects"
    upwards = {name: {used for used in uses[name] if used not in listed[place:]} for place, name in enumerate(listed)}
    assert not any(upwards.values()), upwards


@pytest.fixture(scope="module")
def extension() -> str:
    found = importlib.util.find_spec("rankspawn._spawn")
    if found is None or found.origin is None:
        pytest.skip("this install has no extension")
    return found.origin


def test_extension_is_hardened(extension: str) -> None:
    # That every symbol is bound when it is loaded is more than hardening: see link_args in setup.py.
    assert weaknesses(extension, "PyInit__spawn") == []


def test_extension_exports_only_its_entry(extension: str) -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", extension], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in listed.splitlines()}
    assert {name for name in exported if not name.startswith(("_init", "_fini"))} == {"PyInit__spawn"}
