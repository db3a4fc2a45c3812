"""The tee shows what ranks print in whole lines, and a slow reader, or none at all, slows nobody down."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rankspawn import Popen
from rankspawn._output import follow as _follow
from rankspawn._output.logs import RankFiles, rank_files
from rankspawn._output.tee import Source, Tee

# Seconds: longer than any machine takes for what ends by itself when all is well.
LONG = 60.0


class Reader:
    """A pipe, and what came out of it. start() begins to read."""

    def __init__(self) -> None:
        self.read_end, self.fd = os.pipe()
        self.got = bytearray()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while piece := os.read(self.read_end, 1 << 16):
            self.got += piece

    def start(self) -> Reader:
        self._thread.start()
        return self

    def stop_reading(self) -> None:
        os.close(self.read_end)
        self.read_end = -1

    def close(self) -> bytes:
        """Everything that was written."""
        os.close(self.fd)
        if self._thread.ident is not None:
            self._thread.join(LONG)
        if self.read_end >= 0:
            os.close(self.read_end)
        return bytes(self.got)


@contextlib.contextmanager
def ranks(folder: Path, *scripts: str) -> Iterator[list[RankFiles]]:
    """One rank for each shell script; at the end of the block all have ended."""
    files = rank_files(str(folder), len(scripts))
    started = [
        Popen(["/bin/sh", "-c", script], stdout=own.stdout, stderr=own.stderr)
        for script, own in zip(scripts, files, strict=True)
    ]
    try:
        yield files
        for rank in started:
            rank.wait(LONG)
    finally:
        for rank in started:
            rank.kill()
            rank.wait()


def sources(files: list[RankFiles]) -> list[Source]:
    return [
        Source(rank, path, is_stderr)
        for rank, own in enumerate(files)
        for path, is_stderr in ((own.stdout, False), (own.stderr, True))
        if path is not None
    ]


def shown(folder: Path, *scripts: str, **options: object) -> tuple[bytes, bytes]:
    """What a launcher shows of ranks, on its stdout and its stderr."""
    out, err = Reader().start(), Reader().start()
    try:
        with ranks(folder, *scripts) as files:
            tee = Tee(sources(files), out=out.fd, err=err.fd, **options).start()  # type: ignore[arg-type]
        assert tee.finish(LONG) == ()
    finally:
        texts = out.close(), err.close()
    return texts


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_fast_ranks(tmp_path: Path) -> None:
    """Every line whole, once, with one prefix, in order per rank and stream."""
    count = 100_000
    script = f"seq -f 'line %.0f to stdout' {count}; seq -f 'line %.0f to stderr' 1000 >&2"
    out, err = shown(tmp_path, *[script] * 8)
    for text, name, lines in (out, "stdout", count), (err, "stderr", 1000):
        of_rank: dict[str, list[int]] = {}
        for line in text.decode().splitlines():
            match = re.fullmatch(rf"\[rank ([0-7])\]:line (\d+) to {name}", line)
            assert match, line
            of_rank.setdefault(match[1], []).append(int(match[2]))
        assert len(of_rank) == 8
        assert all(numbers == list(range(1, lines + 1)) for numbers in of_rank.values())


def test_lines_are_shown_while_the_rank_runs(tmp_path: Path) -> None:
    out = Reader().start()
    go_on = tmp_path / "fifo"
    os.mkfifo(go_on)
    try:
        with ranks(tmp_path, f"echo first; read line < {go_on}; echo second") as files:
            with Tee(sources(files), out=out.fd):
                until(lambda: out.got == b"[rank 0]:first\n")
                go_on.write_text("\n")
                until(lambda: out.got == b"[rank 0]:first\n[rank 0]:second\n")
    finally:
        out.close()


def test_some_ranks_only_and_another_prefix(tmp_path: Path) -> None:
    out, _ = shown(tmp_path, "echo a", "echo b", "echo c", ranks={0, 2}, prefix="{rank}> ")
    assert sorted(out.splitlines()) == [b"0> a", b"2> c"]


def test_nobody_reads_and_the_ranks_end_all_the_same(tmp_path: Path) -> None:
    out, err = Reader(), Reader().start()
    try:
        with ranks(tmp_path, "seq 100000", "seq 100000; echo well >&2") as files:
            tee = Tee(sources(files), out=out.fd, err=err.fd).start()
            until(lambda: err.got == b"[rank 1]:well\n")  # a stuck stdout does not hold up stderr
        assert set(tee.finish(0.05)) == {str(own.stdout) for own in files}
        assert all(own.stdout and own.stdout.read_text().endswith("\n100000\n") for own in files)
    finally:
        out.close()
        said = err.close().decode()
    assert said.startswith("[rank 1]:well\nrankspawn: not all of the output could be shown; the rest is in ")
    assert all(str(own.stdout) in said for own in files)


def test_a_late_reader_gets_everything(tmp_path: Path) -> None:
    out = Reader()
    try:
        with ranks(tmp_path, "seq 100000") as files:
            tee = Tee(sources(files), out=out.fd).start()
        time.sleep(0.3)
        out.start()
        assert tee.finish(LONG) == ()
    finally:
        text = out.close()
    assert text == b"".join(b"[rank 0]:%d\n" % number for number in range(1, 100_001))


def test_an_output_that_does_not_block(tmp_path: Path) -> None:
    """Another process may have set O_NONBLOCK, which belongs to all who have the pipe."""
    out = Reader()
    os.set_blocking(out.fd, False)
    try:
        with ranks(tmp_path, "seq 100000") as files:
            tee = Tee(sources(files), out=out.fd).start()
        time.sleep(0.1)
        out.start()
        assert tee.finish(LONG) == ()
    finally:
        text = out.close()
    assert text == b"".join(b"[rank 0]:%d\n" % number for number in range(1, 100_001))


def test_a_reader_that_goes(tmp_path: Path) -> None:
    """`rankspawn run ... | head`"""
    out, err = Reader(), Reader().start()
    go_on = tmp_path / "fifo"
    os.mkfifo(go_on)
    try:
        with ranks(tmp_path, "seq 100000", f"read line < {go_on}; echo on; echo on >&2") as files:
            tee = Tee(sources(files), out=out.fd, err=err.fd).start()
            out.stop_reading()
            until(lambda: b"\n" in err.got)
            go_on.write_text("\n")
        assert tee.finish(LONG) == ()
    finally:
        out.close()
        said = err.close()
    note = b"rankspawn: stdout: Broken pipe; what ranks write there is no longer shown\n"
    assert said == note + b"[rank 1]:on\n"


def test_an_output_that_was_gone_before_there_was_something_to_show(tmp_path: Path) -> None:
    """The tee says so once, and not again for each file that turns up."""
    out, err = Reader(), Reader().start()
    out.stop_reading()
    late = tmp_path / "late"
    (tmp_path / "log").write_text("o\n")
    try:
        with Tee([Source(0, tmp_path / "log", False), Source(1, late, False)], out=out.fd, err=err.fd):
            until(lambda: b"\n" in err.got)
            late.write_text("o\n")
            time.sleep(0.3)
    finally:
        out.close()
        said = err.close()
    assert said.count(b"\n") == 1


def test_without_a_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher was started with stdout closed."""
    monkeypatch.setattr(sys, "stdout", None)
    (tmp_path / "log").write_text("line\n")
    err = Reader().start()
    try:
        tee = Tee([Source(0, tmp_path / "log", False), Source(0, tmp_path / "log", True)], err=err.fd).start()
        until(lambda: err.got == b"[rank 0]:line\n")
        assert tee.finish() == ()
        assert tee._complete
    finally:
        err.close()


