"""What users see says the address that they import it from, in tracebacks, pickles and docs."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")


def public(thing: T) -> T:
    """Mark a class or function as part of the package's own surface: ``rankspawn.NAME``, wherever its code is."""
    thing.__module__ = __package__
    return thing
