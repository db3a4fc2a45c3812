"""What the child half may call between clone and execve, read from its object file; and how the extension is linked."""

from __future__ import annotations

import importlib.util
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


@pytest.mark.parametrize("libnuma", [False, True], ids=["shim", "libnuma"])
@pytest.mark.parametrize("options", [["-O2"], ["-O3", *HARDENED], ["-O0"]], ids=["O2", "hardened", "O0"])
def test_child_calls_nothing_that_could_lock(tmp_path: Path, options: list[str], libnuma: bool) -> None:
    if libnuma and not have_numa_headers():
        pytest.skip("numaif.h is not installed")
    built = tmp_path / "child.o"
    macros = ["-DRANKSPAWN_HAVE_LIBNUMA=1"] if libnuma else []
    # The child's stack is small and has no guard page: no large frame, and none whose size is known only at run time.
    frames = ["-Wframe-larger-than=4096", "-Wvla", "-Walloca", "-Werror"]
    compiling = ["gcc", "-std=c11", *options, *frames, *macros, "-iquote", "csrc", "-c", "csrc/child.c"]
    subprocess.run([*compiling, "-o", str(built)], cwd=ROOT, check=True)
    listed = subprocess.run(["nm", "-u", str(built)], capture_output=True, text=True, check=True).stdout
    undefined = {line.split()[-1] for line in listed.splitlines() if line.strip()}
    assert "syscall" in undefined, "this was not the child half"
    assert undefined - ALLOWED.keys() == set()


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
