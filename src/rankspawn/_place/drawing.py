"""Draws a machine as SVG: sockets, nodes, last-level caches, cores, devices, and the ranks of a plan.

Boxes are laid out from the inside out. Each box knows its size, and puts its children in rows of a given length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt

from .._binding import Binding
from .._canvas import Canvas, Svg, escaped
from .._ids import format_ids
from .colours import STYLE, colour, shade
from .devices import as_devices, find_devices, locate
from .plan import Placed
from .surroundings import Adapter, adapters, cache_size
from .sysfs import Tree
from .topology import Cache, Node, Topology
from .visible import Device

_PAD, _GAP, _TITLE = 8, 6, 16
_CELL_W, _CELL_H = 26, 15
_CHIP_W, _CHIP_H = 26, 16
_LETTER = 6.6  # pixels of a character, above the average


@dataclass
class _Box:
    """A titled rectangle.

    Attributes:
        kind: Its CSS class; "core", "device", "adapter" and "chip" are drawn in their own way.
        title: The line at its top; "" for none.
        children: The boxes in it.
        columns: How many children are in a row.
        cpus: The hardware threads of a core.
        ranks: The ranks that follow a device, or the one rank of a chip.
        hint: The text that appears when the mouse is over it.
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
        if self.kind == "chip":
            return _CHIP_W, _CHIP_H
        if self.kind in ("device", "adapter"):
            return 7.0 * len(self.title) + 14 + (_CHIP_W + 3) * len(self.ranks), 22
        pad = 0 if self.kind == "plain" else _PAD
        sizes = [[child.size() for child in row] for row in self.rows()]
        gap = self.gap()
        width = max((sum(w for w, _ in row) + gap * (len(row) - 1) for row in sizes), default=0)
        height = sum(max(h for _, h in row) for row in sizes) + gap * max(0, len(sizes) - 1)
        title = _TITLE if self.title else 0
        return max(width, _LETTER * len(self.title)) + 2 * pad, height + 2 * pad + title

    def gap(self) -> float:
        return 3 if self.children and self.children[0].kind == "chip" else _GAP


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
        if box.kind == "chip":
            return self.chip(box.ranks[0], x, y)
        if box.kind in ("device", "adapter"):
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
                at += child.size()[0] + box.gap()
            y += max(child.size()[1] for child in row) + box.gap()

    def core(self, box: _Box, x: float, y: float) -> None:
        """Draw a core: a cell for each of its CPUs, in the colour of the CPU's only rank."""
        for number, cpu in enumerate(box.cpus):
            top = y + number * _CELL_H
            users = self.users.get(cpu, [])
            who = f", rank {format_ids(users)}" if users else ("" if cpu in self.allowed else ", not allowed")
            self.lines.append(f"<g><title>CPU {cpu}{who}{escaped(box.hint)}</title>")
            if len(users) == 1:
                self.fill(x, top, _CELL_W, _CELL_H, colour(users[0]))
                self.text(x + _CELL_W / 2, top + 11, str(cpu), f"cpu {shade(users[0])}")
            else:
                state = "shared" if users else "free" if cpu in self.allowed else "banned"
                self.rect(x, top, _CELL_W, _CELL_H, state)
                self.text(x + _CELL_W / 2, top + 11, str(cpu), "cpu" if cpu in self.allowed else "cpu off")
            self.lines.append("</g>")
        kind = "core small" if box.hint.endswith("efficiency") else "core"
        self.rect(x, y, _CELL_W, _CELL_H * len(box.cpus), kind)

    def chip(self, rank: int, x: float, y: float) -> None:
        """Draw a rank's number on its colour."""
        self.lines.append(f"<g><title>rank {rank}</title>")
        self.fill(x, y, _CHIP_W, _CHIP_H, colour(rank))
        self.text(x + _CHIP_W / 2, y + 12, str(rank), f"chip {shade(rank)}")
        self.lines.append("</g>")

    def device(self, box: _Box, x: float, y: float, w: float, h: float) -> None:
        self.lines.append(f"<g><title>{escaped(box.hint)}</title>")
        self.rect(x, y, w, h, box.kind)
        self.text(x + 7, y + 15, box.title)
        self.lines.append("</g>")
        for number, rank in enumerate(box.ranks):
            self.chip(rank, x + w - (_CHIP_W + 3) * (len(box.ranks) - number), y + 3)


def draw(
    topology: Topology, bindings: Iterable[Binding | None], devices: Sequence[str | Device] | None, distances: bool
) -> Svg:
    """Do what ``Topology.svg`` says."""
    ranks = [Placed(Binding(None) if binding is None else binding) for binding in bindings]
    found = find_devices(topology) if devices is None else as_devices(topology, devices)
    return drawing(topology, found, ranks, distances=distances)


