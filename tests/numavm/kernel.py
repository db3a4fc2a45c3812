"""The distribution's kernel, downloaded and unpacked, never installed; and the initramfs that it boots with."""

from __future__ import annotations

import gzip
import lzma
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

DEFAULT_PACKAGE = "linux-image-amd64"

# The kernel modules that give access to the host's files. Modules that they depend on are added; a name that is built
# into the kernel is passed over.
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")


class Unavailable(Exception):
    """This machine lacks something; the message says what, and how to get it."""


@dataclass(frozen=True)
class Kernel:
    """image: what QEMU boots. modules: the kernel modules to load, in order."""

    image: Path
    modules: tuple[Path, ...]


def kernel(wanted: str, cache: Path) -> Kernel:
    """The kernel of a package name, or of a package file (FILE.deb), from the cache or else downloaded into it."""
    folder = cache / f"kernel-{Path(wanted).stem}"
    if not folder.is_dir():
        # The folder is filled under another name and then renamed, so that a folder of this name is whole.
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            made = Path(temporary, "made")
            made.mkdir()
            package = Path(wanted) if wanted.endswith(".deb") else _download(wanted, Path(temporary))
            _take_apart(package, Path(temporary, "unpacked"), made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another run was faster
                    raise
    return Kernel(folder / "image", tuple(sorted(folder.glob("*.ko"))))


def _download(name: str, folder: Path) -> Path:
    """Download a package. Where it only depends on the newest kernel's package (as linux-image-amd64 does), download
    that one."""
    if shutil.which("apt-get") is None:
        raise Unavailable(
            "the virtual machine boots Debian's kernel, and there is no apt-get here to download it with. Where a"
            " package file is at hand: --kernel linux-image-VERSION-amd64.deb"
        )
    newest = re.search(r"Depends: (linux-image-\d\S*)", _run("apt-cache", "depends", name)[1])
    # Started by root, apt becomes another user, who may not write to our temporary folder, and warns of that.
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", newest[1] if newest else name]
    status, said = _run(*command, cwd=folder)
    packages = list(folder.glob("*.deb"))
    if status or not packages:
        raise Unavailable(
            f"{' '.join(command)} failed; it needs the network, and package lists (apt-get update):\n{said}"
        )
    return packages[0]


def _run(*command: str, cwd: Path | None = None) -> tuple[int, str]:
    """The status and the output of a command. An interruption also ends the processes that the command started
    (dpkg-deb starts tar), so that the folder they write to can be removed."""
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    with process:
        try:
            said = process.communicate()[0]
            return process.returncode, said
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()  # The output ends when all of them have ended.
            raise


def _take_apart(package: Path, unpacked: Path, made: Path) -> None:
    """Keep the image and a few modules of the package, which unpacks to half a gigabyte."""
    status, said = _run("dpkg-deb", "-x", str(package), str(unpacked))
    if status:
        raise Unavailable(f"{package} cannot be unpacked: {said.strip()}")
    images = list(unpacked.glob("boot/vmlinuz*"))
    if not images:
        raise Unavailable(f"there is no kernel in {package.name}")
    packed = images[0].read_bytes()
    made.joinpath("image").write_bytes(_uncompressed(packed) or packed)
    for number, (name, content) in enumerate(_with_dependencies(unpacked, MODULES)):
        made.joinpath(f"{number:02}-{name}.ko").write_bytes(content)


def _uncompressed(image: bytes) -> bytes | None:
    """The ELF file inside a bzImage (the kernel's Documentation/arch/x86/boot.rst); QEMU boots it by its PVH entry.

    The decompression takes 3 seconds under software emulation, so it is done here. None for another kind of image, and
    for a compression that the standard library does not know: QEMU boots the image as it is, too.
    """
    if image[0x202:0x206] != b"HdrS":
        return None
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    elf = b""
    if payload.startswith(b"\xfd7zXZ\0"):
        elf = lzma.LZMADecompressor().decompress(payload)  # The image's size follows the stream, and is no part of it.
    elif payload.startswith(b"\x1f\x8b"):
        elf = gzip.decompress(payload[:-4])
    return elf if elf.startswith(b"\x7fELF") else None


def _with_dependencies(unpacked: Path, names: Iterable[str]) -> list[tuple[str, bytes]]:
    """The modules in the order in which they can be loaded. Each module names those that it needs; a package that was
    never installed has no modules.dep. A name without a file is built into the kernel."""
    there = {path.name.partition(".")[0].replace("-", "_"): path for path in unpacked.rglob("*.ko*")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name not in there or name in ordered:
            return
        content = there[name].read_bytes()
        if there[name].suffix == ".xz":
            content = lzma.decompress(content)
        elif there[name].suffix != ".ko":
            raise Unavailable(f"kernel module {there[name].name}: no way here to decompress it")
        needs = re.search(rb"\0depends=([^\0]*)\0", content)
        for need in needs[1].decode().split(",") if needs and needs[1] else ():
            add(need.replace("-", "_"))
        ordered[name] = content

    for name in names:
        add(name.replace("-", "_"))
    return list(ordered.items())


def initramfs(
    init: Path, modules: Iterable[Path], job: str, programs: Iterable[Path] = (), tree: Path | None = None
) -> bytes:
    """The archive with init, its modules and the job; ``programs``, and the content of the folder ``tree``, are put in
    its root."""
    folders = ("dev", "proc", "sys", "lower", "upper", "root", "modules")
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    entries += [("init", stat.S_IFREG | 0o755, init.read_bytes()), ("job", stat.S_IFREG | 0o644, job.encode())]
    entries += [(f"modules/{path.name}", stat.S_IFREG | 0o644, path.read_bytes()) for path in modules]
    entries += [(path.name, stat.S_IFREG | 0o755, path.read_bytes()) for path in programs]
    for path in sorted(tree.rglob("*")) if tree else ():
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        entries.append((str(path.relative_to(tree)), path.lstat().st_mode, content))
    # The format is "newc" (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst). Each part is
    # padded to a multiple of 4 bytes.
    archive = bytearray()
    for number, (name, mode, content) in enumerate((*entries, ("TRAILER!!!", 0, b"")), start=1):
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        archive += head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
    return bytes(archive)
