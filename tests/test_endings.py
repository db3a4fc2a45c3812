"""Each way of ending a job, and everybody who is to have time for it: a rank is all that is in its session.

The ranks are shells and wrappers, as users have them, around a program that saves a checkpoint when it is told to end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rankspawn import RankGroup, launch
from rankspawn._end.sessions import ignores, signal_members
from rankspawn._start.engine import EXTENSION_ERROR
from tests.support.launchers import LAUNCHER
from tests.support.processes import PATIENCE, eventually, has_ended

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc"),
    pytest.mark.skipif(EXTENSION_ERROR is not None, reason="this install has no extension"),
]

# It saves for 0.3 s what it was doing, whichever signal tells it to end.
SAVING = """
import os, signal, sys, time
def told(sig, frame):
    for later in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(later, signal.SIG_IGN)
    time.sleep(0.3)
    with open("new." + os.environ["RANK"], "w") as file: file.write(str(sig))
    os.rename("new." + os.environ["RANK"], "saved." + os.environ["RANK"])
    sys.exit(0)
for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(sig, told)
open("ready." + os.environ["RANK"], "w").close()
while True: time.sleep(0.1)  # a signal that comes just before a sleep is acted on after it
"""
PROGRAM = f"{sys.executable} -I -S save.py"

# How users wrap it. Each puts the program, or itself, where a signal to the rank's process group does not reach, or
# ends before it, or does not hand on what it gets.
WRAPPERS = {
    "none": f"exec {PROGRAM}",
    "shell": f"{PROGRAM}; :",
    "timeout": f"timeout 60 {PROGRAM}; :",
    "timeout alone": f"exec timeout 60 {PROGRAM}",
    "job control": f"set -m; {PROGRAM} & wait",
    "pipe": f"{PROGRAM} | cat",
    "trap": f"trap 'wait' TERM HUP; {PROGRAM} & wait",
    "two groups": f"timeout 60 timeout 60 {PROGRAM}; :",
}
# A shell that waits for a command of the foreground, and is the only one of the two to get SIGTERM, ends at once.


def ready(folder: Path, nprocs: int) -> bool:
    return len(list(folder.glob("ready.*"))) == nprocs


def saved(folder: Path) -> dict[str, int]:
    """By rank, the signal that made it save."""
    return {path.suffix[1:]: int(path.read_text()) for path in folder.glob("saved.*")}


def bash(script: str) -> list[str]:
    return ["/bin/bash", "-c", script]


@contextmanager
def job(wrapper: str, folder: Path, nprocs: int = 2, **options: Any) -> Iterator[RankGroup]:
    (folder / "save.py").write_text(SAVING)
    with launch(bash(WRAPPERS.get(wrapper, wrapper)), nprocs, cwd=folder, **options) as group:
        eventually(lambda: ready(folder, nprocs))
        yield group


@contextmanager
def run(wrapper: str, folder: Path, *options: str, nprocs: int = 2) -> Iterator[subprocess.Popen[str]]:
    """``rankspawn run``, whose ranks are ready."""
    (folder / "save.py").write_text(SAVING)
    script = WRAPPERS.get(wrapper, wrapper)
    command = [*LAUNCHER, "run", f"--nproc-per-node={nprocs}", *options, "--no-python", *bash(script)]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            eventually(lambda: ready(folder, nprocs))
            yield launcher
        finally:
            launcher.kill()


wrapped = pytest.mark.parametrize("wrapper", WRAPPERS)

# ---- told to end ----------------------------------------------------------------------------------------------------


@wrapped
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP])
def test_signal_to_the_launcher(wrapper: str, sig: signal.Signals, tmp_path: Path) -> None:
    with run(wrapper, tmp_path) as launcher:
        launcher.send_signal(sig)
        launcher.wait(PATIENCE)
        assert saved(tmp_path).keys() == {"0", "1"}


@wrapped
def test_interrupt_of_the_launcher(wrapper: str, tmp_path: Path) -> None:
    with run(wrapper, tmp_path) as launcher:
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(PATIENCE) == 128 + signal.SIGINT
        assert saved(tmp_path).keys() == {"0", "1"}


@wrapped
@pytest.mark.parametrize("end", ["terminate", "stop", "interrupt", "close", "failure"])
def test_group(wrapper: str, end: str, tmp_path: Path) -> None:
    script = f"[ $RANK = 2 ] && {{ : > ready.2; read -r _ < fifo; exit 1; }}; {WRAPPERS[wrapper]}"
    os.mkfifo(tmp_path / "fifo")
    with job(script, tmp_path, 3) as group:
        started = time.monotonic()
        if end == "terminate":
            group.terminate()
        elif end == "close":
            group.close()
        elif end == "failure":
            (tmp_path / "fifo").write_text("\n")
            assert group.wait(PATIENCE)[2] == 1
        else:
            group.stop(signal.SIGTERM if end == "stop" else signal.SIGINT)
            group.wait(PATIENCE)
        assert saved(tmp_path).keys() == {"0", "1"}
        assert time.monotonic() - started < 10


@wrapped
def test_failure_of_a_rank_of_run(wrapper: str, tmp_path: Path) -> None:
    script = f"[ $RANK = 2 ] && {{ : > ready.2; read -r _ < fifo; exit 3; }}; {WRAPPERS[wrapper]}"
    os.mkfifo(tmp_path / "fifo")
    with run(script, tmp_path, nprocs=3) as launcher:
        (tmp_path / "fifo").write_text("\n")
        assert launcher.wait(PATIENCE) == 3
        assert saved(tmp_path).keys() == {"0", "1"}


def test_two_interrupts_kill_all_at_once(tmp_path: Path) -> None:
    script = f"trap '' INT; timeout 60 {sys.executable} -I -S -c \"{STUBBORN}\"; :"
    with run(script, tmp_path) as launcher:
        pids = told_pids(tmp_path)
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert not any(map(has_ended, pids))
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(PATIENCE) == 128 + signal.SIGINT
        assert all(map(has_ended, pids))


STUBBORN = (
    "import os, signal, time;"
    " [signal.signal(sig, signal.SIG_IGN) for sig in (1, 2, 15)];"
    " n = os.environ['RANK'];"
    " open('pid.' + n, 'w').write(str(os.getpid())); open('ready.' + n, 'w');"
    " time.sleep(1000)"
)


def told_pids(folder: Path) -> list[int]:
    """What the ranks' stubborn programs wrote before they were ready."""
    return [int(path.read_text()) for path in folder.glob("pid.*")]


