"""Run the checks in this folder on a kernel with several NUMA nodes: a virtual machine, by software emulation.

    python -m tests.numavm.run [--kernel PACKAGE] [--show] [-k WORDS]

It boots the distribution's kernel (downloaded, never installed) once, in the machine that machine.py describes. The
machine's root file system is that of this machine, shared read-only, with a tmpfs on top: it has the same Python and
the same built package, and what the checks write is lost with it. Neither privileges nor /dev/kvm are needed. Each
check is printed with its result as it ends; the last line is "N passed, N failed". The exit status is 0 when none
failed, 1 when one did, 2 when the machine could not be made or did not finish.

Nothing is left behind, even after an interruption: the initramfs and the console are in memory, and QEMU dies with this
process. Only build/numavm (the kernel, two small programs) is kept, for the next time.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.numavm.kernel import DEFAULT_PACKAGE, Unavailable, initramfs, kernel
from tests.numavm.machine import RUNNING, qemu_arguments

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "numavm"

QEMU = "qemu-system-x86_64"
# The Debian package of each program that is needed. init is linked with libc.a of libc6-dev; the checks of the topology
# compare with numactl and lscpu.
PROGRAMS = {
    QEMU: "qemu-system-x86",
    "gcc": "gcc",
    "dpkg-deb": "dpkg",
    "numactl": "numactl",
    "lscpu": "util-linux",
}

# A boot takes 4 seconds on 2 idle CPUs, and 58 were seen on busy ones. A boot that stalls is ended and tried once more.
BOOT_SECONDS = 180
BOOT_TRIES = 2

# The machine runs on for this long after the limit of the checks, at which a check that hangs prints where it hangs.
LAST_WORDS_SECONDS = 60

KERNEL_PARAMETERS = (
    # A panic ends the machine: the kernel reboots, and QEMU runs with -no-reboot.
    "console=ttyS0 quiet panic=-1 rdinit=/init 8250.nr_uarts=2 "
    # init starts the other CPUs. The other parameters skip self-tests, calibrations and hardenings, which take seconds.
    "maxcpus=1 lpj=1000000 tsc=reliable no_timer_check rcupdate.rcu_expedited=1 cryptomgr.notests=1 nowatchdog "
    "pcie_ports=compat mitigations=off rodata=off init_on_alloc=0 lsm= audit=0 zswap.enabled=0 random.trust_cpu=on "
    # Pages must stay where their policy put them.
    "numa_balancing=disable"
)

# The variables that the job inherits, to find the interpreter, and the package where it is not installed.
INHERITED = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "PYTHONPATH", "RANKSPAWN_MECHANISM")

CHECKS = sorted(HERE.glob("checks_*.py"))

_PR_SET_PDEATHSIG = 1
_COUNTS = re.compile(r"\d+ passed, \d+ failed")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kernel", default=DEFAULT_PACKAGE, help="a package's name, or FILE.deb (%(default)s)")
    parser.add_argument("-k", dest="words", metavar="WORDS", help="only the checks that pytest -k would choose")
    parser.add_argument("--limit", type=float, default=1000, help="seconds for the checks (%(default)g)")
    parser.add_argument("--show", action="store_true", help="print QEMU's command line and the console as well")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        provide_programs()
        CACHE.mkdir(parents=True, exist_ok=True)
        for source in ("init", "touch"):
            build(source)
        chosen = kernel(options.kernel, CACHE)
    except Unavailable as error:
        print(f"numavm: {error}", file=sys.stderr)
        return 2
    archive = initramfs(CACHE / "init", chosen.modules, job(options.words, options.limit))
    for _ in range(BOOT_TRIES):
        machine = Machine(chosen.image, archive, options.show)
        try:
            if machine.wait_for_start():
                return machine.relay(options.limit + LAST_WORDS_SECONDS)
            if machine.ended:
                break
        finally:
            machine.close()
    print("numavm: the machine did not boot", file=sys.stderr)
    return 2


def provide_programs() -> None:
    """Install the packages that are missing, where that is possible. Raises Unavailable."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise Unavailable("the checks share this machine's programs with an x86-64 machine: this must be one, on Linux")
    if shutil.which("apt-get") and os.geteuid() == 0:
        missing = missing_packages()
        if missing:
            print("numavm: installing", *missing, flush=True)
            quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
                said = subprocess.run(
                    ["apt-get", "-qq", *command], env=quiet, capture_output=True, text=True, check=False
                )
                if said.returncode:
                    print(said.stdout[-2000:], said.stderr[-2000:], sep="", file=sys.stderr)
    missing = missing_packages()
    if missing:
        raise Unavailable(
            f"this machine lacks what the checks need. As root, on Debian: apt-get install {' '.join(missing)}"
        )


def missing_packages() -> list[str]:
    missing = {package for program, package in PROGRAMS.items() if shutil.which(program) is None}
    if "gcc" not in missing:
        found = subprocess.run(["gcc", "-print-file-name=libc.a"], capture_output=True, text=True, check=True).stdout
        if not os.path.isabs(found.strip()):
            missing.add("libc6-dev")
    return sorted(missing)


