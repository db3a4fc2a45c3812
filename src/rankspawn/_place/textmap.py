"""Draws the plan as text for a terminal: a character for each core, a line for each last-level cache."""

from __future__ import annotations

import string
from collections.abc import Sequence

from .._ids import format_ids
from .devices import locate
from .plan import Placed
from .surroundings import adapters, cache_size
from .sysfs import Tree
from .topology import Cache, Core, Node, Topology
from .visible import Device

# A character for each rank's number.
_DIGITS = string.digits + string.ascii_lowercase + string.ascii_uppercase
_MANY, _NOBODY, _BANNED, _BEYOND = "*", ".", "-", "#"


def text_map(topology: Topology, devices: Sequence[Device], ranks: Sequence[Placed]) -> str:
    """Draw a machine and its ranks as lines of text.

    Args:
        topology: The machine.
        devices: Its accelerators.
        ranks: The ranks; empty to draw the machine alone.

    Returns:
        The lines, with a legend at the end.
    """
    return "\n".join(_Lines(topology, devices, ranks).all()) + "\n"


class _Lines:
    def __init__(self, topology: Topology, devices: Sequence[Device], ranks: Sequence[Placed]) -> None:
        self.topology, self.tree = topology, Tree(topology.root)
        self.devices, self.ranks = devices, ranks
        self.adapters = adapters(self.tree, topology)
        self.users: dict[int, set[int]] = {}
        for number, rank in enumerate(ranks):
            for cpu in rank.binding.cpus or ():
                self.users.setdefault(cpu, set()).add(number)
        self.seen: set[str] = set()

    def all(self) -> list[str]:
        lines = [line for node in self.topology.nodes for line in self.node(node)]
        stray = self.topology.cpus.difference(*(node.cpus for node in self.topology.nodes))
        if stray:
            lines += ["in no node", *self.caches(stray)]
        beside = self.beside(None)
        if beside:
            lines += ["node unknown", *beside]
        return [*lines, *self.legend()]

    def node(self, node: Node) -> list[str]:
        sockets = [socket.id for socket in self.topology.sockets if socket.cpus & node.cpus]
        words = [f"node {node.id}"]
        if sockets:
            words.append(f"socket {format_ids(sockets)}")
        words.append(f"{node.memory / (1 << 30):.0f} GiB" if node.memory else "no memory")
        here = sorted({rank for cpu in node.cpus for rank in self.users.get(cpu, ())})
        if here:
            words.append(_named(here))
        elif not node.cpus:
            words.append("no CPUs")
        return [", ".join(words), *self.caches(node.cpus), *self.beside(node.id)]

    def caches(self, cpus: frozenset[int]) -> list[str]:
        groups = [(self.name(cache), cache.cpus & cpus) for cache in self.topology.caches if cache.cpus & cpus]
        stray = cpus.difference(*(cache.cpus for cache in self.topology.caches))
        if stray:
            groups.append(("", stray))
        rows = []
        for name, part in groups:
            cores = [core for core in self.topology.cores if part.intersection(core.cpus)]
            rows.append(("".join(self.mark(core, part) for core in cores), f"CPUs {format_ids(part)}", name))
        widths = [max(len(row[i]) for row in rows) for i in range(2)] if rows else [0, 0]
        return [f"  {marks.ljust(widths[0])}  {where.ljust(widths[1])}  {name}".rstrip() for marks, where, name in rows]

    def name(self, cache: Cache) -> str:
        return f"L{cache.level} {cache_size(self.tree, cache)}".rstrip()

    def mark(self, core: Core, part: frozenset[int]) -> str:
        cpus = part.intersection(core.cpus)
        users = {rank for cpu in cpus for rank in self.users.get(cpu, ())}
        if not users:
            mark = _NOBODY if cpus & self.topology.allowed_cpus else _BANNED
        elif len(users) > 1:
            mark = _MANY
        else:
            rank = min(users)
            mark = _DIGITS[rank] if rank < len(_DIGITS) else _BEYOND
        self.seen.add(mark)
        return mark

    def beside(self, node: int | None) -> list[str]:
        lines = []
        for number, device in enumerate(self.devices):
            if locate(self.topology, device)[0] == node:
                words = [f"  device {number}: {device.address}", device.name or device.vendor]
                followers = [i for i, rank in enumerate(self.ranks) if rank.device == device]
                lines.append(" ".join(filter(None, words)) + (f", {_named(followers)}" if followers else ""))
        for adapter in self.adapters:
            if adapter.node == node:
                lines.append(f"  {adapter.name} {adapter.link}".rstrip())
        return lines

    def legend(self) -> list[str]:
        texts = {
            _MANY: "several ranks",
            _NOBODY: "no rank",
            _BANNED: "this process may not use it",
            _BEYOND: f"a rank above {len(_DIGITS) - 1}",
        }
        marks = [f"{mark} {text}" for mark, text in texts.items() if mark in self.seen]
        if any(mark in _DIGITS for mark in self.seen):
            last = _DIGITS[min(len(self.ranks), len(_DIGITS)) - 1]
            marks.insert(0, f"{'0' if last == '0' else f'0-{last}'} the number of its rank")
        return ["", "each character is a core: " + ", ".join(marks)] if marks else []


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {format_ids(ranks)}"
