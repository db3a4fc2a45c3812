"""What a look at processes has found, as plain data."""

from __future__ import annotations

from .._frozen import Frozen


class Frame(Frozen):
    """A call that has not returned.

    Attributes:
        function: Its name.
        file: The path of its source.
        line: The line that it is at; 0 where that is not known.
    """

    function: str
    file: str
    line: int


class Thread(Frozen):
    """A thread of a process.

    Attributes:
        tid: Its number; the first thread has the number of the process.
        name: The name that the kernel has for it.
        state: The letter of proc(5): R runs, S sleeps, D is in uninterruptible sleep, T is stopped, Z has ended.
        wchan: The kernel's function that it sleeps in, or "".
        call: The system call that it is in, or "".
        kernel: Its stack in the kernel, the innermost function first. Only root may read it.
        frames: Its calls in Python, the innermost first.
    """

    tid: int
    name: str
    state: str
    wchan: str = ""
    call: str = ""
    kernel: tuple[str, ...] = ()
    frames: tuple[Frame, ...] = ()


class Process(Frozen):
    """A process of a rank.

    Attributes:
        pid: Its number.
        rank: The RANK that it belongs to; None if it belongs to none.
        command: Its command line, or its name in brackets where it has none.
        threads: The first thread, then the others; empty if the process has ended.
        by: What read the Python frames: "py-spy", or "Python 3.14"; "" if nothing did.
        problem: Why there are no Python frames although it runs Python, or "".
    """

    pid: int
    rank: int | None
    command: str
    threads: tuple[Thread, ...]
    by: str = ""
    problem: str = ""

    @property
    def has_frames(self) -> bool:
        """Whether there are Python frames."""
        return any(thread.frames for thread in self.threads)
