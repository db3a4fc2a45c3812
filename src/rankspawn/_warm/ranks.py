"""Forks the ranks of a launch from the templates that fit them, and says why a rank starts cold."""

from __future__ import annotations

import os
import signal
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import _spawn
from .._binding import Binding
from .._start.arguments import command_and_program
from .._start.crew import RankProcess, name_rank
from .._start.engine import masks
from .._start.variables import RankVariables
from .command import PythonCommand, first_folder, python_command
from .inherited import umask
from .variables import difference

if TYPE_CHECKING:
    from .stem import Stem


class Launch:
    """What a launch asks for, and which of its ranks start warm or cold.

    Args:
        ranks: The ranks, none of which has been started.
        variables: Their environments.
        cwd: The folder that the ranks start in; None is the caller's.
        homes: The home of each rank. Ranks of one home can share a template, because their memory is in the same place.
        die_with_parent: As for Popen.
        cgroup: A descriptor of a cgroup's directory.
        guard: As for ``start_ranks``.

    Attributes:
        cwd: The absolute folder.
        commands: The commands of the ranks that can start warm, by rank.
        cold: Why a rank starts cold, by rank.
    """

    def __init__(
        self,
        ranks: Sequence[RankProcess],
        variables: RankVariables,
        *,
        cwd: str | os.PathLike[str] | None,
        homes: Sequence[Hashable],
        die_with_parent: bool,
        cgroup: int | None,
        guard: int,
    ) -> None:
        self._ranks = ranks
        inherited = _as_text(_spawn.own_environment() if variables.env is None else variables.env)
        self._env = {**inherited, **variables.shared}
        self._own = [_as_text(own) for own in variables.some(range(len(ranks))).own]
        self._variables = variables
        self._homes = homes
        self._folder = cwd
        self.cwd = os.path.join(os.getcwd(), os.fsdecode(cwd or ""))
        self._die_with_parent, self.cgroup, self.guard = die_with_parent, cgroup, guard
        self.cold: dict[int, str] = {}
        self.commands: dict[int, PythonCommand] = {}
        for number in range(len(ranks)):
            command = python_command(self.words(number))
            if isinstance(command, str):
                self.cold[number] = command
            else:
                self.commands[number] = command

    @property
    def left(self) -> list[int]:
        """The ranks that are neither started nor to be started cold."""
        return [n for n, rank in enumerate(self._ranks) if not rank._child_created and n not in self.cold]

    def kind(self, number: int) -> tuple[Hashable, ...]:
        """What the ranks of one template must have in common, beside variables and modules."""
        command, binding = self.commands[number], self.binding(number)
        memory = None if binding is None else str(binding.memory)
        folder = first_folder(command, self.cwd)
        return self._homes[number], memory, command.python, command.flags, folder, self.cwd

    def binding(self, number: int) -> Binding | None:
        """The binding of a rank."""
        return self._ranks[number].binding_report.requested

    def words(self, number: int) -> list[str]:
        """A rank's command, as text."""
        return [os.fsdecode(word) for word in command_and_program(self._ranks[number].args, None, False)[0]]

    def environment(self, number: int) -> dict[str, str]:
        """All variables of a rank."""
        return {**self._env, **self._own[number]}

    def common_environment(self, numbers: Sequence[int]) -> dict[str, str]:
        """The variables that these ranks have with the same value."""
        common = dict(self._env)
        for name in {name for number in numbers for name in self._own[number]}:
            values = {self._own[number].get(name, self._env.get(name)) for number in numbers}
            value = values.pop()
            if values or value is None:
                common.pop(name, None)
            else:
                common[name] = value
        return common

    def common_binding(self, numbers: Sequence[int]) -> Binding | None:
        """The template's binding: the CPUs of all these ranks and their common memory policy. It is not required."""
        bindings = [one for one in map(self.binding, numbers) if one is not None]
        cpus = frozenset[int]().union(*(one.cpus or () for one in bindings))
        if len(bindings) < len(numbers) or any(one.cpus is None for one in bindings):
            cpus = frozenset()  # one of them may use all that this process may
        memory = bindings[0].memory if bindings else None
        return Binding(cpus or None, memory, required=False) if cpus or memory else None

    def mismatch(self, number: int, stem: Stem) -> str | None:
        """Say which variable that imports read has another value for this rank; None if all have the same."""
        # What the importer was executed with, because its interpreter may have set LC_CTYPE since.
        return difference({**stem.prepared, "environment": stem.env}, self.environment(number))

    def alike(self, one: int, other: int, stem: Stem) -> bool:
        """Whether two ranks have the same values of all variables that this template's imports have read."""
        imported = {**stem.prepared, "environment": self.environment(one)}
        return difference(imported, self.environment(other)) is None

    def fork(self, numbers: Sequence[int], stem: Stem) -> None:
        """Fork these ranks from a template. If the template ends early, the rest stays unstarted.

        Raises:
            OSError: As ``start_ranks``.
        """
        fds = _Descriptors()
        folder = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            optional = [None if fd is None or fd < 0 else fds.place(fd) for fd in (self.cgroup, self.guard, folder)]
            request = {
                "fds": [0, 1, *optional],
                "descriptors": _own_descriptors(),
                "cwd": os.fsdecode(self._folder or ""),
                "env": self._env,
                "umask": umask(),
                "death_signal": int(signal.SIGKILL) if self._die_with_parent else 0,
                "ranks": [self._request(number, fds) for number in numbers],
            }
            ranks = [self._ranks[number] for number in numbers]
            outcomes = stem.fork(request, fds.sent, ranks)
        finally:
            os.close(folder)
        failure = None
        for place, outcome in outcomes.items():
            try:
                ranks[place].was_forked(outcome, self._folder)
            except OSError as error:
                name_rank(error, numbers[place])
                failure = failure or error
        if failure is not None:
            raise failure

    def _request(self, number: int, fds: _Descriptors) -> dict[str, Any]:
        streams, (cpus, policy, nodes), required = self._ranks[number].for_template(
            self._folder, self._variables.of(number)
        )
        told: list[Any] = []
        for target, stream in enumerate(streams):
            if isinstance(stream, tuple):
                told.append([os.fsdecode(stream[0]), stream[1]])
            elif stream < -1:
                told.append(stream)  # as stdout
            else:
                told.append(fds.place(target if stream == -1 else stream))
        if cpus is None:
            cpus = masks(Binding(frozenset(os.sched_getaffinity(0))))[0]
        return {
            "argv": self.words(number),
            "env": self._own[number],
            "streams": told,
            "cpus": cpus and cpus.hex(),
            "policy": policy,
            "nodes": nodes and nodes.hex(),
            "required": required,
        }


class _Descriptors:
    """The descriptors of a request. The request refers to each by its index."""

    _FIRST = 2  # the template's memory and pipe are before them

    def __init__(self) -> None:
        self.sent: list[int] = []

    def place(self, fd: int) -> int:
        if fd not in self.sent:
            self.sent.append(fd)
        return self._FIRST + self.sent.index(fd)


def _as_text(env: Mapping[Any, Any]) -> dict[str, str]:
    if all(type(name) is type(value) is str for name, value in env.items()):
        return {**env}
    return {os.fsdecode(name): os.fsdecode(value) for name, value in env.items()}


def _own_descriptors(path: str = "/proc/self/fd") -> str:
    return path
