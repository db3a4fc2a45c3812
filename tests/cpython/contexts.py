"""Runs CPython's own tests of multiprocessing with our context in place of the stock one of the same name.

    python tests/cpython/contexts.py spawn
    python tests/cpython/contexts.py forkserver --match '*TestProcess*'
    python tests/cpython/contexts.py --stock spawn

Run it by hand, in an interpreter that has rankspawn, when a context or a Python is new: it takes minutes. The tests are
those of `test._test_multiprocessing`, put together as in `test.test_multiprocessing_spawn`. They run in parts, each in
an interpreter of its own, because some of them set the start method of the program and leave it so.
"""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import subprocess
import sys
import unittest

if __name__ == "__main__":
    # The tests must find CPython's `test` package and nothing of the folder that this file lies in.
    del sys.path[0]

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
parser.add_argument("--stock", action="store_true", help="leave the stock context where it is")
parser.add_argument("--match", action="append", help="run only the tests whose full name matches this pattern")
parser.add_argument("--part", help=argparse.SUPPRESS)
parser.add_argument("method", choices=["spawn", "forkserver"])
# Processes of the tests run this module too, with the same arguments, because what they unpickle is defined here.
options = parser.parse_args(sys.argv[1:])

if options.part:
    from test import _test_multiprocessing, support

    support.use_resources = None  # all of them
    install = _test_multiprocessing.install_tests_in_module_dict
    if options.part == "all":
        install(globals(), options.method)
    elif options.part == "others":
        install(globals(), options.method, exclude_types=True)
    else:
        install(globals(), options.method, only_type=options.part)


def put_ours_in_place() -> list[int]:
    """Put our context in place; return a list that gets the pids of the processes that it starts from now on."""
    from multiprocessing import context

    import rankspawn
    from rankspawn._multiprocessing import methods as _context_popen

    ours = rankspawn.get_context(options.method, [rankspawn.Binding(os.sched_getaffinity(0))])
    context._concrete_contexts[options.method] = ours  # type: ignore[attr-defined]
    started: list[int] = []
    launched = _context_popen._BoundPopen.__init__

    def noted(self: _context_popen._BoundPopen, *arguments: object) -> None:
        launched(self, *arguments)
        started.append(self.pid)

    _context_popen._BoundPopen.__init__ = noted  # type: ignore[method-assign]
    return started


def run_part() -> bool:
    # The tests send SIGINT. A shell ignores SIGINT for its background commands, and Python would leave it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started = [] if options.stock else put_ours_in_place()
    loader = unittest.TestLoader()
    loader.testNamePatterns = options.match
    result = unittest.TextTestRunner().run(loader.loadTestsFromModule(sys.modules["__main__"]))
    print(f"{options.method} {options.part}: {len(started)} processes were started by ours", file=sys.stderr)
    return result.wasSuccessful()


def main() -> int:
    if options.part:
        return not run_part()
    from test import _test_multiprocessing

    parts = ["processes", "threads", "manager", "others"]
    if "only_type" not in inspect.signature(_test_multiprocessing.install_tests_in_module_dict).parameters:
        parts = ["all"]  # Python 3.10 does not know parts
    command = [sys.executable, __file__, *sys.argv[1:], "--part"]
    return sum(subprocess.run([*command, part]).returncode != 0 for part in parts)


if __name__ == "__main__":
    sys.exit(main())
