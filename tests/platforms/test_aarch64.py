"""The engine for AArch64, compiled by Debian's cross compiler: its C test under QEMU's user mode, and on a kernel.

The kernel is Debian's. QEMU emulates a machine with four CPUs on two NUMA nodes, and a third node that has memory and
no CPU, as a Grace has with its GPU. There the assembly of clone3.c runs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.numavm.kernel import initramfs, kernel
from tests.numavm.run import die_with_parent
from tests.platforms.building import (
    ENGINE,
    HERE,
    MAY_BE_REFUSED,
    MODES,
    ROOT,
    SEARCH,
    build_check,
    run,
    run_check,
    tool,
)
from tests.platforms.building import said as read
from tests.platforms.foreign import Apt

NODES = 3
MACHINE = (
    *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none"),
    *("-machine", "virt,gic-version=3", "-cpu", "neoverse-n1", "-accel", "tcg", "-smp", "4", "-m", "1280M"),
    *("-object", "memory-backend-ram,id=m0,size=512M", "-numa", "node,nodeid=0,cpus=0-1,memdev=m0"),
    *("-object", "memory-backend-ram,id=m1,size=512M", "-numa", "node,nodeid=1,cpus=2-3,memdev=m1"),
    *("-object", "memory-backend-ram,id=m2,size=256M", "-numa", "node,nodeid=2,memdev=m2"),
    *("-numa", "dist,src=0,dst=1,val=40", "-numa", "dist,src=0,dst=2,val=80", "-numa", "dist,src=1,dst=2,val=80"),
    *("-serial", "stdio"),
)
PARAMETERS = "console=ttyAMA0 quiet panic=-1 rdinit=/init mitigations=off numa_balancing=disable"

# The builds of the C test, and the modes that each runs. With branch protection, the compiler signs return addresses
# and marks the places that jumps may reach.
VARIANTS = {
    "libnuma": MODES,
    "not-optimised": ("clone3",),
    "branch-protection": ("clone3",),
}


def cross_compiler() -> list[str]:
    return [tool("aarch64-linux-gnu-gcc")]


def build_static(folder: Path, *options: str, link: tuple[str, ...] = ()) -> Path:
    return build_check(cross_compiler(), folder, *options, link=("-static", *link))


def test_user_mode_is_found_out(folder: Path) -> None:
    """QEMU's user mode makes a fork of clone with shared memory: the probe must find that out, and the portable
    mechanism must do the work."""
    program = build_static(folder / "built")
    told = run_check(program, folder / "work", *MODES, through=[tool("qemu-aarch64")])
    assert not told.shares_memory
    assert told.impossible == {"clone3", "clone", "oldest"}
    told.all_passed(["posix_spawn"], MAY_BE_REFUSED)


def boot(folder: Path, job: str, programs: Iterable[Path] = (), tree: Path | None = None) -> str:
    """Run the programs of ``job``, one on each line, in a machine; all that the machine printed."""
    init, archive = folder / "init", folder / "initramfs"
    run([*cross_compiler(), "-std=c11", "-Os", "-Wall", "-Wextra", "-Werror", "-static", HERE / "init.c", "-o", init])
    archive.write_bytes(initramfs(init, (), job, programs, tree))
    apt = Apt("arm64")
    chosen = kernel(str(apt.package("linux-image-arm64")), apt.folder)
    command = [tool("qemu-system-aarch64"), *MACHINE, "-kernel", chosen.image, "-initrd", archive]
    done = subprocess.run(
        [*map(str, command), "-append", PARAMETERS],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=420,
        check=False,
        preexec_fn=die_with_parent,
    )
    assert "platforms: end" in done.stdout, done.stdout + done.stderr
    return done.stdout.replace("\r\n", "\n")


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the machine printed while it ran all variants of the C test."""
    built = tmp_path_factory.mktemp("aarch64")
    libnuma = Apt("arm64").unpacked("libnuma-dev") / "usr"
    variants = {
        "libnuma": build_static(
            built / "libnuma",
            *("-DRANKSPAWN_HAVE_LIBNUMA=1", "-isystem", str(libnuma / "include")),
            link=(str(libnuma / "lib" / "aarch64-linux-gnu" / "libnuma.a"),),
        ),
        "not-optimised": build_static(built / "not-optimised", "-O0"),
        "branch-protection": build_static(built / "branch-protection", "-mbranch-protection=standard"),
    }
    programs = [path.rename(path.with_name(name)) for name, path in variants.items()]
    return boot(built, "".join(f"/{name} /tmp {' '.join(modes)}\n" for name, modes in VARIANTS.items()), programs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_kernel(console: str, variant: str) -> None:
    """Nothing is skipped there, because init is root and has a cgroup v2 and all the memory policies."""
    parts = dict(zip(VARIANTS, console.split("platforms: status "), strict=False))
    told = read(parts[variant])
    assert told.shares_memory, told.text
    told.all_passed(VARIANTS[variant])
    bound = [mode for mode in VARIANTS[variant] if mode != "posix_spawn"]
    assert told.text.count(f": memory policies on {NODES} nodes\n") == len(bound), told.text


def test_python_on_a_kernel(folder: Path) -> None:
    """Debian's Python for AArch64 with our cross-compiled extension runs python_checks.py."""
    apt = Apt("arm64")
    found = re.search(r"Depends: (python3\.\d+)-minimal", apt.depends("python3-minimal"))
    assert found
    python, tree = found[1], folder / "tree"
    headers = apt.unpacked(f"lib{python}-dev") / "usr" / "include"
    numa = apt.unpacked("libnuma-dev") / "usr" / "include"
    needed = (f"{python}-minimal", f"lib{python}-minimal", f"lib{python}-stdlib", "libc6", "libexpat1", "zlib1g")
    for name in (*needed, "libnuma1"):
        shutil.copytree(apt.unpacked(name), tree, symlinks=True, dirs_exist_ok=True)
    shutil.copytree(ROOT / "src", tree / "package", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    for name in ("usr/share", "usr/lib/aarch64-linux-gnu/gconv"):
        shutil.rmtree(tree / name)
    shutil.copy(HERE / "python_checks.py", tree)
    translated = folder / "_spawn.c"
    run([sys.executable, "-m", "cython", "-3", ROOT / "src" / "rankspawn" / "_spawn.pyx", "-o", translated])
    extension = tree / "package" / "rankspawn" / "_spawn.abi3.so"  # every CPython looks for this name
    options = ["-std=c11", "-O2", "-fPIC", "-shared", "-Wl,-z,now", "-DRANKSPAWN_HAVE_LIBNUMA=1"]
    folders = ["-iquote", ROOT / "csrc", "-I", headers / python, "-I", headers, "-isystem", numa]
    libnuma = tree / "usr" / "lib" / "aarch64-linux-gnu" / "libnuma.so.1"
    run([*cross_compiler(), *options, *folders, translated, *ENGINE, *SEARCH, libnuma, "-o", extension])
    alone = [
        "-fPIE",
        "-DRANKSPAWN_FREESTANDING",
        "-ffreestanding",
        "-fno-tree-loop-distribute-patterns",
        "-fno-stack-protector",
    ]
    alone += ["-nostdlib", "-static-pie"]
    sources = [*sorted((ROOT / "csrc" / "guard").glob("*.c")), *SEARCH]
    program = tree / "package" / "rankspawn" / "rankspawn-guard"
    run([*cross_compiler(), *options[:2], *alone, *folders[:2], *sources, "-o", program])
    said = boot(folder, f"/usr/bin/{python} /python_checks.py\n", tree=tree)
    assert "python_checks: passed" in said, said