def drawing(
    topology: Topology,
    devices: Sequence[Device],
    ranks: Sequence[Placed],
    *,
    title: str = "",
    distances: bool = False,
) -> Svg:
    """Draw a machine.

    Args:
        topology: The machine.
        devices: Its accelerators. One whose node is unknown is drawn beside the nodes.
        ranks: The ranks, with a legend; empty to draw the machine alone.
        title: The first line of the drawing; "" for none.
        distances: Whether to draw the distances between the NUMA nodes, from the firmware's SLIT.

    Returns:
        The SVG text.
    """
    tree = Tree(topology.root)
    by_node: dict[int | None, list[_Box]] = {}
    for number, device in enumerate(devices):
        by_node.setdefault(locate(topology, device)[0], []).append(_device(number, device, ranks))
    for adapter in adapters(tree, topology):
        by_node.setdefault(adapter.node, []).append(_adapter(adapter))
    artist = _Artist(topology, ranks)
    machine = _Machine(topology, tree, by_node, artist.users).drawn()
    width, height = machine.size()
    top = float(_PAD)
    if title:
        artist.text(_PAD, top + 12, title, "title")
        top += 24
    artist.box(machine, _PAD, top)
    width, height = max(width, 8.0 * len(title)) + 2 * _PAD, top + height + _GAP
    width, height = _legend(artist, topology, ranks, width, height)
    if distances:
        width, height = _distances(artist, topology, width, height)
    return artist.document(width, height, STYLE)


def _device(number: int, device: Device, ranks: Sequence[Placed]) -> _Box:
    followers = tuple(i for i, rank in enumerate(ranks) if rank.device == device)
    name = device.name.removeprefix("NVIDIA ").removeprefix("AMD ")
    hint = f"{device.vendor} {device.name} {device.uuid}".strip() or device.address
    return _Box("device", f"{number}: {device.address}" + (f" {name}" if name else ""), ranks=followers, hint=hint)


def _adapter(adapter: Adapter) -> _Box:
    kind = {"Ethernet": "RoCE", "": "RDMA"}.get(adapter.link, adapter.link)
    return _Box("adapter", f"{adapter.name} {kind}", hint=f"network adapter {adapter.name}, {kind}")


def _legend(
    artist: _Artist, topology: Topology, ranks: Sequence[Placed], width: float, y: float
) -> tuple[float, float]:
    """Draw the legend: what each rank has, and what the frames mean."""
    for index, rank in enumerate(ranks):
        artist.chip(index, _PAD, y)
        text = f"rank {index}: {rank.binding}" + (f", follows {rank.device.address}" if rank.device else "")
        artist.text(_PAD + _CHIP_W + 6, y + 12, text)
        width = max(width, 2 * _PAD + _CHIP_W + 6 + _LETTER * len(text))
        y += _CHIP_H + 3
    y += _GAP
    marks = [("core", "core: a cell for each of its CPUs")]
    if any(core.kind == "efficiency" for core in topology.cores):
        marks.append(("core small", "efficiency core"))
    if any(len(users) > 1 for users in artist.users.values()):
        marks.append(("shared", "CPU of several ranks, which the node names"))
    if not topology.allowed_cpus >= topology.cpus:
        marks.append(("banned", "CPU that this process may not use"))
    for kind, text in marks:
        artist.rect(_PAD, y, _CHIP_W, _CHIP_H - 2, kind)
        artist.text(_PAD + _CHIP_W + 6, y + 11, text, "note")
        width = max(width, 2 * _PAD + _CHIP_W + 6 + _LETTER * len(text))
        y += _CHIP_H + 3
    return width, y + _PAD


def _distances(artist: _Artist, topology: Topology, width: float, y: float) -> tuple[float, float]:
    """Draw the table of distances from each node (row) to each node (column)."""
    nodes = topology.nodes
    artist.text(_PAD, y + 10, "distance between nodes (10 is the node itself)")
    step = 34.0
    for column, node in enumerate(nodes):
        artist.text(_PAD + 60 + column * step, y + 28, f"{node.id}", "note")
    for row, node in enumerate(nodes):
        artist.text(_PAD, y + 44 + row * 16, f"node {node.id}", "note")
        for column, other in enumerate(nodes):
            artist.text(_PAD + 60 + column * step, y + 44 + row * 16, str(node.distance(other.id)))
    return max(width, 2 * _PAD + 60 + step * len(nodes)), y + 44 + 16 * len(nodes) + _PAD