def test_both_outputs_gone(tmp_path: Path) -> None:
    out, err = Reader(), Reader()
    out.stop_reading()
    err.stop_reading()
    try:
        with ranks(tmp_path, "seq 1000; seq 1000 >&2") as files:
            tee = Tee(sources(files), out=out.fd, err=err.fd).start()
        assert tee.finish(LONG) == ()
    finally:
        out.close()
        err.close()


def test_a_terminal_that_was_stopped(tmp_path: Path) -> None:
    """Ctrl-S does not hold up the end of the job, and the tee names the file that it could not show."""
    controller, terminal = pty.openpty()
    err = Reader().start()
    try:
        termios.tcflow(terminal, termios.TCOOFF)
        with ranks(tmp_path, "seq 1000") as files:
            tee = Tee(sources(files), out=terminal, err=err.fd).start()
        assert tee.finish(0.2) == (str(files[0].stdout),)
    finally:
        os.close(terminal)
        os.close(controller)
        said = err.close().decode()
    assert str(files[0].stdout) in said


def test_a_terminal_that_takes_a_part(tmp_path: Path) -> None:
    """poll(2) says that the terminal takes something, then write(2) blocks half-way. Nobody waits for that thread."""
    controller, terminal = pty.openpty()
    try:
        with ranks(tmp_path, "seq 100000") as files:
            tee = Tee(sources(files), out=terminal, err=terminal).start()
        assert tee.finish(0.3) == (str(files[0].stdout),)
    finally:
        os.close(controller)
        os.close(terminal)


