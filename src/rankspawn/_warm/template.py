"""``Template``: processes that have imported what ranks need, kept for all launches of a program."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from .._binding import FLAG, is_sequence, refuse_other_kinds
from .._ids import name_ranks
from .._public import public
from .._start.engine import mechanisms, why_no_engine
from .inherited import closed_streams, difference, inherited

if TYPE_CHECKING:
    from types import TracebackType

    from .._end.guard import Guard
    from .._output.form import TemplateReport
    from .._start.crew import RankProcess
    from .._start.variables import RankVariables
    from .ranks import Launch
    from .stem import Stem

# A launch makes at most so many templates for ranks of one home: the second is for variables that the first has read.
_MOST_FOR_A_HOME = 2


@public
class Template:
    """Processes that have imported modules once, from which ``launch(..., warm=template)`` forks its ranks.

    When a forked rank begins, its imports are done, and it shares their memory with the other ranks. It is a child of
    this process and born bound, like a rank that is executed. The first launch makes the templates: one for each node
    that has ranks, and for each set of values of the variables that the imports read. Later launches and restarts use
    them again. If no template fits a rank, or none can be proved safe, the rank is executed as usual, and a
    RuntimeWarning says why.

    The command must be ``python [FLAGS] SCRIPT``, ``-m MODULE`` or ``-c CODE``. Needs Linux 5.4 or newer.

    Args:
        modules: What to import, by name and in this order; True: what the script imports at its top.
        required: True raises RuntimeError if a rank cannot be forked.
        timeout: How long the imports may take, in seconds.
        lasts: Whether it serves more than one launch. If not, its processes belong to the launch's guard and cgroup,
            and end as soon as the ranks have been forked.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``timeout`` is not a positive number.
    """

    def __init__(
        self,
        modules: Sequence[str] | Literal[True] = True,
        *,
        required: bool = False,
        timeout: float = 300.0,
        lasts: bool = True,
    ) -> None:
        refuse_other_kinds({"required": FLAG, "lasts": FLAG}, {"required": required, "lasts": lasts})
        named = modules is True or (is_sequence(modules) and all(isinstance(name, str) for name in modules))
        if not named:
            raise TypeError(f"modules: expected a sequence of names or True, got {modules!r}")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise TypeError(f"timeout: expected a number of seconds, got {timeout!r}")
        if not timeout > 0:
            raise ValueError(f"timeout: expected a positive number of seconds, got {timeout!r}")
        self.modules: tuple[str, ...] | Literal[True] = True if modules is True else tuple(modules)
        self.required = required
        self.timeout = timeout
        self.interrupt: Callable[[], object] | None = None
        """A function, called ten times a second while a launch waits for imports. If it raises, the launch ends."""
        self.lasts = lasts
        self._stems: list[tuple[Any, Stem]] = []
        self._begun: list[tuple[Any, Stem]] = []
        """The templates whose imports no launch has waited for."""
        self._inherited: dict[str, str] = {}
        self._guard: Guard | None = None
        self._said: set[str] = set()
        self._found: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._lock = threading.RLock()
        self._owner, self._closed = os.getpid(), False

    def start(self, ranks: Sequence[RankProcess], variables: RankVariables, **options: Any) -> list[int]:
        """Fork those of ``ranks`` for which there is, or can be, a template. ``launch`` starts the rest.

        Args:
            ranks: RankProcess objects that have not been started.
            variables: Their environments.
            **options: As for ``ranks.Launch``.

        Returns:
            The ranks that are left.

        Raises:
            OSError: As ``launch``, for a rank that cannot be started either way. Ranks
                that were started keep running.
            RuntimeError: A rank could not be forked, and ``required`` is true.
        """
        if self._closed:
            raise ValueError("the template is closed")
        why, cold = self.why_not(), {}
        if self._owner != os.getpid():
            why = f"the template belongs to process {self._owner}, of which this is a forked copy"
        if why is None:
            from .ranks import Launch

            launch = Launch(ranks, variables, **options)
            with self._lock:
                try:
                    self._start(launch)
                except (MemoryError, OSError) as error:
                    if getattr(error, "rank", None) is not None:
                        raise
                    why = f"no template can be made: {error}"
            cold = {**launch.cold, **dict.fromkeys(launch.left, why or "its template has ended")}
        else:
            cold = dict.fromkeys(range(len(ranks)), why)
        self.leave_cold(cold)
        return sorted(cold)

    def leave_cold(self, why: Mapping[int, str]) -> None:
        """Say why ranks start cold.

        Args:
            why: The reasons, by rank.

        Raises:
            RuntimeError: There is a reason, and ``required`` is true.
        """
        lines = _name_ranks(why)
        if lines and self.required:
            raise RuntimeError("a warm start is required, but " + "; ".join(lines))
        for line in lines:
            self._say(line)

    def begin(self, command: Sequence[str], env: Mapping[str, str], *, guard: bool) -> None:
        """Begin the imports, and return at once: the next start waits for the rest of them.

        The template is for unbound ranks. If the ranks turn out to differ, by a variable that an import reads for
        example, they get another template. If the imports cannot begin, the start tries again, and says why.

        Args:
            command: What a rank will run.
            env: The variables that the ranks will have in common.
            guard: Whether a guard also ends the template if this process is killed.
        """
        if self.why_not() is not None:
            return
        from .._end.guard import Guard
        from .._start.crew import RankProcess
        from .._start.variables import RankVariables
        from .ranks import Launch

        with self._lock, suppress(OSError):
            if guard and self._guard is None and not Guard.why_not():
                self._guard = Guard.start()
            rank = RankProcess(command, (None, None, None), None)
            launch = Launch(
                [rank], RankVariables(env, [{}]), cwd=None, homes=[None], die_with_parent=True, cgroup=None, guard=-1
            )
            rank.let_go()
            self._inherited = self._inherited or inherited()
            for number in launch.left:
                self._begun.append((self._kind(launch, number), self._stem(launch, [number])))
                self._stems.append(self._begun[-1])

    def _start(self, launch: Launch) -> None:
        self._adopt(self._begun)
        self._begun.clear()
        now = inherited()
        self._inherited = self._inherited or now
        changed = difference(self._inherited, now)
        if changed is not None:
            launch.cold.update(dict.fromkeys(launch.left, changed))
            return
        for _ in range(_MOST_FOR_A_HOME):
            self._use(launch)
            made = self._make(launch)
            if not made:
                break
        self._use(launch)

    def _use(self, launch: Launch) -> None:
        """Fork the ranks for which there is a template."""
        for key, stem in self._stems:
            if not stem.is_alive():
                continue
            fitting = []
            for number in launch.left:
                if self._kind(launch, number) == key and launch.mismatch(number, stem) is None:
                    fitting.append(number)
            if fitting:
                for path in stem.edited():
                    self._say(f"{path} was changed after a template had imported it: ranks use its old content")
                launch.fork(fitting, stem)

    def _make(self, launch: Launch) -> bool:
        """Make templates for the remaining ranks, all at once. Ranks for which there can be none start cold."""
        homes: dict[Any, list[int]] = {}
        for number in launch.left:
            homes.setdefault(self._kind(launch, number), []).append(number)
        made = []
        for key, numbers in homes.items():
            some = self._together(launch, key, numbers)
            if some:
                made.append((key, self._stem(launch, some)))
                self._stems.append(made[-1])
        self._adopt(made)
        for key, numbers in homes.items():
            for of_home, stem in made:
                if of_home == key and stem.refused is not None:
                    launch.cold.update(dict.fromkeys(set(numbers) & set(launch.left), stem.refused))
        return bool(made)

    def _adopt(self, made: Sequence[tuple[Any, Stem]]) -> None:
        for _, stem in made:
            stem.adopt(self.timeout, self.interrupt)
            for name, error in stem.prepared.get("failed", {}).items():
                self._say(f"the template could not import {name}: {error}")

    def _together(self, launch: Launch, key: Any, numbers: list[int]) -> list[int]:
        """The ranks that one new template serves. The others start cold if no template can help them."""
        known = [stem for of_home, stem in self._stems if of_home == key and (stem.works or not stem.was_ready)]
        if not known:
            return numbers
        if not known[-1].was_ready:  # the same refusal would come again
            launch.cold.update(dict.fromkeys(numbers, known[-1].refused or "no template could be made"))
            return []
        # There are templates, and none fits: imports have read variables that have other values here.
        alike = [number for number in numbers if launch.alike(numbers[0], number, known[-1])]
        if len(alike) == 1 < len(numbers) or any(launch.mismatch(alike[0], stem) is None for stem in known):
            for number in numbers:
                launch.cold[number] = launch.mismatch(number, known[-1]) or "its template did not fork it"
            return []
        return alike

    def _stem(self, launch: Launch, numbers: list[int]) -> Stem:
        from .stem import Stem

        command = launch.commands[numbers[0]]
        guard, cgroup = launch.guard, launch.cgroup
        if self.lasts:
            cgroup = None
            if self._guard is not None and self._guard.process.poll() is not None:
                self._guard.close()  # it was killed
                self._guard = None
            if self._guard is None and guard >= 0:
                from .._end.guard import Guard

                self._guard = Guard.start()
            guard = -1 if self._guard is None else self._guard.fd
        return Stem(
            command,
            self._modules_of(launch, numbers[0]),
            cwd=launch.cwd,
            env=launch.common_environment(numbers),
            binding=launch.common_binding(numbers),
            cgroup=cgroup,
            guard=guard,
            lasts=self.lasts,
        )

    def _modules_of(self, launch: Launch, number: int) -> tuple[str, ...]:
        if self.modules is not True:
            return self.modules
        # The source is read once: a template that lasts is used again for a script that has been edited.
        command = launch.commands[number]
        program = (command.python, command.kind, command.target, launch.cwd)
        if program not in self._found:
            from .find import find

            self._found[program] = find(launch.words(number), launch.cwd).modules
        return self._found[program]

    def _kind(self, launch: Launch, number: int) -> Any:
        return launch.kind(number), self._modules_of(launch, number) if self.modules is True else ()

    @staticmethod
    def why_not() -> str | None:
        """Say why no rank can be started warm on this system; None if one can."""
        if not sys.platform.startswith("linux"):
            return "a warm start needs Linux"
        if not mechanisms():
            return f"a warm start needs rankspawn's engine: {why_no_engine()}"
        if os.confstr("CS_GNU_LIBC_VERSION") is None:
            return "a warm start needs the GNU C library"
        if not hasattr(os, "pidfd_open"):
            return "a warm start needs os.pidfd_open, which this Python was built without"
        return closed_streams()

    def __del__(self, getpid: Callable[[], int] = os.getpid, warn: Callable[..., None] = warnings.warn) -> None:
        if getattr(self, "_closed", True) or self._owner != getpid() or not self._stems:
            return
        self.close()
        warn("a Template was not closed", ResourceWarning, source=self)

    def report(self) -> list[TemplateReport]:
        """Describe each process and what it has done, as plain data, the oldest first, as in a group's report."""
        return [stem.report() for _, stem in self._stems]

    def children(self) -> set[int]:
        """The children of this process that the template waits for by itself: its own processes and their guard."""
        guard = () if self._guard is None else (self._guard.process.pid,)
        stems = [stem for _, stem in self._stems if stem.works or stem.importer is not None]
        return {*(stem.pid for stem in stems), *guard}

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            warnings.warn(line, RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """End the templates. Ranks that were forked from them run on. Harmless when done twice."""
        with self._lock:
            self._closed = True
            for _, stem in self._stems:
                stem.close()
            if self._guard is not None:
                self._guard.close()
                self._guard = None

    def __enter__(self) -> Template:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _name_ranks(reasons: Mapping[int, str]) -> list[str]:
    """A line for each reason, with the ranks that start cold for it."""
    by_reason: dict[str, list[int]] = {}
    for number, why in sorted(reasons.items()):
        by_reason.setdefault(why, []).append(number)
    return [f"{name_ranks(some)} started cold: {why}" for why, some in by_reason.items()]
