"""The files that the launcher writes: whole, under a name of their own, and without waiting for a reader for ever."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rankspawn._output import write
from rankspawn._output.write import write_text
from tests.support.launchers import LAUNCHER, TIMEOUT, completed, in_ranks, launched
from tests.support.state import in_child

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's pipes and mounts")


# ---- files beside others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--report", "--timeline"])
def test_a_file_that_a_killed_launcher_left_is_in_nobodys_way(option: str, tmp_path: Path) -> None:
    """A name with the pid in it is no name of our own: in a container the pid is the same each time."""
    stale = tmp_path / "stale"
    run = in_ranks("", option, str(tmp_path / "report"))
    script = f'echo mine > "{tmp_path}/.report.$$.new"; echo $$ > {stale}; exec "$@"'  # execve(2) keeps the pid
    done = completed(["sh", "-c", script, "sh", *run])
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / f".report.{stale.read_text().strip()}.new").read_text() == "mine\n"
    assert (tmp_path / "report").stat().st_size > 0
    assert len(list(tmp_path.iterdir())) == 3


def test_the_name_beside_is_new_each_time_and_never_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda size: b"\0" * size)
    others = tmp_path / f".rankspawn-{'00' * 8}.new"
    others.write_text("another's")
    with pytest.raises(FileExistsError):
        write_text("text", tmp_path / "report")
    assert others.read_text() == "another's"
    monkeypatch.undo()
    write_text("text", tmp_path / "report")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"another's", "text"}


def test_a_name_as_long_as_a_name_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_text("text", path)
    assert path.read_text() == "text"


def test_a_file_in_a_folder_that_is_not_ours_is_written_in_its_place() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which no other user may enter
        path = Path(folder, "report")
        path.write_text("a longer text than the new one\n")
        path.chmod(0o666)
        Path(folder).chmod(0o555)

        def as_nobody() -> str:
            if os.geteuid() == 0:
                os.setuid(65534)
            write_text("new\n", path)
            with pytest.raises(PermissionError):
                write_text("new\n", Path(folder, "another"))
            return path.read_text()

        try:
            assert in_child(as_nobody) == "new\n"
            assert os.listdir(folder) == ["report"]
        finally:
            Path(folder).chmod(0o755)


def test_a_file_that_is_a_mount_point_is_written_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("")
    (tmp_path / "report").write_text("")
    script = 'mount --bind "$1" "$2" || exit 77; shift 2; exec "$@"'
    run = in_ranks("raise SystemExit(3)", "--report", str(tmp_path / "report"))
    mounts = [str(tmp_path / "outside"), str(tmp_path / "report")]
    done = completed(["unshare", "--mount", "sh", "-c", script, "sh", *mounts, *run])
    if "unshare failed" in done.stderr or done.returncode == 77:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert done.returncode == 3
    report = json.loads((tmp_path / "outside").read_text())
    assert report["attempts"][0]["ranks"][0]["exit"]["status"] == 3


def test_a_report_that_cannot_be_written_after_a_restart_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    code = (
        "import os, shutil, time\n"
        "first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "while not os.path.exists('folder/report'): time.sleep(0.01)\n"
        "shutil.rmtree('folder')\n"
        "raise SystemExit(3)\n"
    )
    second = code.replace("while not os.path.exists('folder/report'): time.sleep(0.01)\n", "").replace(
        "shutil.rmtree('folder')\nraise SystemExit(3)", "open('ran', 'w').close()"
    )
    both = f"import os\nexec({code!r} if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' else {second!r})\n"
    done = completed(in_ranks(both, "--max-restarts", "1", "--report", "folder/report"), cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "ran").exists()
    assert done.stderr.count("rankspawn: folder/report: No such file or directory\n") == 2


def test_torchruns_error_file_may_be_a_fifo_that_nobody_reads(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "error")
    code = (
        "import json, os\n"
        "json.dump({'message': 'boom'}, open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w'))\n"
        "raise SystemExit(3)\n"
    )
    done = completed(in_ranks(code), env={**os.environ, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error")})
    assert done.returncode == 3
    assert f"nobody reads it: {tmp_path}/error\n" in done.stderr


# ---- pipes ----------------------------------------------------------------------------------------------------------


def test_a_fifo_that_nobody_opens_does_not_keep_the_launcher(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    done = completed(in_ranks("raise SystemExit(3)", "--report", str(tmp_path / "fifo")))
    assert done.returncode == 3
    assert done.stderr.endswith(f"rankspawn: {tmp_path}/fifo: nobody reads it\n")


@contextmanager
def small_fifo(path: Path) -> Iterator[int]:
    """A FIFO that is open for reading and holds one page."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
        yield reader
    finally:
        os.close(reader)


