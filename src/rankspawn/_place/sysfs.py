"""Reads files below a sysfs root, each once, as text, number, list or mask. Errors name the file."""

from __future__ import annotations

import os
import re

from .._binding import PlacementError
from .._ids import parse_ids, parse_mask
from .._public import public

_PAIR = re.compile(r"[0-9]{1,6}(?:,[0-9]{1,6})?")  # the hardware threads of a core, on most machines


@public
class TopologyError(PlacementError):
    """A file below the sysfs root cannot be read, or has unexpected content."""


class Tree:
    """Reads files below a root; all paths are relative to it.

    Args:
        root: The folder that has sys/ and proc/ in it.

    Attributes:
        opened: The text of each file that was read, by path.
        listed: The names in each folder that was listed, by path.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.fspath(root)
        self.opened: dict[str, str] = {}
        self.listed: dict[str, list[str]] = {}
        self._prefix = self.root.rstrip("/") + "/"

    def text(self, path: str) -> str | None:
        """Read a file, once, and strip blanks and NUL bytes from both ends. None if there is no such file.

        Raises:
            TopologyError: The file cannot be read.
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
            # A short read of a sysfs file is the whole file. Only long files of proc come in pieces.
            while len(data) >= 4096 and (more := os.read(fd, 65536)):
                data += more
        except OSError as error:
            raise TopologyError(f"cannot read {self._prefix}{path}: {error.strerror}") from error
        finally:
            os.close(fd)
        text = self.opened[path] = data.decode("ascii", "replace").strip(" \t\n\0")
        return text

    def ids(self, path: str) -> frozenset[int] | None:
        """Read a list such as "0-3,8"; None if there is no such file."""
        text = self.text(path)
        return None if text is None else self._parsed(path, text, mask=False)

    def first_ids(self, folder: str, names: tuple[str, ...], of: int | None = None) -> frozenset[int] | None:
        """Read the first existing file of several: as a list if its name ends in "list", else as a mask.

        Args:
            folder: The folder of the files.
            names: The files' names, in the order in which they are tried.
            of: An id that must be in the file, as a CPU is among its own siblings. A file without it is skipped,
                because lists and masks disagree in some trees made by hand.

        Returns:
            The ids; None if none of the files exists.

        Raises:
            TopologyError: Every existing file lacks ``of``, or is malformed.
        """
        wrong = ""
        for name in names:
            text = self.text(f"{folder}/{name}")
            if text is not None:
                ids = self._parsed(f"{folder}/{name}", text, mask=not name.endswith("list"))
                if of is None or of in ids:
                    return ids
                wrong = wrong or f"{self._prefix}{folder}/{name}: expected {of} among its ids, got {text[:60]!r}"
        if wrong:
            raise TopologyError(wrong)
        return None

    def number(self, path: str) -> int | None:
        """Read the integer in a file; None if there is no such file."""
        text = self.text(path)
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            raise TopologyError(f"{self._prefix}{path}: expected a number, got {text[:60]!r}") from None

    def names(self, path: str) -> list[str]:
        """List a folder, sorted; empty if there is no such folder."""
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
                return frozenset(map(int, text.split(",")))  # By far the most common list, in a third of the time.
            return parse_mask(text) if mask else parse_ids(text)
        except ValueError:
            what = "a mask like ff,00000003" if mask else "a list like 0-3,8"
            raise TopologyError(f"{self._prefix}{path}: expected {what}, got {text[:60]!r}") from None
