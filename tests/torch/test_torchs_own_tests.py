"""torch's own tests of elastic multiprocessing: they end with ours installed as they do without.

torch's wheels have no tests. Give a checkout of pytorch, of the version that is installed, in RANKSPAWN_PYTORCH:

    git clone --depth 1 --branch v2.13.0 https://github.com/pytorch/pytorch
    RANKSPAWN_PYTORCH=pytorch make test-torch PYTEST_ARGS="-k own_tests"

Debian's source package of pytorch has them as well. They take half an hour; expecttest must be installed and, for those
of the agent, etcd and python-etcd. A file runs as it is, and then as a copy that installs ours first: its own children,
which import it again, are to have ours as well. Some of these tests depend on which of two ranks the
system gives more time; one that ends in two ways is run again, alone, until it ends as the other did.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CHECKOUT = Path(os.environ.get("RANKSPAWN_PYTORCH", "nowhere")) / "test" / "distributed" / "elastic"
# Those that start workers. The folder's others test rendezvous, timers and metrics, in which we have no part.
FILES = [
    "multiprocessing/api_test.py",
    "agent/server/test/local_elastic_agent_test.py",
    "agent/server/test/shutdown_timeout_test.py",
]

TRIES = 5

pytestmark = [
    pytest.mark.skipif("RANKSPAWN_PYTORCH" not in os.environ, reason="RANKSPAWN_PYTORCH names no checkout of pytorch"),
    pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed"),
    pytest.mark.skipif(find_spec("expecttest") is None, reason="expecttest, which torch's tests need, is missing"),
]

INSTALL = "import rankspawn.torchrun\nrankspawn.torchrun.install()\n"
# The name of each test and how it ended; torch's own skips are included.
DRIVER = """
import importlib, json, sys, unittest
sys.path.insert(0, sys.argv[1])
class Result(unittest.TextTestResult):
    ended = {}
    def stopTest(self, test):
        self.ended.setdefault(test.id(), "passed")
        super().stopTest(test)
    def addSkip(self, test, reason):
        self.ended[test.id()] = "skipped: " + reason
        super().addSkip(test, reason)
    def addFailure(self, test, error):
        self.ended[test.id()] = "failed: " + error[0].__name__
        super().addFailure(test, error)
    def addError(self, test, error):
        self.ended[test.id()] = "failed: " + error[0].__name__
        super().addError(test, error)
    def addSubTest(self, test, subtest, error):
        if error:
            self.ended[test.id()] = "failed: " + error[0].__name__
        super().addSubTest(test, subtest, error)
if __name__ == "__main__":
    module = importlib.import_module(sys.argv[2])
    loader, names = unittest.defaultTestLoader, sys.argv[4:]
    suite = loader.loadTestsFromNames(names) if names else loader.loadTestsFromModule(module)
    unittest.TextTestRunner(verbosity=2, resultclass=Result).run(suite)
    with open(sys.argv[3], "w") as told:
        json.dump(Result.ended, told)
"""


class Copy:
    """A test file of torch's in a folder of its own, beside links to what it uses."""

    def __init__(self, folder: Path, file: Path, first: str) -> None:
        folder.mkdir()
        for one in file.parent.iterdir():
            if one != file:
                (folder / one.name).symlink_to(one)
        (folder / file.name).write_text(first + file.read_text())
        (folder / "driver.py").write_text(DRIVER)
        self.folder, self.module = folder, file.stem

    def run(self, *names: str) -> dict[str, str]:
        """How each test ends, or each of those that are named."""
        told, environment = self.folder / "told.json", dict(os.environ)
        for name in [name for name in environment if name.startswith("PYTEST_")]:
            del environment[name]  # some of torch's skip themselves under pytest
        # Their programs begin with "#!/usr/bin/env python3".
        environment.update(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", TMPDIR=str(self.folder))
        with open(self.folder / "log", "w") as log:
            subprocess.run(
                [sys.executable, "driver.py", str(self.folder), self.module, str(told), *names],
                stdout=log, stderr=log, timeout=3000, env=environment, cwd=self.folder, check=False,
            )  # fmt: skip
        assert told.exists(), (self.folder / "log").read_text()[-4000:]
        ended: dict[str, str] = json.loads(told.read_text())
        told.unlink()
        return ended


@pytest.mark.parametrize("name", FILES)
def test_own_tests(name: str, tmp_path: Path) -> None:
    file = CHECKOUT / name
    if not file.exists():
        pytest.skip(f"{file} is not there")
    theirs, ours = Copy(tmp_path / "torchs", file, ""), Copy(tmp_path / "ours", file, INSTALL)
    ended, with_ours = theirs.run(), ours.run()
    assert len(ended) > 5
    for test in [test for test in ended if with_ours.get(test) != ended[test]]:
        for _ in range(TRIES):
            print(f"{test}: {ended[test]}; with ours: {with_ours.get(test)}")
            if ended[test] == "passed":
                with_ours.update(ours.run(test))
            else:
                ended.update(theirs.run(test))
            if ended[test] == with_ours[test]:
                break
    for end in ("passed", "skipped", "failed"):
        print(name, end, len([one for one in ended.values() if one.startswith(end)]))
    assert with_ours == ended
