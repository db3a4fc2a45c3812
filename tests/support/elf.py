"""What readelf says of a shared object: how it is hardened, and what it is linked to."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

# A function that an indirect call may reach begins with one of these: endbr64; on aarch64 bti c, or paciasp, which does
# the same.
LANDINGS = {
    "x86_64": (bytes.fromhex("f30f1efa"),),
    "aarch64": (bytes.fromhex("5f2403d5"), bytes.fromhex("3f2303d5")),
}


def readelf(option: str, path: str | Path) -> str:
    return subprocess.run(["readelf", "-W", option, path], capture_output=True, text=True, check=True).stdout


def dynamic(path: str | Path, tag: str) -> list[str]:
    """The values of ``tag`` in the dynamic section: NEEDED, RPATH, ..."""
    return re.findall(rf"\({tag}\).*\[(.*)\]", readelf("-d", path))


def memory_weaknesses(path: str | Path) -> list[str]:
    """The parts of memory that can be written to or executed, and need not be."""
    segments, entries = readelf("-l", path), readelf("-d", path)
    rows = re.findall(r"^ +(\w+) +(?:0x\w+ +){5}([RWE ]{3}) ", segments, re.MULTILINE)
    flags = {kind: flag for kind, flag in rows if kind != "LOAD"}
    found = {
        "no GNU_RELRO": "GNU_RELRO" not in flags,
        "an executable stack": "E" in flags.get("GNU_STACK", "E"),
        "memory that can be written to and executed": any("W" in flag and "E" in flag for _, flag in rows),
        "relocations in code": "TEXTREL" in entries,
    }
    return [what for what, is_so in found.items() if is_so]


def weaknesses(path: str | Path, entry: str) -> list[str]:
    """memory_weaknesses(), and the protections that an object of ours lacks; ``entry`` is one of its functions."""
    found = memory_weaknesses(path)
    if not re.search(r"\(FLAGS\).*\bBIND_NOW\b|\(BIND_NOW\)|\(FLAGS_1\).*\bNOW\b", readelf("-d", path)):
        found.append("symbols are bound when first called")
    symbols = readelf("--dyn-syms", path)
    if not re.search(r"UND +__stack_chk_fail\b", symbols):
        found.append("no stack protector")
    landings = LANDINGS.get(platform.machine())
    at = re.search(rf"([0-9a-f]+) +\d+ FUNC .* {entry}$", symbols, re.MULTILINE)
    assert at, f"{path} has no function {entry}"
    # In the first executable segment of a shared object, a byte's address is its offset in the file.
    if landings and not Path(path).read_bytes()[int(at[1], 16) :].startswith(landings):
        found.append("branches may go anywhere")
    return found
