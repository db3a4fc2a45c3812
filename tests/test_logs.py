"""Where ranks write, and the last lines of a log as a terminal can show them."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rankspawn import Job, Popen, launch
from rankspawn._output.logs import LogFolder, last_lines, printable, rank_files
from tests.support.launchers import LAUNCHER, after, completed, environment_here, in_ranks
from tests.support.processes import eventually
from tests.support.state import NOBODY, fork, in_child


def test_the_layout_is_torchruns(tmp_path: Path) -> None:
    files = rank_files(str(tmp_path / "new" / "folder"), 12, attempt=3)
    folder = tmp_path / "new" / "folder" / "attempt_3"
    assert sorted(os.listdir(folder), key=int) == [str(rank) for rank in range(12)]
    assert (files[11].stdout, files[11].stderr) == (folder / "11" / "stdout.log", folder / "11" / "stderr.log")
    assert files[11].error == str(folder / "11" / "error.json")
    assert list(folder.rglob("*.*")) == []  # the ranks make the files


def test_a_folder_is_named_after_the_job_and_the_time(tmp_path: Path) -> None:
    made = []
    for _ in range(3):  # in one second, as of several machines
        with LogFolder(str(tmp_path), name="train") as folder:
            made.append(Path(folder.path))
            assert (tmp_path / "latest").samefile(folder.path)
    assert len(set(made)) == 3 and all(re.fullmatch(r"train-\d{8}-\d{6}(-[23])?", one.name) for one in made)
    assert os.readlink(tmp_path / "latest") == made[2].name  # so that the folder can be moved
    assert {path.name for path in tmp_path.iterdir()} == {"latest", *(one.name for one in made)}


def test_a_file_that_is_called_latest_stays(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("mine")
    with LogFolder(str(tmp_path), name="train") as folder:
        assert os.path.isdir(folder.path)
    assert (tmp_path / "latest").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="makes another user's link")
def test_another_users_link_in_a_sticky_folder_stays_and_nothing_else_does(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "latest").symlink_to("theirs")

    def begin() -> None:
        os.chdir(tmp_path)
        os.setuid(NOBODY)
        assert os.path.isdir(LogFolder(".", name="train").path)

    in_child(begin)
    assert os.readlink(tmp_path / "latest") == "theirs"
    assert [path.name.split("-")[0] for path in sorted(tmp_path.iterdir())] == ["latest", "train"]


def test_folders_of_jobs_that_begin_together_are_their_own(tmp_path: Path) -> None:
    code = "import sys\nfrom rankspawn._output.logs import LogFolder\nprint(LogFolder(sys.argv[1], name='job').path)\n"
    begun = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    made = {one.communicate(timeout=60)[0].strip() for one in begun}
    assert len(made) == 6 and all(os.path.isdir(path) for path in made)
    assert str(tmp_path / os.readlink(tmp_path / "latest")) in made
    assert len(list(tmp_path.iterdir())) == 7


def test_a_folder_names_the_run_id_and_the_machine(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    several = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", "29500"]
    command = ["run", *several, "--rdzv-id", "a/b", "--log-dir", "logs", "train.py"]
    assert completed([*LAUNCHER, *command], cwd=tmp_path, env=environment_here()).returncode == 0
    assert os.readlink(tmp_path / "logs" / "latest").startswith("train-a_b-node1-2")


def test_without_a_log_folder_there_are_error_files_only(tmp_path: Path) -> None:
    first, again = (rank_files(str(tmp_path), 2, attempt, streams=False) for attempt in (0, 1))
    assert os.listdir(tmp_path) == []
    assert {own.stdout for own in first} == {own.stderr for own in first} == {None}
    errors = {own.error for own in [*first, *again]}
    assert len(errors) == 4
    assert {os.path.dirname(error) for error in errors} == {str(tmp_path)}


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (files,) = rank_files("logs", 1)
    with Popen(["/bin/sh", "-c", "echo here"], stdout=files.stdout, stderr=files.stderr, cwd="/") as rank:
        rank.wait(60)
    assert (tmp_path / "logs" / "attempt_0" / "0" / "stdout.log").read_text() == "here\n"


def test_what_an_earlier_job_left_is_not_this_ones(tmp_path: Path) -> None:
    (files,) = rank_files(str(tmp_path), 1)
    folder = Path(files.error).parent
    for name in ("stdout.log", "stderr.log", "error.json", "mine"):
        (folder / name).write_text("{}")
    assert rank_files(str(tmp_path), 1) == [files]
    assert os.listdir(folder) == ["mine"]


@pytest.mark.parametrize("in_the_way", ["attempt_0", "attempt_0/1"])
def test_a_file_in_the_way(tmp_path: Path, in_the_way: str) -> None:
    (tmp_path / in_the_way).parent.mkdir(exist_ok=True)
    (tmp_path / in_the_way).write_text("")
    with pytest.raises(FileExistsError, match=re.escape(in_the_way)) as caught:
        rank_files(str(tmp_path), 2)
    assert ("rank 1" in str(caught.value)) == in_the_way.endswith("/1")


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        (b"", []),
        (b"\n\n \n", []),
        (b"one", ["one"]),
        (b"1\n2\n3\n4\n\n\n", ["2", "3", "4"]),
        (b"\n\nlast\n", ["", "", "last"]),
        (b"\r1%\r2%\r\nnext\r\n", ["2%", "next"]),
        (b"caf\xc3\xa9 \xff\n", ["café \\xff"]),
        (b"\0\0\0\0after a hole\n", ["after a hole"]),
    ],
)
def test_last_lines(tmp_path: Path, written: bytes, lines: list[str]) -> None:
    log = tmp_path / "log"
    log.write_bytes(written)
    assert last_lines(log, 3) == lines


def test_last_lines_of_a_large_file(tmp_path: Path) -> None:
    """A sparse file of a terabyte: only its end is read."""
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + b"".join(b"%d\n" % number for number in range(100_000)))
    assert last_lines(log, 2) == ["99998", "99999"]
    assert last_lines(log, 1000, most_bytes=15) == ["99998", "99999"]  # no part of 99997


def test_last_lines_without_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes("é".encode() * 100_000)
    (line,) = last_lines(log, most_bytes=101)
    assert line == "\\xa9" + "é" * 50


def test_last_lines_of_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in tmp_path, tmp_path / "fifo":
        with pytest.raises(OSError, match=re.escape(str(path))):
            last_lines(path)
    with pytest.raises(FileNotFoundError):
        last_lines(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\ttabs, ü and 漢字 stay", "\ttabs, ü and 漢字 stay"),
        ("\x1b[1;31mred\x1b[0m \x1b]0;title\x07\x1b]8;;http://a\x1b\\link\x1b(B", "red link"),
        ("\x1b[2J\x1b[H\x1b[10Aup", "up"),
        ("bell \a, back \b, a broken \x1b", r"bell \x07, back \x08, a broken \x1b"),
        ("\x9b31m and \u202eright to left", r"\x9b31m and \u202eright to left"),
        ("half \udcff", r"half \udcff"),
    ],
)
def test_printable(text: str, safe: str) -> None:
    assert printable(text) == safe


# ---- one folder, several groups -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's locks and signals")
def test_two_groups_do_not_write_to_one_folder_at_the_same_time(tmp_path: Path) -> None:
    with launch(["sh", "-c", "echo first; exec sleep 600"], 2, log_dir=tmp_path) as group:
        assert group.files is not None and group.files[0].stdout is not None
        eventually(lambda: group.files[0].stdout.exists() and group.files[0].stdout.read_text() == "first\n")
        with pytest.raises(OSError, match="another group write their logs here") as caught:
            launch(["true"], 1, log_dir=tmp_path)
        assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, str(tmp_path / "attempt_0"))
        other = "import sys, rankspawn\nrankspawn.launch(['true'], 1, log_dir=sys.argv[1])\n"
        done = subprocess.run([sys.executable, "-c", other, tmp_path], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "another group write their logs here" in done.stderr
        assert group.files[0].stdout.read_text() == "first\n"
        with launch(["true"], 1, log_dir=tmp_path / "another") as elsewhere:
            assert elsewhere.wait(60) == (0,)
        again = Job(1, 29500, restart_count=1)
        with launch(["true"], 1, log_dir=tmp_path, job=again) as elsewhere:
            assert elsewhere.wait(60) == (0,)
        group.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's locks and signals")
@pytest.mark.parametrize("forked", [False, True], ids=["alone", "with a forked process that lives on"])
def test_one_group_after_the_other_in_one_folder(tmp_path: Path, forked: bool) -> None:
    child = 0
    try:
        for text in ("one", "two", "three"):
            with launch(["echo", text], 1, log_dir=tmp_path) as group:
                if forked and not child:
                    child = fork(signal.pause)
                assert group.wait(60) == (0,)
            assert (tmp_path / "attempt_0" / "0" / "stdout.log").read_text() == f"{text}\n"
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's locks and signals")
def test_a_launch_that_fails_or_a_launcher_that_is_killed_claims_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        launch(["/no/such/program"], 2, log_dir=tmp_path)
    code = (
        "import os, sys, rankspawn\n"
        "group = rankspawn.launch(['sleep', '600'], 1, log_dir=sys.argv[1])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], timeout=60).returncode == -signal.SIGKILL
    with launch(["echo", "here"], 1, log_dir=tmp_path) as group:
        assert group.wait(60) == (0,)


@pytest.mark.skipif(sys.platform != "linux", reason="no file may have a byte: RLIMIT_FSIZE")
def test_a_job_needs_no_temporary_folder_for_its_launchers_sake() -> None:
    """Each place is tried by writing a file. In a container with a read-only root there may be none at all."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))"
    # One write each: print() of an unbuffered interpreter writes its newline apart.
    code = "import os\nos.write(1, b'%d\\n' % ('TORCHELASTIC_ERROR_FILE' in os.environ))\nraise SystemExit(3)\n"
    done = completed(after(limit, in_ranks(code, "--nproc-per-node", "2", "--keep-going")), env=environment_here())
    assert (done.returncode, done.stdout) == (3, "0\n0\n")
    assert "rankspawn: cannot make a temporary folder (TMPDIR, /tmp): " in done.stderr, done.stderr
    missing = (
        "rankspawn: cannot make a temporary folder (TMPDIR, /tmp): ranks write here by themselves, without --tee's"
    )
    code = (
        "import os\nos.write(1, os.environ['RANK'].encode() + b'\\n')\nos.write(2, b'error\\n')\nraise SystemExit(3)\n"
    )
    for words in (["--tee"], ["-t", "3"], ["--tee", "--local-ranks-filter", "1"]):
        command = in_ranks(code, "--nproc-per-node", "2", "--keep-going", "--max-restarts", "1", *words)
        done = completed(after(limit, command), env=environment_here())
        shown = ["1"] if "--local-ranks-filter" in words else ["0", "1"]
        assert (done.returncode, sorted(done.stdout.splitlines())) == (3, sorted(shown * 2))
        assert done.stderr.splitlines().count("error") == 2 * len(shown) and done.stderr.count(missing) == 1, (
            done.stderr
        )


