"""A Debian of the suite forky in a folder, for the Pythons that this machine's own system does not have.

    python -m tests.interpreters.forky [COMMAND [ARGUMENT ...]]

Makes it, once, in ``.cache/forky`` (a gigabyte; Debian's mirror is the one in apt's own sources, or the environment
variable DEBIAN_MIRROR), lays a copy of the checkout into it, and runs COMMAND there, in the copy. What COMMAND builds
in the copy is there the next time.

It needs root, and debootstrap. The command has mounts and processes of its own (unshare(1)): both are gone when it has
ended, however that was. pip there asks the index that pip here asks: settings and certificates are mounted into the
folder. Local folders of packages that the settings name are not, and pip warns of each.
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
    # Programs that tests run, as in the Makefile's build/.test-tools.
    "strace", "numactl", "hwloc-nox", "qemu-user", "procps", "iproute2",
)  # fmt: skip

# Not part of a copy, and left alone where the copy has them: what is built, and what environments and caches hold.
BUILT = {"build", "dist", "__pycache__"}

# Mounted into the system where they are here: how to reach the network, pip's settings, and what variables say of both.
NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs")
PIPS = ("/etc/pip.conf", "/etc/xdg/pip", "~/.config/pip", "~/.pip")
NAMED_BY = ("PIP_CONFIG_FILE", "PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")

# The shell is process 1 of the command's namespace, and reaps what the command leaves there. The system is mounted onto
# itself because some programs (ip netns exec) want their root to be a mount.
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
    """Make the system if it is not there, and bring its copy of the checkout up to date."""
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
    # Not the finished place: what an interrupted run leaves must not pass for a system.
    half = Path(f"{SYSTEM}.half")
    for old in (half, SYSTEM):
        shutil.rmtree(old, ignore_errors=True)
    mirror = _mirror()
    print(f"making {SYSTEM.relative_to(ROOT)}: Debian forky with Python {' and '.join(PYTHONS)}", flush=True)
    # "sid": debootstrap's script for suites that it does not know the name of.
    packages = f"--include={','.join(PACKAGES)}"
    command = ["debootstrap", "--variant=minbase", packages, "forky", str(half), mirror, "sid"]
    # Its dpkg need not see each package safe on the disk: what does not become whole is made anew.
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
    """Lay the checkout's sources into the system, with their times, and take away what is no longer among them."""
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
        # Hidden folders are git's, environments and caches; none of them is a source.
        folders[:] = [
            name for name in folders if name not in BUILT and name[0] != "." and not name.endswith(".egg-info")
        ]
        for name in files:
            if not name.endswith((".so", ".pyc")) and name != ".git":
                yield Path(where, name).relative_to(folder)


def command(words: Sequence[str]) -> list[str]:
    """What runs ``words`` in the system's copy of the checkout."""
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
            there.unlink(missing_ok=True)  # a link would lead out of the system
            there.touch()
        shared.append(path)
    own = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    inside = f"/{COPY.relative_to(SYSTEM)}"
    return [*own, "sh", "-c", ENTER, "sh", str(SYSTEM), inside, *shared, "--", *words]


def environment() -> dict[str, str]:
    """The caller's, without what speaks of this machine's folders."""
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
