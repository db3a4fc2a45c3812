"""``create_subprocess_exec``: asyncio's process, which ``Popen`` starts and whose end the loop sees by its pidfd.

It does not use asyncio's child watchers, because they differ between versions of Python. So a loop in any thread works.
"""

from __future__ import annotations

import asyncio
import threading
from asyncio.base_subprocess import BaseSubprocessTransport
from asyncio.subprocess import Process, SubprocessStreamProtocol
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .._public import public
from .popen import Popen

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterable
    from typing import TypedDict

    from typing_extensions import Unpack

    from .._binding import Binding
    from .popen import AnyPath, ProcessGroup, Stream, Variables

    class Options(TypedDict, total=False):
        """The other arguments of Popen, except those that turn bytes into text."""

        executable: AnyPath | None
        preexec_fn: Callable[[], object] | None
        close_fds: bool
        cwd: AnyPath | None
        env: Variables | None
        startupinfo: Any
        creationflags: int
        restore_signals: bool
        start_new_session: bool
        pass_fds: Collection[int]
        user: str | int | None
        group: str | int | None
        extra_groups: Iterable[str | int] | None
        umask: int
        pipesize: int
        process_group: ProcessGroup
        binding: Binding | None
        die_with_parent: bool
        cgroup: str | os.PathLike[str] | int | None


_NOT_HERE = ("shell", "bufsize", "text", "universal_newlines", "encoding", "errors")
_AGAIN = 0.02  # seconds between two looks at an ended process that a debugger still holds


@public
async def create_subprocess_exec(
    program: AnyPath,
    *args: AnyPath,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    limit: int = 2**16,
    **options: Unpack[Options],
) -> Process:
    """Start a process in the running asyncio loop: ``asyncio.create_subprocess_exec``, with ``Popen``'s additions.

    Args:
        program: The program to execute.
        *args: Its arguments.
        stdin: As for ``Popen``; asyncio.subprocess.PIPE for ``process.stdin``.
        stdout: As for ``Popen``; asyncio.subprocess.PIPE for ``process.stdout``.
        stderr: As for ``Popen``; asyncio.subprocess.PIPE for ``process.stderr``.
        limit: How many bytes the reader of a pipe buffers (default: 64 KiB).
        **options: The other arguments of ``Popen``: ``binding``, ``die_with_parent``, ``cgroup``, ``env``, ``cwd`` and
            the rest, except ``shell`` and those that turn bytes into text.

    Returns:
        asyncio's own Process. The loop sees its end by its pidfd; without one (macOS, Windows) a thread waits for it.

    Raises:
        ValueError: asyncio does not take the argument, because its streams give bytes.
        OSError: As ``Popen`` raises it, like its other errors.
    """
    for name in _NOT_HERE:
        if options.get(name):
            raise ValueError(f"{name}: an asyncio process has streams of bytes and no shell; leave {name} out")
    loop = asyncio.get_running_loop()
    protocol = SubprocessStreamProtocol(limit=limit, loop=loop)
    connected: asyncio.Future[None] = loop.create_future()
    command: Any = (program, *args)
    streams: tuple[Any, Any, Any] = (stdin, stdout, stderr)
    given: dict[str, Any] = {name: value for name, value in options.items() if name not in _NOT_HERE}
    transport = _Transport(loop, protocol, command, False, *streams, 0, waiter=connected, **given)
    try:
        await connected
    except BaseException as error:
        transport.close()  # which kills it
        if not isinstance(error, (SystemExit, KeyboardInterrupt)):
            await Process(transport, protocol, loop).wait()
        raise
    return Process(transport, protocol, loop)


class _Transport(BaseSubprocessTransport):
    """asyncio's transport, whose process is a Popen of ours."""

    _proc: Popen[bytes]
    _loop: asyncio.AbstractEventLoop

    def _start(
        self, args: Any, shell: bool, stdin: Any, stdout: Any, stderr: Any, bufsize: int, **options: Any
    ) -> None:
        self._proc = Popen(args, stdin=stdin, stdout=stdout, stderr=stderr, bufsize=bufsize, **options)
        # A reference of its own, so that another waiter cannot close the descriptor that the loop watches.
        self._pidfd = self._proc._pidfd
        if self._pidfd is None:
            threading.Thread(target=self._wait_in_thread, name="rankspawn-wait", daemon=True).start()
        else:
            self._loop.add_reader(self._pidfd.fd, self._collect)

    def _collect(self) -> None:
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd.fd)
            self._pidfd = None
        returncode = self._proc.poll()
        if returncode is None:
            self._loop.call_later(_AGAIN, self._collect)
        else:
            self._process_exited(returncode)

    def _wait_in_thread(self) -> None:
        returncode = self._proc.wait()
        with suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self._process_exited, returncode)

    def send_signal(self, signal: int) -> None:
        """Signal the process by its pidfd. Raises ProcessLookupError if the loop has already seen its end."""
        self._check_proc()
        self._proc.send_signal(signal)
