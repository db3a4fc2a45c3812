"""``get_context``: a context of multiprocessing whose processes are bound before they run any code of the program.

Everything that takes a context takes this one: ``concurrent.futures.ProcessPoolExecutor(mp_context=...)``, a pool,
``torch.utils.data.DataLoader(multiprocessing_context=...)``. It is an object beside the stock contexts. It changes
nothing in the calling process: not the start method, not the executable, and no mask.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from multiprocessing import context, util
from typing import TYPE_CHECKING, Any

from .._binding import Binding
from .._public import public
from .._start.outcome import BindingReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.managers import SyncManager
    from multiprocessing.popen_fork import Popen
    from multiprocessing.process import BaseProcess

    from .._warm.template import Template

    Bindings = Sequence[Binding | None] | Callable[[BaseProcess], Binding | None]


@public
def get_context(
    method: str = "spawn",
    bindings: Bindings = (),
    *,
    die_with_parent: bool = False,
    preload: Sequence[str] | Template | None = None,
) -> Context:
    """Make a context of multiprocessing whose processes are bound. Use it wherever code takes a context.

    Args:
        method: "spawn": a process is born bound, like a ``rankspawn.Popen``, before its interpreter starts.
            "forkserver": a process binds itself right after the fork, before it reads what to run, so before the
            program's main module and any thread of its own. Modules that the server has preloaded (by default from
            Python 3.14 on: the main module) have their memory where the server ran, and have counted the server's CPUs.
            "warm": as "spawn", but a template that has imported ``preload`` forks the process, as a child of this
            process in a session of its own. If it cannot be forked, it is executed, and a RuntimeWarning says why.
        bindings: A binding for each place, as ``rankspawn.place`` returns them. None in it gives a process the binding
            of its parent (with "forkserver": of the server). A process takes the place that has the fewest living
            processes of this context; of several such places, the one that was taken longest ago. So the i-th process
            has the i-th binding, whether or not others have ended; a process that replaces an ended worker has that
            worker's binding; and a restarted group gets the same places. Or a function that takes the process, before
            its start, and returns its binding or None. Empty: rankspawn starts the processes and binds none.
        die_with_parent: As for ``rankspawn.Popen``; not with "forkserver".
        preload: With "warm": the names of the modules that the template imports. The first start makes the template,
            and it ends with the context. Or a ``rankspawn.Template`` that names its modules, which the caller closes.

    Returns:
        The context. A started process has an attribute ``binding_report``, a BindingReport. Its ``start()`` raises
        BindingError, and leaves no process behind, if the system refuses a binding that is ``required``. The server
        process of a Manager takes no place and is not bound.

    Raises:
        ValueError: There is no such method on this system; or ``die_with_parent`` is given with "forkserver", whose
            processes are children of the server; or ``preload`` without "warm"; or a template does not name its
            modules.
        TypeError: A binding is neither a Binding nor None.
        ImportError: This rankspawn does not know this Python's multiprocessing.
    """
    if method not in _CONTEXTS or os.name != "posix":
        raise ValueError(f"method: expected 'spawn', 'forkserver' or 'warm' (on POSIX systems), got {method!r}")
    if die_with_parent and method == "forkserver":
        raise ValueError("die_with_parent is for 'spawn' and 'warm': with 'forkserver' the server is the parent")
    if preload is not None and method != "warm":
        raise ValueError(f"preload is for 'warm', not for {method!r}")
    if isinstance(preload, str):
        raise TypeError(f"preload: expected a sequence of names, got {preload!r}")
    if not callable(bindings):
        bindings = tuple(map(_checked, bindings))
    from . import methods  # noqa: F401  An unknown Python fails here, not at the first start.

    if preload is not None:
        from .._warm.template import Template

        if isinstance(preload, Template):
            if preload.modules is True:
                raise ValueError("preload: expected a Template of named modules: functions do not say what they import")
            return WarmContext(bindings, die_with_parent, preload.modules, preload)
    return _CONTEXTS[method](bindings, die_with_parent, tuple(preload or ()))


class Context(context.BaseContext):
    """What the contexts of all start methods have in common. get_context() makes them."""

    _name: str
    _stock_name: str

    def __init__(self, bindings: Bindings, die_with_parent: bool, preload: tuple[str, ...] = ()) -> None:
        # Not by multiprocessing.get_context(): a program may have put one of ours there, under the stock name.
        stock: Any = getattr(context, self._stock_name)()
        self._stock = stock
        self._preload = preload
        self._bindings = bindings
        self._die_with_parent = die_with_parent
        self._starts = itertools.count(1)
        self._taken = [0] * (0 if callable(bindings) else len(bindings))
        """By place: the number of the start that took it last."""
        self._places: weakref.WeakKeyDictionary[Popen, tuple[int, int]] = weakref.WeakKeyDictionary()
        """The place of a process, and the number that ``_taken`` had for this place before."""
        self._lock = threading.Lock()
        # A class, because programs derive from it. It has the stock name, which is in the name of each process.
        self.Process = type(stock.Process.__name__, (_BoundProcess, stock.Process), {"_rankspawn_context": self})

    def Manager(self) -> SyncManager:
        """Made by the stock context: the server process takes no place and is not bound."""
        manager: SyncManager = self._stock.Manager()
        return manager

    def __reduce__(self) -> tuple[Any, ...]:
        preload = self._preload if self._name == "warm" else None
        remade = functools.partial(get_context, die_with_parent=self._die_with_parent, preload=preload)
        return remade, (self._name, self._bindings)

    def _place(self, popen: Popen, process: BaseProcess) -> Binding | None:
        """The binding for ``process``. It takes the place until ``popen`` has a return code."""
        if callable(self._bindings):
            return _checked(self._bindings(process))
        if not self._bindings:
            return None
        with self._lock:
            # BaseProcess.start() has just looked for processes that have ended.
            living = [place for started, (place, _) in self._places.items() if started.returncode is None]
            place = min(range(len(self._taken)), key=lambda place: (living.count(place), self._taken[place]))
            self._places[popen] = place, self._taken[place]
            self._taken[place] = next(self._starts)
        return self._bindings[place]

    def _leave(self, popen: Popen) -> None:
        """Give back the place of ``popen``, whose process was not started."""
        with self._lock:
            if popen in self._places:
                place, self._taken[place] = self._places.pop(popen)


class SpawnContext(Context):
    """Processes are fresh interpreters, born bound."""

    _name = "spawn"
    _stock_name = "SpawnContext"


class ForkServerContext(Context):
    """Processes are forks of a server, and bind themselves first."""

    _name = "forkserver"
    _stock_name = "ForkServerContext"


class WarmContext(Context):
    """Processes are forks of a template, each of them a child of this process."""

    _name = "warm"
    _stock_name = "SpawnContext"

    def __init__(
        self,
        bindings: Bindings,
        die_with_parent: bool,
        preload: tuple[str, ...] = (),
        template: Template | None = None,
    ) -> None:
        super().__init__(bindings, die_with_parent, preload)
        self._template = template

    def template(self) -> Template:
        """The Template that processes are forked from. The context's own one ends with it, or with this process."""
        from .._warm.template import Template

        with self._lock:
            if self._template is None:
                self._template = Template(("multiprocessing.spawn", *self._preload))
                # After multiprocessing's own finalizers, which have waited for the processes.
                util.Finalize(self, self._template.close, exitpriority=-1)
            return self._template


