"""The colours of ranks, and the style of a drawing in light and dark mode.

The eight colours are Okabe and Ito's, which people with every common kind of colour blindness can tell apart. Each
further round of eight is lighter, then darker. A rank's number is always written beside its colour.
"""

from __future__ import annotations

_COLOURS = ("e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7", "9a9a9a")
# How far each round of eight goes towards white (above 0) or black (below 0).
_ROUNDS = (0.0, 0.5, -0.35)

STYLE = """
text { font: 11px system-ui, sans-serif; fill: #1d2733 }
.title { font-size: 13px; font-weight: 600 } .note { fill: #5d6a79 }
.cpu { font-size: 9px; text-anchor: middle } .off { fill: #8d99a6 }
.chip { font-weight: 700; text-anchor: middle }
.dark { fill: #14181d } .light { fill: #ffffff }
.socket { fill: #f2f4f7; stroke: #8a97a6 } .node { fill: #ffffff; stroke: #5b7fa6 }
.memory { fill: #fbf7ec; stroke: #b59b4c } .cache { fill: #f7f9fb; stroke: #c3ccd6 }
.device { fill: #ffffff; stroke: #4a5562; stroke-width: 1.5 }
.adapter { fill: #ffffff; stroke: #4a5562; stroke-dasharray: 4 2 }
.free { fill: #ffffff } .shared { fill: #dbe3ec } .banned { fill: #e4e8ec } .core { fill: none; stroke: #5d6a79 }
.small { stroke-dasharray: 2 1.5 } .plain { fill: none; stroke: none }
@media (prefers-color-scheme: dark) {
.paper { fill: #14181d } text { fill: #e3e8ee } .note { fill: #97a3b0 } .off { fill: #6d7885 }
.dark { fill: #14181d } .light { fill: #ffffff }
.socket { fill: #1b2027; stroke: #5d6a79 } .node { fill: #14181d; stroke: #6f94bd }
.memory { fill: #221f14; stroke: #97834a } .cache { fill: #1b2027; stroke: #3d4854 }
.device, .adapter { fill: #14181d; stroke: #97a3b0 }
.free { fill: #14181d } .shared { fill: #35424f } .banned { fill: #262d35 } .core { stroke: #7d8997 }
}
"""


def colour(rank: int) -> str:
    """Choose a rank's colour, in hexadecimal because not every program that draws SVG knows CSS's colour names."""
    return "#" + "".join(f"{part:02x}" for part in _parts(rank))


def shade(rank: int) -> str:
    """Choose the class of the text on a rank's colour: "dark" or "light", whichever is easier to read (WCAG 2)."""
    red, green, blue = (_linear(part / 255) for part in _parts(rank))
    return "dark" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "light"


def _parts(rank: int) -> tuple[int, int, int]:
    digits = _COLOURS[rank % len(_COLOURS)]
    towards = _ROUNDS[rank // len(_COLOURS) % len(_ROUNDS)]
    goal = 255 if towards > 0 else 0
    red, green, blue = (round(part + (goal - part) * abs(towards)) for part in bytes.fromhex(digits))
    return red, green, blue


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