def build(name: str) -> None:
    """Compile one of the two small programs, if its source is newer."""
    source, made = HERE / f"{name}.c", CACHE / name
    if made.exists() and made.stat().st_mtime >= source.stat().st_mtime:
        return
    static = ["-static"] if name == "init" else []
    # The program gets its name when it is whole: an interrupted compiler leaves a part that is newer than the source.
    new = made.with_suffix(f".{os.getpid()}")
    subprocess.run(["gcc", "-std=gnu11", "-Os", "-Wall", "-Wextra", *static, "-o", new, source], check=True)
    new.replace(made)


def job(words: str | None, seconds: float) -> str:
    """The shell script that runs in the machine."""
    variables = {name: os.environ[name] for name in INHERITED if name in os.environ}
    variables |= {
        "RANKSPAWN_NUMAVM_SECONDS": f"{seconds:g}",
        "NO_COLOR": "1",
        # Plugins take seconds to load, at a tenth of the usual speed. Byte code is written, although the machine ends
        # with it: dozens of checks start Python anew.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-u", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:terminal"]
    # These replace the project's own options, which are for the terminal plugin.
    command += ["-p", "tests.numavm.report", "-o", "addopts=--import-mode=importlib --strict-markers"]
    command += [*map(str, CHECKS), *(["-k", words] if words else [])]
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join([*lines, f"cd {shlex.quote(str(ROOT))} || exit 126", f"exec {shlex.join(command)}", ""])


def counter_khz() -> str:
    return subprocess.run([CACHE / "init"], capture_output=True, text=True, check=True).stdout.strip()


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Machine:
    """A running virtual machine: QEMU, the kernel's console, and the job's output on the second serial port."""

    def __init__(self, image: Path, archive: bytes, show: bool) -> None:
        self.began = time.monotonic()
        self._show = show
        self._rest = b""
        self._console = os.memfd_create("console")
        archive_fd = os.memfd_create("initramfs")
        with open(archive_fd, "wb", closefd=False) as file:
            file.write(archive)
        command = [
            *(QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none"),
            *("-machine", "q35,vmport=off,smm=off,i8042=off,sata=off,smbus=off"),
            # One host thread runs all CPUs: with a thread for each CPU, a boot on 2 CPUs took half as long again.
            *("-accel", "tcg,thread=single,tb-size=256"),
            *qemu_arguments(),
            *("-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"),
            *("-device", "virtio-9p-pci,bus=pcie.0,fsdev=root,mount_tag=root"),
            *("-serial", f"file:/dev/fd/{self._console}", "-serial", "file:/dev/fd/1"),
            *("-kernel", str(image), "-initrd", f"/dev/fd/{archive_fd}"),
            *("-append", f"{KERNEL_PARAMETERS} tsc_early_khz={counter_khz()}"),
        ]
        if show:
            print(shlex.join(command), file=sys.stderr)
        self._qemu = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=(self._console, archive_fd),
            preexec_fn=die_with_parent,
        )
        os.close(archive_fd)

    @property
    def ended(self) -> bool:
        """Whether QEMU has ended by itself, because it refused its arguments, or the kernel or init gave up."""
        return self._qemu.poll() is not None

    def close(self) -> None:
        self._qemu.kill()
        self._qemu.wait()
        assert self._qemu.stdout is not None
        self._qemu.stdout.close()
        if self._show:
            print(self._console_text(), file=sys.stderr)
        os.close(self._console)

    def _console_text(self) -> str:
        size = os.fstat(self._console).st_size
        return os.pread(self._console, size, 0).decode(errors="replace")

    def _line(self, until: float) -> str | None:
        """The next line that the job or init prints; None at the end, or when the time ``until`` has come."""
        assert self._qemu.stdout is not None
        fd = self._qemu.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([fd], [], [], max(0.0, until - time.monotonic()))[0]:
                return None
            data = os.read(fd, 65536)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")

    def wait_for_start(self) -> bool:
        """Whether the job has started within the limit; if not, the reason is printed, as far as it is known."""
        until = self.began + BOOT_SECONDS
        while (line := self._line(until)) is not None:
            if line == "numavm: start":
                print(f"numavm: booted in {time.monotonic() - self.began:.1f} s", flush=True)
                return True
        self._say_console()
        if not self.ended:
            print(f"numavm: no start of the checks within {BOOT_SECONDS} s", file=sys.stderr)
        return False

    def relay(self, limit: float) -> int:
        """Print what the job prints, and the counts at the very end; return the exit status."""
        started = time.monotonic()
        counts = running = ""
        while (line := self._line(started + limit)) is not None:
            if line.startswith(RUNNING):
                running = f", in {line.removeprefix(RUNNING)}"
                continue
            if line.startswith("numavm: exit "):
                print(f"numavm: the checks took {time.monotonic() - started:.1f} s")
                if not counts:
                    print(f"numavm: the checks did not finish: pytest ended by itself{running}", file=sys.stderr)
                    return 2
                print(counts, flush=True)
                return 0 if line == "numavm: exit 0" else 1
            if _COUNTS.fullmatch(line):
                counts = line
            else:
                print(line, flush=True)
        self._say_console()
        ended = "the machine ended" if self.ended else "the time was over"
        after = f"{ended} after {time.monotonic() - started:.0f} s{running}"
        print(f"numavm: the checks did not finish: {after}", file=sys.stderr)
        return 2

    def _say_console(self) -> None:
        print(*self._console_text().splitlines()[-25:], sep="\n", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
