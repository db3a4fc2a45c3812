"""A warm start that cannot be: ranks start cold, somebody says why, and nothing is left behind."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankspawn import Template, launch
from rankspawn._output.logs import rank_files
from rankspawn._procfs import children
from rankspawn._start.engine import EXTENSION_ERROR
from rankspawn._warm import stem as of_stem
from rankspawn._warm.adoption import adopting
from tests.support.processes import PATIENCE, eventually
from tests.support.state import NOBODY, in_child

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a warm start needs Linux"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
]

PR_GET_CHILD_SUBREAPER = 37
PYTHON = [sys.executable, "-S", "-c"]


def is_subreaper() -> int:
    flag = ctypes.c_int(-1)
    assert ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(flag), 0, 0, 0) == 0
    return flag.value


@pytest.fixture(autouse=True)
def flag_is_kept() -> Iterator[None]:
    before = is_subreaper()
    yield
    assert is_subreaper() == before


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that ranks and importers can import by its name, ``preloaded``."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "preloaded.py"


def mechanisms(warm: object, nprocs: int = 2, **options: object) -> tuple[set[str | None], list[str]]:
    """How ranks were started, and the warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with launch([*PYTHON, ""], nprocs, warm=warm, **options) as group:  # type: ignore[arg-type]
            assert group.wait(PATIENCE) == (0,) * nprocs
            return {rank.mechanism for rank in group.ranks}, [str(one.message) for one in said]


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "the template ended while it imported"),
        ("import os; os._exit(0)", "the template ended while it imported"),
        ("import time; time.sleep(1000)", "the template did not answer within 1 seconds while it imported"),
        ("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", "Python thread"),
        ("import socket; kept = socket.socket()", "which all ranks would share"),
        ("import subprocess; kept = subprocess.Popen(['sleep', '1000'])", "a process"),
    ],
    ids=["killed", "exits", "hangs", "thread", "socket", "process"],
)
def test_a_template_that_cannot_be(module: Path, does: str, why: str) -> None:
    module.write_text(does)
    with Template(["preloaded"], timeout=1.0 if "within" in why else PATIENCE) as template:
        how, said = mechanisms(template)
        assert how == {"clone"}
        assert len(said) == 1 and said[0].startswith("ranks 0-1 started cold: ") and why in said[0]
        # It is not tried again, and not said again.
        assert mechanisms(template) == ({"clone"}, [])
        (told,) = template.report()
        assert why in (told["refused"] or "")


@pytest.mark.parametrize("handler", ["signal.SIG_IGN", "lambda *_: os.waitpid(-1, os.WNOHANG)"])
def test_an_import_may_ignore_the_ends_of_children(module: Path, handler: str) -> None:
    module.write_text(f"import os, signal; signal.signal(signal.SIGCHLD, {handler})")
    program = "import signal, sys; sys.exit(signal.getsignal(signal.SIGCHLD) in (None, signal.SIG_DFL))"
    with (
        Template(["preloaded"], required=True, timeout=PATIENCE) as template,
        launch([*PYTHON, program], 2, warm=template) as group,
    ):
        assert group.wait(PATIENCE) == (0, 0)
        assert {rank.mechanism for rank in group.ranks} == {"warm"}


def test_required_is_an_error(module: Path) -> None:
    module.write_text("import socket; kept = socket.socket()")
    with Template(["preloaded"], required=True) as template:
        with pytest.raises(RuntimeError, match="a warm start is required, but rank 0 started cold: an import has left"):
            launch([*PYTHON, ""], 1, warm=template)
        with pytest.raises(RuntimeError, match="expected a command that is `python SCRIPT`, got '/bin/true'"):
            launch(["/bin/true"], 1, warm=template)


def test_a_preload_that_raises_is_left_out(module: Path) -> None:
    module.write_text("raise ValueError('broken')")
    how, said = mechanisms(["preloaded", "json"])
    assert how == {"warm"}
    assert said == ["the template could not import preloaded: ValueError: broken"]


def test_a_variable_that_differs_by_rank_is_cold(module: Path) -> None:
    module.write_text("import os; RANK = os.environ.get('RANK')")
    how, said = mechanisms(["preloaded"])
    assert (
        how == {"clone"} and len(said) == 2 and all("preloaded read RANK when it was imported" in one for one in said)
    )


def test_a_variable_that_differs_by_launch_has_a_template_of_its_own(module: Path) -> None:
    module.write_text("import os; A = os.environ.get('A')")
    script = [*PYTHON, "import os, sys, preloaded; sys.exit(preloaded.A != os.environ['A'])"]
    with Template(["preloaded"]) as template:
        for a in "xyx":
            with launch(script, 2, warm=template, env={**os.environ, "A": a}) as group:
                assert group.wait(PATIENCE) == (0, 0)
                assert {rank.mechanism for rank in group.ranks} == {"warm"}
        assert [told["ranks"] for told in template.report()] == [4, 2]


def test_edited_files_are_said(module: Path) -> None:
    module.write_text("VALUE = 1")
    with Template(["preloaded"]) as template:
        assert mechanisms(template) == ({"warm"}, [])
        module.write_text("VALUE = 2 # longer")
        os.utime(module, ns=(1, 1))
        how, said = mechanisms(template)
        assert how == {"warm"} and len(said) == 1 and said[0].startswith(f"{module} was changed after")
        assert mechanisms(template) == ({"warm"}, [])


