"""What cannot be run is said before the ranks are started, and with what is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rankspawn
from rankspawn._start.engine import mechanisms
from tests.support.launchers import LAUNCHER, completed


def test_a_misspelt_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    done = completed([*LAUNCHER, "run", "--nproc-per-node", "4", str(tmp_path / "trian.py")])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"rankspawn: {tmp_path}/trian.py: No such file or directory (did you mean train.py?)\n"


def test_a_script_that_another_interpreter_may_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_EXEC", "/bin/echo")
    assert completed([*LAUNCHER, "run", str(tmp_path / "not here.py")]).returncode == 0


def test_a_script_from_stdin() -> None:
    assert completed([*LAUNCHER, "run", "-"], input="print('here')").stdout == "here\n"


@pytest.mark.parametrize("option", ["--report", "--timeline"])
def test_a_folder_that_is_not_there(option: str, tmp_path: Path) -> None:
    path, ran = tmp_path / "no" / "file.json", tmp_path / "ran"
    done = completed([*LAUNCHER, "run", option, str(path), "--no-python", "touch", str(ran)])
    assert (done.returncode, done.stderr) == (2, f"rankspawn: {path}: No such file or directory\n")
    assert not ran.exists()


MISPLACED = (
    "rankspawn: --nproc-per-node and --numa_binding after SCRIPT: passed to {}, whose text does not name them;"
    " put options of rankspawn run before SCRIPT\n"
)


def test_an_option_of_ours_behind_the_script(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(1)\n")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__main__.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(1)\n")
    behind = ["--nproc-per-node", "8", "--numa_binding=node", "--nproc-per-node=4", "--lr", "1"]
    for what in (["train.py"], ["--run-path", "train.py"], ["-m", "train"], ["-m", "package"]):
        done = completed([*LAUNCHER, "run", "--max-restarts", "1", *what, *behind], cwd=tmp_path)
        assert done.stdout == f"{behind}\n" * 2, "they are handed to SCRIPT all the same, in each attempt"
        assert done.stderr.startswith(MISPLACED.format(what[-1])) and done.stderr.count("after SCRIPT") == 1


def test_an_option_that_the_script_may_have_meant(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import sys\nNNODES = '--nproc_per_node'\n")
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    for what in (
        ["train.py", "--nproc-per-node", "8"],  # its text names it, with an underscore
        ["train.py", "--log-dir", "here", "--master-port", "1"],  # scripts have such options
        ["train.py", "nproc-per-node", "8"],
        ["-m", "sysconfig", "--nproc-per-node", "8"],  # installed: it may be a launcher
        ["--no-python", "./python", "train.py", "--max-restarts", "8"],
    ):
        done = completed([*LAUNCHER, "run", *what], cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "status"),
    [(["run", "--no-python"], 127), (["bind", "--local-rank", "0", "--nproc-per-node", "1"], 127)],
    ids=["run", "bind"],
)
def test_an_interpreter_that_is_not_there(command: list[str], status: int, tmp_path: Path) -> None:
    script = tmp_path / "script"
    for first, said in (
        ("#!/bin/sh\r\n", "its interpreter /bin/sh\\r does not: its first line ends with a carriage return"),
        ("#!/no/such/python -u\n", "its interpreter /no/such/python does not)"),
    ):
        script.write_bytes(first.encode() + b"true\n")
        script.chmod(0o755)
        done = completed([*LAUNCHER, *command, str(script)])
        assert done.returncode == status
        assert f"({script} exists, but {said}" in done.stderr
    done = completed([*LAUNCHER, *command, str(tmp_path / "none")])
    assert done.returncode == status and "exists, but" not in done.stderr


def test_an_interpreter_that_is_not_there_is_a_note_in_python(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_bytes(b"#!/bin/sh\r\ntrue\n")
    script.chmod(0o755)
    for start in (
        lambda: rankspawn.Popen([script]),
        lambda: rankspawn.Popen(["./script"], cwd=tmp_path),
        lambda: rankspawn.launch([str(script)], 2),
    ):
        with pytest.raises(FileNotFoundError) as failed:
            start()
        if sys.version_info >= (3, 11) and mechanisms():
            assert "its interpreter /bin/sh\\r does not" in failed.value.__notes__[0]
    with pytest.raises(FileNotFoundError) as failed:
        rankspawn.Popen([tmp_path / "none"])
    assert not hasattr(failed.value, "__notes__")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is an empty file"),
        (b"true\n", "is no program, and has no #! line"),
        (b"\x7fELF\x02\x01\x01" + bytes(60), "is not a program for this machine"),
        (b"#! {}/no-program\n", "may be executed, but its interpreter {}/no-program may not"),
    ],
    ids=["empty", "no #!", "ELF", "interpreter"],
)
@pytest.mark.parametrize("command", ["run --no-python", "bind --local-rank 0 --nproc-per-node 1"])
def test_a_file_that_cannot_be_executed(command: str, text: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "no-program").write_text("x")
    script = tmp_path / "script"
    script.write_bytes(text.replace(b"{}", os.fsencode(tmp_path)))
    script.chmod(0o755)
    done = completed([*LAUNCHER, *command.split(), str(script)])
    assert done.returncode == 126
    assert f"({script} {said.replace('{}', str(tmp_path))}" in done.stderr


def test_programs_that_were_meant_otherwise(tmp_path: Path) -> None:
    (tmp_path / "wrap.sh").write_text("#!/bin/sh\n")
    (tmp_path / "wrap.sh").chmod(0o755)
    done = completed([*LAUNCHER, "run", "--no-python", "wrap.sh"], cwd=tmp_path)
    assert done.returncode == 127 and "(it is not in PATH; did you mean ./wrap.sh?)" in done.stderr
    done = completed([*LAUNCHER, "run", "env", "e.py"], cwd=tmp_path)
    assert (
        done.returncode == 2 and "env: No such file or directory; to run the program, pass --no-python" in done.stderr
    )
    for words in (["--nproc-per-node", "2", "e.py"], ["e.py"]):
        done = completed([*LAUNCHER, *words])
        assert done.returncode == 2 and done.stderr.endswith("; `rankspawn run ...` starts the ranks of a script\n")


def test_what_is_run_is_run() -> None:
    assert completed([*LAUNCHER, "run", "--no-python", sys.executable, "-c", "print(1)"]).stdout == "1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file system may refuse such names")
@pytest.mark.parametrize("name", [b"tr\xe9in", "tr\u00e4in".encode()], ids=["no UTF-8", "UTF-8"])
@pytest.mark.parametrize(
    "locale",
    [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}],
    ids=["C", "C without UTF-8 mode", "C.UTF-8"],
)
def test_names_of_files_are_shown_byte_by_byte(name: bytes, locale: dict[str, str], tmp_path: Path) -> None:
    """As the ranks' own output shows them."""
    script, folder = name + b".py", name + b".logs"
    (tmp_path / os.fsdecode(script)).write_text("import sys\nprint(sys.argv[0])\nsys.exit(3)\n")

    def said(*words: str | bytes) -> tuple[bytes, bytes]:
        command = [*LAUNCHER, "run", *words]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **locale}, capture_output=True, timeout=60)
        assert done.returncode in (2, 3)
        return done.stdout, done.stderr

    assert said(script)[0] == script + b"\n"
    assert said("--tee", script)[0] == b"[rank 0]:" + script + b"\n"
    missing = b"no-" + script
    assert said(missing)[1].startswith(b"rankspawn: " + missing + b": No such file or directory")
    assert b"passed to " + script + b", whose text" in said(script, "--nnodes", "2")[1]
    report = folder + b"/none/x.json"
    assert said("--report", report, script)[1] == b"rankspawn: " + report + b": No such file or directory\n"
    kept = said("--log-dir", folder, script)[1]
    for begin, end in ((b"rankspawn: logs in ", b""), (b"  its files are in ", b"/attempt_0/0")):
        path = rb"\S*" + re.escape(folder) + b"/" + re.escape(name) + rb"-\d{8}-\d{6}"
        assert re.search(rb"(?m)^" + begin + path + end + rb"$", kept), kept
