"""A context of multiprocessing whose processes are forked from a template: get_context("warm")."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

from rankspawn import Binding, BindingError, Template, get_context

CPU = min(os.sched_getaffinity(0))


@pytest.fixture(scope="module", autouse=True)
def tracker_of_multiprocessing() -> Iterator[None]:
    """It is started once and kept, and so runs before the first test."""
    resource_tracker.ensure_running()
    tracker = resource_tracker._resource_tracker  # type: ignore[attr-defined]
    while not Path("/proc", str(tracker._pid), "cmdline").read_text():  # empty in the middle of execve(2)
        time.sleep(0.01)
    yield
    tracker._stop()


@pytest.fixture
def context() -> Iterator[Any]:
    """A context whose template ends with the test; a process that is executed instead of forked is an error."""
    context = get_context("warm", preload=["wave"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield context
    if context._template is not None:
        context._template.close()


def told(queue: Any = None) -> tuple[bool, int, str, str, int]:
    """What a process is, and whether it had the preloaded module."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    stdin = os.readlink("/proc/self/fd/0")
    one = "wave" in sys.modules, parent.pid or 0, multiprocessing.current_process().name, stdin, os.getppid()
    if queue is not None:
        queue.put(one)
    return one


def test_contexts_share_a_template_that_its_owner_closes() -> None:
    with Template(["wave"], required=True) as template:
        for _ in range(2):
            context: Any = get_context("warm", preload=template)
            with context.Pool(1) as pool:
                assert pool.apply(told)[0]
            del context, pool
        assert [one["ranks"] for one in template.report()] == [2]
        again: Any = pickle.loads(pickle.dumps(get_context("warm", preload=template)))
        assert again._preload == ("wave",) and again._template is None
    with Template() as unnamed, pytest.raises(ValueError, match="expected a Template of named modules"):
        get_context("warm", preload=unnamed)
    with pytest.raises(ValueError, match="preload is for 'warm'"):
        get_context("spawn", preload=template)


def test_a_pools_processes_are_forked_and_children_of_this_one(context: Any) -> None:
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        seen = [future.result(30) for future in [pool.submit(told) for _ in range(4)]]
    assert {(has, parent, by_kernel) for has, parent, _, _, by_kernel in seen} == {(True, os.getpid(), os.getpid())}
    assert {stdin for *_, stdin, _ in seen} == {os.devnull}
    (report,) = context._template.report()
    assert report["ranks"] == len({name for _, _, name, _, _ in seen})


def test_queues_locks_and_events_reach_it(context: Any) -> None:
    queue, lock, ready = context.Queue(), context.Lock(), context.Event()
    lock.acquire()
    process = context.Process(target=_use, args=(queue, lock, ready))
    process.start()
    assert ready.wait(30)
    lock.release()
    assert queue.get(timeout=30) == "had the lock"
    process.join(30)
    assert process.exitcode == 0


def _use(queue: Any, lock: Any, ready: Any) -> None:
    ready.set()
    with lock:
        queue.put("had the lock")


@pytest.mark.parametrize(
    ("target", "arguments", "expected"),
    [(sys.exit, (5,), 5), (os._exit, (3,), 3), (int, ("x",), 1)],
)
def test_exit_codes(
    context: Any, target: Any, arguments: Any, expected: int, capfd: pytest.CaptureFixture[str]
) -> None:
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join(30)
    assert process.exitcode == expected
    assert ("ValueError" in capfd.readouterr().err) == (target is int)


def test_it_is_ended_by_a_signal(context: Any) -> None:
    process = context.Process(target=signal.pause)
    process.start()
    process.terminate()
    process.join(30)
    assert process.exitcode == -signal.SIGTERM


def test_it_is_bound() -> None:
    context = get_context("warm", [Binding({CPU})])
    try:
        with context.Pool(1) as pool:
            assert pool.apply(os.sched_getaffinity, (0,)) == {CPU}
    finally:
        context.template().close()


def test_a_refused_binding_is_an_error_and_leaves_nothing() -> None:
    context: Any = get_context("warm", [Binding({4000})])
    try:
        with pytest.raises(BindingError) as caught:
            context.Process(target=int).start()
        assert caught.value.errno == errno.EINVAL
    finally:
        context.template().close()


def test_where_it_cannot_be_forked_it_is_executed_and_the_reason_is_said() -> None:
    context: Any = get_context("warm", preload=["tests.support.leaves_a_thread"])
    try:
        queue = context.Queue()
        process = context.Process(target=told, args=(queue,))
        with pytest.warns(RuntimeWarning, match="started cold: an import has started the Python thread 'stays'"):
            process.start()
        assert queue.get(timeout=30)[:2] == (False, os.getpid())
        process.join(30)
        assert process.exitcode == 0
    finally:
        context.template().close()


def test_the_template_ends_with_the_context() -> None:
    context: Any = get_context("warm")
    process = context.Process(target=int)
    process.start()
    process.join(30)
    template = context.template()
    assert template.report()[0]["refused"] is None
    del context, process
    gc.collect()
    assert template._closed


def test_a_context_can_be_sent(context: Any) -> None:
    again = pickle.loads(pickle.dumps(context))
    assert again.get_start_method() == "warm" and again._preload == ("wave",)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"method": "spawn", "preload": ["x"]}, "preload is for 'warm', not for 'spawn'"),
        ({"method": "warm", "preload": "torch"}, "preload: expected a sequence of names, got 'torch'"),
        ({"method": "cold"}, "method: expected 'spawn', 'forkserver' or 'warm' (on POSIX systems), got 'cold'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        get_context(**arguments)
    assert str(caught.value) == error
