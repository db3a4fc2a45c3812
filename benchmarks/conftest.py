"""The programs that are measured, and the state of the process that measures them."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

# So that the modules beside this file are found where pytest's import mode leaves sys.path alone, too.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import Bench, Situation
from job import Place, Skip, module
from worker import open_fds, touch


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    with Bench() as bench:
        yield bench


@pytest.fixture
def place(bench: Bench, tmp_path: Path) -> Place:
    return Place(bench.cpu, bench.node, bench.programs, tmp_path)


@pytest.fixture
def enter(bench: Bench) -> Iterator[Callable[[Situation], None]]:
    """A function that puts this process in a situation, until the test ends."""
    with ExitStack() as stack:
        yield lambda situation: stack.enter_context(_entered(bench, situation))


@contextmanager
def _entered(bench: Bench, situation: Situation) -> Iterator[None]:
    if situation.cores > len(os.sched_getaffinity(0)):
        raise Skip(f"{situation.cores} CPUs are needed")
    engine = module("rankspawn._start.engine")
    before, limit = os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_NOFILE)
    os.sched_setaffinity(0, bench.cpus(situation.cores))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in situation.variables:
            patch.setenv(name, value)
        engine.mechanisms.cache_clear()
        opened, memory = open_fds(situation.fds), touch(situation.touch_mib)
        try:
            yield
        finally:
            for fd in opened:
                os.close(fd)
            if memory is not None:
                memory.close()
            os.sched_setaffinity(0, before)
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    engine.mechanisms.cache_clear()
