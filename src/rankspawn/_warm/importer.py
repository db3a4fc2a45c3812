"""The program of a template: it imports, forks itself once, and then forks ranks on request.

It runs in two processes. The *importer*, a child of the launcher, imports the modules, and may have threads afterwards.
It forks the *stem*, by libc's fork, and ends. The stem has one thread, and every handler that a library registered for
a fork has run. The launcher adopts the stem, so that it is the launcher's child, and so are the ranks that the stem
forks as its siblings.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import signal
import socket
import sys
import time
import warnings
from os import _exit
from typing import Any, NoReturn

from .. import _spawn
from .wire import receive, send

_TRIAL_SECONDS = 20.0
_HUGE = 2 << 20  # bytes of a huge page, or a multiple of it; the kernel refuses less


def run() -> NoReturn:
    """Serve the launcher until it closes its socket, which is descriptor 0 here. In a rank, run the rank's program."""
    try:
        argv, env, prepared = _template()
    except (EOFError, ConnectionError):
        _exit(0)  # the launcher has closed the socket, or has ended
    from .rank import become

    become(argv, env, prepared)


def _template() -> tuple[list[str], dict[str, str], dict[str, Any]]:
    """Be the importer, and then the stem. Returns only in a rank: its command, its environment, what imports left."""
    sock = socket.socket(fileno=fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3))
    _give_null(0, os.O_RDONLY)
    orders, _ = receive(sock)
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = orders["folder"]
    from .imports import prepare

    began = time.monotonic()
    prepared = prepare(orders["modules"])
    send(sock, {"prepared": prepared, "seconds": time.monotonic() - began})
    receive(sock)  # the launcher is ready to adopt
    if _fork(sock):
        _exit(0)
    return (*_serve(sock), prepared)


def _fork(sock: socket.socket) -> int:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, which have been listed. The child runs on with what libc's handlers left.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        send(sock, {"stem": pid})
    return pid


def _serve(sock: socket.socket) -> tuple[list[str], dict[str, str]]:
    """Be the stem: answer requests. Returns only in a rank: its command and its environment."""
    for fd, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        _give_null(fd, mode)
    adopted, _ = receive(sock)
    refused = _spawn.die_with_parent()
    if os.getppid() != adopted["launcher"]:
        _exit(0)
    os.setsid()
    # A request's descriptors get numbers above all that are open now. A rank closes all from there on.
    above = max(map(int, os.listdir(adopted["descriptors"]))) + 1
    sock = socket.socket(fileno=_moved(sock.detach(), above))
    why = f"PR_SET_PDEATHSIG: {os.strerror(refused)}" if refused else _why_not(adopted, above)
    send(sock, {"refused": why})
    number = -1
    while number < 0:
        request, fds = receive(sock)
        fds = [_moved(fd, above) for fd in fds]
        number = _answer(request, fds, above)
        if number < 0:
            for fd in fds:
                os.close(fd)
            send(sock, {"forked": True})
            if adopted["lasts"]:
                adopted["lasts"] = False
                _collapse(sock)
    # The engine has closed all descriptors from `above` on: the socket's number is free, and may become another file's.
    sock.detach()
    rank = request["ranks"][number]
    return rank["argv"], {**request["env"], **rank["env"]}


def _answer(request: dict[str, Any], fds: list[int], above: int) -> int:
    """Fork the ranks of a request. Returns -1 here, and in a rank its number."""
    memory, done, cgroup, guard, folder = (-1 if place is None else fds[place] for place in request["fds"])
    cwd = os.path.join(f"{request['descriptors']}/{folder}", request["cwd"] or "")
    crew = _spawn.Crew(len(request["ranks"]), request["env"], {}, {}, cwd, True, request["death_signal"], cgroup, guard)
    for rank in request["ranks"]:
        streams = [tuple(one) if isinstance(one, list) else one if one < 0 else fds[one] for one in rank["streams"]]
        masks = [None if mask is None else bytes.fromhex(mask) for mask in (rank["cpus"], rank["nodes"])]
        crew.add(None, rank["argv"], ("",), rank["env"], streams, masks[0], rank["policy"], masks[1], rank["required"])
    results = mmap.mmap(memory, len(request["ranks"]) * _spawn.RESULT_BYTES)
    number = _spawn.fork_crew(crew, results, done, above, request["umask"])
    results.close()
    return number


class _Trial:
    """What the engine reports about the trial rank."""

    pid = 0


def _why_not(adopted: dict[str, Any], above: int) -> str | None:
    """Say why ranks cannot be forked from this process; None if a trial rank has worked and ended."""
    threads = len(os.listdir(adopted["threads"]))
    if threads != 1:
        return f"{threads} threads run after the fork"
    crew = _spawn.Crew(1, {}, {}, {}, None, True, signal.SIGKILL, -1, -1)
    crew.add(None, ("trial",), ("",), {}, (-1, -1, -1), None, -1, None, False)
    handler = signal.getsignal(signal.SIGCHLD)
    if handler is not None:  # None: a library's, which cannot be set again
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # one that ignores it, or reaps, would take the trial's end
    results = mmap.mmap(-1, _spawn.RESULT_BYTES)
    reading, done = os.pipe()
    if _spawn.fork_crew(crew, results, done, above, 0o077, siblings=False) >= 0:
        _work()
    os.close(done)
    os.read(reading, 1)  # end of file: the rank has taken all its steps
    os.close(reading)
    trial = _Trial()
    step, code, *_ = _spawn.adopt(trial, results, 0) or (0, 0)
    results.close()
    if step or not trial.pid:
        return f"a trial rank could not be forked: {_spawn.STEP_NAMES[step]}: {os.strerror(code)}"
    why = _end_of(trial)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    return why


def _end_of(trial: Any) -> str | None:
    """Wait for the trial rank, and say what was wrong with its end."""
    poller = select.poll()
    poller.register(trial._pidfd.fd, select.POLLIN)
    in_time = poller.poll(_TRIAL_SECONDS * 1000)
    if not in_time:
        os.kill(trial.pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(trial.pid, 0)[1])
    if not in_time:
        return f"a trial rank did not end within {_TRIAL_SECONDS:g} seconds"
    return f"a trial rank ended with {code}" if code else None


def _work() -> NoReturn:
    """Use what a fork often breaks: the pools of threads that calculate."""
    code = 1
    try:
        for name in ("numpy", "torch"):
            library = sys.modules.get(name)
            if library is not None:
                square = library.ones((256, 256))
                (square @ square + square).sum()
        code = 0
    finally:
        _exit(code)


def _collapse(sock: socket.socket, maps: str = "/proc/self/maps") -> None:
    """Put the memory that ranks share into huge pages, so that a fork copies one entry for each, instead of 512.

    It takes tenths of a second, and is done between two requests. A request that comes meanwhile ends it.
    """
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    with open(maps) as file:
        mappings = [line.split() for line in file]
    for span, permissions, _, device, *_ in mappings:
        start, end = (int(address, 16) for address in span.split("-"))
        if permissions.startswith("rw") and permissions.endswith("p") and device == "00:00":
            for piece in range(-(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE, _HUGE):
                if poller.poll(0):
                    return
                _spawn.collapse_pages(piece, _HUGE)


def _give_null(fd: int, mode: int) -> None:
    null = os.open(os.devnull, mode)
    os.dup2(null, fd, inheritable=True)
    if null != fd:
        os.close(null)


def _moved(fd: int, above: int) -> int:
    """The descriptor under a number that is not below ``above``."""
    if fd >= above:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above)
    finally:
        os.close(fd)
