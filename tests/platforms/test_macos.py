"""The engine compiles for macOS, with Apple's own headers, which the Zig toolchain contains, and links.

That shows that the preprocessor keeps nothing of Linux, that the compiler warns of nothing, and that Apple's libSystem
has every symbol. It does not show that the engine works: nothing is run, because there is no macOS here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.platforms.building import ENGINE, compile_each, run, tool

# The functions that the engine may call there beside the families posix_spawn and pthread.
POSIX = {"clock_gettime", "fcntl", "sigaction", "waitid"}
POSIX |= {"free", "malloc", "memcpy", "memset", "strchr", "strcmp", "strlen", "strncmp"}
# The symbols that Apple's headers and the compiler use instead of some names.
APPLE = {"_NSGetEnviron", "__bzero", "__error", "bzero", "dyld_stub_binder"}


@pytest.mark.parametrize("target", ["aarch64-macos", "x86_64-macos"])
def test_engine_is_built(folder: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"):
        monkeypatch.setenv(name, os.fspath(folder / "cache"))
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", target]
    objects = compile_each(compiler, ENGINE, folder / "built")
    library = folder / "engine.dylib"
    run([*compiler, "-nostdlib", "-lSystem", "-shared", *objects, "-o", library])
    called = {line.split()[-1].removeprefix("_") for line in run([tool("llvm-nm"), "-u", library]).splitlines() if line}
    assert "posix_spawn" in called
    families = {name for name in called if name.startswith(("posix_spawn", "pthread_"))}
    assert called - families - POSIX - APPLE == set()
