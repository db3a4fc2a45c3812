"""``Frozen``, the base class of this package's plain data: a small frozen dataclass.

Nothing that ``rankspawn plan`` needs imports ``dataclasses`` or ``typing``, because the two, with inspect, ast and dis
behind them, and the classes that they make, take longer than all the rest of a plan.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, NoReturn

    from typing_extensions import Self, dataclass_transform
else:

    def dataclass_transform(**_):
        # Only for type checkers (PEP 681), which see the fields, and an __init__ that takes them, as in a dataclass.
        return lambda cls: cls


@dataclass_transform(frozen_default=True)
class Frozen:
    """Data that never changes. It is compared, hashed, shown, matched, copied and pickled by its fields.

    The fields are the annotations of the class, in their order, with their defaults. A subclass that checks its fields
    has its own ``__init__``, which passes them to this one. Other entries in an object's ``__dict__`` are not compared,
    copied or pickled.
    """

    __match_args__: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        names = dict.fromkeys((*cls.__match_args__, *cls.__annotations__))
        cls.__match_args__ = tuple(names)  # type: ignore[misc]
        cls._defaults = {name: getattr(cls, name) for name in cls.__match_args__ if hasattr(cls, name)}

    def __init__(self, *values: Any, **named: Any) -> None:
        names, fields = self.__match_args__, self.__dict__
        fields.update(self._defaults)
        fields.update(zip(names, values, strict=False))
        fields.update(named)
        known = len(values) <= len(names) and (not named or named.keys() <= set(names[len(values) :]))
        if not known or len(fields) < len(names):
            given = f"{len(values)} by position" + "".join(f", {name}" for name in named)
            raise TypeError(f"{type(self).__name__} takes {', '.join(names)}, each once; given: {given}")

    def _values(self) -> tuple[Any, ...]:
        return tuple([self.__dict__[name] for name in self.__match_args__])

    def replace(self, **changes: Any) -> Self:
        """Return a checked copy with ``changes`` to its fields. Python 3.13's ``copy.replace`` calls it."""
        return type(self)(**{**dict(zip(self.__match_args__, self._values(), strict=True)), **changes})

    __replace__ = replace

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        fields = zip(self.__match_args__, self._values(), strict=True)
        return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in fields)})"

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), self._values()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen: {name} cannot be deleted")