_CONTEXTS: dict[str, type[Context]] = {
    "spawn": SpawnContext,
    "forkserver": ForkServerContext,
    "warm": WarmContext,
}


class _BoundProcess:
    """What a context's process class adds to the stock one."""

    _rankspawn_context: Context
    _popen: Any

    @property
    def binding_report(self) -> BindingReport | None:
        """What was asked, what was refused and, read on demand, the process's binding; None before start()."""
        popen = self._popen
        return None if popen is None else BindingReport(popen.binding, popen.refused, popen.pid, popen.late)

    @classmethod
    def _Popen(cls, process: Any) -> Any:
        # The process may be of another class: multiprocessing.Process asks the class of the default context.
        from .methods import POPEN

        return POPEN[cls._rankspawn_context.get_start_method()](cls._rankspawn_context, process)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The new process cannot import a class that a context has made: there it is the stock class, which has all that
        # a process needs in itself. A class that the program has derived is importable, and stays.
        reduced: Any = super().__reduce_ex__(protocol)
        of = self._rankspawn_context
        return (object.__new__, (of._stock.Process,), *reduced[2:]) if type(self) is of.Process else reduced


def _checked(binding: object) -> Binding | None:
    if binding is not None and not isinstance(binding, Binding):
        raise TypeError(f"bindings: expected a Binding or None, got {binding!r}")
    return binding
