"""Runs the default tests on every CPython that can be had: ``make test`` for each, in its own virtual environment.

    python -m tests.interpreters.run [--only 3.12] [--only 3.14t] [PYTEST_ARGUMENT ...]

The interpreters are those on PATH and among pyenv's versions: one of each version from 3.10 on, free-threaded builds
included. The versions that this machine lacks come from Debian's suite forky (see forky.py).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time

from tests.interpreters import forky
from tests.interpreters.find import find_interpreters


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", action="append", metavar="VERSION", help="of these versions only (may be repeated)")
    options, pytest_arguments = parser.parse_known_args()

    found, passed_over = find_interpreters([], with_tests=False)
    for message in passed_over:
        print(f"passed over: {message}")
    here = {interpreter.name: interpreter.executable for interpreter in reversed(found)}
    there = {version: f"/usr/bin/python{version}" for version in forky.PYTHONS if version not in here}
    wanted = options.only or [*sorted(here, key=lambda name: int(name[2:].rstrip("td"))), *there]
    if unknown := [name for name in wanted if name not in here and name not in there]:
        print(f"no such interpreter here: {', '.join(unknown)}", file=sys.stderr)
        return 1

    ended: list[tuple[str, str, float]] = []
    for name in wanted:
        began = time.monotonic()
        where = "here" if name in here else "Debian forky"
        print(f"\n==== Python {name} ({where})", flush=True)
        executable = here.get(name) or there[name]
        make = ["make", "--no-print-directory", f"PYTHON={executable}", f"VENV=.venv-{name}", "test"]
        make.append(f"PYTEST_ARGS={shlex.join(pytest_arguments)}")
        environment = dict(os.environ)
        if name in there:
            try:
                forky.prepare()
            except forky.Unavailable as why:
                ended.append((name, f"NOT TESTED: {why}", 0.0))
                continue
            make, environment = forky.command(make), forky.environment()
        # MAKEFLAGS would give the options and the job server of the outer make to the inner one.
        environment.pop("MAKEFLAGS", None)
        status = subprocess.run(make, stdin=subprocess.DEVNULL, env=environment).returncode
        ended.append((name, f"FAILED (status {status})" if status else "ok", time.monotonic() - began))

    print()
    for name, verdict, seconds in ended:
        print(f"Python {name:6} {seconds:5.0f} s  {verdict}")
    return 0 if all(verdict == "ok" for _, verdict, _ in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
