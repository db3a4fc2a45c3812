"""The elements of a drawing in SVG."""

from __future__ import annotations


class Svg(str):
    """A drawing: the text of an SVG file, which a notebook shows as a picture."""

    __slots__ = ()

    def _repr_svg_(self) -> str:
        return str(self)


class Canvas:
    """Collects the elements of a drawing, a line each. Positions and sizes are in pixels; ``kind`` is a CSS class.

    Attributes:
        lines: The elements so far, in the order in which they are painted.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []

    def rect(self, x: float, y: float, w: float, h: float, kind: str) -> None:
        self.lines.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="2"/>')

    def fill(self, x: float, y: float, w: float, h: float, colour: str) -> None:
        self.lines.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{colour}"/>')

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        attribute = f' class="{kind}"' if kind else ""
        self.lines.append(f'<text{attribute} x="{x:.1f}" y="{y:.1f}">{escaped(text)}</text>')

    def document(self, width: float, height: float, style: str) -> Svg:
        """Return the whole SVG text; ``style`` is the CSS of the classes."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
            f' viewBox="0 0 {width:.0f} {height:.0f}"><style>{style}</style>'
            f'<rect class="paper" width="100%" height="100%" fill="#ffffff"/>'
        )
        return Svg("\n".join([head, *self.lines, "</svg>", ""]))


def escaped(text: str) -> str:
    """Return ``text`` as the content of an XML element."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