def test_a_reader_that_sleeps_does_not_keep_the_launcher(tmp_path: Path) -> None:
    with small_fifo(tmp_path / "fifo"):
        done = completed(in_ranks("raise SystemExit(3)", "--nproc-per-node", "8", "--report", str(tmp_path / "fifo")))
    assert done.returncode == 3
    assert f"{tmp_path}/fifo: nobody reads it; " in done.stderr and " bytes are missing\n" in done.stderr


def test_a_reader_that_comes_late_and_reads_slowly_reads_all(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    text = "".join(f"{number}\n" for number in range(30_000))  # more than a pipe holds
    read: list[bytes] = []

    def reader() -> None:
        time.sleep(0.3)
        with open(tmp_path / "fifo", "rb", buffering=0) as fifo:
            while piece := fifo.read(10_000):
                read.append(piece)
                time.sleep(0.02)

    thread = threading.Thread(target=reader)
    thread.start()
    write_text(text, tmp_path / "fifo")
    thread.join()
    assert b"".join(read).decode() == text


@pytest.mark.parametrize("opened", [False, True], ids=["no reader", "a reader that sleeps"])
def test_a_signal_ends_the_wait(opened: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_SECONDS", 1e6)
    readable, writable = os.pipe()
    timer = threading.Timer(0.1, os.write, [writable, b"."])
    timer.start()
    try:
        if opened:
            with small_fifo(tmp_path / "fifo"), pytest.raises(TimeoutError, match="9000 bytes are missing") as caught:
                write_text("x" * 9000, tmp_path / "fifo", readable)
        else:
            os.mkfifo(tmp_path / "fifo")
            with pytest.raises(TimeoutError, match="nobody reads it") as caught:
                write_text("x", tmp_path / "fifo", readable)
        assert (caught.value.errno, caught.value.filename) == (errno.ETIMEDOUT, str(tmp_path / "fifo"))
    finally:
        timer.join()
        os.close(readable)
        os.close(writable)


def test_ctrl_c_ends_the_wait_for_the_reader_of_a_report(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    patient = (
        "import sys, rankspawn._output.write\nrankspawn._output.write._SECONDS = 1e6\n"
        "from rankspawn._cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    run = ["run", "--report", str(tmp_path / "fifo"), "--no-python", "sh", "-c", "exit 3"]
    with launched([sys.executable, "-c", patient, *run]) as job:
        assert job.stderr.readline().startswith("rankspawn: rank 0 ")
        job.process.send_signal(signal.SIGINT)
        assert job.end() in (3, 128 + signal.SIGINT, -signal.SIGINT)
        assert "nobody reads it" in job.stderr.read()


def test_a_full_stdout_as_report(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        command = [*LAUNCHER, "run", "--report", "/dev/stdout", "--no-python", "sh", "-c", "head -c 4096 /dev/zero"]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
        assert (done.returncode, done.stderr.count("/dev/stdout: nobody reads it")) == (0, 1)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_full_disk_ends_no_job(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    script = f"mount -t tmpfs -o size=16k none {full} && head -c 1M /dev/zero > {full}/zeros; " + shlex.join(
        [*LAUNCHER, "run", "--report", f"{full}/report.json", "--timeline", f"{full}/timeline.svg", "--no-python"]
    )
    command = ["unshare", "--mount", "sh", "-c", f"{script} sh -c 'sleep 0.5; echo survived; exit 5'"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if "unshare: " in done.stderr or "mount: " in done.stderr:
        pytest.skip(done.stderr)
    assert (done.returncode, done.stdout) == (5, "survived\n"), done.stderr
    assert "rankspawn: " in done.stderr and "report.json: No space left on device" in done.stderr
