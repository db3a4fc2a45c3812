"""What the tests of ``rankspawn run`` share: launchers started as a user starts them, and ranks that tell of
themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

LAUNCHER = [sys.executable, "-m", "rankspawn"]
TIMEOUT = 60.0  # a test that takes longer has failed

# What ranks do, as programs for `python -c`. A rank writes each line by one system call, so that lines of several ranks
# on one pipe stay whole.
SAY = """
import json, os, signal, sys, time
def say(what):
    os.write(1, (json.dumps([int(os.environ["RANK"]), what]) + "\\n").encode())
"""
ENVIRONMENT = SAY + "say(dict(os.environ))\n"
ARGUMENTS = SAY + "say(sys.argv[1:])\n"
SLEEP = SAY + "say(os.getpid())\ntime.sleep(120)\n"


def in_ranks(code: str, *options: str) -> list[str]:
    """The command line that runs ``code`` in each rank."""
    return [*LAUNCHER, "run", *options, "--no-python", sys.executable, "-c", code]


def completed(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """``command``, run until no process has its output open: neither the ranks nor what they started."""
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, **options)


def said(output: str) -> dict[int, Any]:
    """What each rank said, by rank."""
    return dict(json.loads(line) for line in output.splitlines())


class Launched:
    """A launcher that runs while the test goes on."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None and process.stderr is not None
        self.stdout: IO[str] = process.stdout
        self.stderr: IO[str] = process.stderr

    def hear(self, count: int) -> dict[int, Any]:
        """The next thing that each of ``count`` ranks says, by rank."""
        lines = [self.stdout.readline() for _ in range(count)]
        assert all(lines), self.stderr.read()
        return said("".join(lines))

    def end(self) -> int:
        """Wait for the launcher's end; its status."""
        return self.process.wait(TIMEOUT)


@contextmanager
def launched(command: list[str], *, seconds: float = TIMEOUT, **options: Any) -> Iterator[Launched]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        # Where something hangs, a test that reads would wait for ever. The end of the launcher ends the ranks, and the
        # end of the ranks ends the output.
        watchdog = threading.Timer(seconds, process.kill)
        watchdog.start()
        try:
            yield Launched(process)
        finally:
            watchdog.cancel()
            watchdog.join()
            process.kill()


def after(preparation: str, command: list[str]) -> list[str]:
    """``command``, preceded in the same process by the Python code ``preparation``."""
    code = f"import os, signal, sys\n{preparation}\nos.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", code, *command]


def with_grace(seconds: float, command: list[str]) -> list[str]:
    """``command`` (one of ours) with ``--grace``: ranks get only ``seconds`` between SIGTERM and SIGKILL."""
    at = command.index("run") + 1
    return [*command[:at], "--grace", str(seconds), *command[at:]]


TOLD = {
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "ROLE_NAME": "default",
    "ROLE_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RUN_ID": "none",
    # torchrun sets "True", with which rank 0 would look for the store of torchrun's agent.
    "TORCHELASTIC_USE_AGENT_STORE": "False",
}


def environment_here(**changes: str) -> dict[str, str]:
    """This process's environment without the variables that a launcher of the tests may have set."""
    theirs = {"OMP_NUM_THREADS", "MASTER_PORT", "RANK", "LOCAL_RANK", "ROLE_RANK", *TOLD}
    return {**{name: value for name, value in os.environ.items() if name not in theirs}, **changes}
