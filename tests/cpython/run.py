"""Run CPython's own tests of `subprocess` on `rankspawn.Popen`, and compare with the stock class on the same machine.

For every installed CPython from 3.10 on (on PATH, or among pyenv's versions) this builds the project into a virtual
environment under ``.venv-cpython/`` and runs ``test.test_subprocess`` and ``test.test_asyncio.test_subprocess``, once
with the stock class and once with `subprocess.Popen` replaced. It fails where ours does worse in anything:

* a failure or an error that the stock class does not have, unless ``excepted.txt`` names the test with a reason;
* a test that the stock class runs, and ours skips or never reaches (a crash, a time-out);
* children, threads or file descriptors left behind, exceptions in a ``__del__``, that the stock class does not leave;
* a test in ``excepted.txt`` that passes or does not exist: the list must not outlive its reasons;
* a run that did not use our class, or in which an object of the stock class made a child after all.

It uses the standard library only, so that any Python can start it: ``python3 -m tests.cpython.run --help``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.interpreters.find import Interpreter, find_interpreters

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VENVS = ROOT / ".venv-cpython"
MODULES = ("test.test_subprocess", "test.test_asyncio.test_subprocess")
MECHANISMS = ("clone", "posix_spawn", "subprocess")

# Products of a build in the checkout: they are neither hashed nor copied for a build.
BUILT = ("__pycache__", "rankspawn-guard", "*.so", "*.pyd", "*.egg-info", "_spawn.c")


@dataclass
class TestRecord:
    """What one test did in one run. `bad` maps a sub-test ("" for the test itself) to its tracebacks."""

    bad: dict[str, list[str]] = field(default_factory=dict)
    skipped: str | None = None
    ended: bool = False
    altered: bool = False
    unraisable: list[str] = field(default_factory=list)


@dataclass
class Run:
    """One run of one test module in one interpreter with one class."""

    tests: dict[str, TestRecord] = field(default_factory=dict)
    ran: int = 0
    finished: bool = False
    mechanisms: Counter[str] = field(default_factory=Counter)
    handed_on: int = 0
    stock: int = 0
    left: dict[str, int] = field(default_factory=dict)
    warnings: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    ending: str = ""
    log: str = ""

    def failed(self) -> list[str]:
        return [name for name, record in self.tests.items() if record.bad]


@dataclass(frozen=True)
class Excepted:
    """A line of excepted.txt."""

    oldest: tuple[int, int]
    newest: tuple[int, int]
    test: str
    reason: str


@dataclass(frozen=True)
class Row:
    """A line of the table, and what is wrong with it."""

    interpreter: str
    module: str
    ran: int
    stock_failed: int
    ours_failed: int
    excepted: int
    mechanisms: str
    seconds: float
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def sources() -> list[Path]:
    """The files of which a change must lead to a new build."""
    files = [path for path in (ROOT / "setup.py", ROOT / "pyproject.toml") if path.exists()]
    for folder in (ROOT / "src", ROOT / "csrc"):
        for path in sorted(folder.rglob("*")):
            parts = path.relative_to(ROOT).parts
            if path.is_file() and not any(Path(part).match(pattern) for part in parts for pattern in BUILT):
                files.append(path)
    return files


def hash_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sources():
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock: a second run of this harness must not install while the first one tests."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def installed(interpreter: Interpreter, say: bool) -> list[str]:
    """Build and install the project for `interpreter`, if that is not done yet; return the folders to import it from.

    The tests run in the interpreter itself, with these folders added, and not in the virtual environment, because in
    one CPython skips several tests of `subprocess`.
    """
    venv = VENVS / interpreter.tag
    python = venv / "bin" / "python"
    stamp = venv / "rankspawn-sources"
    wanted = f"{interpreter.executable} {hash_of_sources()}\n"
    if not (stamp.exists() and stamp.read_text() == wanted and python.exists()):
        if say:
            print(f"{interpreter.tag}: building and installing the project", flush=True)
        stamp.unlink(missing_ok=True)
        # `--clear` only where the environment cannot be used, because installing into a good one is much faster.
        if python.resolve() != Path(interpreter.executable) or not works([str(python), "-m", "pip", "--version"]):
            run_logged([interpreter.executable, "-m", "venv", "--clear", str(venv)])
        # Built from a copy, because a build leaves files beside the sources, and several may build in this checkout.
        with tempfile.TemporaryDirectory(prefix="rankspawn-build-") as folder:
            copy = Path(folder) / "rankspawn"
            copy.mkdir()
            for path in ROOT.iterdir():
                if path.is_file():
                    shutil.copy2(path, copy)
            for name in ("src", "csrc"):
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*BUILT))
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            run_logged([*pip, str(copy)])
        stamp.write_text(wanted)
    ask = "import json, sysconfig; print(json.dumps([sysconfig.get_path(p) for p in ('platlib', 'purelib')]))"
    answer = subprocess.run([python, "-I", "-c", ask], capture_output=True, text=True, check=True)
    return sorted(set(json.loads(answer.stdout)))


def works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    except OSError:
        return False


def run_logged(command: list[str]) -> None:
    """Run a command of the set-up; show what it printed only if it fails."""
    # Without the engine, the tests would compare the standard library with itself.
    environment = {**os.environ, "RANKSPAWN_REQUIRE_EXTENSION": "1"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SetupError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")


class SetupError(Exception):
    """The project could not be built or installed for an interpreter."""


def run_module(
    interpreter: Interpreter,
    module: str,
    *,
    popen: str | None,
    paths: list[str],
    mechanism: str | None = None,
    match: list[str] | None = None,
    timeout: float,
) -> Run:
    """Run `module` in `interpreter`, with the class named by `popen` in place, or the stock one where it is None."""
    run = Run()
    # The settings of the caller's Python must not become settings of the tested interpreter.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RANKSPAWN_"))}
    if popen and mechanism:
        environment["RANKSPAWN_MECHANISM"] = mechanism
    # -bb: bytes compared with text are an error, as in CPython's own runs of its tests.
    command = [interpreter.executable, "-bb", str(HERE / "replaced.py")]
    if popen:
        command += ["--popen", popen]
        for path in paths:
            command += ["--path", path]
    for pattern in match or ():
        command += ["--match", pattern]
    with tempfile.TemporaryDirectory(prefix="rankspawn-cpython-") as folder:
        report, log = Path(folder) / "report.jsonl", Path(folder) / "log.txt"
        # The tests write into their current folder.
        work = Path(folder) / "work"
        work.mkdir()
        report.touch()
        began = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--report", str(report), module],
                cwd=work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A process group of its own, so that one signal ends whatever a test left running.
                start_new_session=True,
            )
            try:
                try:
                    status = process.wait(timeout)
                    if status < 0:
                        run.ending = f"killed by {signal.Signals(-status).name}"
                    elif status > 0:
                        run.ending = f"exit status {status}"
                except subprocess.TimeoutExpired:
                    run.ending = f"not done after {timeout:g} s"
                    process.send_signal(signal.SIGABRT)  # faulthandler then writes every thread's stack into the log.
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(10)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        run.seconds = time.monotonic() - began
        run.log = log.read_text(errors="replace")
        read_report(report, run)
    return run


def read_report(path: Path, run: Run) -> None:
    """Fill `run` with what replaced.py wrote (its docstring has the events)."""
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # the run was killed in the middle of its last line
        event = json.loads(line)
        if event["event"] == "done":
            run.finished = True
            run.ran = event["ran"]
            run.mechanisms.update(event["mechanisms"])
            run.handed_on, run.stock, run.left = event["handed_on"], event["stock"], event["left"]
            continue
        record = run.tests.setdefault(event["test"], TestRecord())
        if event["event"] == "end":
            record.ended = True
            record.altered = event["altered"]
            record.unraisable = event["unraisable"]
            run.warnings.update(event["warnings"])
        elif event["event"] == "outcome":
            if event["outcome"] in ("failure", "error"):
                record.bad.setdefault(event["subtest"], []).append(event["detail"])
            elif event["outcome"] == "skip":
                record.skipped = event["detail"]


def read_excepted(path: Path) -> list[Excepted]:
    """The lines of excepted.txt (its head has the format)."""
    exceptions = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        columns = re.split(r" {2,}", line.strip(), maxsplit=2)
        versions = re.fullmatch(r"(\d+)\.(\d+)(\+|-(\d+)\.(\d+))?", columns[0])
        if len(columns) != 3 or not versions:
            raise SystemExit(f"{path}:{number}: not '<interpreters>  <test>  <reason>': {line}")
        oldest = newest = (int(versions[1]), int(versions[2]))
        if versions[3] == "+":
            newest = (sys.maxsize, 0)
        elif versions[3]:
            newest = (int(versions[4]), int(versions[5]))
        exceptions.append(Excepted(oldest, newest, columns[1], columns[2]))
    return exceptions


def indented(text: str) -> str:
    return "\n".join("    " + line for line in text.rstrip().splitlines())


def compare(
    stock: Run,
    ours: Run,
    excepted: dict[str, str],
    *,
    mechanism: str | None,
    whole: bool,
    again: Callable[[str], str],
) -> tuple[list[str], list[str], int]:
    """What is wrong with `ours`, compared with `stock`; remarks; and how many tests were excepted.

    `whole`: all tests of the module ran, so that an excepted test that did not run does not exist. `again` runs one
    test alone a few times and says how often it failed. That helps whoever reads the fault, and is no second chance.
    """
    faults: list[str] = []
    notes: list[str] = []
    used: set[str] = set()
    for name, record in ours.tests.items():
        reference = stock.tests.get(name, TestRecord())
        new = {sub: texts for sub, texts in record.bad.items() if sub not in reference.bad}
        if new and name in excepted:
            used.add(name)
        elif new:
            # A class that is broken altogether fails hundreds of tests: to run the first few again is enough.
            alone = again(name) if len(faults) < 5 else "not run again"
            for sub, texts in new.items():
                text = indented("\n".join(texts))
                faults.append(f"{name} {sub}".strip() + f" fails only with ours ({alone}):\n{text}")
        if record.skipped is not None and reference.skipped is None and not reference.bad:
            faults.append(f"{name} is skipped only with ours: {record.skipped}")
        if record.altered and not reference.altered:
            faults.append(f"{name} leaves children or threads behind only with ours")
        news = Counter(record.unraisable) - Counter(reference.unraisable)
        if news:
            faults.append(f"{name}: raised where nobody can catch it, only with ours: {', '.join(news)}")
    # Where the run broke off, only that is reported, below.
    for name in sorted(stock.tests.keys() - ours.tests.keys()) if ours.finished else ():
        faults.append(f"{name} ran with the stock class and not with ours")
    for name in sorted(excepted):
        if mechanism == "subprocess" or not whole or not ours.finished:
            # The standard library's own path uses the internals that tests mock, so no test needs to be excepted.
            continue
        if name not in ours.tests:
            faults.append(f"stale exception: {name} does not exist here")
        elif mechanism in (None, "clone") and ours.tests[name].skipped is None and not ours.tests[name].bad:
            faults.append(f"stale exception: {name} passes")
    for what, count in ours.left.items():
        if count > max(stock.left.get(what, 0), 0):
            faults.append(f"{count} {what} left at the end of the run, {stock.left.get(what, 0)} with the stock class")
    for who, run in (("the stock class", stock), ("ours", ours)):
        if not run.finished:
            running = [name for name, record in run.tests.items() if not record.ended and not name.startswith("setUp")]
            faults.append(
                f"the run with {who} did not finish: {run.ending or 'no reason known'} after {len(run.tests)} tests; "
                f"running then: {', '.join(running) or 'no test'}\n" + indented("\n".join(run.log.splitlines()[-60:]))
            )
    if whole:
        faults += usage_faults(ours, mechanism)
    more = ours.warnings - stock.warnings
    if more:
        notes.append("more warnings than with the stock class: " + ", ".join(f"{v} {k}" for k, v in more.items()))
    return faults, notes, len(used)


def usage_faults(ours: Run, mechanism: str | None) -> list[str]:
    """Reasons to think that the run did not use our class, or that the class misreports its mechanism."""
    faults: list[str] = []
    if not ours.finished:
        return faults
    if ours.stock:
        faults.append(f"{ours.stock} spawns went through objects of the stock class: the replacement is not complete")
    if mechanism is None:
        if not ours.mechanisms["clone"] + ours.mechanisms["posix_spawn"]:
            faults.append(f"no child was made by a mechanism of ours: {dict(ours.mechanisms)}")
    elif not ours.mechanisms[mechanism]:
        faults.append(f"no child was made by {mechanism}: {dict(ours.mechanisms)}")
    if ours.handed_on > ours.mechanisms["subprocess"] + ours.mechanisms["none"]:
        faults.append(
            f"the standard library's own path ran {ours.handed_on} times, and .mechanism said so only "
            f"{ours.mechanisms['subprocess']} times"
        )
    return faults


def test_interpreter(interpreter: Interpreter, options: argparse.Namespace, exceptions: list[Excepted]) -> list[Row]:
    """The rows of the table for one interpreter."""
    rows = []
    with locked(VENVS / f"{interpreter.tag}.lock"):
        paths = list(options.path) if options.path else installed(interpreter, say=True)
        for module in options.module or MODULES:

            def run(ours: bool, match: list[str] | None, mechanism: str | None = None, module: str = module) -> Run:
                return run_module(
                    interpreter,
                    module,
                    popen=options.popen if ours else None,
                    paths=paths if ours else [],
                    mechanism=mechanism,
                    match=match,
                    timeout=options.timeout,
                )

            stock = run(False, options.match)
            excepted = {
                e.test: e.reason
                for e in exceptions
                if e.oldest <= interpreter.version <= e.newest and e.test.startswith(module + ".")
            }
            for mechanism in options.mechanism or [None]:
                ours = run(True, options.match, mechanism)

                def again(test: str, mechanism: str | None = mechanism, run: Callable[..., Run] = run) -> str:
                    times = 3
                    counts = []
                    for with_ours in (True, False):
                        runs = [run(with_ours, [test], mechanism) for _ in range(times)]
                        counts.append(sum(bool(r.failed()) or not r.finished for r in runs))
                    return f"alone: ours {counts[0]} of {times} times, stock {counts[1]} of {times}"

                faults, notes, used = compare(
                    stock, ours, excepted, mechanism=mechanism, whole=not options.match, again=again
                )
                rows.append(
                    Row(
                        interpreter.tag + (f" {mechanism}" if mechanism else ""),
                        module,
                        ours.ran,
                        len(stock.failed()),
                        len(ours.failed()),
                        used,
                        " ".join(f"{name}:{count}" for name, count in sorted(ours.mechanisms.items())) or "none",
                        stock.seconds + ours.seconds,
                        tuple(faults),
                        tuple(notes),
                    )
                )
    return rows


def print_table(rows: list[Row]) -> None:
    head = ("interpreter", "module", "tests", "stock failed", "ours failed", "excepted", "spawns by mechanism", "s", "")
    lines = [
        (
            row.interpreter,
            row.module,
            str(row.ran),
            str(row.stock_failed),
            str(row.ours_failed),
            str(row.excepted),
            row.mechanisms,
            f"{row.seconds:.0f}",
            f"{len(row.faults)} FAULTS" if row.faults else "ok",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    for line in [head, *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--python", action="append", default=[], help="interpreter to test with (default: all found)")
    parser.add_argument(
        "--mechanism", action="append", choices=MECHANISMS, help="force it with RANKSPAWN_MECHANISM (may be repeated)"
    )
    parser.add_argument("--module", action="append", help=f"test module (default: {', '.join(MODULES)})")
    parser.add_argument("--match", action="append", help="run only the tests whose full name matches (*_shell_*)")
    parser.add_argument("--popen", default="rankspawn:Popen", help="module:attribute of the class (%(default)s)")
    parser.add_argument("--path", action="append", help="import that module from this folder, and install nothing")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one module in one run (%(default)s)")
    parser.add_argument("--jobs", "-j", type=int, default=1, help="interpreters to run at the same time (%(default)s)")
    options = parser.parse_args()

    exceptions = read_excepted(HERE / "excepted.txt")
    interpreters, passed_over = find_interpreters(options.python, with_tests=True)
    for message in passed_over:
        print(f"passed over: {message}")
    if not interpreters:
        print("no interpreter to test with was found: see --python", file=sys.stderr)
        return 1
    print("testing with: " + ", ".join(i.tag for i in interpreters), flush=True)

    rows: list[Row] = []
    broken: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        futures = {i.tag: pool.submit(test_interpreter, i, options, exceptions) for i in interpreters}
        for tag, future in futures.items():
            try:
                rows += future.result()
            except SetupError as error:
                broken.append(f"{tag}: {error}")
    for row in rows:
        for text in (*row.faults, *(f"note: {note}" for note in row.notes)):
            print(f"\n{row.interpreter} {row.module}: {text}")
    for text in broken:
        print(f"\n{text}")
    print()
    print_table(rows)
    return 1 if broken or any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
