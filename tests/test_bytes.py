"""Bytes beside text in every argument, under ``python -bb``: where subprocess works, ours works, and says the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no bytes in these arguments")

ROOT = Path(__file__).parent.parent
MECHANISMS = ["clone", "posix_spawn", "subprocess"] if sys.platform == "linux" else ["posix_spawn", "subprocess"]

HEAD = """
import os, pathlib, subprocess, sys

class BytesPath:
    def __init__(self, path): self.path = os.fsencode(path)
    def __fspath__(self): return self.path

folder = sys.argv[1]
assert sys.flags.bytes_warning == 2
"""

STARTS = """
import rankspawn

def told(popen, *args, **kwargs):
    try:
        with popen(*args, stdout=subprocess.PIPE, **kwargs) as process:
            out = process.communicate()[0]
        return process.returncode, out
    except Exception as error:
        return type(error), str(error), getattr(error, "filename", None)

echo = "printf %s \\"$RS_A$RS_B\\"; pwd"
starts = {
    "args": dict(args=[b"true"]),
    "args, mixed": dict(args=["sh", b"-c", "exit $#", b"a", "b", pathlib.Path("c")]),
    "args, a string": dict(args=b"/bin/true"),
    "args, a shell": dict(args=b"exit 3", shell=True),
    "args, a shell and mixed": dict(args=["exit $#", b"a", "b"], shell=True),
    "a path of bytes": dict(args=[BytesPath("/bin/true")]),
    "missing": dict(args=[b"/no/such/program"]),
    "missing in PATH": dict(args=[b"rankspawn-none"], env={b"PATH": "/bin"}),
    "executable": dict(args=["sh", "-c", "exit 4"], executable=b"/bin/sh"),
    "executable in PATH": dict(args=[b"sh", "-c", "exit 4"], executable="sh", env={b"PATH": b"/usr/bin:/bin"}),
    "env, bytes": dict(args=[b"true"], env={b"PATH": b"/bin"}),
    "env, key": dict(args=["true"], env={b"PATH": "/bin"}),
    "env, value": dict(args=["true"], env={"PATH": b"/bin"}),
    "env, both": dict(args=["sh", "-c", echo], env={b"RS_A": "1", "RS_B": b"2", "PATH": "/bin"}),
    "env, no PATH": dict(args=["sh", "-c", echo], env={b"RS_A": b"1"}),
    "env, value that cannot be": dict(args=["true"], env={"PATH": 3}),
    "env, key that cannot be": dict(args=["true"], env={b"PATH": "/bin", 3: ""}),
    "env, illegal name": dict(args=["/bin/true"], env={b"A=B": b""}),
    "cwd": dict(args=["pwd"], cwd=os.fsencode(folder)),
    "cwd, path": dict(args=["pwd"], cwd=BytesPath(folder)),
    "cwd, missing": dict(args=["pwd"], cwd=b"/no/such/folder"),
    "a stream that is bytes": dict(args=["true"], stdin=b"/dev/null"),
}
for name, start in starts.items():
    expected, found = told(subprocess.Popen, **start), told(rankspawn.Popen, **start)
    assert found == expected, (name, expected, found)

# A name that is there as bytes and as text. A dict cannot hold both where they compare, which their equal hashes cause.
class Both(dict):
    def items(self):
        return [("PATH", "/bin"), (b"RS_A", b"1"), ("RS_B", "2")]
    def keys(self):  # Python 3.15 starts a process like this one by os.posix_spawn, which asks for these two
        return [name for name, _ in self.items()]
    def values(self):
        return [value for _, value in self.items()]
    def __len__(self):
        return 3
for popen in (subprocess.Popen, rankspawn.Popen):
    assert told(popen, ["/bin/sh", "-c", "printf $RS_A$RS_B"], env=Both()) == (0, b"12")
"""

STREAMS = """
import rankspawn
from rankspawn import Binding

