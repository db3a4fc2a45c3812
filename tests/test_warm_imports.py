"""What the importer of a template finds out about itself: each test has one do what it must notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankspawn._warm.variables import difference

IMPORTER = """
import json, sys
sys.path[0] = {folder!r}
from rankspawn._warm.imports import prepare
prepared = prepare({modules!r})
assert {folder!r} not in sys.path
print(json.dumps(prepared))
"""


@pytest.fixture
def prepared(tmp_path: Path):
    def importing(modules: dict[str, str], *flags: str, **env: str) -> dict[str, Any]:
        for name, text in modules.items():
            path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        names = [name for name in modules if not name.startswith("_")]
        program = IMPORTER.format(folder=str(tmp_path), modules=names)
        done = subprocess.run(
            [sys.executable, *flags, "-c", program],
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])

    return importing


def test_modules_are_imported_and_their_files_listed(prepared, tmp_path: Path) -> None:
    found = prepared({"one": "import _two", "_two": "", "three": "1/0", "four": "import nothing", "five": "exit(3)"})
    assert found["refused"] is None
    assert list(found["modules"]) == ["one"]
    assert found["failed"] == {
        "three": "ZeroDivisionError: division by zero",
        "four": "ModuleNotFoundError: No module named 'nothing'",
        "five": "SystemExit: 3",
    }
    for name in ("one", "_two"):
        path = tmp_path / f"{name}.py"
        assert found["files"][str(path)] == path.stat().st_mtime_ns


def test_reads_name_the_module_that_was_imported(prepared) -> None:
    found = prepared(
        {
            "_helper": "import os\ndef get(name): return os.environ.get(name)",
            "outer": "import os, _helper, inner\n_helper.get('OUTER')\nos.environ['HOME']",
            "inner": "import os, _helper\n_helper.get('INNER')\n'IS_IN' in os.environ\nos.getenv('GETENV')\n"
            "os.environb.get(b'BYTES')\n"
            "[dict(os.environ), {**os.environ}, os.environ.copy(), list(os.environ.items())]",
        },
        COPIED="1",
    )
    reads = found["environment_read"]
    assert {name: reads[name] for name in ("OUTER", "INNER", "IS_IN", "GETENV", "HOME", "BYTES")} == {
        "OUTER": "outer", "INNER": "inner", "IS_IN": "inner", "GETENV": "inner", "HOME": "outer", "BYTES": "inner",
    }  # fmt: skip
    assert found["environment_copied"] == ["inner"] and "COPIED" not in reads
    assert "OUTER" not in found["environment"] and found["environment"]["HOME"] == os.environ["HOME"]


def test_what_imports_set_is_listed_and_not_taken_for_a_read(prepared) -> None:
    found = prepared(
        {
            "sets": "from os import environ\nenviron['SET'] = 'x'\n"
            "environ['SET']\ndel environ['GONE']\nenviron.setdefault('D', 'd')"
        },
        GONE="1",
    )
    assert found["environment_written"] == {"SET": "x", "GONE": None, "D": "d"}
    assert "SET" not in found["environment_read"]
    assert found["environment_read"]["D"] == "sets"


def test_a_rank_with_other_values_of_what_was_read_is_noticed(prepared) -> None:
    found = prepared({"reads": "import os\nRANK = os.environ.get('RANK')"})
    env = dict(found["environment"])
    assert difference(found, env) is None
    assert difference(found, {**env, "UNREAD": "1"}) is None
    assert (
        difference(found, {**env, "RANK": "3"})
        == "reads read RANK when it was imported: it was unset in the template, and is '3' in the rank"
    )
    assert difference(found, {**env, "OMP_NUM_THREADS": "77"}).startswith("libraries read OMP_NUM_THREADS")
    assert difference(found, {**env, "PYTHONHASHSEED": "77"}).startswith("libraries read PYTHONHASHSEED")
    assert difference({**found, "openmp": ["libgomp.so"]}, {**env, "OMP_PLACES": "cores"}).startswith("OMP_PLACES is")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import socket\nkept = socket.socket()", "has left socket:"),
        ("import os\nkept = os.pipe()", "has left pipe:"),
        ("import select\nkept = select.epoll()", "has left anon_inode:[eventpoll]"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True, name='T').start()",
         "has started the Python thread 'T'"),
        ("import _thread, time\n_thread.start_new_thread(time.sleep, (9,))", "has started a native thread"),
        ("import subprocess\nkept = subprocess.Popen(['sleep', '3'])", "has started a process"),
        ("import sys\nsys.settrace(lambda *_: None)", "a tracer or profiler"),
    ],
)  # fmt: skip
def test_what_ranks_would_share_or_lack_is_refused(prepared, source: str, expected: str) -> None:
    assert expected in prepared({"it": source})["refused"]


def test_what_an_import_has_closed_again_is_no_reason(prepared) -> None:
    source = (
        "import socket, threading\nsocket.socket().close()\nt = threading.Thread(target=int)\nt.start()\nt.join()\n"
        "null = open('/dev/null')\nkept = open(__file__)"
    )
    assert prepared({"it": source})["refused"] is None


def test_an_accelerators_file_is_refused(prepared, tmp_path: Path) -> None:
    if os.geteuid() or not hasattr(os, "mknod"):
        pytest.skip("needs root: a device file is made")
    source = "import os, mmap\nkept = os.open('/dev/accel-rankspawn-test', os.O_RDONLY)"
    os.mknod("/dev/accel-rankspawn-test", 0o20600, os.makedev(1, 5))  # /dev/zero's numbers
    try:
        assert "an accelerator's driver does not survive a fork" in prepared({"it": source})["refused"]
    finally:
        os.unlink("/dev/accel-rankspawn-test")


def test_buffers_are_written_once_and_the_collector_is_as_it_was(prepared) -> None:
    source = "import gc\nprint('printed', end='\\n')\nassert not gc.isenabled()"
    assert prepared({"it": source})["modules"].keys() == {"it"}


def test_a_folder_of_the_programs_is_in_the_path_of_none_with_safe_path(tmp_path: Path) -> None:
    program = (
        "import sys; before = list(sys.path); from rankspawn._warm.imports import prepare; prepare([]);"
        " assert sys.path == before"
    )
    subprocess.run([sys.executable, "-I", "-c", program], check=True)


def test_a_rank_has_no_descriptor_or_library_that_only_the_importer_needed(prepared) -> None:
    """libffi, which is ctypes's, opens its own file for its trampolines, and keeps it."""
    source = "import atexit, os, sys\nopened = sorted(os.listdir('/proc/self/fd'))\n"
    source += "atexit.register(lambda: (opened == sorted(os.listdir('/proc/self/fd'))"
    source += " and not {'ctypes', '_ctypes'} & {*sys.modules}) or os._exit(1))"
    assert prepared({"it": source})["refused"] is None