class _Machine:
    """Makes the boxes of a machine.

    Args:
        topology: The machine.
        tree: Its files.
        devices: The boxes of its devices, by their node.
        users: The ranks that have each CPU.
    """

    def __init__(
        self, topology: Topology, tree: Tree, devices: dict[int | None, list[_Box]], users: dict[int, list[int]]
    ) -> None:
        self.topology, self.tree, self.devices, self.users = topology, tree, devices, users

    def drawn(self) -> _Box:
        tops = self.tops()
        if None in self.devices:
            tops.append(_Box("memory", "node unknown", [_Box("plain", "", self.devices[None], 4)]))
        memory = [box for box in tops if box.kind == "memory"]
        tops = [box for box in tops if box.kind != "memory"]
        machine = _Box("plain", "", [_Box("plain", "", tops, 1 if len(tops) < 3 else _columns(len(tops)))])
        if memory:
            machine.children.append(_Box("plain", "", memory, 4))
        return machine

    def tops(self) -> list[_Box]:
        """Make the outermost boxes: nodes that span sockets; sockets with their nodes; nodes of memory only."""
        topology, tops = self.topology, []
        done: set[int] = set()
        for node in topology.nodes_with_cpus():
            inside = [socket for socket in topology.sockets if socket.cpus & node.cpus]
            if len(inside) > 1:
                boxes = [_Box("socket", f"socket {one.id}", [self.cores(one.cpus & node.cpus)]) for one in inside]
                tops.append(self.node(node, [_Box("plain", "", boxes, _columns(len(boxes)))]))
                done.update(node.cpus)
        for socket in topology.sockets:
            nodes = [node for node in topology.nodes_with_cpus() if node.cpus <= socket.cpus and not node.cpus & done]
            boxes = [self.node(node, [self.cores(node.cpus)]) for node in nodes]
            stray = socket.cpus.difference(done, *(node.cpus for node in topology.nodes))
            if stray:
                boxes.append(_Box("memory", "in no node", [self.cores(stray)]))
            if boxes:
                tops.append(_Box("socket", f"socket {socket.id}", boxes, 2 if len(boxes) > 1 else 1))
        return tops + [self.node(node, []) for node in topology.nodes if not node.cpus]

    def node(self, node: Node, children: list[_Box]) -> _Box:
        gib = node.memory / (1 << 30)
        memory = f"{gib:.{0 if gib >= 10 else 1}f} GiB" if gib else "no memory"
        here = self.devices.get(node.id, [])
        ranks = sorted({rank for cpu in node.cpus for rank in self.users.get(cpu, ())})
        chips = [_Box("plain", "", [_Box("chip", ranks=(rank,)) for rank in ranks], 16)] if ranks else []
        room = max((box.size()[0] for box in children), default=600.0)
        columns = max(1, int(room // max((box.size()[0] + _GAP for box in here), default=room)))
        rows = [*chips, *children, *([_Box("plain", "", here, columns)] if here else [])]
        title = f"node {node.id}, {memory}" + ("" if node.cpus else ", no CPUs")
        return _Box("node" if node.cpus else "memory", title, rows)

    def cores(self, cpus: frozenset[int]) -> _Box:
        """Make a box of the cores among ``cpus``, in boxes of their caches."""
        caches = self.topology.caches
        groups: list[tuple[Cache | None, frozenset[int]]] = [(one, one.cpus & cpus) for one in caches]
        groups.append((None, cpus.difference(*(one.cpus for one in caches))))
        boxes = []
        for cache, part in groups:
            cores = list(_core_boxes(self.topology, part))
            if cores:
                columns = min(len(cores), 8 if len(cores) <= 32 else 16)
                boxes.append(_Box("cache" if cache else "plain", self.cache_title(cache, columns), cores, columns))
        lone = all(len(box.children) == 1 for box in boxes)
        return _Box("plain", "", boxes, 8 if lone else _columns(len(boxes)))

    def cache_title(self, cache: Cache | None, columns: int) -> str:
        """Name a cache, with its size if the cores below it leave room for that."""
        if cache is None:
            return ""
        size = cache_size(self.tree, cache)
        return f"L{cache.level} {size}" if size and columns > 2 else f"L{cache.level}"


def _core_boxes(topology: Topology, cpus: frozenset[int]) -> Iterable[_Box]:
    for core in topology.cores:
        mine = tuple(cpu for cpu in core.cpus if cpu in cpus)
        if mine:
            yield _Box("core", cpus=mine, hint=f", {core.kind}" if core.kind else "")


def _columns(count: int) -> int:
    """Choose how many boxes a row has: close to a square and, if possible, without a gap in the last row."""
    side = max(1, ceil(sqrt(count)))
    return next((columns for columns in range(side, 2 * side) if count % columns == 0), side)