def test_what_the_launcher_has_changed_is_cold() -> None:
    def changed() -> tuple[set[str | None], list[str]]:
        with Template(["json"]) as template:
            assert mechanisms(template)[0] == {"warm"}
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
            return mechanisms(template)

    how, said = in_child(changed)
    assert how == {"clone"} and "Max open files of the launcher was" in said[0]


def test_a_forked_copy_of_the_launcher_starts_cold() -> None:
    with Template(["json"]) as template:
        assert mechanisms(template)[0] == {"warm"}
        how, said = in_child(lambda: mechanisms(template))
        assert how == {"clone"} and "forked copy" in said[0]
        assert mechanisms(template)[0] == {"warm"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without processes")
def test_too_many_processes_is_all_or_nothing(module: Path) -> None:
    # The template may have two processes beside itself, as a user who has no others.
    module.write_text(f"""
import ctypes, importlib.metadata, os, resource
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which the change of ids has cleared
resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))
""")
    with Template(["preloaded"]) as template:
        assert mechanisms(template)[0] == {"warm"}
        before = children()
        with pytest.raises(BlockingIOError, match="rank 2: clone: ") as told:
            launch([*PYTHON, "import time; time.sleep(1000)"], 4, warm=template)
        assert told.value.rank == 2  # type: ignore[attr-defined]
        assert children() == before
        assert mechanisms(template)[0] == {"warm"}


def test_a_template_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_stem, "_ANSWER_SECONDS", 0.5)
    with Template(["json"]) as template:
        assert mechanisms(template)[0] == {"warm"}
        os.kill(template.report()[0]["pid"], signal.SIGSTOP)
        assert mechanisms(template)[0] == {"warm"}
        first, second = template.report()
        assert first["refused"] == "the template did not answer within 0.5 seconds while it was forking ranks"
        assert second["refused"] is None


def test_an_interrupted_request_leaves_nothing() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = children()
    with Template(["json"]) as template:
        assert mechanisms(template)[0] == {"warm"}
        pid = template.report()[0]["pid"]
        os.kill(pid, signal.SIGSTOP)
        handler = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with pytest.raises(Interrupted):
                launch([*PYTHON, "import time; time.sleep(1000)"], 4, warm=template)
        finally:
            signal.signal(signal.SIGALRM, handler)
        assert mechanisms(template)[0] == {"warm"}
    assert children() == before


def test_a_failed_step_is_the_same_error(tmp_path: Path) -> None:
    files = rank_files(str(tmp_path / "logs"), 2, 0)
    shutil.rmtree(tmp_path / "logs")
    said = []
    for warm in (False, ["json"]):
        with pytest.raises(FileNotFoundError) as told:
            launch([*PYTHON, ""], 2, warm=warm, files=files)
        said.append((told.value.errno, str(told.value.filename).endswith("stdout.log")))
        assert told.value.strerror and told.value.strerror.startswith("rank ")
    assert said == [(errno.ENOENT, True)] * 2


def test_a_folder_that_is_not_there_is_the_ranks_error(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="no template can be made"), pytest.raises(FileNotFoundError, match="rank "):
        launch([*PYTHON, ""], 2, warm=["json"], cwd=tmp_path / "absent")


def test_a_strangers_orphan_is_reaped() -> None:
    """What loses its parent in the moment of an adoption becomes this process's child, and no zombie."""
    before = children()
    stranger = subprocess.Popen(["/bin/sh", "-c", "sleep 1 & sleep 0.5"])
    parent = subprocess.Popen(["/bin/true"], start_new_session=True)
    time.sleep(0.2)
    with adopting(parent) as known:  # type: ignore[arg-type]
        parent.wait()
        stranger.wait()
        known.pid = 0
    (taken,) = children() - before
    eventually(lambda: not Path(f"/proc/{taken}").exists())
    assert children() == before


def test_a_launcher_with_many_descriptors() -> None:
    """A descriptor's number may be too large for select(2)."""

    def many() -> set[str | None]:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if hard < 2000:
            return {"warm"}
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        null = os.open(os.devnull, os.O_RDONLY)
        kept = [os.dup(null) for _ in range(1100)]
        try:
            return mechanisms(["json"])[0] | mechanisms(["json"])[0]
        finally:
            assert kept

    assert in_child(many) == {"warm"}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_run_ends_while_the_template_imports(module: Path, name: str) -> None:
    module.write_text(
        "import os, pathlib, time; pathlib.Path(__file__).with_name(str(os.getpid())).touch()\ntime.sleep(600)"
    )
    script = module.with_name("script.py")
    script.write_text("raise SystemExit('a rank was started')")
    command = [sys.executable, "-m", "rankspawn", "run", "--warm", "preloaded", str(script)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            eventually(lambda: list(module.parent.glob("[0-9]*")))
            launcher.send_signal(signal.SIGUSR1)  # for ranks: it ends nothing
            launcher.send_signal(getattr(signal, name))
            _, said = launcher.communicate(timeout=PATIENCE)
        finally:
            launcher.kill()
    sig = getattr(signal, name)
    assert launcher.returncode == (-sig if name == "SIGHUP" else 128 + sig), said
    assert said.splitlines()[-1] == f"rankspawn: {name}: no rank was started"
    (importer,) = module.parent.glob("[0-9]*")
    eventually(lambda: not Path("/proc", importer.name).exists())
