"""A program on a terminal of its own: what it shows there, and what is typed."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.support.launchers import TIMEOUT

PLAIN = {"CI": "", "NO_COLOR": "", "FORCE_COLOR": ""}
"""Variables that would change what is shown, as if they were not set."""


class Terminal:
    """What is on a terminal, and what is typed there."""

    def __init__(self, fd: int) -> None:
        self.fd, self.text = fd, ""

    def types(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def shows(self, pattern: str) -> re.Match[str]:
        """Wait until something new matches. The next call looks behind the match."""
        until = time.monotonic() + TIMEOUT
        while (found := re.search(pattern, self.text)) is None:
            assert time.monotonic() < until, f"{pattern} is not in {self.text!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.fd, 4096).decode()
                except OSError as error:  # nobody has the other end open
                    raise AssertionError(f"{pattern} is not in {self.text!r}") from error
        self.text = self.text[found.end() :]
        return found


@contextmanager
def on_terminal(command: list[str], **environment: str) -> Iterator[tuple[Terminal, int]]:
    """The terminal of ``command``, which leads its session, and the pid of ``command``."""
    pid, fd = pty.fork()
    if pid == 0:
        try:
            os.execvpe(command[0], command, {**os.environ, "TERM": "xterm", **PLAIN, **environment})
        finally:
            os._exit(127)
    ended = False
    try:
        yield Terminal(fd), pid
        os.waitpid(pid, 0)
        ended = True
    finally:
        if not ended:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(fd)