@pytest.mark.parametrize("shell", ["exec", "", "set -m;"])
def test_grace_is_over_for_all_at_the_same_time(shell: str, tmp_path: Path) -> None:
    """Who ignores all has the grace, whether its shell lives on or not, and no more."""
    wrapper = f'{shell} timeout 60 {sys.executable} -I -S -c "{STUBBORN}"'
    with run(wrapper, tmp_path, "--grace=1") as launcher:
        pids = told_pids(tmp_path)
        assert len(pids) == 2
        launcher.send_signal(signal.SIGTERM)
        started = time.monotonic()
        time.sleep(0.6)
        assert not any(map(has_ended, pids))
        launcher.wait(PATIENCE)
        assert 0.9 < time.monotonic() - started < 5
        assert all(map(has_ended, pids))


def test_wait_kills_what_lingers(tmp_path: Path) -> None:
    """A wait() that has returned after a grace leaves nobody, also before the group is closed."""
    script = f'timeout 60 {sys.executable} -I -S -c "{STUBBORN}"; :'
    with job(script, tmp_path) as group:
        pids = told_pids(tmp_path)
        group.stop(grace=0.5)
        group.wait(PATIENCE)
        assert group.killing
        eventually(lambda: all(map(has_ended, pids)))


def test_what_ignores_the_interrupt_gets_sigterm_when_its_shell_has_ended(tmp_path: Path) -> None:
    """What a shell starts in the background ignores SIGINT. Nobody waits for half of the grace because of it."""
    with job("sleep 1000 & : > ready.$RANK; wait", tmp_path) as group:
        started = time.monotonic()
        group.stop(signal.SIGINT)
        group.wait(PATIENCE)
        assert time.monotonic() - started < 5
        assert not group.killing


