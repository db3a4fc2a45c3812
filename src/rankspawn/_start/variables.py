"""The environments of many ranks: what they share, and what each has in addition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .arguments import callers_environment, named_by_text


class RankVariables:
    """The environments of ranks, in layers that the engine merges. Each layer wins over those before it.

    Attributes:
        env: The variables that all ranks inherit; None for the caller's environment.
        shared: Further variables of all ranks.
        numbered: Variables whose value is a number that grows with the rank: name -> the first rank's number.
        own: Each rank's own variables, by rank.
    """

    def __init__(
        self,
        env: Mapping[Any, Any] | None,
        own: Sequence[Mapping[Any, Any]],
        shared: Mapping[str, str] | None = None,
        numbered: Mapping[str, int] | None = None,
    ) -> None:
        self.env = None if env is None else named_by_text(env)
        self.shared = shared or {}
        self.numbered = numbered or {}
        self.own = [named_by_text(one) if one else one for one in own]

    def of(self, rank: int) -> Mapping[Any, Any] | None:
        """One rank's environment, merged only when somebody reads it; None for the caller's, unchanged."""
        return _Whole(self, rank) if self.shared or self.numbered or self.own[rank] else self.env

    def some(self, ranks: Sequence[int]) -> RankVariables:
        """The environments of some of the ranks, which keep their numbers."""
        return RankVariables(self.env, [{**self._numbers(rank), **self.own[rank]} for rank in ranks], self.shared)

    def whole(self, rank: int) -> dict[Any, Any]:
        """One rank's environment."""
        inherited = callers_environment() if self.env is None else self.env
        return {**inherited, **self.shared, **self._numbers(rank), **self.own[rank]}

    def _numbers(self, rank: int) -> dict[str, str]:
        return {name: str(first + rank) for name, first in self.numbered.items()}


class _Whole(Mapping[Any, Any]):
    """A rank's environment for its few readers: audit hooks, and the search of PATH. Most launches have neither."""

    __slots__ = ("_rank", "_variables")

    def __init__(self, variables: RankVariables, rank: int) -> None:
        self._variables, self._rank = variables, rank

    def __getitem__(self, name: Any) -> Any:
        return self._variables.whole(self._rank)[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._variables.whole(self._rank))

    def __len__(self) -> int:
        return len(self._variables.whole(self._rank))
