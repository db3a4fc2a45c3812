"""What the project's docstrings mean, as reStructuredText.

A paragraph that begins with the name of a parameter or an attribute and a colon says something of each name in it:
"cpus: text", "numa, memory: text", several behind each other. It becomes a definition list. Public classes are links.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import rankspawn

# A class's name in running text; neither a part of a longer one, nor between quotation marks.
_NAMES = "|".join(name for name in rankspawn.__all__ if name[0].isupper())
_CLASS = re.compile(rf"(?<![\w.'\"])({_NAMES})(?![\w.(='\"])")


def names_of(described: object) -> set[str]:
    """What a docstring may speak of: parameters of a function; those of a class, and its attributes."""
    if isinstance(described, type):
        makers = (one.__init__ for one in described.__mro__)  # type: ignore[misc]
        return {*inspect.get_annotations(described)}.union(*map(_parameters, makers)) - {"self"}
    return _parameters(described) - {"self"}


def types_of(described: object) -> dict[str, str]:
    """The types of a class's attributes that its signature does not show."""
    if not isinstance(described, type):
        return {}
    annotations, shown = inspect.get_annotations(described), _parameters(described)
    return {name: getattr(one, "__forward_arg__", one) for name, one in annotations.items() if name not in shown}


def _parameters(called: object) -> set[str]:
    try:
        return set(inspect.signature(called).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # it cannot be called, or is C's
        return set()


def paragraphs(text: str) -> Iterator[str]:
    yield from re.split(r"\n\s*\n", inspect.cleandoc(text))


def entries(paragraph: str, names: set[str]) -> list[tuple[list[str], str]]:
    """What a paragraph says, by the names that it speaks of; empty for one that says something else."""
    one = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)"
    begins = re.compile(rf"(?:^|(?<=[.;] ))((?:{one})(?:, (?:{one}))*): ")
    joined = " ".join(paragraph.split())
    before, *rest = begins.split(joined)
    if before:
        return []
    return [(terms.split(", "), said.strip()) for terms, said in zip(rest[::2], rest[1::2], strict=True)]


def as_rst(text: str, described: object, itself: str) -> list[str]:
    """The lines of a docstring as Sphinx takes them. itself: the name that it belongs to, which is no link in it."""
    names, types = names_of(described), types_of(described)
    lines: list[str] = []
    for paragraph in paragraphs(text):
        if found := entries(paragraph, names):
            for terms, said in found:
                named = (f"``{term}``" + (f": ``{types[term]}``" if term in types else "") for term in terms)
                lines += [", ".join(named), f"    {_linked(said, itself)}", ""]
        else:
            lines += [*_linked(paragraph, itself).splitlines(), ""]
    return lines


def _linked(text: str, itself: str) -> str:
    def link(name: str) -> str:
        return name if name == itself else f":py:obj:`~rankspawn.{name}`"

    parts = re.split(r"(``.*?``)", text, flags=re.DOTALL)
    for number, part in enumerate(parts):
        if not part.startswith("``"):
            parts[number] = _CLASS.sub(lambda found: link(found[0]), part)
        elif part.strip("`") in rankspawn.__all__ and part.strip("`") != itself:
            parts[number] = link(part.strip("`"))
    return "".join(parts)
