"""Error files as torch's own ``@record`` writes them, and the choice of the first failure beside torch's."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from rankspawn import Popen
from rankspawn._output.failure import Failure, describe, first_failure
from rankspawn._output.logs import RankFiles, rank_files
from rankspawn._output.recorded import pass_on, read_error_file

errors = pytest.importorskip("torch.distributed.elastic.multiprocessing.errors", reason="torch is not installed")

HEAD = """
import os, signal, sys, time
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record

class Unlucky(Exception):
    pass

@record
def main():
"""
ENDS = {
    "returns": "return 1",
    "raises": "print('a warning', file=sys.stderr); raise Unlucky('bo\\u00f6m\\nsecond line')",
    "exits": "sys.exit(3)",
    "is killed": "os.kill(os.getpid(), signal.SIGSEGV)",
    "launches": "raise ChildFailedError('trainer', {0: ProcessFailure(0, 4242, -11, os.environ['OF_A_CHILD'])})",
}


@dataclass
class Ended:
    """A rank that ended, and what it left."""

    returncode: int
    pid: int
    files: RankFiles


@pytest.fixture(scope="module", params=ENDS)
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("logs")
    (files,) = rank_files(str(folder), 1)
    child = folder / "child.json"
    child.write_text('{"message": {"message": "of a child", "extraInfo": {"timestamp": "5", "py_callstack": "deep"}}}')
    environment = {**os.environ, "TORCHELASTIC_ERROR_FILE": files.error, "OF_A_CHILD": str(child)}
    command = [sys.executable, "-c", f"{HEAD}    {ENDS[request.param]}\nmain()"]
    with Popen(command, env=environment, stdout=files.stdout, stderr=files.stderr) as rank:
        return Ended(rank.wait(120), rank.pid, files)


def test_read_as_torch_reads_it(ended: Ended) -> None:
    ours, theirs = (
        read_error_file(ended.files.error),
        errors.ProcessFailure(0, ended.pid, ended.returncode, ended.files.error),
    )
    if ours is None:
        assert theirs.error_file == "<N/A>"
        return
    assert not ours.problem
    data = theirs.error_file_data["message"]
    assert (ours.message, ours.time) == (data["message"], theirs.timestamp)
    assert ours.traceback == data["extraInfo"]["py_callstack"]


@pytest.mark.parametrize("ended", ["raises", "launches"], indirect=True)
def test_passed_on_as_torch_passes_it_on(ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = read_error_file(ended.files.error)
    assert error is not None
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    pass_on(error, ended.returncode, ours)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(theirs))
    errors.get_error_handler().dump_error_file(ended.files.error, ended.returncode)
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


@pytest.mark.parametrize("ended", ["raises"], indirect=True)
def test_told(ended: Ended) -> None:
    """The interpreter wrote the same traceback to the end of stderr, so it is shown only once."""
    files = ended.files
    told = describe(Failure(0, ended.returncode, 0.0, ended.pid, files=files, error=read_error_file(files.error)))
    lines = told.splitlines()
    assert lines[0] == f"rank 0 (pid {ended.pid}) exited with status 1"
    assert lines[1].startswith("  it recorded, at 2")
    assert lines[1].endswith(": Unlucky: boöm")
    assert lines[2] == "    Traceback (most recent call last):"
    assert lines[-3:] == ["    Unlucky: boöm", "    second line", f"  its files are in {os.path.dirname(files.error)}"]


@pytest.mark.parametrize("times", [(5, 3, 4), (3, 5, 4), (4, 4, 3), (4, 3, 3)])
def test_the_same_rank_is_the_first(tmp_path: Path, times: tuple[int, ...]) -> None:
    ours, theirs = [], {}
    for rank, when in enumerate(times):
        path = tmp_path / f"{rank}.json"
        path.write_text(json.dumps({"message": {"message": "m", "extraInfo": {"timestamp": str(when)}}}))
        ours.append(Failure(rank, 1, 10.0 + rank, error=read_error_file(path)))
        theirs[rank] = errors.ProcessFailure(rank, 1, 1, str(path))
    assert first_failure(ours).rank == errors.ChildFailedError("job", theirs).get_first_failure()[0]