def test_killed_in_the_middle_of_a_line(tmp_path: Path) -> None:
    out, _ = shown(tmp_path, "echo whole; printf half; kill -9 $$")
    assert out == b"[rank 0]:whole\n[rank 0]:half\n"


def test_who_was_left_behind_and_prints_without_end(tmp_path: Path) -> None:
    out, stop = Reader().start(), tmp_path / "stop"
    try:
        with ranks(tmp_path, f"while [ ! -e {stop} ]; do echo y; done & sleep 0.1") as files:
            tee = Tee(sources(files), out=out.fd).start()
            until(lambda: len(out.got) > 1000)
        assert tee.finish(LONG) == ()
    finally:
        stop.touch()
        assert set(out.close().splitlines()) == {b"[rank 0]:y"}


def test_a_rank_that_closes_its_output(tmp_path: Path) -> None:
    out, err = shown(tmp_path, "echo before; exec >&- 2>&-; echo after; exit 0", "echo other")
    assert sorted(out.splitlines()) == [b"[rank 0]:before", b"[rank 1]:other"]
    assert err == b""


def test_a_line_that_comes_in_pieces(tmp_path: Path) -> None:
    """A rank writes a UTF-8 character byte by byte, and the tee reads in between: it shows only the whole line."""
    out, _ = shown(tmp_path, r"for byte in 342 202 254; do printf \\$byte; sleep 0.05; done; echo")
    assert out.decode() == "[rank 0]:€\n"


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_a_line_of_megabytes(tmp_path: Path, character: str) -> None:
    """The tee shows it in pieces of bounded size, and cuts no character."""
    log, out = tmp_path / "log", Reader().start()
    line = "x" + character * 500_000
    log.write_text(line, encoding="utf-8")
    try:
        with Tee([Source(0, log, False)], out=out.fd):
            pass
    finally:
        pieces = out.close().decode().splitlines()
    assert "".join(piece.removeprefix("[rank 0]:") for piece in pieces) == line
    assert max(len(piece.encode()) for piece in pieces) <= (1 << 16) + len("[rank 0]:")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    junk = bytes(byte for byte in range(256) if byte not in b"\r\n") * 20
    (tmp_path / "junk").write_bytes(junk)
    out, _ = shown(tmp_path, f"cat {tmp_path}/junk; echo; echo next")
    assert out == b"[rank 0]:" + junk + b"\n[rank 0]:next\n"


def test_of_a_progress_bar_the_last_state(tmp_path: Path) -> None:
    script = r"i=0; while [ $i -lt 101 ]; do printf '\r%d%%' $i; i=$((i+1)); done >&2; echo >&2; printf 'dos\r\n' >&2"
    _, err = shown(tmp_path, script)
    *before, last, dos = err.splitlines()
    assert (last, dos) == (b"[rank 0]:100%", b"[rank 0]:dos")
    assert len(before) <= 1  # an earlier state, if the tee read in between


@pytest.mark.parametrize("states", [1, 30_000, 32_763, 32_768, 100_000])
def test_of_a_long_progress_bar_too(tmp_path: Path, states: int) -> None:
    """The bar is longer than one read, and a read may end in the middle of the last state."""
    log, out = tmp_path / "log", Reader().start()
    log.write_bytes(b"x\r" * states + b"0123456789\nnext\n")
    try:
        with Tee([Source(0, log, False)], out=out.fd):
            pass
    finally:
        text = out.close()
    assert text == b"[rank 0]:0123456789\n[rank 0]:next\n"


def test_a_progress_bar_is_shown_more_often_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _follow._STATE_SECONDS_ON_TERMINAL < _follow._STATE_SECONDS
    monkeypatch.setattr(_follow, "_STATE_SECONDS_ON_TERMINAL", 0.05)
    monkeypatch.setattr(_follow, "_STATE_SECONDS", LONG)
    (tmp_path / "log").write_text("\r1%\r2%")
    controller, terminal = pty.openpty()
    try:
        with Tee([Source(0, tmp_path / "log", False)], out=terminal), open(tmp_path / "log", "a") as log:
            assert os.read(controller, 99) == b"[rank 0]:2%\r\n"

            def shows_a_new_state() -> bool:
                log.write("\r3%\r")
                log.flush()
                return bool(select.select([controller], [], [], 0.1)[0])

            until(shows_a_new_state)
            assert os.read(controller, 13) == b"[rank 0]:3%\r\n"
    finally:
        os.close(terminal)
        os.close(controller)


