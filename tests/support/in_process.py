"""The functions that the tests of contexts run in processes. The module imports little, because each process does
import it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from multiprocessing import shared_memory
from typing import Any


def mask() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def send(pipe: Any, function: Callable[[], object]) -> None:
    pipe.send(function())


def wait_for(pipe: Any) -> None:
    """Send this process's pid, then run until a message comes or the other end of the pipe is closed."""
    pipe.send(os.getpid())
    try:
        pipe.recv()
    except EOFError:
        pass


def leave_a_grandchild(pipe: Any) -> None:
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    pipe.send(pid)


def double(number: int) -> int:
    return 2 * number


def double_and_stay(number: int) -> tuple[int, list[int]]:
    time.sleep(0.02)  # so that the other processes take the next tasks
    return 2 * number, mask()


def fail() -> None:
    raise ValueError("on purpose")


def echo(inbox: Any, outbox: Any) -> None:
    for item in iter(inbox.get, None):
        outbox.put(item)


def add(value: Any, times: int) -> None:
    for _ in range(times):
        with value.get_lock():
            value.value += 1


def fill(name: str) -> None:
    memory = shared_memory.SharedMemory(name)
    memory.buf[:5] = b"ranks"
    memory.close()


def initialize() -> None:
    os.environ["INITIALIZED"] = "yes"


def initialized(_: int) -> str:
    return os.environ["INITIALIZED"]