def test_what_saves_after_an_interrupt_is_not_disturbed(tmp_path: Path) -> None:
    """Its shell has ended, and it is saving: a SIGTERM would end it."""
    code = SAVING.replace("    for later", "    signal.signal(signal.SIGTERM, signal.SIG_DFL)\n    for later")
    code = code.replace("(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)", "(signal.SIGINT,)")
    (tmp_path / "interrupted.py").write_text(code)
    leader = f"import subprocess; subprocess.Popen(['{sys.executable}', '-I', '-S', 'interrupted.py']); import time"
    with job(f'exec {sys.executable} -I -S -c "{leader}; time.sleep(1000)"', tmp_path) as group:
        group.stop(signal.SIGINT)
        group.wait(PATIENCE)
    assert saved(tmp_path) == {"0": signal.SIGINT, "1": signal.SIGINT}


# ---- stopped and continued ------------------------------------------------------------------------------------------


def states(pids: list[int]) -> set[str]:
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}


def test_stop_and_continue_reach_all_of_the_session(tmp_path: Path) -> None:
    script = f'timeout 60 {sys.executable} -I -S -c "{STUBBORN}"; :'
    with job(script, tmp_path) as group:
        pids = told_pids(tmp_path)
        group.send_signal(signal.SIGSTOP)
        eventually(lambda: states(pids) == {"T"})
        group.send_signal(signal.SIGCONT)
        eventually(lambda: states(pids) == {"S"})
        group.send_signal(signal.SIGSTOP, to="group")
        time.sleep(0.1)
        assert states(pids) == {"S"}
        group.send_signal(signal.SIGKILL)
        eventually(lambda: all(map(has_ended, pids)))
        group.wait(PATIENCE)


def test_what_is_stopped_in_a_group_of_its_own_can_save(tmp_path: Path) -> None:
    with job("timeout", tmp_path) as group:
        group.send_signal(signal.SIGSTOP)
        group.terminate()
    assert saved(tmp_path).keys() == {"0", "1"}


# ---- who is told first ----------------------------------------------------------------------------------------------

# A rank that needs one more batch of its forked loader to come to its checkpoint.
LOADING = """
import os, signal, sys, time
reading, writing = os.pipe()
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.close(reading)
    while True:
        time.sleep(0.1)
        os.write(writing, b"batch")
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
open("ready." + os.environ["RANK"], "w").close()
while not told:
    time.sleep(0.02)
for _ in range(10):
    batch = os.read(reading, 5)
assert batch
with open("new." + os.environ["RANK"], "w") as file: file.write("15")
os.rename("new." + os.environ["RANK"], "saved." + os.environ["RANK"])
"""
LOADER = f"exec {sys.executable} -I -S load.py"


