"""Run one of CPython's own test modules with ``subprocess.Popen`` replaced, and say in JSON lines what happened.

`run.py` starts this file in each tested interpreter, once with ``--popen`` (ours) and once without (the stock class).
Everything else is the same in the two runs, so that a difference in their results comes from the classes.

The report is a file that is opened, appended to and closed for every line. It is never held open, because the tests of
`subprocess` look at the file descriptors of this very process. Each line is an object with an ``event``:

``start``    a test begins; a crash or a time-out interrupted the last one that has no ``end``
``outcome``  one result (a test can have several: its sub-tests, its body, its tear-down)
``end``      the test is over; carries what it left in the interpreter's hooks
``done``     the module is over; carries the counts and what the whole run left behind
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # The tests must find CPython's `test` package and nothing of the folder that this file lies in.
    del sys.path[0]

import argparse
import collections
import faulthandler
import functools
import gc
import importlib
import json
import os
import subprocess
import threading
import traceback
import unittest
import warnings
from typing import Any

# Kept under a name of our own: `subprocess.Popen` is about to mean something else.
StockPopen = subprocess.Popen


class Report:
    """Appends JSON lines to a file without holding it open between two lines."""

    def __init__(self, path: str) -> None:
        self._path = path

    def write(self, event: str, **fields: object) -> None:
        line = json.dumps({"event": event, **fields}, ensure_ascii=True) + "\n"
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, line.encode("ascii"))
        finally:
            os.close(fd)


class Spawns:
    """Counts calls of ``_execute_child``: which class was asked, and by which mechanism the child was made."""

    def __init__(self) -> None:
        # Calls of our class, by its attribute `mechanism` after the call ("none": it failed before it chose one).
        self.by_mechanism: collections.Counter[str] = collections.Counter()
        # Calls of the stock method by an object of our class, which handed the call on.
        self.handed_on = 0
        # Calls of the stock method by an object that is not of our class: it escaped the replacement.
        self.stock = 0

    def watch_stock(self, ours: type | None) -> None:
        original: Any = StockPopen._execute_child  # type: ignore[attr-defined]

        @functools.wraps(original)
        def watched(popen: Any, *args: Any, **kwargs: Any) -> Any:
            if ours is not None and isinstance(popen, ours):
                self.handed_on += 1
            else:
                self.stock += 1
            return original(popen, *args, **kwargs)

        StockPopen._execute_child = watched  # type: ignore[attr-defined]

    def watch_ours(self, ours: Any) -> None:
        original = ours._execute_child

        @functools.wraps(original)
        def watched(popen: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(popen, *args, **kwargs)
            finally:
                # A failed spawn counts too: half of the tests are about failing as the stock class does.
                self.by_mechanism[str(getattr(popen, "mechanism", None) or "none")] += 1

        ours._execute_child = watched


def replace_popen(where: str, spawns: Spawns) -> None:
    """Put the class named by `where` (``module:attribute``) in place of `subprocess.Popen`, everywhere.

    `subprocess.run`, `call`, `check_output` and asyncio's transport look the class up in `subprocess` when they are
    called. In a module that has already done ``from subprocess import Popen``, that name is replaced as well. The
    package of our class is left alone, because it needs the stock class as its base.
    """
    module_name, _, attribute = where.partition(":")
    ours = getattr(importlib.import_module(module_name), attribute)
    if ours is StockPopen or not issubclass(ours, StockPopen):
        raise SystemExit(f"{where} is not a subclass of subprocess.Popen")
    # The class may be defined in another package than the one that was named.
    packages = {module_name.partition(".")[0], ours.__module__.partition(".")[0]}
    spawns.watch_stock(ours)
    spawns.watch_ours(ours)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages or name == __name__:
            continue
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if value is StockPopen:
                setattr(module, key, ours)
    assert subprocess.Popen is ours


class Result(unittest.TextTestResult):
    """Writes the usual text for people, and the same as JSON lines for `run.py`."""

    report: Report

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unraisable: list[str] = []
        self._warnings: list[str] = []
        self._show_warning = warnings.showwarning

    def startTestRun(self) -> None:
        super().startTestRun()
        # No assertion sees what a `__del__` raises or warns of, so it is collected here, test by test. Tests that
        # expect it replace this hook with their own for that time.
        sys.unraisablehook = self._unraisable_raised
        self._show_warning = warnings.showwarning
        warnings.showwarning = self._warning_shown

    def stopTestRun(self) -> None:
        warnings.showwarning = self._show_warning
        sys.unraisablehook = sys.__unraisablehook__
        super().stopTestRun()

    def _unraisable_raised(self, unraisable: sys.UnraisableHookArgs) -> None:
        lines = traceback.format_exception_only(unraisable.exc_type, unraisable.exc_value)
        self._unraisable.append("".join(lines).strip())
        sys.__unraisablehook__(unraisable)

    def _warning_shown(self, message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        self._warnings.append(category.__name__)
        self._show_warning(message, category, *args, **kwargs)

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._unraisable.clear()
        self._warnings.clear()
        self.report.write("start", test=test.id())

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        # CPython's runner fails a test that leaves children or threads behind. Its flag is in a module that only the
        # tests import; after an early failure the module may not have been imported.
        support = sys.modules.get("test.support")
        altered = bool(getattr(support, "environment_altered", False))
        if support is not None and altered:
            setattr(support, "environment_altered", False)  # noqa: B010 - the name exists at run time only
        self.report.write(
            "end", test=test.id(), altered=altered, unraisable=list(self._unraisable), warnings=list(self._warnings)
        )

    def _outcome(self, test: unittest.TestCase, outcome: str, detail: str = "", subtest: str = "") -> None:
        self.report.write("outcome", test=test.id(), subtest=subtest, outcome=outcome, detail=detail)

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self._outcome(test, "success")

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        self._outcome(test, "error", self.errors[-1][1])

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self._outcome(test, "failure", self.failures[-1][1])

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self._outcome(test, "skip", reason)

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addExpectedFailure(test, err)
        self._outcome(test, "success", "expected failure")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        super().addUnexpectedSuccess(test)
        self._outcome(test, "failure", "unexpected success")

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            kind = "failure" if issubclass(err[0], test.failureException) else "error"
            self._outcome(test, kind, "".join(traceback.format_exception(*err)), subtest.id()[len(test.id()) :].strip())


def open_fds() -> int:
    """How many file descriptors this process has open, without the one that lists them."""
    return len(os.listdir("/dev/fd")) - 1


def unreaped_children() -> int:
    """How many children of this process nobody has waited for. This reaps those that have ended; those that still run
    count as one."""
    count = 0
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return count
        count += 1
        if pid == 0:
            return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--report", required=True, help="file to append the JSON lines to")
    parser.add_argument("--popen", help="module:attribute of the class to put in place (default: the stock class)")
    parser.add_argument("--path", action="append", default=[], help="folder to import that module from")
    parser.add_argument("--match", action="append", help="run only the tests whose full name matches this pattern")
    parser.add_argument("module", help="dotted name of the test module")
    options = parser.parse_args()

    faulthandler.enable()  # run.py ends a run that takes too long with SIGABRT: the log then shows where it hung.
    report = Report(options.report)
    Result.report = report
    spawns = Spawns()
    sys.path[:0] = options.path
    if options.popen:
        replace_popen(options.popen, spawns)
    else:
        spawns.watch_stock(None)

    # Imported after the replacement, because the test modules derive their own classes from `subprocess.Popen`.
    loader = unittest.TestLoader()
    loader.testNamePatterns = options.match
    tests = loader.loadTestsFromName(options.module)
    gc.collect()
    fds = open_fds()
    result = unittest.TextTestRunner(resultclass=Result, verbosity=2).run(tests)
    ran = result.testsRun
    del tests, result
    gc.collect()
    report.write(
        "done",
        ran=ran,
        mechanisms=dict(spawns.by_mechanism),
        handed_on=spawns.handed_on,
        stock=spawns.stock,
        # What the whole module left behind. It is a fault only if it is more than the stock class leaves.
        left={
            "file descriptors": open_fds() - fds,
            "children": unreaped_children(),
            "threads": threading.active_count() - 1,
        },
    )


if __name__ == "__main__":
    main()