def test_a_progress_bar_is_shown_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_follow, "_STATE_SECONDS", 0.05)
    out = Reader().start()
    go_on = tmp_path / "fifo"
    os.mkfifo(go_on)
    try:
        with ranks(tmp_path, rf"printf '\r1%%\r2%%'; read line < {go_on}; printf '\r3%%\n'") as files:
            with Tee(sources(files), out=out.fd):
                until(lambda: out.got == b"[rank 0]:2%\n")
                time.sleep(0.2)  # nothing new, nothing shown
                assert out.got == b"[rank 0]:2%\n"
                go_on.write_text("\n")
                until(lambda: out.got == b"[rank 0]:2%\n[rank 0]:3%\n")
    finally:
        out.close()


@pytest.mark.parametrize("reopened", [False, True], ids=["by another", "by the rank"])
def test_a_file_that_is_cut_to_nothing(tmp_path: Path, reopened: bool) -> None:
    """If another process cuts the file (logrotate's copytruncate), the rank writes on behind a hole; a rank that cuts
    it itself begins anew."""
    out = Reader().start()
    go_on = tmp_path / "fifo"
    os.mkfifo(go_on)
    again = "exec > $PWD/attempt_0/0/stdout.log;" if reopened else ""
    try:
        with ranks(tmp_path, f"cd {tmp_path}; seq 10000; read line < {go_on}; {again} seq 3") as files:
            with Tee(sources(files), out=out.fd):
                until(lambda: out.got.endswith(b":10000\n"))
                if not reopened:
                    os.truncate(files[0].stdout or "", 0)
                    time.sleep(0.3)
                del out.got[:]
                go_on.write_text("\n")
                until(lambda: out.got.endswith(b":3\n"))
                assert out.got == b"[rank 0]:1\n[rank 0]:2\n[rank 0]:3\n"
    finally:
        out.close()


def test_a_hole_is_not_read(tmp_path: Path) -> None:
    """A rank had written a terabyte when its file was cut, so it writes on behind a hole of that size."""
    log, out = tmp_path / "log", Reader().start()
    try:
        with log.open("wb", buffering=0) as file, Tee([Source(0, log, False)], out=out.fd):
            file.write(b"before\n")
            until(lambda: out.got == b"[rank 0]:before\n")
            file.truncate(0)
            time.sleep(0.3)
            file.seek(1 << 40)
            file.write(b"after\n")
            until(lambda: out.got == b"[rank 0]:before\n[rank 0]:after\n")
    finally:
        out.close()


def test_a_file_that_is_not_there_yet_and_one_that_never_is(tmp_path: Path) -> None:
    out = Reader().start()
    late = tmp_path / "late"
    try:
        with Tee([Source(0, tmp_path / "never", False), Source(1, late, False)], out=out.fd):
            time.sleep(0.05)
            late.write_text("here\n")
            until(lambda: out.got == b"[rank 1]:here\n")
    finally:
        out.close()


def test_what_is_no_log_file(tmp_path: Path) -> None:
    """The tee says so, and shows the other files."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "log").write_text("here\n")
    err = Reader().start()
    try:
        with Tee([Source(0, tmp_path, True), Source(1, tmp_path / "fifo", True), Source(2, tmp_path / "log", True)],
                 err=err.fd):  # fmt: skip
            pass
    finally:
        said = err.close().decode()
    for path in (tmp_path, tmp_path / "fifo"):
        assert said.count(f"{path} cannot be shown: not a regular file\n") == 1
    assert "[rank 2]:here\n" in said


def test_what_becomes_a_log_file(tmp_path: Path) -> None:
    """A path that cannot be read for a while is shown once it can be."""
    (tmp_path / "log").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    out, err = Reader().start(), Reader().start()
    try:
        paths = [Source(0, tmp_path / "log", False), Source(1, tmp_path / "loop", False)]
        with Tee(paths, out=out.fd, err=err.fd):
            until(lambda: err.got.count(b"cannot be shown") == 2)
            (tmp_path / "log").rmdir()
            (tmp_path / "loop").unlink()
            (tmp_path / "log").write_text("a\n")
            (tmp_path / "loop").write_text("b\n")
            until(lambda: out.got.count(b"\n") == 2)
    finally:
        text, said = out.close(), err.close()
    assert sorted(text.splitlines()) == [b"[rank 0]:a", b"[rank 1]:b"]
    assert said.count(b"\n") == 2


STALE = """
import sys, time
from rankspawn._output.tee import Source, Tee
with Tee([Source(0, sys.argv[1], False)]), open(sys.argv[1], "a", buffering=1) as log:
    for number in range(6):
        log.write(f"{number}\\n")
        time.sleep(0.2)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (Debian, Ubuntu: apt-get install strace)")