@pytest.mark.parametrize("end", ["terminate", "failure"])
def test_a_rank_that_needs_its_helper(end: str, tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(LOADING)
    os.mkfifo(tmp_path / "fifo")
    script = f"[ $RANK = 2 ] && {{ : > ready.2; read -r _ < fifo; exit 1; }}; {LOADER}"
    with job(script, tmp_path, 3, signal_to="rank", grace=10.0) as group:
        started = time.monotonic()
        if end == "failure":
            (tmp_path / "fifo").write_text("\n")
            group.wait(PATIENCE)
        else:
            group.terminate()
        # The helpers are told when their rank has ended.
        assert time.monotonic() - started < 4.5
        assert not group.killing or end == "terminate"
    assert saved(tmp_path).keys() == {"0", "1"}


def test_a_rank_of_run_that_needs_its_helper(tmp_path: Path) -> None:
    (tmp_path / "load.py").write_text(LOADING)
    with run(LOADER, tmp_path, "--signal-to=rank", "--grace=10") as launcher:
        launcher.terminate()
        launcher.wait(PATIENCE)
        assert saved(tmp_path).keys() == {"0", "1"}


@wrapped
@pytest.mark.parametrize("signal_to", ["rank", "group"])
def test_the_rest_is_told_later(wrapper: str, signal_to: Any, tmp_path: Path) -> None:
    """When the rank has ended, or half of the grace has gone: no wrapper loses what it wraps."""
    with job(wrapper, tmp_path, signal_to=signal_to, grace=3.0) as group:
        group.terminate()
    assert saved(tmp_path).keys() == {"0", "1"}


def test_half_of_the_grace_goes_by(tmp_path: Path) -> None:
    """A shell with a trap does not end, and does not hand on what it gets."""
    script = f"trap : TERM; {PROGRAM}; :"
    with job(script, tmp_path, signal_to="rank", grace=2.0) as group:
        started = time.monotonic()
        group.stop()
        group.wait(PATIENCE)
        assert 1.0 <= time.monotonic() - started < 2.0
    assert saved(tmp_path).keys() == {"0", "1"}


def test_who_is_told_first_must_be_known() -> None:
    with pytest.raises(ValueError, match="'rank', 'group' or 'session'"):
        launch(["/bin/true"], 1, signal_to="everybody")  # type: ignore[arg-type]


# ---- a program of one's own -----------------------------------------------------------------------------------------

OWN = """
import asyncio, os, signal, sys, threading, time
from rankspawn import launch
how, wrapper, nprocs = sys.argv[1], sys.argv[2], 2
options = dict(cwd=os.getcwd(), handle_signals=True, grace=float(os.environ.get("GRACE", "30")))
ours = ("/bin/bash", "-c", wrapper)
if how == "wait":
    with launch(ours, nprocs, **options) as group:
        group.wait()
elif how == "python":
    with launch(ours, nprocs, **options) as group:
        while True: sum(range(1000))
elif how == "sleep":
    with launch(ours, nprocs, **options) as group:
        time.sleep(1000)
elif how == "asyncio":
    async def main():
        async with launch(ours, nprocs, **options) as group:
            await group
    asyncio.run(main())
elif how == "asyncio elsewhere":
    async def main():
        async with launch(ours, nprocs, **options) as group:
            await asyncio.sleep(1000)
    asyncio.run(main())
elif how == "thread":
    with launch(ours, nprocs, **options) as group:
        thread = threading.Thread(target=group.wait)
        thread.start()
        thread.join()
elif how == "two":
    with launch(ours, 1, **options), launch(ours, 1, rank_env=[{"RANK": "1"}], **options) as group:
        group.wait()
elif how == "closing":
    with launch(ours, nprocs, **options) as group:
        while not all(os.path.exists(f"ready.{rank}") for rank in range(nprocs)): time.sleep(0.01)
elif how == "tee":
    with launch(ours, nprocs, tee=True, **options) as group:
        group.wait()
"""
HOWS = ["wait", "python", "sleep", "asyncio", "asyncio elsewhere", "thread", "two", "closing", "tee"]


@contextmanager
def own(how: str, wrapper: str, folder: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    (folder / "save.py").write_text(SAVING)
    (folder / "own.py").write_text(OWN)
    (folder / "tmp").mkdir()
    env = {**os.environ, "TMPDIR": str(folder / "tmp"), **env}
    command = [sys.executable, "own.py", how, WRAPPERS.get(wrapper, wrapper)]
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) as program:
        try:
            eventually(lambda: ready(folder, 2))
            yield program
        finally:
            program.kill()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP])
