"""A Debian of the suite forky in a folder, for the Pythons that this machine's own system does not have.

    python -m tests.interpreters.forky [COMMAND [ARGUMENT ...]]

This makes the system once, in ``.cache/forky`` (a gigabyte), copies the checkout into it, and runs COMMAND there, in
the copy. Debian's mirror is the one in apt's own sources, or in the environment variable DEBIAN_MIRROR. What COMMAND
builds in the copy stays for the next time.

It needs root, and debootstrap. COMMAND has its own mount and PID namespaces (unshare(1)): its mounts and processes are
gone when it has ended, in whatever way. pip there asks the same index as pip here, because pip's settings and the
certificates are mounted into the system. Local folders of packages that the settings name are not mounted, and pip
warns of each.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SYSTEM = ROOT / ".cache" / "forky"
COPY = SYSTEM / "rankspawn"

PYTHONS = ("3.14", "3.15")
OF_EACH = ("python{}-dev", "python{}-venv", "libpython{}-testsuite")
PACKAGES = (
    *(package.format(version) for version in PYTHONS for package in OF_EACH),
    "gcc", "libc6-dev", "libnuma-dev", "make",
    # The programs that tests run, as in the Makefile's build/.test-tools.
    "strace", "numactl", "hwloc-nox", "qemu-user", "procps", "iproute2",
)  # fmt: skip

# Folders that are not copied, and not removed from the copy: what is built, and caches.
BUILT = {"build", "dist", "__pycache__"}

# Files and folders that are mounted into the system, where this machine has them: those for the network, pip's
# settings, and those that these variables name.
NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs")
PIPS = ("/etc/pip.conf", "/etc/xdg/pip", "~/.config/pip", "~/.pip")
NAMED_BY = ("PIP_CONFIG_FILE", "PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")

# The shell is process 1 of the command's PID namespace, and reaps the processes that the command leaves there. The
# system is mounted onto itself, because some programs (ip netns exec) need a root that is a mount.
ENTER = """
set -e
system=$1; folder=$2; shift 2
mount --bind "$system" "$system"
mount -t proc proc "$system/proc"
mount --rbind /sys "$system/sys"
mount --rbind /dev "$system/dev"
mount -t tmpfs -o mode=1777 tmp "$system/tmp"
while [ "$1" != -- ]; do mount --bind "$1" "$system$1"; shift; done
shift
chroot "$system" sh -c 'cd "$1" && shift && exec "$@"' sh "$folder" "$@" && exit 0 || exit $?
"""


class Unavailable(Exception):
    """The system cannot be made here; the text says why and what to do."""


def prepare() -> None:
    """Make the system if there is none, and bring its copy of the checkout up to date."""
    SYSTEM.parent.mkdir(exist_ok=True)
    with Path(f"{SYSTEM}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = SYSTEM / "rankspawn-packages"
        wanted = "\n".join(PACKAGES)
        if not stamp.exists() or stamp.read_text() != wanted:
            _make()
            stamp.write_text(wanted)
        _copy()


def _make() -> None:
    if os.geteuid() != 0:
        raise Unavailable("only root can make and enter a system in a folder")
    if shutil.which("debootstrap") is None:
        raise Unavailable("debootstrap is not here: apt-get install debootstrap")
    # The system is made under another name and then renamed: what an interrupted run leaves must not be taken for it.
    half = Path(f"{SYSTEM}.half")
    for old in (half, SYSTEM):
        shutil.rmtree(old, ignore_errors=True)
    mirror = _mirror()
    print(f"making {SYSTEM.relative_to(ROOT)}: Debian forky with Python {' and '.join(PYTHONS)}", flush=True)
    # "sid" names debootstrap's script for suites whose name it does not know.
    packages = f"--include={','.join(PACKAGES)}"
    command = ["debootstrap", "--variant=minbase", packages, "forky", str(half), mirror, "sid"]
    # dpkg need not wait until each package is on the disk, because a system that is not finished is made anew.
    quick = {**os.environ, "DPKG_FORCE": "unsafe-io"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=quick)
    if done.returncode:
        raise Unavailable(f"debootstrap failed:\n{(done.stdout + done.stderr)[-2000:]}")
    half.rename(SYSTEM)


def _mirror() -> str:
    if named := os.environ.get("DEBIAN_MIRROR"):
        return named
    ask = [
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
        "Origin: Debian",
        "Label: Debian",
    ]
    try:
        told = subprocess.run(ask, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        told = []
    if not told:
        raise Unavailable("apt knows no mirror of Debian's: apt-get update, or name one in DEBIAN_MIRROR")
    return told[0]


def _copy() -> None:
    """Copy the checkout's sources into the system, with their times, and remove files that are no longer among them."""
    sources = set(_sources(ROOT))
    for relative in _sources(COPY):
        if relative not in sources:
            (COPY / relative).unlink()
    for relative in sources:
        source, copy = ROOT / relative, COPY / relative
        if not copy.exists() or copy.stat().st_mtime_ns != source.stat().st_mtime_ns:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


def _sources(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        # Hidden folders are git's, or environments and caches; none of them holds sources.
        folders[:] = [
            name for name in folders if name not in BUILT and name[0] != "." and not name.endswith(".egg-info")
        ]
        for name in files:
            if not name.endswith((".so", ".pyc", "rankspawn-guard")) and name != ".git":
                yield Path(where, name).relative_to(folder)


def command(words: Sequence[str]) -> list[str]:
    """The command that runs ``words`` in the system's copy of the checkout."""
    named = [os.environ[name] for name in NAMED_BY if name in os.environ]
    shared: list[str] = []
    for path in map(os.path.expanduser, (*NETWORK, *PIPS, *named)):
        here, there = Path(path), Path(f"{SYSTEM}{path}")
        if not here.exists() or any(path == one or path.startswith(f"{one}/") for one in shared):
            continue
        if here.is_dir():
            there.mkdir(parents=True, exist_ok=True)
        elif not there.is_file() or there.is_symlink():
            there.parent.mkdir(parents=True, exist_ok=True)
            there.unlink(missing_ok=True)  # a symbolic link would lead out of the system
            there.touch()
        shared.append(path)
    own = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    inside = f"/{COPY.relative_to(SYSTEM)}"
    return [*own, "sh", "-c", ENTER, "sh", str(SYSTEM), inside, *shared, "--", *words]


def environment() -> dict[str, str]:
    """The caller's environment without the variables that name folders of this machine."""
    theirs = {k: v for k, v in os.environ.items() if k not in ("PYENV_ROOT", "TMPDIR", "VIRTUAL_ENV")}
    return {**theirs, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def main() -> int:
    try:
        prepare()
    except Unavailable as why:
        print(f"forky: {why}", file=sys.stderr)
        return 1
    if not sys.argv[1:]:
        return 0
    return subprocess.run(command(sys.argv[1:]), env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