@pytest.mark.skipif(sys.platform != "linux", reason="no file may have a byte: RLIMIT_FSIZE")
def test_files_that_shall_be_kept_need_a_place() -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))"
    for words in (["--redirects", "3"], ["--tee", "--duplicate-stdout-filters", "a"]):
        done = completed(after(limit, in_ranks("print('here')", *words)))
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(
            r"rankspawn: cannot make a folder for log files: no usable temporary folder among .*/tmp, /var/tmp, .*:"
            r" File too large; pass --log-dir DIR\n",
            done.stderr,
        )


@pytest.mark.parametrize("how", ["links inside", "a link in its place"])
def test_the_end_of_a_temporary_folder_follows_no_link(how: str, tmp_path: Path) -> None:
    kept, moved = tmp_path / "kept", tmp_path / "moved"
    kept.mkdir()
    (kept / "file").write_text("text")
    with LogFolder() as folder:
        made = Path(folder.path)
        (made / "attempt_0" / "0").mkdir(parents=True)
        (made / "attempt_0" / "0" / "stdout.log").write_text("text")
        (made / "attempt_0" / "folder").symlink_to(kept)
        (made / "attempt_0" / "file").symlink_to(kept / "file")
        (made / "attempt_0" / "nowhere").symlink_to(tmp_path / "nowhere")
        if how == "a link in its place":
            made.rename(moved)
            made.symlink_to(kept)
    assert (kept / "file").read_text() == "text"
    if how == "links inside":
        assert not made.exists()
    else:
        made.unlink()
        assert (moved / "attempt_0" / "0" / "stdout.log").exists()


def test_a_temporary_folder_is_made_where_there_is_one(tmp_path: Path) -> None:
    """As by tempfile, which no command imports."""
    chosen = str(tmp_path)
    code = "import sys; from rankspawn._output.logs import LogFolder\nwith LogFolder() as made: print(made.path)\n"
    code += "assert 'tempfile' not in sys.modules and 'shutil' not in sys.modules"
    for variables, parent in (
        ({"TMPDIR": chosen}, chosen),
        ({"TMPDIR": f"{chosen}/nowhere", "TEMP": chosen}, chosen),
        ({"TMPDIR": "", "TMP": chosen}, chosen),
        ({"TMPDIR": f"{chosen}/nowhere"}, "/tmp"),
    ):
        environment = {
            name: value for name, value in environment_here().items() if name not in ("TMPDIR", "TEMP", "TMP")
        }
        done = completed([sys.executable, "-c", code], env={**environment, **variables})
        assert done.returncode == 0, done.stderr
        path = Path(done.stdout.strip())
        assert path.parent == Path(parent) and path.name.startswith("rankspawn-")
        assert not path.exists()