def test_signal_to_a_program_of_ones_own(how: str, sig: signal.Signals, tmp_path: Path) -> None:
    with own(how, "timeout", tmp_path) as program:
        program.send_signal(sig)
        assert program.wait(PATIENCE) == -sig
        assert saved(tmp_path).keys() == {"0", "1"}
        assert list((tmp_path / "tmp").iterdir()) == []
        assert program.stderr is not None and program.stderr.read() == ""


@pytest.mark.parametrize("how", ["wait", "asyncio"])
def test_grace_of_a_program_of_ones_own(how: str, tmp_path: Path) -> None:
    script = f'timeout 60 {sys.executable} -I -S -c "{STUBBORN}"; :'
    with own(how, script, tmp_path, GRACE="0.5") as program:
        pids = told_pids(tmp_path)
        program.terminate()
        assert program.wait(PATIENCE) == -signal.SIGTERM
        assert len(pids) == 2 and all(map(has_ended, pids))


def test_interrupt_ends_the_grace_of_a_program_of_ones_own(tmp_path: Path) -> None:
    script = f'timeout 60 {sys.executable} -I -S -c "{STUBBORN}"; :'
    with own("wait", script, tmp_path) as program:
        pids = told_pids(tmp_path)
        program.terminate()
        time.sleep(0.3)
        assert program.poll() is None
        program.send_signal(signal.SIGINT)
        assert program.wait(PATIENCE) == -signal.SIGTERM
        assert len(pids) == 2 and all(map(has_ended, pids))


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    with launch(["/bin/true"], 1, handle_signals=True):
        with launch(["/bin/true"], 1, handle_signals=True):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            assert signal.getsignal(signal.SIGHUP) is signal.getsignal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert [signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before
    with pytest.raises(FileNotFoundError):
        launch(["/no/such/program"], 1, handle_signals=True)
    assert [signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


def test_a_handler_of_the_programs_own_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGHUP, handler)
    try:
        with launch(["/bin/true"], 1, handle_signals=True):
            assert signal.getsignal(signal.SIGHUP) is handler
            ours = signal.signal(signal.SIGTERM, handler)
            assert ours is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_signals_that_come_while_ranks_are_started(tmp_path: Path) -> None:
    """They are acted on when all have been started: nobody is left, and the program dies of the signal."""
    code = """
import os, signal
from rankspawn import launch
def follow(started):
    os.kill(os.getpid(), signal.SIGTERM)
    print("asked", flush=True)
with launch(["/bin/sleep", "1000"], 4, handle_signals=True, progress=follow) as group:
    print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "asked\n", "")


def test_a_forked_copy_has_the_default_action() -> None:
    code = """
import os, signal, time
from rankspawn import launch
with launch(["/bin/sleep", "1000"], 1, handle_signals=True) as group:
    told, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(telling, b".")
        while True: time.sleep(0.1)
    os.read(told, 1)
    os.kill(pid, signal.SIGTERM)
    print(os.waitpid(pid, 0)[1], group.poll(), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "15 (None,)\n"), done.stderr


def test_handlers_need_the_main_thread() -> None:
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="main thread"):
            pool.submit(launch, ["/bin/true"], 1, handle_signals=True).result()


# ---- the pieces -----------------------------------------------------------------------------------------------------


def test_members_of_other_sessions_get_nothing(tmp_path: Path) -> None:
    script = f'timeout 60 {sys.executable} -I -S -c "{STUBBORN}"; :'
    with job(script, tmp_path) as group:
        pids = {int(path.suffix[1:]): int(path.read_text()) for path in tmp_path.glob("pid.*")}
        signal_members({group.ranks[0].pid}, [signal.SIGKILL])
        eventually(lambda: has_ended(pids[0]))
        assert not has_ended(pids[1])
        group.kill()


def test_ignores(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ignores(os.getpid(), signal.SIGHUP)
        assert not ignores(os.getpid(), signal.SIGTERM)
        assert ignores(os.getpid(), signal.SIGTERM, proc=str(tmp_path))
    finally:
        signal.signal(signal.SIGHUP, before)
