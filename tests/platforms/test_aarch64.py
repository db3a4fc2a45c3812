"""The engine for AArch64, compiled by Debian's cross compiler: its C test under QEMU's user mode, and on a kernel.

The kernel is Debian's, in a machine that QEMU emulates with four CPUs on two NUMA nodes and memory on a third that has
no CPU, as a Grace has with its GPU. There the assembly of clone3.c runs.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.numavm.kernel import initramfs, kernel
from tests.numavm.run import die_with_parent
from tests.platforms.building import HERE, MAY_BE_REFUSED, MODES, build_check, run, run_check, said, tool
from tests.platforms.foreign import Apt

NODES = 3
MACHINE = (
    *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none"),
    *("-machine", "virt,gic-version=3", "-cpu", "neoverse-n1", "-accel", "tcg", "-smp", "4", "-m", "512M"),
    *("-object", "memory-backend-ram,id=m0,size=192M", "-numa", "node,nodeid=0,cpus=0-1,memdev=m0"),
    *("-object", "memory-backend-ram,id=m1,size=192M", "-numa", "node,nodeid=1,cpus=2-3,memdev=m1"),
    *("-object", "memory-backend-ram,id=m2,size=128M", "-numa", "node,nodeid=2,memdev=m2"),
    *("-numa", "dist,src=0,dst=1,val=40", "-numa", "dist,src=0,dst=2,val=80", "-numa", "dist,src=1,dst=2,val=80"),
    *("-serial", "stdio"),
)
PARAMETERS = "console=ttyAMA0 quiet panic=-1 rdinit=/init mitigations=off numa_balancing=disable"

# The machine's programs, and the modes of each. Compilers may sign return addresses and mark where jumps may land.
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
    """There clone with shared memory is a fork: the probe must say so, and the portable mechanism do the work."""
    program = build_static(folder / "built")
    told = run_check(program, folder / "work", *MODES, through=[tool("qemu-aarch64")])
    assert not told.shares_memory
    assert told.impossible == {"clone3", "clone", "oldest"}
    told.all_passed(["posix_spawn"], MAY_BE_REFUSED)


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All that the machine printed."""
    built = tmp_path_factory.mktemp("aarch64")
    apt = Apt("arm64")
    libnuma = apt.unpacked("libnuma-dev") / "usr"
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
    init = built / "init"
    run([*cross_compiler(), "-std=c11", "-Os", "-Wall", "-Wextra", "-Werror", "-static", HERE / "init.c", "-o", init])
    job = "".join(f"/{name} /tmp {' '.join(modes)}\n" for name, modes in VARIANTS.items())
    chosen = kernel(str(apt.package("linux-image-arm64")), apt.folder)
    archive = built / "initramfs"
    archive.write_bytes(initramfs(init, (), job, programs))
    command = [tool("qemu-system-aarch64"), *MACHINE, "-kernel", chosen.image, "-initrd", archive]
    done = subprocess.run(
        [*map(str, command), "-append", PARAMETERS],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=280,
        check=False,
        preexec_fn=die_with_parent,
    )
    assert "platforms: end" in done.stdout, done.stdout + done.stderr
    return done.stdout.replace("\r\n", "\n")


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_kernel(console: str, variant: str) -> None:
    """Nothing is skipped there: init is root, and has a cgroup v2 and all the memory policies."""
    parts = dict(zip(VARIANTS, console.split("platforms: status "), strict=False))
    told = said(parts[variant])
    assert told.shares_memory, told.text
    told.all_passed(VARIANTS[variant])
    bound = [mode for mode in VARIANTS[variant] if mode != "posix_spawn"]
    assert told.text.count(f": memory policies on {NODES} nodes\n") == len(bound), told.text
