"""Builds the one extension, ``rankspawn._spawn``, and on Linux the guard's program, which lies beside it.

Everything else is declared in pyproject.toml.

The extension is the engine on Linux and macOS. Windows has none, and a machine without a working C compiler gets a
pure-Python install with a warning: the same classes then work over plain ``subprocess``.

Environment variables, all optional:

RANKSPAWN_REQUIRE_EXTENSION=1   a failed build of the extension is an error (set by make and CI)
RANKSPAWN_LIBNUMA=auto|1|0      link libnuma where it is found (default), insist on it, or build the raw-syscall shim
RANKSPAWN_DEVELOP=1             -Wall -Wextra -Werror
RANKSPAWN_SANITIZE=1            AddressSanitizer and UndefinedBehaviorSanitizer
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Generated C lies here and never in src/, where it would end up in an sdist or in a commit.
GENERATED = "build/cython"

LINUX = sys.platform.startswith("linux")

# rankspawn._end.guard finds it by this name beside the extension.
GUARD = "rankspawn-guard"

# How it is compiled, beside compile_args(). The C library would set up what a stack protector and fortified calls need;
# csrc/search/kernel.c says why the rest.
FREESTANDING = [
    "-DRANKSPAWN_FREESTANDING",
    "-ffreestanding",
    "-fno-tree-loop-distribute-patterns",
    "-fno-stack-protector",
    "-U_FORTIFY_SOURCE",
]
FREESTANDING += ["-fno-asynchronous-unwind-tables", "-nostdlib", "-static-pie"]
HOSTED = ["-pie"]

# What the engine needs of libnuma: the two headers, and a library that defines what they declare.
LIBNUMA_PROBE = """\
#include <numa.h>
#include <numaif.h>
int rankspawn_probe(void) { return numa_available() + (int)set_mempolicy(MPOL_DEFAULT, 0, 0); }
"""


# Hardening that not every compiler and machine has: each is used where the compiler takes it without a warning. The
# last two mark what an indirect branch or a return may reach (Intel's CET, Arm's BTI and PAC).
HARDENING_WHERE_KNOWN = ["-fstack-clash-protection", "-fcf-protection=full", "-mbranch-protection=standard"]


def switched_on(name: str) -> bool:
    """Whether the environment variable ``name`` asks for something."""
    return os.environ.get(name, "0") not in ("", "0")


def compile_args() -> list[str]:
    # Hidden visibility: the engine's C functions are called inside this one object only, so nothing else in the
    # process can interpose them, and calls between its files do not go through the dynamic linker's tables.
    # -iquote and not -I: csrc/spawn.h must not hide the system's <spawn.h>, which csrc/posix.c needs.
    args = ["-std=c11", "-fvisibility=hidden", "-iquote", "csrc"]
    if switched_on("RANKSPAWN_DEVELOP"):
        # Python 3.15's types have more fields than Cython's generated tables name: those are zero, as they should be.
        args += ["-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"]
    if switched_on("RANKSPAWN_SANITIZE"):
        # Fortified libc calls hide from AddressSanitizer what it would report better.
        args += ["-U_FORTIFY_SOURCE", "-g", "-O1", "-fno-omit-frame-pointer"]
        args += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    else:
        # Undefined first, because some distributions' compilers define it themselves, with another level.
        args += ["-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
    return args


def c_files(*folders: str) -> list[str]:
    """The sources in these folders: relative paths, sorted, so that the same source gives the same build."""
    return sorted(path.as_posix() for folder in folders for path in Path(folder).glob("*.c"))


def link_args() -> list[str]:
    args = []
    if LINUX:
        # BIND_NOW (-z now) is required, not only hardening. The child shares the parent's memory between clone and
        # exec; a call that is still unbound there would run the dynamic linker's lazy resolver in the child, which
        # takes locks and writes tables that belong to the parent. With it every symbol is bound at import.
        args += ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack"]
    if switched_on("RANKSPAWN_SANITIZE"):
        args += ["-fsanitize=address,undefined"]
    return args


class BuildSpawn(build_ext):
    """Looks for libnuma, translates the .pyx into build/, and says clearly what a failure means."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._prepare(ext)
            super().build_extension(ext)
            if LINUX:
                self._build_guard(ext)
        except Exception as error:
            if not ext.optional:
                raise
            # Whatever went wrong (no compiler, no Python.h, no Cython), an install without the engine works.
            print(
                f"\nrankspawn: WARNING: the extension {ext.name} could not be built: {error}\n"
                "rankspawn: WARNING: installing without it. Ranks are then started by plain subprocess, slower,\n"
                "rankspawn: WARNING: and memory policies are refused. To get the engine, install a C compiler and\n"
                "rankspawn: WARNING: Python's headers (Debian, Ubuntu: apt-get install gcc python3-dev libnuma-dev)\n"
                "rankspawn: WARNING: and install again; RANKSPAWN_REQUIRE_EXTENSION=1 makes this an error.\n",
                file=sys.stderr,
            )

    def _prepare(self, ext: Extension) -> None:
        from Cython.Build import cythonize

        # The folder that pip builds in has another name each time; without it the same source gives the same bytes.
        nameless = f"-ffile-prefix-map={os.getcwd()}=."
        ext.extra_compile_args += [flag for flag in [*HARDENING_WHERE_KNOWN, nameless] if self._compiler_takes(flag)]
        if LINUX and self._use_libnuma():
            ext.define_macros.append(("RANKSPAWN_HAVE_LIBNUMA", "1"))
            ext.libraries.append("numa")
        (translated,) = cythonize([ext], build_dir=GENERATED, force=bool(self.force))
        ext.sources = translated.sources
        if switched_on("RANKSPAWN_SANITIZE"):
            # AddressSanitizer marks what lies around a function's variables on the stack and clears the marks when the
            # function returns. The child's functions never return: their marks would stay in the parent's memory, and
            # be reported as overflows there. Without these marks the child's memory accesses are checked all the same.
            ext.sources.remove("csrc/child.c")
            unmarked = [*ext.extra_compile_args, "--param", "asan-stack=0"]
            ext.extra_objects += self.compiler.compile(
                ["csrc/child.c"], self.build_temp, ext.define_macros, extra_postargs=unmarked
            )

    def copy_extensions_to_source(self) -> None:
        """An editable install finds the guard's program beside the extension in src/."""
        super().copy_extensions_to_source()
        if os.path.exists(self._guard):
            self.copy_file(self._guard, os.path.join("src", "rankspawn", GUARD), level=self.verbose)

    @property
    def _guard(self) -> str:
        return os.path.join(self.build_lib, "rankspawn", GUARD)

    def _build_guard(self, ext: Extension) -> None:
        """Build the guard's program: without the C library where compiler and machine allow it, else with it."""
        sources = c_files("csrc/guard", "csrc/search")
        command = [*self.compiler.compiler_so, *ext.extra_compile_args, "-fPIE", *sources, *link_args()]
        complaint = ""
        # AddressSanitizer is a library above the C library.
        for options in [HOSTED] if switched_on("RANKSPAWN_SANITIZE") else [FREESTANDING, HOSTED]:
            done = subprocess.run(
                [*command, *options, "-o", self._guard], stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            if done.returncode == 0:
                return
            complaint += done.stderr
        if not ext.optional:
            raise CompileError(f"{GUARD}: {complaint}")
        print(
            f"\nrankspawn: WARNING: the guard's program could not be built: {complaint}\n"
            "rankspawn: WARNING: installing without it: when a launcher is killed, what its ranks started lives on.\n",
            file=sys.stderr,
        )

    def _compiler_takes(self, flag: str) -> bool:
        command = [*self.compiler.compiler_so, "-Werror", flag, "-S", "-x", "c", os.devnull, "-o", os.devnull]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0

    def _use_libnuma(self) -> bool:
        wish = os.environ.get("RANKSPAWN_LIBNUMA", "auto")
        if wish not in ("auto", "1", "0"):
            raise SystemExit(f"rankspawn: RANKSPAWN_LIBNUMA={wish!r}: expected auto, 1 or 0")
        if wish == "0":
            print("rankspawn: libnuma: not used, as asked; the shim makes the two system calls")
            return False
        complaint = self._libnuma_complaint()
        if not complaint:
            print("rankspawn: libnuma: found, linked")
            return True
        if wish == "1":
            raise SystemExit(f"rankspawn: RANKSPAWN_LIBNUMA=1, but libnuma cannot be used:\n{complaint}")
        print("rankspawn: libnuma: not found (Debian, Ubuntu: libnuma-dev); the shim makes the two system calls")
        return False

    def _libnuma_complaint(self) -> str:
        """What the compiler or linker said against a program that uses libnuma; empty when it can be used.

        The commands are run here and not by ``self.compiler.compile``, which would print a failed probe's errors as
        if something were wrong.
        """
        with tempfile.TemporaryDirectory() as folder:
            source, built, linked = (os.path.join(folder, f"probe.{kind}") for kind in ("c", "o", "so"))
            Path(source).write_text(LIBNUMA_PROBE)
            compiling = [*self.compiler.compiler_so, "-c", source, "-o", built]
            # "-z defs": without it a shared object links even when the symbols are nowhere.
            linking = [*self.compiler.linker_so, built, "-Wl,-z,defs", "-lnuma", "-o", linked]
            for command in (compiling, linking):
                done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
                if done.returncode != 0:
                    return done.stderr or f"{command[0]} ended with status {done.returncode}"
        return ""


class WheelForOneSystem(bdist_wheel):
    """A wheel without the extension has no tag of a system, but for Windows' wheel, which says that it is for Windows.

    Named py3-none-any it would fit every machine, and pip would take it wherever no other wheel fits (another
    processor, an older libc) instead of the sdist, which builds the engine there.

    ``-C--build-option=--plat-name=win_amd64`` makes it on any system.
    """

    def finalize_options(self) -> None:
        if sys.platform == "win32":
            self.plat_name = self.plat_name or sysconfig.get_platform()
        if self.plat_name and self.plat_name.startswith("win"):
            self.distribution.ext_modules = []
        super().finalize_options()

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build" and not any(map(os.path.exists, self.get_finalized_command("build_ext").get_outputs())):
            # BuildSpawn has said why.
            self.distribution.ext_modules = []
            self.root_is_pure = True


def extensions() -> list[Extension]:
    if sys.platform == "win32":
        return []
    return [
        Extension(
            "rankspawn._spawn",
            ["src/rankspawn/_spawn.pyx", *c_files("csrc", *(["csrc/search"] if LINUX else []))],
            depends=[
                "setup.py",
                *sorted(path.as_posix() for path in Path("csrc").rglob("*.[ch]")),
                *sorted(path.as_posix() for path in Path("src/rankspawn").glob("*.px[di]")),
            ],
            extra_compile_args=compile_args(),
            extra_link_args=link_args(),
            optional=not switched_on("RANKSPAWN_REQUIRE_EXTENSION"),
        )
    ]


setup(ext_modules=extensions(), cmdclass={"bdist_wheel": WheelForOneSystem, "build_ext": BuildSpawn})
