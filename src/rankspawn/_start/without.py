"""What works without the engine, when the standard library starts a process: CPUs from birth, and fresh signals."""

from __future__ import annotations

import errno
import os
import signal
import threading
from typing import TYPE_CHECKING

from .engine import bind_process, bind_thread
from .outcome import RefusedStep

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from .._binding import Binding

    T = TypeVar("T")


class NoThreadError(RuntimeError):
    """No thread could be made, because the interpreter shuts down or the system allows no more. Nothing was done."""


def in_thread(work: Callable[[], T]) -> T:
    """Do ``work`` in a new thread.

    A process inherits the CPUs and the memory policy of the thread that starts it. Those of the calling thread do not
    change, so nothing needs to be restored.

    Args:
        work: The function; it is called once, without arguments.

    Returns:
        What ``work`` returned.

    Raises:
        NoThreadError: ``work`` was not called.
        BaseException: What ``work`` raised.
    """
    outcome: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # raised again in the calling thread
            errors.append(error)

    thread = threading.Thread(target=run, name="rankspawn-bound")
    try:
        thread.start()
    except RuntimeError as error:
        raise NoThreadError(str(error)) from None
    try:
        thread.join()
    except BaseException:
        # A signal handler raised (Ctrl-C) during the start. Wait, because only a finished start can be undone.
        thread.join()
        raise
    if errors:
        raise errors.pop()
    return outcome.pop()


def start_bound(binding: Binding, start: Callable[[], int]) -> tuple[tuple[RefusedStep, ...], bool]:
    """Start a process from a thread that has bound itself to the CPUs of ``binding``. The process inherits them.

    Args:
        binding: The binding; its memory policy is refused.
        start: Starts the process, and returns its pid.

    Returns:
        The refused steps, and whether the CPU mask was set late: after the start, and only on the process's main
        thread. It is late if the system has no sched_setaffinity(2), or allows no thread.

    Raises:
        BindingError: The system refused a required step. Unless the mask is late, nothing was started.
    """
    if binding.cpus is not None and hasattr(os, "sched_setaffinity"):
        refused = () if binding.memory is None else (RefusedStep("set_mempolicy", errno.ENOTSUP),)

        def bound() -> tuple[RefusedStep, ...]:
            steps = bind_thread(binding.replace(memory=None))
            start()
            return steps

        try:
            return (*refused, *in_thread(bound)), False
        except NoThreadError:
            pass
    steps = bind_process(start(), binding)
    return steps, binding.cpus is not None and "sched_setaffinity" not in [one.step for one in steps]


def fresh_signals() -> Callable[[], None] | None:
    """Find what a forked child has to do before it executes, so that its program begins with fresh signals.

    As in csrc/spawn.h, fresh means an empty mask, and default actions except for an ignored SIGHUP. Python only
    knows the signals that were ignored when it started, or that its module ``signal`` ignored.

    Returns:
        A function for ``preexec_fn``; None if there is nothing to do, or in a sub-interpreter, which forbids it.
    """
    if os.name != "posix":
        return None
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    ignored: set[Any] = {sig for sig in signal.valid_signals() if signal.getsignal(sig) == signal.SIG_IGN}
    # subprocess restores these two itself. A handler of a signal that was blocked must not run in the child.
    changed = (ignored - {signal.SIGPIPE, signal.SIGXFSZ} | blocked) - kept
    if (not blocked and not changed) or _in_sub_interpreter():
        return None

    def refresh() -> None:
        for sig in changed:
            signal.signal(sig, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    return refresh


def _in_sub_interpreter() -> bool:
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            module = __import__(name)
        except ImportError:
            continue
        # Since 3.13 each is a tuple, whose second part may differ.
        ids = [one[0] if isinstance(one, tuple) else one for one in (module.get_current(), module.get_main())]
        return bool(ids[0] != ids[1])
    return False
