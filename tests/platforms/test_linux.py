"""The engine's C test on this machine: glibc with and without libnuma, the sanitizers, and musl."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.platforms.building import (
    CHECK,
    ENGINE,
    MAY_BE_REFUSED,
    MODES,
    SEARCH,
    build_check,
    compile_each,
    run,
    run_check,
    tool,
)

LIBNUMA = ("-DRANKSPAWN_HAVE_LIBNUMA=1",)
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@pytest.mark.parametrize(
    ("options", "link"), [(LIBNUMA, ["-lnuma"]), ((), ()), (("-O0",), ())], ids=["libnuma", "shim", "not optimised"]
)
def test_glibc(folder: Path, options: Sequence[str], link: Sequence[str]) -> None:
    program = build_check([tool("gcc")], folder / "built", *options, link=link)
    told = run_check(program, folder / "work", *MODES)
    told.all_passed(MODES, MAY_BE_REFUSED)


def test_sanitizers(folder: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer; setup.py says why child.c is compiled with asan-stack=0."""
    gcc = [tool("gcc")]
    child = [source for source in ENGINE if source.name == "child.c"]
    others = [source for source in (*ENGINE, *SEARCH, *CHECK) if source not in child]
    objects = compile_each(gcc, others, folder / "built", *SANITIZE)
    objects += compile_each(gcc, child, folder / "built", *SANITIZE, "--param", "asan-stack=0")
    program = folder / "built" / "engine_check"
    run([*gcc, *SANITIZE, *objects, "-Wl,--wrap=clone3_to_child", "-pthread", "-o", program])
    run_check(program, folder / "work", *MODES).all_passed(MODES, MAY_BE_REFUSED)


def test_musl(folder: Path) -> None:
    """The engine is compiled with musl's headers alone. The test's seccomp filter needs the kernel's headers too."""
    headers = folder / "kernel"
    headers.mkdir()
    (headers / "linux").symlink_to("/usr/include/linux")
    (headers / "asm-generic").symlink_to("/usr/include/asm-generic")
    (headers / "asm").symlink_to(f"/usr/include/{platform.machine()}-linux-gnu/asm")
    program = build_check([tool("musl-gcc")], folder / "built", check=["-idirafter", str(headers)])
    assert "ld-musl" in run(["readelf", "-l", program])
    told = run_check(program, folder / "work", *MODES)
    told.all_passed(MODES, MAY_BE_REFUSED)
