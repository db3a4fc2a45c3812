"""Files below a sysfs root: read once each, as text, number, list or mask, with errors that name the file."""

from __future__ import annotations

import os
import re

from .._binding import PlacementError
from .._ids import parse_ids, parse_mask

_PAIR = re.compile(r"[0-9]{1,6}(?:,[0-9]{1,6})?")  # a core's threads, in most machines


class TopologyError(PlacementError):
    """A file below the sysfs root cannot be read, or does not say what it should."""


class Tree:
    """The folder that has sys/ and proc/ in it; paths are relative to it.

    opened: each file that was read, with its text. listed: each folder that was listed, with its names.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.fspath(root)
        self.opened: dict[str, str] = {}
        self.listed: dict[str, list[str]] = {}
        self._prefix = self.root.rstrip("/") + "/"

    def text(self, path: str) -> str | None:
        """The file's text without blanks and NUL bytes at its ends; None where there is no such file.

        A file is opened once; what was read is remembered.
        """
        known = self.opened.get(path)
        if known is not None:
            return known
        try:
            fd = os.open(self._prefix + path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise TopologyError(f"cannot open {self._prefix}{path}: {error.strerror}") from error
        try:
            data = os.read(fd, 65536)
            # A short read of sysfs is the whole file; only long ones of proc come in pieces.
            while len(data) >= 4096 and (more := os.read(fd, 65536)):
                data += more
        except OSError as error:
            raise TopologyError(f"cannot read {self._prefix}{path}: {error.strerror}") from error
        finally:
            os.close(fd)
        text = self.opened[path] = data.decode("ascii", "replace").strip(" \t\n\0")
        return text

    def ids(self, path: str) -> frozenset[int] | None:
        """The ids of a list such as "0-3,8"; None where there is no such file."""
        text = self.text(path)
        return None if text is None else self._parsed(path, text, mask=False)

    def first_ids(self, folder: str, names: tuple[str, ...], of: int | None = None) -> frozenset[int] | None:
        """The ids in the first of ``names`` that ``folder`` has; names that end in "list" hold lists, others masks.

        of: an id that must be among them, as a CPU is among its own siblings. A file without it is passed over for
        the next name (in trees made by hand, lists and masks disagree); TopologyError where no other is there.
        """
        wrong = ""
        for name in names:
            text = self.text(f"{folder}/{name}")
            if text is not None:
                ids = self._parsed(f"{folder}/{name}", text, mask=not name.endswith("list"))
                if of is None or of in ids:
                    return ids
                wrong = wrong or f"{self._prefix}{folder}/{name} should have {of} among its ids: {text[:60]!r}"
        if wrong:
            raise TopologyError(wrong)
        return None

    def number(self, path: str) -> int | None:
        """The one whole number in the file; None where there is no such file."""
        text = self.text(path)
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            raise TopologyError(f"{self._prefix}{path} should be a number: {text[:60]!r}") from None

    def names(self, path: str) -> list[str]:
        """What the folder holds, sorted; nothing where there is no such folder."""
        try:
            names = self.listed[path] = sorted(os.listdir(self._prefix + path))
            return names
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise TopologyError(f"cannot list {self._prefix}{path}: {error.strerror}") from error

    def _parsed(self, path: str, text: str, *, mask: bool) -> frozenset[int]:
        try:
            if not mask and _PAIR.fullmatch(text):
                return frozenset(map(int, text.split(",")))  # The commonest by far, in a third of the time.
            return parse_mask(text) if mask else parse_ids(text)
        except ValueError:
            what = "a mask like ff,00000003" if mask else "a list like 0-3,8"
            raise TopologyError(f"{self._prefix}{path} should be {what}: {text[:60]!r}") from None