@pytest.mark.parametrize("call", ["lseek", "read"])
def test_a_file_server_that_forgets_the_file_once(call: str, tmp_path: Path) -> None:
    log, trace = tmp_path / "log", tmp_path / "trace"
    log.touch()
    fault = f"--inject={call}:error=ESTALE:when={2 if call == 'read' else 6}"
    command = ["strace", "-f", "-o", str(trace), "-P", str(log), f"--trace={call}", fault]
    done = subprocess.run(
        [*command, sys.executable, "-c", STALE, str(log)], capture_output=True, text=True, timeout=LONG
    )
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    assert "(INJECTED)" in trace.read_text()
    assert done.stdout == "".join(f"[rank 0]:{number}\n" for number in range(6))
    said = f"rankspawn: what is written to {log} cannot be shown: Stale file handle\n"
    # How many looks there are depends on when they come; a look for the file's size at the end says nothing.
    assert done.stderr == said or (call == "lseek" and not done.stderr)


FULL = """
import resource, sys, time
from rankspawn._output.tee import Source, Tee
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
with Tee([Source(0, sys.argv[1], False)]):
    sys.stdin.readline()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
"""


def test_an_output_that_fails_for_a_while(tmp_path: Path) -> None:
    """As on a disk that is full until somebody makes room."""
    lines = "".join(f"line {number}\n" for number in range(500))
    (tmp_path / "log").write_text(lines)
    command = [sys.executable, "-c", FULL, str(tmp_path / "log")]
    with (
        open(tmp_path / "out", "w") as out,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdin and process.stderr
        assert process.stderr.readline() == (
            "rankspawn: stdout: File too large; what ranks write there is shown when that is over\n"
        )
        _, said = process.communicate("go on\n", timeout=LONG)
    assert said == ""
    assert (tmp_path / "out").read_text() == "".join(f"[rank 0]:{line}\n" for line in lines.splitlines())


def test_an_output_that_fails_to_the_end(tmp_path: Path) -> None:
    """The tee names the file that has what could not be shown."""
    (tmp_path / "log").write_text("line\n")
    err = Reader().start()
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        tee = Tee([Source(0, tmp_path / "log", False)], out=full, err=err.fd).start()
        assert tee.finish(LONG) == (str(tmp_path / "log"),)
    finally:
        os.close(full)
        said = err.close().decode()
    assert said.splitlines() == [
        "rankspawn: stdout: No space left on device; what ranks write there is shown when that is over",
        f"rankspawn: not all of the output could be shown; the rest is in {tmp_path / 'log'}",
    ]


@pytest.mark.parametrize(("encoding", "expected"), [("ascii", b"caf\\xe9"), ("latin-1", b"caf\xe9")])
def test_a_text_stream_that_has_not_all_characters(encoding: str, expected: bytes, tmp_path: Path) -> None:
    held = io.BytesIO()
    with ranks(tmp_path, r"printf 'caf\303\251\n'; echo after") as files:
        tee = Tee(sources(files), out=io.TextIOWrapper(held, encoding=encoding), err=io.StringIO()).start()
    assert tee.finish() == ()
    assert held.getvalue() == b"[rank 0]:" + expected + b"\n[rank 0]:after\n"


def test_text_streams(tmp_path: Path) -> None:
    """A notebook's output has no descriptor."""
    out, err = io.StringIO(), io.StringIO()
    with ranks(tmp_path, r"printf 'caf\303\251\n\377\n'; echo e >&2") as files:
        tee = Tee(sources(files), out=out, err=err).start()
    assert tee.finish() == ()
    assert (out.getvalue(), err.getvalue()) == ("[rank 0]:café\n[rank 0]:\ufffd\n", "[rank 0]:e\n")


def test_a_text_stream_that_was_closed(tmp_path: Path) -> None:
    out, err = io.StringIO(), io.StringIO()
    out.close()
    with ranks(tmp_path, "echo o; echo e >&2") as files:
        tee = Tee(sources(files), out=out, err=err).start()
    assert tee.finish() == ()
    assert "rankspawn: stdout: I/O operation on closed file" in err.getvalue()
    assert "[rank 0]:e\n" in err.getvalue()


LAUNCHER = """
import sys
from rankspawn._output.tee import Source, Tee
with Tee([Source(0, sys.argv[1], False), Source(1, sys.argv[2], True)]):
    for number in range(20000):
        sys.stderr.write(f"launcher {number}\\n")
"""


def test_no_line_is_torn_by_what_the_launcher_prints(tmp_path: Path) -> None:
    """Both of the launcher's outputs are one pipe, as in a batch job, and the pipe is full all the time."""
    for name in ("0", "1"):
        (tmp_path / name).write_text("".join(f"{number} {'x' * (number % 97)}\n" for number in range(20000)))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(tmp_path / "0"), str(tmp_path / "1")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LONG, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    for prefix in "[rank 0]:", "[rank 1]:", "launcher ":
        numbers = [int(line.removeprefix(prefix).split()[0]) for line in lines if line.startswith(prefix)]
        assert numbers == list(range(20000)), prefix
    assert len(lines) == 60000


def test_without_poll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, the tee writes without asking whether the output takes it."""
    monkeypatch.delattr("select.poll")
    log, out = tmp_path / "log", Reader()
    os.set_blocking(out.fd, False)
    log.write_bytes(b"1\n" * 50_000)
    try:
        with Tee([Source(0, log, False)], out=out.fd):
            time.sleep(0.1)
            out.start()
            with log.open("ab") as file:
                file.write(b"2\n")
            until(lambda: out.got.endswith(b":2\n"))
    finally:
        text = out.close()
    assert text == b"[rank 0]:1\n" * 50_000 + b"[rank 0]:2\n"


def test_signals_are_not_for_its_thread(tmp_path: Path) -> None:
    with Tee([Source(0, tmp_path / "never", False)]) as tee:
        assert tee._thread is not None
        status = Path("/proc/self/task", str(tee._thread.native_id), "status")
        until(lambda: "SigBlk:\tfffffffe7ffbfeff\n" in status.read_text())


def test_it_may_be_finished_twice_or_never_begun(tmp_path: Path) -> None:
    tee = Tee([Source(0, tmp_path / "never", False)])
    assert tee.finish() == ()
    tee.start()
    assert tee.finish() == tee.finish() == ()


# ---- the end, interrupted -------------------------------------------------------------------------------------------

# Waits for a reader as long as it is let, and says when it begins to.
PATIENT = """
import os, sys
import rankspawn._output.tee as tee
wait = tee.Tee._wait
def wait_long(self, thread, timeout, interrupt):
    os.write(2, b"waiting\\n")
    wait(self, thread, 1e6, interrupt)
tee.Tee._wait = wait_long
"""
WRITES = [sys.executable, "-c", "print(('x' * 99 + '\\n') * 13000, end='')"]
IN_PYTHON = f"""{PATIENT}
import rankspawn
with rankspawn.launch({WRITES!r}, 2, tee=True) as group:
    group.wait()
"""
IN_SHELL = f"""{PATIENT}
from rankspawn._cli.main import main
sys.exit(main(["run", "--nproc-per-node", "2", "--tee", "--no-python", *{WRITES!r}]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="interrupted by poll(2) on a pipe's writing end")
@pytest.mark.parametrize(
    ("program", "sig", "status"),
    [
        pytest.param(IN_PYTHON, signal.SIGINT, -signal.SIGINT, id="launch"),
        pytest.param(IN_SHELL, signal.SIGINT, 0, id="run, SIGINT"),
        pytest.param(IN_SHELL, signal.SIGTERM, 0, id="run, SIGTERM"),
    ],
)
def test_what_was_not_shown_is_kept_when_the_end_is_interrupted(
    program: str, sig: int, status: int, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as launcher:  # fmt: skip
        try:
            assert launcher.stderr is not None
            assert launcher.stderr.readline() == "waiting\n"
            launcher.send_signal(sig)
            told = launcher.stderr.read()
            assert launcher.wait(LONG) == status
        finally:
            launcher.kill()
    found = re.search(r"not all of the output could be shown; the rest is in (\S+), (\S+)\n", told)
    assert found is not None, told
    for path in found.groups():
        assert path.startswith(str(tmp_path)) and os.path.getsize(path) == 13000 * 100


def test_an_interrupted_end_that_had_shown_all_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_SHELL], capture_output=True, text=True, timeout=LONG,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "waiting\n", 26000)
    assert os.listdir(tmp_path) == []
