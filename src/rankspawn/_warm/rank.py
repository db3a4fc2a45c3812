"""Turns a forked rank into its program, as if the interpreter had been executed for it.

The program must find no frame of ours below its own: not in a traceback, not by sys._getframe(), not as a level that
is missing from the recursion limit. Nor may anything be left to be done after it, because the interpreter's end
(waiting for threads, atexit, the exit status, death by SIGINT after a KeyboardInterrupt) is long and differs from
version to version. So the interpreter runs the program itself. ``become`` raises an exception that nothing catches; the
interpreter drops all frames and calls sys.excepthook, which is an object of C (_bottom.pxi). That gives the interpreter
the rank's command line, by the public functions that ``python`` itself calls (Py_InitializeFromConfig, which may be
called again, and Py_RunMain), and exits with its status. What SCRIPT, -m and -c mean, sys.argv, sys.flags, sys.path[0]
and each message are the interpreter's own, then.

Rejected: exec() by a function of ours, whose frame is in every traceback; a thread state of its own, which the end of
the interpreter does not expect; a hook in sitecustomize, before the interpreter runs its own command, because that
command cannot be another for each rank, and -S, -I and -E leave the hook out; PyRun_AnyFile, which has neither -c as
the interpreter has it (3.13 shows its lines in tracebacks, 3.14 dedents it) nor a folder with a __main__.py, neither
sys.path[0] nor the end.
"""

from __future__ import annotations

import faulthandler
import importlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from .. import _spawn
from .imports import handlers_after, handlers_before

_SEED_OF_OLDER_TORCH = 67280421310721  # c10::detail::default_rng_seed_val


class Unwound(BaseException):
    """Raised through all frames, so that the interpreter has none left."""


def become(
    argv: Sequence[str | bytes], env: Mapping[str, str], prepared: Mapping[str, Any], *, proc: str = "/proc"
) -> NoReturn:
    """Run ``argv`` in this process, which was forked from a template, as a process that was executed would.

    Its streams, session, masks and folder are set already. The caller must not catch what this raises, and must not do
    anything in a ``finally``, so that its frames only disappear.

    Args:
        argv: The command: the interpreter, its flags, and what it runs.
        env: All variables of the rank.
        prepared: What prepare() returned in the template.
        proc: Where proc(5) is.

    Raises:
        Unwound: Always.
    """
    _set_environment(env, prepared["environment_written"])
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        _set_stream(fd, name, mode)
    _set_identity()
    _make_random()
    importlib.invalidate_caches()
    sys.modules["__main__"] = _new_main()
    sys.excepthook = _spawn.MainAtTheBottom([os.fsencode(word) for word in argv], sys.excepthook)
    _set_signals(proc)
    raise Unwound


def _set_environment(env: Mapping[str, str], written: Mapping[str, str | None]) -> None:
    """Set the rank's variables, in their order, and those that its own imports would have set."""
    os.environ.clear()
    os.environ.update(env)
    for name, value in written.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _set_signals(proc: str) -> None:
    """Set Python's signal handlers as they are in an interpreter that has started and imported the modules.

    A handler that an import has set stays. Of the other signals, the rank ignores those that the launcher ignores, as
    after execve(2).
    """
    ignored = _ignored(proc)
    for number in sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}, key=signal.SIGINT.__eq__):
        handler = handlers_after[number]
        if handler is None:
            continue  # a library's handler
        if handler == handlers_before[number]:
            handler = signal.SIG_IGN if number in ignored else signal.SIG_DFL
            if number in (signal.SIGPIPE, signal.SIGXFSZ):
                handler = signal.SIG_IGN
            elif number == signal.SIGINT and handler == signal.SIG_DFL:
                handler = signal.default_int_handler
        signal.signal(number, handler)
    if faulthandler.is_enabled():
        faulthandler.disable()
        faulthandler.enable()


def _ignored(proc: str) -> set[int]:
    with open(f"{proc}/self/status") as status:
        mask = next(int(line.split()[1], 16) for line in status if line.startswith("SigIgn:"))
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def _set_stream(fd: int, name: str, mode: str) -> None:
    """Renew a standard stream for the file behind its descriptor now, in the objects that programs hold.

    A logger that was made at an import holds sys.stderr. The text and its buffer are therefore initialised again in
    place. The layer below them keeps for good what it has found out about a file, as whether it can be sought.
    """
    text: Any = getattr(sys, f"__{name}__")
    try:
        os.fstat(fd)
    except OSError:
        if getattr(sys, name) is text:
            setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)
        return
    if text is None:
        return
    raw: Any = io.FileIO(fd, f"{mode}b", closefd=False)
    raw.name = f"<{name}>"
    buffered = raw
    if not isinstance(text.buffer, io.FileIO):  # -u has only stdin buffered
        buffered = text.buffer
        buffered.__init__(raw, _buffer_size(raw))
    # -u has all streams written through.
    lines = not text.write_through and (fd == 2 or raw.isatty())
    text.__init__(buffered, text.encoding, text.errors, "\n", line_buffering=lines, write_through=text.write_through)
    text.mode = mode


def _buffer_size(raw: Any) -> int:
    """What open() gives a buffer for this file."""
    if sys.version_info >= (3, 14):
        return max(min(raw._blksize, 8 << 20), io.DEFAULT_BUFFER_SIZE)
    return raw._blksize if raw._blksize > 1 else io.DEFAULT_BUFFER_SIZE


def _set_identity() -> None:
    """Set what a process knows of itself: its main thread's number, its start, and its place in multiprocessing."""
    threading.main_thread()._set_native_id()  # type: ignore[attr-defined]
    if (logging := sys.modules.get("logging")) is not None:
        now = time.time_ns() if isinstance(logging._startTime, int) else time.time()
        logging._startTime = now  # type: ignore[attr-defined]
    if (process := sys.modules.get("multiprocessing.process")) is not None:
        key = process.AuthenticationString(os.urandom(32))
        process.current_process()._config["authkey"] = key


def _make_random() -> None:
    """Make random numbers differ from rank to rank, where those of executed processes differ."""
    if (random := sys.modules.get("random")) is not None:
        random.seed()
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed()
    if (torch := sys.modules.get("torch")) is not None:
        # Newer versions begin with a random number, older ones with a constant. A program's own seed, which a module
        # may have set when it was imported, is small.
        generator = torch.default_generator
        if generator.initial_seed() > 1 << 32 and generator.initial_seed() != _SEED_OF_OLDER_TORCH:
            generator.seed()


def _new_main() -> ModuleType:
    """A module as the interpreter makes it for its program."""
    main = ModuleType("__main__")
    names: dict[str, Any] = vars(main)
    names["__loader__"] = sys.modules["_frozen_importlib"].BuiltinImporter
    if sys.version_info < (3, 14):
        names["__annotations__"] = {}
    names["__builtins__"] = sys.modules["builtins"]
    return main
