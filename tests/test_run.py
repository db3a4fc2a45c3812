"""``rankspawn run``'s own options: what it does when ranks fail, what it shows, what it writes, what it survives."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from rankspawn._ids import format_ids
from tests.support.launchers import (
    ENVIRONMENT,
    LAUNCHER,
    SAY,
    SLEEP,
    TIMEOUT,
    after,
    completed,
    environment_here,
    in_ranks,
    launched,
    said,
    with_grace,
)
from tests.support.processes import eventually, has_ended, new_cgroup, state
from tests.support.terminals import on_terminal

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sessions, signals and terminals are asked for")
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")

# How a program begins that does not do the same in each attempt.
ATTEMPT = SAY + "attempt, rank = int(os.environ['TORCHELASTIC_RESTART_COUNT']), os.environ['RANK']\n"

# The second line of what is said of a failure.
ENDED = r"  it ended at 2\d{3}-\d\d-\d\d \d\d:\d\d:\d\d, after [\d.]+ s\n"

TOGETHER = ["--stdin", "all", "--nproc-per-node"]  # the end of stdin is for all ranks


# ---- failure --------------------------------------------------------------------------------------------------------


def test_the_others_go_on_where_that_is_asked_for() -> None:
    # The other ranks wait for the end of stdin, so that rank 1 fails first.
    code = SAY + "if os.environ['RANK'] == '1': sys.exit(3)\nsys.stdin.read()\nsay('done')\n"
    with launched(in_ranks(code, *TOGETHER, "3", "--keep-going"), stdin=subprocess.PIPE) as job:
        assert job.stderr.readline() == "rankspawn: rank 1 has failed\n"
        assert job.process.stdin is not None
        job.process.stdin.close()
        assert job.hear(2) == {0: "done", 2: "done"}
        assert job.end() == 3
        assert re.fullmatch(rf"rankspawn: rank 1 \(pid \d+\) exited with status 3\n{ENDED}", job.stderr.read())


def test_the_first_of_several_failures_is_the_jobs() -> None:
    code = SAY + "rank = int(os.environ['RANK'])\nif rank: sys.stdin.read()\nsys.exit(10 + rank)\n"
    with launched(in_ranks(code, *TOGETHER, "3", "--keep-going"), stdin=subprocess.PIPE) as job:
        assert job.stderr.readline() == "rankspawn: rank 0 has failed\n"
        # In whole seconds all failures would be at once, and rank 0, the lowest, would be the first all the same.
        assert job.process.stdin is not None
        job.process.stdin.close()
        assert job.end() == 10
        assert "others: 1 exit status 11; 2 exit status 12" in job.stderr.read()


def test_a_job_is_started_again_until_it_does_not_fail(tmp_path: Path) -> None:
    code = ATTEMPT + (
        "say([attempt, os.environ['TORCHELASTIC_MAX_RESTARTS'], int(os.environ['MASTER_PORT'])])\n"
        "print('rank', rank, 'of attempt', attempt, file=sys.stderr)\n"
        "if attempt < 2 and rank == '1': sys.exit(4)\n"
    )
    logs, report = tmp_path / "logs", tmp_path / "report.json"
    options = ["--nproc-per-node", "2", "--max-restarts", "5", "--log-dir", str(logs), "--report", str(report)]
    done = completed([*in_ranks(code, *options)])
    assert (done.returncode, done.stdout) == (0, "")
    assert [line for line in done.stderr.splitlines() if "restart" in line] == [
        "rankspawn: restart 1 of 5",
        "rankspawn: restart 2 of 5",
    ]
    told = {}
    folder = logs / os.readlink(logs / "latest")
    for attempt in range(3):
        for rank in range(2):
            files = folder / f"attempt_{attempt}" / str(rank)
            if rank == 1 or attempt == 2:  # rank 0 may have been ended before it said anything
                told[attempt, rank] = said((files / "stdout.log").read_text())[rank]
                assert (files / "stderr.log").read_text() == f"rank {rank} of attempt {attempt}\n"
    assert [told[attempt, 1][:2] for attempt in range(3)] == [[0, "5"], [1, "5"], [2, "5"]]
    assert told[2, 0] == told[2, 1]
    assert len({told[attempt, 1][2] for attempt in range(3)}) == 3, "each attempt has a port of its own"
    attempts = json.loads(report.read_text())["attempts"]
    assert [one["ranks"][1]["exit"]["returncode"] for one in attempts] == [4, 4, 0]
    assert [one["attempt"] for one in attempts] == [0, 1, 2]


def test_the_status_is_that_of_the_last_attempt() -> None:
    code = ATTEMPT + "sys.exit(20 + attempt)\n"
    done = completed(in_ranks(code, "--max-restarts", "2"))
    assert done.returncode == 22
    assert re.findall(r"exited with status (\d+)", done.stderr) == ["20", "21", "22"]


def test_a_named_port_is_every_attempts() -> None:
    code = ATTEMPT + "say(os.environ['MASTER_PORT'])\nsys.exit(attempt == 0)\n"
    done = completed(in_ranks(code, "--max-restarts", "1", "--master-port", "29511"))
    assert done.returncode == 0
    assert done.stdout == '[0, "29511"]\n' * 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_what_a_signal_ends_is_not_started_again(name: str) -> None:
    with launched(in_ranks(SLEEP, "--nproc-per-node", "2", "--max-restarts", "3")) as job:
        job.hear(2)
        number = signal.Signals[name]
        job.process.send_signal(number)
        assert job.end() == 128 + number
        told = job.stderr.read()
        assert f"rankspawn: {name}: ending the ranks\n" in told and "restart" not in told


def test_a_signal_after_a_failure_lets_nothing_start_again() -> None:
    code = SAY + (
        "def end(number, frame):\n"
        "    os.kill(os.getppid(), signal.SIGTERM)\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "say('ready')\n"
        "if os.environ['RANK'] == '0': sys.stdin.read(); sys.exit(5)\n"
        "time.sleep(120)\n"
    )
    command = in_ranks(code, "--nproc-per-node", "2", "--max-restarts", "3")
    with launched(command, stdin=subprocess.PIPE) as job:
        job.hear(2)
        assert job.process.stdin is not None
        job.process.stdin.close()
        assert job.end() == 5  # the failure was first
        assert "restart" not in job.stderr.read()


def test_what_is_told_of_the_first_failure(tmp_path: Path) -> None:
    code = SAY + (
        "print('\\n'.join(f'line {number}' for number in range(30)), file=sys.stderr, flush=True)\n"
        "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(120)\n"
    )
    cpu = min(os.sched_getaffinity(0)) if sys.platform == "linux" else 0
    binding = ["--cpus", str(cpu)] if sys.platform == "linux" else []
    done = completed(in_ranks(code, "--nproc-per-node", "2", "--log-dir", str(tmp_path), "--no-stacks", *binding))
    assert done.returncode == 137
    folder = tmp_path / os.readlink(tmp_path / "latest")
    last = "".join(f"    line {number}\n" for number in range(10, 30))
    # What is counted before a death is read once the ranks have lived for a quarter of a second, as on a busy machine.
    why = r"(?:  why: no out-of-memory kill was counted .*\n)?"
    bound = rf"  it was bound to cpus {cpu}.*\n" if binding else ""
    assert re.fullmatch(
        rf"rankspawn: logs in {folder}\n"
        r"rankspawn: rank 1 has failed: ending the others\n"
        r"rankspawn: rank 1 \(pid \d+\) was killed by SIGKILL \(.*\)\n"
        rf"{ENDED}{why}{bound}  its stderr ends with:\n{last}  its files are in {folder}/attempt_0/1\n"
        r"  others: 0 killed by SIGTERM\n",
        done.stderr,
    ), done.stderr


RAISES = (
    "import os, time\n"
    "rank = int(os.environ['RANK'])\n"
    "if rank > 1: time.sleep(120)\n"
    "def step(): raise RuntimeError('boom')\n"
    "step()\n"
)


def test_ranks_that_raise_alike_are_told_in_a_line(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(RAISES.replace("if rank > 1: time.sleep(120)", ""))
    done = completed(
        [*LAUNCHER, "run", "--nproc-per-node", "4", "--keep-going", "--log-dir", str(tmp_path), str(script)]
    )
    (first,) = re.findall(r"^rankspawn: rank (\d) \(pid", done.stderr, re.MULTILINE)
    others = format_ids({0, 1, 2, 3} - {int(first)})
    assert done.stderr.endswith(f"\n  ranks {others}: RuntimeError: boom (train.py:4)\n"), done.stderr
    assert done.stderr.count("Traceback") == 1


@pytest.mark.parametrize("stderr_is_shown", [True, False])
def test_a_traceback_is_on_the_screen_once(tmp_path: Path, stderr_is_shown: bool) -> None:
    script = tmp_path / "train.py"
    script.write_text(RAISES.replace("rank > 1", "rank"))
    tee = ["--tee"] if stderr_is_shown else ["--tee", "1", "--redirects", "2"]
    done = completed([*LAUNCHER, "run", "--nproc-per-node", "2", *tee, "--log-dir", str(tmp_path), str(script)])
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    if stderr_is_shown:
        assert "\n[rank 0]:RuntimeError: boom\n" in done.stderr
        assert (
            "\n  why: RuntimeError: boom (train.py:4)\n  what it wrote to stderr is shown above, behind [rank 0]:\n"
        ) in done.stderr
    else:
        assert "\n  its stderr ends with:\n    Traceback" in done.stderr


def test_what_tee_could_not_show_is_quoted(tmp_path: Path) -> None:
    """A rank that the filter hides has no lines above."""
    script = tmp_path / "train.py"
    script.write_text(RAISES.replace("rank > 1", "rank"))
    done = completed([*LAUNCHER, "run", "--nproc-per-node", "2", "--tee", "--local-ranks-filter", "1", str(script)])
    assert "\n  its stderr ends with:\n    Traceback" in done.stderr and "shown above" not in done.stderr


RECORD = SAY + (
    "more = {'py_callstack': 'x.py\\nboom', 'timestamp': '1700000000'}\n"
    "about = {'message': 'RuntimeError: boom', 'extraInfo': more}\n"
    "open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write(json.dumps({'message': about}))\n"
    "sys.exit(7)\n"
)


def test_what_a_rank_recorded_is_told_and_passed_on(tmp_path: Path) -> None:
    theirs = tmp_path / "error.json"
    done = completed(in_ranks(RECORD), env=environment_here(TORCHELASTIC_ERROR_FILE=str(theirs)))
    assert done.returncode == 7
    assert re.search(
        r"it recorded, at 2023-11-1\d \d\d:\d\d:\d\d: RuntimeError: boom\n    x.py\n    boom\n", done.stderr
    )
    passed = json.loads(theirs.read_text())["message"]
    assert (passed["message"], passed["errorCode"]) == ("RuntimeError: boom", 7)


def test_only_the_last_error_is_passed_on(tmp_path: Path) -> None:
    theirs = tmp_path / "error.json"
    code = ATTEMPT + "if attempt == 1: sys.exit(0)\n" + RECORD
    environment = environment_here(TORCHELASTIC_ERROR_FILE=str(theirs))
    assert completed(in_ranks(code, "--max-restarts", "1"), env=environment).returncode == 0
    assert not theirs.exists()


def test_an_error_that_cannot_be_passed_on_is_said(tmp_path: Path) -> None:
    theirs = tmp_path / "not there" / "error.json"
    done = completed(in_ranks(RECORD), env=environment_here(TORCHELASTIC_ERROR_FILE=str(theirs)))
    assert done.returncode == 7
    assert done.stderr.endswith(f"rankspawn: TORCHELASTIC_ERROR_FILE: No such file or directory: {theirs}\n")


def test_no_grace_is_a_kill() -> None:
    code = SAY + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay('ready')\ntime.sleep(120)\n"
    with launched(with_grace(0, in_ranks(code, "--nproc-per-node", "2"))) as job:
        job.hear(2)
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 128 + signal.SIGTERM
        told = job.stderr.read()
        assert told.endswith("rankspawn: interrupted; 2 ranks had to be killed after 0 s: 0-1\n"), told


@linux
def test_no_more_open_files_than_are_allowed_is_said() -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))"
    for options in (["--nproc-per-node", "100"], ["--nproc-per-node", "10", "--tee"]):
        done = completed(after(limit, in_ranks("pass", *options)))
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(
            r"rankspawn: too many ranks: they need \d+ open files, and the limit is 40 \(ulimit -Hn\)\n", done.stderr
        )


@linux
def test_a_low_soft_limit_of_open_files_is_raised() -> None:
    code = SAY + "import resource\nsay(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (32, 500))"
    soft, hard = said(completed(after(limit, in_ranks(code, "--nproc-per-node", "40"))).stdout)[0]
    assert 40 < soft < 100 and hard == 500


# ---- output ---------------------------------------------------------------------------------------------------------


def test_tee_shows_whole_lines_with_their_rank(tmp_path: Path) -> None:
    code = SAY + (
        "for number in range(200):\n"
        "    print('out', number, 'x' * 50, flush=True)\n"
        "    print('err', number, 'x' * 50, file=sys.stderr, flush=True)\n"
        "sys.exit(int(os.environ['RANK']))\n"
    )
    # With PYTHONUNBUFFERED, print() would write the launcher's own lines word by word.
    options = ["--nproc-per-node", "3", "--keep-going", "--tee", "--log-dir", str(tmp_path)]
    done = completed(in_ranks(code, *options), env=environment_here(PYTHONUNBUFFERED="1"))
    assert done.returncode in (1, 2)
    for rank in range(3):
        for output, stream in ((done.stdout, "out"), (done.stderr, "err")):
            shown = [line for line in output.splitlines() if line.startswith(f"[rank {rank}]:")]
            assert shown == [f"[rank {rank}]:{stream} {number} {'x' * 50}" for number in range(200)]
    assert not [line for line in done.stderr.splitlines() if not re.match(r"rankspawn: |\[rank \d\]:|  ", line)]
    folder = tmp_path / os.readlink(tmp_path / "latest")
    assert len((folder / "attempt_0" / "2" / "stdout.log").read_text().splitlines()) == 200


def test_tee_of_some_ranks() -> None:
    done = completed(in_ranks("print('here')", "--nproc-per-node", "4", "--tee", "--local-ranks-filter", "0,2-3"))
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["[rank 0]:here", "[rank 2]:here", "[rank 3]:here"]


def test_tee_alone_leaves_no_files(tmp_path: Path) -> None:
    done = completed(in_ranks("raise SystemExit(3)", "--tee"), env=environment_here(TMPDIR=str(tmp_path)))
    assert done.returncode == 3
    assert list(tmp_path.iterdir()) == []
    assert "its files are in" not in done.stderr


def test_what_could_not_be_shown_is_kept(tmp_path: Path) -> None:
    code = "import sys\nsys.stdout.write(('x' * 99 + '\\n') * 20000)\n"
    with launched(in_ranks(code, "--tee"), env=environment_here(TMPDIR=str(tmp_path))) as job:
        assert job.end() == 0  # though nobody reads its stdout
        told = job.stderr.read()
    files = re.search(r"the rest is in (\S+)", told)
    assert files is not None, told
    assert Path(files[1]).stat().st_size == 20000 * 100 and files[1].startswith(str(tmp_path))


def test_an_output_that_nobody_reads_any_more_ends_no_rank(tmp_path: Path) -> None:
    code = SAY + (
        "for number in range(20):\n"
        "    print('line', number, flush=True)\n"
        "    time.sleep(0.02)\n"
        f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').close()\n"
    )
    with launched(in_ranks(code, "--nproc-per-node", "2", "--tee")) as job:
        assert job.stdout.readline().startswith("[rank ")
        job.stdout.close()
        assert job.end() == 0
        assert job.stderr.read() == "rankspawn: stdout: Broken pipe; what ranks write there is no longer shown\n"
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.mark.parametrize("options", [[], ["--tee"]], ids=["plain", "tee"])
def test_a_stderr_that_nobody_reads_changes_no_status(options: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as unread:
        done = subprocess.run(
            in_ranks("raise SystemExit(3)", "--max-restarts", "1", *options), stderr=unread, timeout=TIMEOUT
        )
    assert done.returncode == 3


@pytest.mark.parametrize("closed", ["2", "1, 2", "0, 1, 2"])
@pytest.mark.parametrize("options", [[], ["--tee"]], ids=["plain", "tee"])
def test_streams_that_are_closed_from_the_start(closed: str, options: list[str]) -> None:
    command = after(f"for fd in ({closed},): os.close(fd)", in_ranks("raise SystemExit(3)", *options))
    assert completed(command).returncode == 3


def test_a_plan_that_nobody_reads_has_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as unread:
        done = subprocess.run(
            [*LAUNCHER, "plan", "--nproc-per-node", "1"],
            stdout=unread, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")


# ---- reports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--report", "--timeline"])
def test_a_report_that_cannot_be_written_is_known_at_once(option: str, tmp_path: Path) -> None:
    for path, words, status in (
        (tmp_path / "not there" / "x", "No such file or directory", 2),
        (tmp_path, "Is a directory", 1),
    ):
        # The ranks would sleep for longer than a test may take.
        done = completed([*LAUNCHER, "run", option, str(path), "--no-python", "sleep", "120"])
        assert (done.returncode, done.stderr) == (status, f"rankspawn: {path}: {words}\n")


@linux
@pytest.mark.parametrize("placed", [False, True])
def test_a_report_has_the_bindings_of_ranks_that_end_at_once(placed: bool, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    cpus = os.sched_getaffinity(0)
    options = ["--nproc-per-node", "16", *(["--cpus", str(min(cpus))] if placed else []), "--report", str(report)]
    done = completed([*LAUNCHER, "run", *options, "--no-python", "true"])
    assert done.returncode == 0, done.stderr
    ranks = json.loads(report.read_text())["attempts"][0]["ranks"]
    assert {rank["binding"]["effective"]["cpus"] for rank in ranks} == {format_ids({min(cpus)} if placed else cpus)}


def test_a_report_is_there_while_the_ranks_run_and_when_a_signal_ended_them(tmp_path: Path) -> None:
    report, timeline = tmp_path / "report.json", tmp_path / "timeline.svg"
    options = ["--nproc-per-node", "2", "--report", str(report), "--timeline", str(timeline)]
    with launched(in_ranks(SLEEP, *options)) as job:
        pids = job.hear(2)
        eventually(timeline.exists)
        (attempt,) = json.loads(report.read_text())["attempts"]
        assert {rank["rank"]: rank["pid"] for rank in attempt["ranks"]} == pids
        assert [rank["exit"] for rank in attempt["ranks"]] == [None, None]
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 128 + signal.SIGTERM
    (attempt,) = json.loads(report.read_text())["attempts"]
    assert [rank["exit"]["signal"] for rank in attempt["ranks"]] == ["SIGTERM", "SIGTERM"]
    assert "SIGTERM" in timeline.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "timeline.svg"]


def test_the_reader_of_a_pipe_has_one_report(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with launched([*LAUNCHER, "run", "--report", str(fifo), "--no-python", "false"]) as job:
        report = json.loads(fifo.read_text())
        assert job.end() == 1
    assert report["attempts"][0]["ranks"][0]["exit"]["status"] == 1


def test_a_job_that_succeeded_stays_one_where_its_report_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    code = (
        "import os, shutil, sys\n"
        "while not os.path.exists(sys.argv[1]): pass\n"
        "shutil.rmtree(os.path.dirname(sys.argv[1]))\n"
    )
    report = str(folder / "report.json")
    done = completed([*in_ranks(code, "--report", report), report])
    assert (done.returncode, done.stderr) == (0, f"rankspawn: {folder}/report.json: No such file or directory\n")


# ---- what the ranks have started ------------------------------------------------------------------------------------

CHILD = SAY + "import subprocess\nsay([os.getpid(), subprocess.Popen(['sleep', '120']).pid])\ntime.sleep(120)\n"


@linux
def test_the_guard_ends_what_ranks_of_a_killed_launcher_started() -> None:
    with launched(in_ranks(CHILD, "--nproc-per-node", "2", "--guard")) as job:
        started = [pid for pids in job.hear(2).values() for pid in pids]
        job.process.kill()
        job.end()
        for pid in started:
            eventually(lambda pid=pid: has_ended(pid))


@linux
def test_a_guard_that_is_killed_is_said() -> None:
    with launched(in_ranks(SLEEP, "--guard")) as job:
        rank = job.hear(1)[0]
        children = psutil.Process(job.process.pid).children()
        (guard,) = [child for child in children if child.pid != rank]
        guard.kill()
        told = f"rankspawn: the guard (process {guard.pid}) has ended: processes that the ranks started stay behind"
        assert job.stderr.readline().startswith(told)
        os.kill(rank, signal.SIGTERM)
        assert job.end() == 128 + signal.SIGTERM


@linux
def test_a_cgroup_ends_what_left_the_session() -> None:
    code = CHILD.replace("'sleep', '120'", "'setsid', 'sleep', '120'")
    with new_cgroup() as parent:
        with launched(in_ranks(code, "--nproc-per-node", "2", "--cgroup", str(parent))) as job:
            started = [pid for pids in job.hear(2).values() for pid in pids]
            assert len([path for path in parent.iterdir() if path.is_dir()]) == 1
            job.process.send_signal(signal.SIGTERM)
            assert job.end() == 128 + signal.SIGTERM
        assert all(has_ended(pid) for pid in started)
        assert not [path for path in parent.iterdir() if path.is_dir()]


@linux
@pytest.mark.parametrize("path", ["/no/such/cgroup", "/tmp"])
def test_what_is_no_cgroup_is_said(path: str) -> None:
    done = completed(in_ranks("pass", "--cgroup", path))
    assert done.returncode == 1  # not 127: the program was not looked for
    assert re.fullmatch(rf"rankspawn: .*expected a directory of cgroup v2, got no cgroup .*'{path}'\n", done.stderr)


# ---- signals --------------------------------------------------------------------------------------------------------


def test_sigquit_reaches_the_ranks_when_it_is_to_end_them() -> None:
    code = SAY + "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\nsay(1)\ntime.sleep(120)\n"
    with launched(in_ranks(code, "--nproc-per-node", "2", "--signals-to-handle", "SIGQUIT")) as job:
        job.hear(2)
        job.process.send_signal(signal.SIGQUIT)
        assert job.end() == 128 + signal.SIGQUIT
        assert job.stderr.read() == "rankspawn: SIGQUIT: ending the ranks\n"


def test_who_ends_otherwise_than_a_signal_asked_is_told_of() -> None:
    code = SAY + (
        "def end(number, frame): sys.exit(8)\n"
        "if os.environ['RANK'] == '1': signal.signal(signal.SIGTERM, end)\n"
        "say('ready')\n"
        "time.sleep(120)\n"
    )
    with launched(in_ranks(code, "--nproc-per-node", "3")) as job:
        job.hear(3)
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 128 + signal.SIGTERM
        told = job.stderr.read()
    assert re.fullmatch(
        rf"rankspawn: SIGTERM: ending the ranks\nrankspawn: rank 1 \(pid \d+\) exited with status 8\n{ENDED}", told
    ), told


def test_no_moment_at_which_ctrl_c_shows_a_traceback_of_the_command() -> None:
    random.seed(4)
    for _ in range(12):
        code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\ntime.sleep(0.1)\n"
        with launched(in_ranks(code, "--nproc-per-node", "2", "--numa-binding", "node")) as job:
            time.sleep(random.uniform(0.05, 0.6))
            job.process.send_signal(signal.SIGINT)
            status, told = job.end(), job.stderr.read()
        # Until the interpreter has loaded the package and its signal module, it answers Ctrl-C in its own way.
        if "Traceback" in told:
            assert not re.search(r'__main__.py", line \d+, in main', told) and "Exception ignored" not in told, told
        else:
            assert (status, told) in (
                (0, ""),
                (-signal.SIGINT, ""),
                (128 + signal.SIGINT, "rankspawn: SIGINT: ending the ranks\n"),
            )


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users can reach."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@linux
def test_a_rank_that_may_not_be_signalled_is_said_and_waited_for(public_folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a program that another user may not signal")
    # A set-user-ID interpreter that becomes root for good. The launcher runs as nobody.
    python = public_folder / "python"
    python.write_bytes(Path(sys.executable).resolve().read_bytes())
    python.chmod(0o4755)
    code = SAY + "os.setresuid(0, 0, 0)\nsay('root')\nsys.stdin.read()\nsys.exit(3)\n"
    command = [*LAUNCHER, "run", "--no-python", str(python), "-c", code]
    with launched(after("os.setgroups([])\nos.setgid(65534)\nos.setuid(65534)", command), stdin=subprocess.PIPE) as job:
        line = job.stdout.readline()
        if '"root"' not in line:
            pytest.skip(f"no set-user-ID program works here: {job.stderr.read()}")
        job.process.send_signal(signal.SIGTERM)
        assert job.stderr.readline() == "rankspawn: SIGTERM: ending the ranks\n"
        assert re.fullmatch("rankspawn: cannot signal a rank: .*\n", job.stderr.readline())
        assert job.process.stdin is not None
        job.process.stdin.close()
        assert job.end() == 128 + signal.SIGTERM
        assert "exited with status 3" in job.stderr.read()


# ---- terminals ------------------------------------------------------------------------------------------------------


@linux
def test_ctrl_z_stops_the_ranks_and_the_shell_continues_them() -> None:
    code = (
        "import os, time\n"
        "os.write(1, f'rank {os.getpid()} {os.getppid()}.\\n'.encode())\n"
        "while True: time.sleep(0.05)\n"
    )
    with on_terminal(["/bin/sh", "-i"], PS1="ready> ", ENV="") as (terminal, _):
        terminal.shows("ready> ")
        terminal.types(shlex.join(in_ranks(code, "--nproc-per-node", "2")) + "\n")
        found = [terminal.shows(r"rank (\d+) (\d+)\.\r\n") for _ in range(2)]
        ranks, launcher = [int(match[1]) for match in found], int(found[0][2])
        for _ in range(2):
            terminal.types("\x1a")
            terminal.shows("(?i)stopped")
            terminal.shows("ready> ")
            for pid in (*ranks, launcher):
                eventually(lambda pid=pid: state(pid) == "T")
            terminal.types("fg\n")
            for pid in (*ranks, launcher):
                eventually(lambda pid=pid: state(pid) in ("S", "R"))
        terminal.types("\x03")
        terminal.shows("rankspawn: SIGINT: ending the ranks")
        terminal.shows("ready> ")
        terminal.types("echo status $?\n")
        terminal.shows("status 130")
        assert all(has_ended(pid) for pid in ranks)
        terminal.types("exit\n")


@linux
def test_a_suspension_that_nobody_could_end_is_none() -> None:
    with launched(in_ranks(SLEEP, "--nproc-per-node", "2"), start_new_session=True) as job:
        ranks = job.hear(2).values()
        for _ in range(3):
            job.process.send_signal(signal.SIGTSTP)
        for pid in ranks:
            eventually(lambda pid=pid: state(pid) == "S")
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == 128 + signal.SIGTERM


IGNORE = (
    SAY
    + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen(sys.argv[1] + os.environ['RANK'], 'w')\ntime.sleep(120)\n"
)


def ready(folder: Path, ranks: int) -> None:
    eventually(lambda: len(list(folder.glob("ready*"))) == ranks)


def test_the_progress_line_is_shown_and_wiped(tmp_path: Path) -> None:
    command = [*in_ranks(IGNORE, "--nproc-per-node", "2", "--log-dir", str(tmp_path / "logs")), f"{tmp_path}/ready"]
    with on_terminal(with_grace(3, command)) as (terminal, pid):
        terminal.shows(r"rankspawn: logs in \S+\r\n")
        ready(tmp_path, 2)
        os.kill(pid, signal.SIGTERM)
        terminal.shows(
            "^(\r\x1b\\[Krankspawn: \\d+ s: 2 ranks running)*(\r\x1b\\[K)?rankspawn: SIGTERM: ending the ranks\r\n"
            "\r\x1b\\[Krankspawn: 2 of 2 ranks still run, SIGKILL in [123] s: 0-1"
            "(\r\x1b\\[Krankspawn: 2 of 2 ranks still run, SIGKILL in [0123] s: 0-1)*"
            "\r\x1b\\[Krankspawn: the grace period is over: killing ranks 0-1\r\n"
        )
        assert "still run" not in terminal.text.partition("\r\x1b[K")[0]


@pytest.mark.parametrize("options", [[], ["--tee"]], ids=["plain", "tee"])
def test_no_progress_line_where_ranks_write_to_the_terminal(tmp_path: Path, options: list[str]) -> None:
    command = [*in_ranks(IGNORE, "--nproc-per-node", "2", *options), f"{tmp_path}/ready"]
    with on_terminal(with_grace(1, command)) as (terminal, pid):
        ready(tmp_path, 2)
        os.kill(pid, signal.SIGTERM)
        shown = terminal.shows("(?s)^(.*)the grace period is over: killing")
        assert "\x1b" not in shown[1] and "still run" not in shown[1]


# ---- many -----------------------------------------------------------------------------------------------------------


def test_256_ranks() -> None:
    done = completed([*LAUNCHER, "run", "--nproc-per-node", "256", "--no-python", "true"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_1000_ranks(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--nproc-per-node", "1000", "--report", str(report)]
    with launched([*LAUNCHER, "run", *options, "--no-python", "sleep", "120"]) as job:
        eventually(report.exists)
        job.process.send_signal(signal.SIGINT)
        assert job.end() == 128 + signal.SIGINT
        assert job.stderr.read() == "rankspawn: SIGINT: ending the ranks\n"
    ranks = json.loads(report.read_text())["attempts"][0]["ranks"]
    assert [rank["exit"]["signal"] for rank in ranks] == ["SIGINT"] * 1000


# ---- several machines -----------------------------------------------------------------------------------------------


def test_each_machine_counts_its_ranks_from_where_the_one_before_it_ends() -> None:
    meet = ["--nnodes", "3", "--master-addr", "127.0.0.1", "--master-port", "29512"]
    for node in range(3):
        done = completed(in_ranks(ENVIRONMENT, *meet, "--nproc-per-node", "2", "--node-rank", str(node)))
        assert (done.returncode, done.stderr) == (0, "")
        ranks = said(done.stdout)
        assert sorted(ranks) == [2 * node, 2 * node + 1]
        for local, rank in enumerate(sorted(ranks)):
            told = {
                "RANK": str(rank),
                "ROLE_RANK": str(rank),
                "LOCAL_RANK": str(local),
                "GROUP_RANK": str(node),
                "GROUP_WORLD_SIZE": "3",
                "WORLD_SIZE": "6",
                "ROLE_WORLD_SIZE": "6",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29512",
            }
            assert {name: ranks[rank][name] for name in told} == told


def test_ranks_of_other_machines_are_named_by_their_rank() -> None:
    meet = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", "29513"]
    code = SAY + "print('here')\nsys.stdout.flush()\nif os.environ['LOCAL_RANK'] == '1': sys.exit(3)\ntime.sleep(120)\n"
    done = completed(in_ranks(code, *meet, "--nproc-per-node", "4", "--tee", "--local-ranks-filter", "1"))
    assert (done.returncode, done.stdout) == (3, "[rank 5]:here\n")
    assert "rankspawn: rank 5 has failed: ending the others\n" in done.stderr
    assert re.search(r"^rankspawn: rank 5 \(pid \d+\) exited with status 3$", done.stderr, re.MULTILINE)
    assert "others: 4,6-7 killed by SIGTERM" in done.stderr


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}


def test_a_step_of_slurm_says_which_machine_this_is() -> None:
    done = completed(in_ranks(ENVIRONMENT, "--nproc-per-node", "2"), env=environment_here(**SLURM))
    assert (done.returncode, done.stderr) == (0, "")
    told = said(done.stdout)[3]
    assert (told["GROUP_RANK"], told["WORLD_SIZE"], told["MASTER_ADDR"]) == ("1", "4", "gpu07")
    assert (told["MASTER_PORT"], told["TORCHELASTIC_RUN_ID"]) == (str(29500 + 772 % 3001), "77.2")
    # The user's options win over Slurm's variables.
    done = completed(in_ranks(ENVIRONMENT, "--nnodes", "1"), env=environment_here(**SLURM))
    assert said(done.stdout)[0]["GROUP_WORLD_SIZE"] == "1"
    done = completed(in_ranks(ENVIRONMENT, "--master-port", "29514"), env=environment_here(**SLURM))
    assert said(done.stdout)[1]["MASTER_PORT"] == "29514"


def test_ranks_that_share_the_one_cpu_of_a_slurm_task_are_said() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    cpu = min(os.sched_getaffinity(0))
    command = after(f"os.sched_setaffinity(0, {{{cpu}}})", in_ranks("", "--nproc-per-node", "2"))
    done = completed(command, env=environment_here(**SLURM))
    assert done.returncode == 0
    assert re.fullmatch(rf"rankspawn: 2 ranks share CPUs {cpu}: `srun .*\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--nnodes 2", "--nnodes needs --node-rank, the number of this machine from 0"),
        ("--nnodes 2 --node-rank 1", "--nnodes needs --master-addr, the address where rank 0 listens"),
        ("--nnodes 2 --node-rank 2", "--node-rank 2: expected 0 to 1, because --nnodes is 2"),
        ("--node-rank 1", "--node-rank 1: expected 0 to 0, because --nnodes is 1"),
        ("--nnodes 0", "expected a positive integer, or MIN:MAX, got '0'"),
        ("--nnodes 1:4", "--nnodes 1:4 needs an elastic agent: use `rankspawn torchrun`"),
        ("--node-rank -1", "expected a non-negative integer, got '-1'"),
        (
            "--nnodes 2 --node-rank 1 --master-addr a --master-port 5 --max-restarts 1",
            "--max-restarts on several machines needs an elastic agent: use `rankspawn torchrun`",
        ),
        ("--max-restarts many", "expected a non-negative integer, got 'many'"),
        ("--grace soon", "expected a number of seconds, got 'soon'"),
        ("--grace nan", "expected a number of seconds, got 'nan'"),
    ],
)
def test_wrong_usage(options: str, words: str) -> None:
    done = completed([*LAUNCHER, "run", *options.split(), "x.py"], env=environment_here())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"{words}\n") and "Traceback" not in done.stderr


def test_help_fits_a_terminal_of_80_columns() -> None:
    done = completed([*LAUNCHER, "run", "--help"], env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
