"""A machine drawn as SVG: sockets, nodes, last-level caches, cores and devices, each rank's cores in its colour.

Boxes are laid out from the inside out: each knows its size, and puts its children in rows of a given length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass, field
from math import ceil, sqrt

from .._canvas import Canvas, escaped
from .._ids import format_ids
from .devices import locate
from .plan import Placed
from .topology import Cache, Node, Topology
from .visible import Device

_PAD, _GAP, _TITLE = 8, 6, 16
_CELL_W, _CELL_H = 26, 15
_STYLE = """
text { font: 11px system-ui, sans-serif; fill: #1d2733 }
.cpu { font-size: 9px; text-anchor: middle } .off { fill: #9aa5b1 }
.socket { fill: #f2f4f7; stroke: #8a97a6 } .node { fill: #ffffff; stroke: #5b7fa6 }
.memory { fill: #fbf7ec; stroke: #b59b4c } .cache { fill: #f7f9fb; stroke: #c3ccd6 }
.device { fill: #ffffff; stroke: #4a5562; stroke-width: 1.5 } .core { fill: none; stroke: #5d6a79 }
.small { stroke-dasharray: 2 1.5 } .plain { fill: none; stroke: none }
"""


@dataclass
class _Box:
    """A titled rectangle.

    Attributes:
        kind: Its CSS class; "core" and "device" have a way of their own to be drawn.
        title: The line at its top; "" for none.
        children: The boxes in it.
        columns: How many children are in a row.
        cpus: The hardware threads of a core.
        ranks: The ranks that follow a device.
        hint: What is shown when the mouse is over it.
    """

    kind: str
    title: str = ""
    children: list[_Box] = field(default_factory=list)
    columns: int = 1
    cpus: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    hint: str = ""

    def rows(self) -> list[list[_Box]]:
        return [self.children[i : i + self.columns] for i in range(0, len(self.children), self.columns)]

    def size(self) -> tuple[float, float]:
        if self.kind == "core":
            return _CELL_W, _CELL_H * len(self.cpus)
        if self.kind == "device":
            return 7.0 * len(self.title) + 14, 22
        pad = 0 if self.kind == "plain" else _PAD
        sizes = [[child.size() for child in row] for row in self.rows()]
        width = max((sum(w for w, _ in row) + _GAP * (len(row) - 1) for row in sizes), default=0)
        height = sum(max(h for _, h in row) for row in sizes) + _GAP * max(0, len(sizes) - 1)
        title = _TITLE if self.title else 0
        return max(width, 6.6 * len(self.title)) + 2 * pad, height + 2 * pad + title


class _Artist(Canvas):
    """Draws boxes; it knows which ranks may use which CPU."""

    def __init__(self, topology: Topology, ranks: Sequence[Placed]) -> None:
        super().__init__()
        self.allowed = topology.allowed_cpus
        self.users: dict[int, list[int]] = {}
        for index, rank in enumerate(ranks):
            for cpu in rank.binding.cpus or ():
                self.users.setdefault(cpu, []).append(index)

    def box(self, box: _Box, x: float, y: float) -> None:
        w, h = box.size()
        if box.kind == "core":
            return self.core(box, x, y)
        if box.kind == "device":
            return self.device(box, x, y, w, h)
        pad = 0 if box.kind == "plain" else _PAD
        if box.kind != "plain":
            self.rect(x, y, w, h, box.kind)
        if box.title:
            self.text(x + pad, y + pad + 10, box.title)
        y += pad + (_TITLE if box.title else 0)
        for row in box.rows():
            at = x + pad
            for child in row:
                self.box(child, at, y)
                at += child.size()[0] + _GAP
            y += max(child.size()[1] for child in row) + _GAP

    def core(self, box: _Box, x: float, y: float) -> None:
        for number, cpu in enumerate(box.cpus):
            top = y + number * _CELL_H
            users = self.users.get(cpu, [])
            who = f", rank {format_ids(users)}" if users else ("" if cpu in self.allowed else ", not allowed")
            self.lines.append(f"<g><title>CPU {cpu}{who}{escaped(box.hint)}</title>")
            fill = "#ffffff" if cpu in self.allowed else "#e4e8ec"
            self.fill(x, top, _CELL_W, _CELL_H, fill)
            for i, rank in enumerate(users[:6]):  # More than six stripes look alike; the title names all ranks.
                part = _CELL_W / len(users[:6])
                self.fill(x + i * part, top, part, _CELL_H, _colour(rank))
            self.text(x + _CELL_W / 2, top + 11, str(cpu), "cpu" if cpu in self.allowed else "cpu off")
            self.lines.append("</g>")
        kind = "core small" if box.hint.endswith("efficiency") else "core"
        self.rect(x, y, _CELL_W, _CELL_H * len(box.cpus), kind)

    def device(self, box: _Box, x: float, y: float, w: float, h: float) -> None:
        self.lines.append(f"<g><title>{escaped(box.hint)}</title>")
        self.rect(x, y, w, h, "device")
        for i, rank in enumerate(box.ranks):
            part = w / len(box.ranks)
            self.fill(x + 1 + i * part, y + h - 6, part - 2, 5, _colour(rank))
        self.text(x + 7, y + 13, box.title)
        self.lines.append("</g>")


def drawing(topology: Topology, devices: Sequence[Device], ranks: Sequence[Placed]) -> str:
    """Draw a machine.

    Args:
        topology: The machine.
        devices: Its accelerators; those whose node is unknown are drawn beside the nodes.
        ranks: The ranks, which a legend names; empty to draw the machine alone.

    Returns:
        The SVG text.
    """
    by_node: dict[int | None, list[_Box]] = {}
    for number, device in enumerate(devices):
        followers = tuple(i for i, rank in enumerate(ranks) if rank.device == device)
        hint = f"{device.vendor} {device.name} {device.uuid}".strip() or device.address
        box = _Box("device", f"{number}: {device.address}", ranks=followers, hint=hint)
        by_node.setdefault(locate(topology, device)[0], []).append(box)
    tops = _tops(topology, by_node)
    if None in by_node:
        tops.append(_Box("memory", "node unknown", [_Box("plain", "", by_node[None], 4)]))
    memory = [box for box in tops if box.kind == "memory"]
    tops = [box for box in tops if box.kind != "memory"]
    machine = _Box("plain", "", [_Box("plain", "", tops, 1 if len(tops) < 3 else _columns(len(tops)))])
    if memory:
        machine.children.append(_Box("plain", "", memory, 4))
    artist = _Artist(topology, ranks)
    width, height = machine.size()
    artist.box(machine, _PAD, _PAD)
    width, height = _legend(artist, ranks, width + 2 * _PAD, height + 2 * _PAD + _GAP)
    return artist.document(width, height, _STYLE)


def _legend(artist: _Artist, ranks: Sequence[Placed], width: float, y: float) -> tuple[float, float]:
    for index, rank in enumerate(ranks):
        artist.fill(_PAD, y, 14, 12, _colour(index))
        artist.rect(_PAD, y, 14, 12, "core")
        text = f"rank {index}: {rank.binding}" + (f", follows {rank.device.address}" if rank.device else "")
        artist.text(_PAD + 20, y + 10, text)
        width = max(width, _PAD + 28 + 6.2 * len(text))
        y += 17
    return width, y + _PAD


def _tops(topology: Topology, devices: dict[int | None, list[_Box]]) -> list[_Box]:
    """Make the outermost boxes: nodes that span sockets, with those; sockets with their nodes; nodes of memory only."""
    tops = []
    done: set[int] = set()
    for node in topology.nodes_with_cpus():
        inside = [socket for socket in topology.sockets if socket.cpus & node.cpus]
        if len(inside) > 1:
            boxes = [_Box("socket", f"socket {one.id}", [_cores(topology, one.cpus & node.cpus)]) for one in inside]
            tops.append(_node(node, [_Box("plain", "", boxes, _columns(len(boxes)))], devices))
            done.update(node.cpus)
    for socket in topology.sockets:
        nodes = [node for node in topology.nodes_with_cpus() if node.cpus <= socket.cpus and not node.cpus & done]
        boxes = [_node(node, [_cores(topology, node.cpus)], devices) for node in nodes]
        stray = socket.cpus.difference(done, *(node.cpus for node in topology.nodes))
        if stray:
            boxes.append(_Box("memory", "in no node", [_cores(topology, stray)]))
        if boxes:
            tops.append(_Box("socket", f"socket {socket.id}", boxes, 2 if len(boxes) > 1 else 1))
    return tops + [_node(node, [], devices) for node in topology.nodes if not node.cpus]


def _node(node: Node, children: list[_Box], devices: dict[int | None, list[_Box]]) -> _Box:
    gib = node.memory / (1 << 30)
    memory = f"{gib:.{0 if gib >= 10 else 1}f} GiB" if gib else "no memory"
    here = devices.get(node.id, [])
    rows = [*children, _Box("plain", "", here, 4)] if here else children
    title = f"node {node.id}, {memory}" + ("" if node.cpus else ", no CPUs")
    return _Box("node" if node.cpus else "memory", title, rows)


def _cores(topology: Topology, cpus: frozenset[int]) -> _Box:
    """Make a box of the cores among ``cpus``, in boxes of their caches."""
    groups: list[tuple[Cache | None, frozenset[int]]] = [(one, one.cpus & cpus) for one in topology.caches]
    groups.append((None, cpus.difference(*(one.cpus for one in topology.caches))))
    boxes = []
    for cache, part in groups:
        cores = list(_core_boxes(topology, part))
        if cores:
            columns = min(len(cores), 8 if len(cores) <= 32 else 16)
            title = f"L{cache.level}" if cache else ""
            boxes.append(_Box("cache" if cache else "plain", title, cores, columns))
    lone = all(len(box.children) == 1 for box in boxes)
    return _Box("plain", "", boxes, 8 if lone else _columns(len(boxes)))


def _core_boxes(topology: Topology, cpus: frozenset[int]) -> Iterable[_Box]:
    for core in topology.cores:
        mine = tuple(cpu for cpu in core.cpus if cpu in cpus)
        if mine:
            yield _Box("core", cpus=mine, hint=f", {core.kind}" if core.kind else "")


def _colour(rank: int) -> str:
    """Choose a light colour for a rank; neighbours are far apart on the wheel, and each round has its own lightness.

    The colour is in hexadecimal digits, because not every program that draws SVG knows CSS's hsl().
    """
    hue = rank * 137.508 % 360 / 360  # the golden angle
    parts = hls_to_rgb(hue, (0.70, 0.82, 0.60)[rank // 9 % 3], 0.72)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def _columns(count: int) -> int:
    """Choose how many boxes are in a row: near a square and without a gap in the last row, where there is such."""
    side = max(1, ceil(sqrt(count)))
    return next((columns for columns in range(side, 2 * side) if count % columns == 0), side)
