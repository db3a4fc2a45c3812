"""Gives public classes and functions the module that users import them from, for tracebacks, pickles and docs."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")


def public(thing: T) -> T:
    """Decorate a public class or function: its module becomes ``rankspawn``, wherever its code is."""
    thing.__module__ = __package__
    return thing
