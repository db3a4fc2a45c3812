"""``create_subprocess_exec``: asyncio's process, bound, in every loop and with every child watcher."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import sys
import threading
import warnings
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from rankspawn import Binding, BindingError, create_subprocess_exec

try:
    import uvloop
except ImportError:
    uvloop = None
else:
    # libuv makes a pipe for its first loop, and keeps it.
    with contextlib.closing(uvloop.new_event_loop()) as first:
        first.run_until_complete(asyncio.sleep(0))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="binds processes")

PATIENCE = 60
CPU = min(os.sched_getaffinity(0)) if sys.platform == "linux" else 0


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def limited() -> Any:
        return await asyncio.wait_for(coroutine, PATIENCE)

    return asyncio.run(limited())


async def shout(**options: Any) -> tuple[int | None, bytes]:
    """A process that is talked to, and that says where it is."""
    script = "read line; echo $line; grep Cpus_allowed_list /proc/self/status; exit 3"
    process = await create_subprocess_exec("/bin/sh", "-c", script, stdin=PIPE, stdout=PIPE, **options)
    out, err = await process.communicate(b"hello\n")
    assert err is None
    return process.returncode, out


SAID = (3, f"hello\nCpus_allowed_list:\t{CPU}\n".encode())


def test_it_is_asyncios_process_and_bound() -> None:
    assert run(shout(binding=Binding({CPU}))) == SAID


def test_every_argument_but_those_of_text_is_taken() -> None:
    from rankspawn import Popen
    from rankspawn._start.aio import _NOT_HERE

    async def given(**options: Any) -> int:
        return await (await create_subprocess_exec("/bin/true", **options)).wait()

    own = {"args", "stdin", "stdout", "stderr"}
    stock = inspect.signature(Popen.__mro__[2].__init__).parameters.values()  # type: ignore[misc]
    options = {one.name: one.default for one in stock if one.name not in {"self", *own, *_NOT_HERE}}
    assert len(options) > 12
    assert run(given(**options, binding=None, die_with_parent=True, cgroup=None)) == 0
    for name in _NOT_HERE:
        with pytest.raises(ValueError, match=f"^{name}: "):
            run(given(**{name: "1"}))
    with pytest.raises(TypeError, match="no_such_argument"):
        run(given(no_such_argument=1))


def test_streams_may_be_files(tmp_path: Path) -> None:
    async def logged() -> int:
        process = await create_subprocess_exec(
            "/bin/sh", "-c", "echo out; echo err >&2", stdin=DEVNULL, stdout=tmp_path / "log", stderr=STDOUT
        )
        return await process.wait()

    assert run(logged()) == 0
    assert (tmp_path / "log").read_text() == "out\nerr\n"


def test_errors_are_those_of_popen() -> None:
    with pytest.raises(FileNotFoundError, match="/nonexistent"):
        run(create_subprocess_exec("/nonexistent"))
    with pytest.raises(BindingError):
        run(create_subprocess_exec("/bin/true", binding=Binding({4095})))


def test_signals() -> None:
    async def ended() -> list[int]:
        codes = []
        for how in ("terminate", "kill", "send_signal"):
            process = await create_subprocess_exec("/bin/sleep", "60")
            getattr(process, how)(*([signal.SIGINT] if how == "send_signal" else []))
            codes.append(await process.wait())
            with pytest.raises(ProcessLookupError):
                process.send_signal(0)
        return codes

    assert run(ended()) == [-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT]


def test_many_at_once_and_waited_for_by_several() -> None:
    async def one(number: int) -> list[int]:
        process = await create_subprocess_exec("/bin/sh", "-c", f"exit {number}")
        return await asyncio.gather(process.wait(), process.wait())

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*map(one, range(20)))

    assert run(all_of_them()) == [[number] * 2 for number in range(20)]


def test_a_process_that_another_has_reaped() -> None:
    async def reaped() -> int:
        process = await create_subprocess_exec("/bin/sh", "-c", "exit 3")
        await asyncio.to_thread(process._transport.get_extra_info("subprocess").wait)  # type: ignore[attr-defined]
        return await process.wait()

    assert run(reaped()) == 3


def test_a_wait_that_is_cancelled_leaves_the_process() -> None:
    async def cancelled() -> int:
        process = await create_subprocess_exec("/bin/sleep", "60")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), 0.01)
        assert process.returncode is None
        process.kill()
        return await process.wait()

    assert run(cancelled()) == -signal.SIGKILL


def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    async def cancelled() -> None:
        task = asyncio.ensure_future(create_subprocess_exec("/bin/sleep", "60", stdin=PIPE, stdout=PIPE))
        await asyncio.sleep(0)  # it has started the process, and waits for its pipes
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(cancelled())


def test_in_a_loop_of_another_thread() -> None:
    said = []
    thread = threading.Thread(target=lambda: said.append(run(shout(binding=Binding({CPU})))))
    thread.start()
    thread.join()
    assert said == [SAID]


# FastChildWatcher reaps whatever has ended, and takes its status with it: nothing beside it can have that.
WATCHERS = ("ThreadedChildWatcher", "PidfdChildWatcher", "SafeChildWatcher", "MultiLoopChildWatcher")


@pytest.mark.parametrize("name", [name for name in WATCHERS if hasattr(asyncio, name)])
def test_no_child_watcher_is_needed_and_none_is_in_the_way(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        before = asyncio.get_child_watcher()
        watcher = getattr(asyncio, name)()

        async def both() -> tuple[Any, int]:
            watcher.attach_loop(asyncio.get_running_loop())
            asyncio.set_child_watcher(watcher)
            theirs = await asyncio.create_subprocess_exec("/bin/sh", "-c", "exit 4")
            return await shout(binding=Binding({CPU})), await theirs.wait()

        try:
            assert run(both()) == (SAID, 4)
        finally:
            watcher.close()
            asyncio.set_child_watcher(before)


def test_under_uvloop() -> None:
    if uvloop is None:
        pytest.skip("uvloop is not installed")
    loop = uvloop.new_event_loop()
    try:
        assert loop.run_until_complete(asyncio.wait_for(shout(binding=Binding({CPU})), PATIENCE)) == SAID
    finally:
        loop.close()


def test_without_a_pidfd_a_thread_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSPAWN_MECHANISM", "subprocess")
    assert run(shout())[0] == 3
