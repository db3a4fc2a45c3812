"""What a group says of its ranks: that they failed, and why, as an error; who they are; in which state it is."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rankspawn import Failure, Job, Popen, RanksFailedError, Topology, launch, place
from tests.support.sysfs_tree import Machine, write

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals of sessions")

FAILS = ["/bin/sh", "-c", 'test "$LOCAL_RANK" = 1 || exec sleep 60; echo why >&2; exit 3']


def test_a_failure_is_raised_where_it_was_asked_for(tmp_path: Path) -> None:
    with launch(FAILS, 3, log_dir=tmp_path) as group:
        with pytest.raises(RanksFailedError) as raised:
            group.wait(60, check=True)
    error = raised.value
    assert isinstance(error, subprocess.CalledProcessError)
    assert (error.returncode, error.cmd) == (3, FAILS)
    assert [failure.rank for failure in error.failures] == [1, 0, 2]
    assert error.failures[0].output is not None and error.failures[0].output.lines == ("why",)
    assert str(error).splitlines() == [*str(error.failures[0]).splitlines(), "  others: 0,2 killed by SIGTERM"]
    assert f"  its files are in {tmp_path}/attempt_0/1\n" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (again.failures, again.cmd, str(again)) == (error.failures, error.cmd, str(error))


def test_what_a_rank_wrote_to_a_temporary_file_is_known_after_the_group() -> None:
    with launch(FAILS, 2, tee=True) as group:
        with pytest.raises(RanksFailedError) as raised:
            group.wait(60, check=True)
    assert "  its stderr ends with:\n    why" in str(raised.value)
    assert "files are in" not in str(raised.value)  # they are gone


def test_nothing_is_raised_where_nothing_failed() -> None:
    with launch(["/bin/true"], 2) as group:
        group.check()
        assert group.wait(60, check=True) == (0, 0)
        group.check()


def test_a_failure_so_far_is_raised_while_others_run() -> None:
    with launch(FAILS, 2, keep_going=True, job=Job(2, 29500, nnodes=2, node_rank=1)) as group:
        group.check()
        assert group.wait_any(60) == [1]
        with pytest.raises(
            RanksFailedError, match=r"^rank 3 \(pid \d+\) exited with status 3\n  it ended at .*, after [\d.]+ s$"
        ) as raised:
            group.check()
        (failure,) = raised.value.failures
        assert (failure.rank, failure.local_rank) == (3, 1)
        assert failure.pid == group[failure.local_rank].pid
        assert group.running == (0,)


def test_the_text_of_a_failure_is_the_commands() -> None:
    assert str(Failure(7, 2, 0.0)) == "rank 7 exited with status 2"


def test_a_group_is_a_sequence_of_its_ranks() -> None:
    with launch(["/bin/true"], 3) as group:
        assert len(group) == 3
        assert list(group) == list(group.ranks)
        assert isinstance(group[0], Popen) and group[-1] is group.ranks[2] and group[1:] == group.ranks[1:]
        with pytest.raises(IndexError):
            group[3]
        group.wait(60)


def test_the_state_of_a_group_is_in_its_repr() -> None:
    with launch(FAILS, 2, keep_going=True) as group:
        assert repr(group) == "<RankGroup of 2 ranks: all run>"
        group.wait_any(60)
        assert repr(group) == "<RankGroup of 2 ranks: 1 run, rank 1 failed first>"
        group.stop()
        assert repr(group) == "<RankGroup of 2 ranks: 1 run, rank 1 failed first, asked to end>"
        group.wait(60)
        assert repr(group) == "<RankGroup of 2 ranks: all have ended, rank 1 failed first>"
    assert repr(group) == "<RankGroup of 2 ranks: all have ended, rank 1 failed first, closed>"
    with launch(["/bin/true"], 1) as group:
        group.wait(60)
        assert repr(group) == "<RankGroup of 1 rank: all have ended>"


def test_figures_are_texts_that_a_notebook_shows(tmp_path: Path) -> None:
    topology = Topology.read(write(tmp_path, Machine(sockets=2, cores=2)))
    bindings = place(topology, "node", nprocs=2, devices=[])
    drawn = topology.svg(bindings)
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert f"rank 1: {bindings[1]}" in drawn and "rank 1" not in topology.svg()
    assert topology.svg([None]) and topology.svg(devices=[], distances=True)
    assert drawn._repr_svg_() == drawn and topology._repr_svg_() == topology.svg()
    with launch(FAILS, 2) as group:
        group.wait(60)
        drawn = group.timeline()
    assert ElementTree.fromstring(drawn._repr_svg_()).tag.endswith("svg")
    assert "exit 3" in drawn and "SIGTERM" in drawn