for out, err in [(BytesPath, pathlib.Path), (pathlib.Path, BytesPath), (BytesPath, BytesPath)]:
    for same in (False, True):
        names = [os.path.join(folder, "out"), os.path.join(folder, "out" if same else "err")]
        with rankspawn.Popen(
            ["sh", "-c", "echo 1; echo 2 >&2"],
            stdin=BytesPath("/dev/null"),
            stdout=out(names[0]),
            stderr=err(names[1]),
            binding=Binding(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        ) as process:
            assert process.wait() == 0
        found = [pathlib.Path(name).read_text() for name in names]
        assert found == (["1\\n2\\n"] * 2 if same else ["1\\n", "2\\n"]), (out, err, found)
"""

RANKS = """
from pathlib import Path
from rankspawn._group.start import start_ranks

def start(commands, env, rank_env, cwd, streams=None):
    ranks = []
    none = (None, None, None)
    start_ranks(
        ranks, commands, env=env, rank_env=rank_env, bindings=[None] * len(commands),
        streams=streams or [none] * len(commands), cwd=cwd,
    )
    return [rank.wait() for rank in ranks]

say = "exit $RS_A$RS_B"
assert start([["sh", "-c", say], [b"sh", b"-c", say]], None, [{"RS_A": "1"}, {b"RS_A": b"2"}], None) == [1, 2]
assert start([["sh", "-c", say], [b"sh", "-c", say]], {b"RS_A": b"1", "PATH": "/bin"}, [{"RS_B": "1"}, {b"RS_B": "2"}],
             os.fsencode(folder)) == [11, 12]
shared = {b"PATH": b"/bin", "RS_A": "3"}
assert start([["sh", "-c", say]] * 2, shared, [{b"RS_A": b"4"}, {}], BytesPath(folder)) == [4, 3]
logs = [(None, BytesPath(f"{folder}/{rank}"), Path(f"{folder}/{rank}")) for rank in range(2)]
assert start([["sh", "-c", "echo 1; echo 2 >&2"]] * 2, None, [{}, {}], None, logs) == [0, 0]
assert [Path(folder, str(rank)).read_text() for rank in range(2)] == ["1\\n2\\n"] * 2
"""

LAUNCH = """
import rankspawn
from rankspawn import Job

for keywords in (
    dict(env={**os.environ, "RS_A": b"1"}),
    dict(env={b"PATH": b"/bin", "RS_A": "1"}),
    dict(env={**os.environ, b"RS_A": b"1"}, cwd=os.fsencode(folder)),
    dict(rank_env=[{b"RS_A": b"1"}, {"RS_A": b"1"}]),
    dict(env={b"RS_B": b"7", b"PATH": b"/bin", b"OMP_NUM_THREADS": b"1", "RS_A": "0"}, rank_env=[{b"RS_A": b"1"}] * 2),
):
    keywords |= dict(guard=False, keep_going=True)
    with rankspawn.launch([b"sh", "-c", "exit $RS_A"], 2, **keywords) as group:
        assert group.wait() == (1, 1), keywords
"""

HANDLER = """
import rankspawn

def start(*args, **kwargs):
    handler = rankspawn.get_subprocess_handler(*args, **kwargs)
    try:
        return handler.proc.wait()
    finally:
        handler.close()

assert start("sh", ("-c", "exit $RS_A"), {b"RS_A": b"3"}, "", "", 0) == 3
assert start(b"/bin/sh", ("-c", "exit $RS_A"), {"RS_A": b"3"}, os.fsencode(folder + "/out"), folder + "/out", 0) == 3
options = rankspawn.NumaOptions(rankspawn.AffinityMode("node"), should_fall_back_if_binding_fails=True)
assert start("true", (), {b"LOCAL_WORLD_SIZE": b"2"}, "", "", 1, options) == 0
assert start("true", (), {"LOCAL_WORLD_SIZE": b"2"}, "", "", 1, options) == 0
"""

CONTEXT = """
import multiprocessing, rankspawn

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        context = rankspawn.get_context(method)
        context.set_executable(os.fsencode(sys.executable))
        process = context.Process(target=os.getpid, name="a name")
        process.start()
        process.join()
        assert process.exitcode == 0
"""


def run(code: str, folder: Path, mechanism: str) -> None:
    program = folder / "program.py"
    program.write_text(HEAD + code)
    environment = {**os.environ, "RANKSPAWN_MECHANISM": mechanism, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-bb", str(program), str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "BytesWarning" not in done.stderr


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize(
    "code", [STARTS, STREAMS, RANKS, LAUNCH, HANDLER, CONTEXT],
    ids=["Popen", "streams", "ranks", "launch", "handler", "context"],
)  # fmt: skip
def test_bytes_beside_text(code: str, mechanism: str, tmp_path: Path) -> None:
    run(code, tmp_path, mechanism)
