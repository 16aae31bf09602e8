"""A small pen for diagrams: boxes, arrows, words and images, as vector graphics in one style.

A drawing is an SVG image with its own background, light or dark as the reader's system is. Its
units are CSS pixels; 864 of them are the width of a page. Text is 15 pixels, which is 11 points.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

from IPython.display import HTML, display
from torch import Tensor

from .plotting import image_tag, png

TEXT = 15  # pixels
STYLE = """
text { font: 15px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: #1b1f24 }
.page { fill: #ffffff }
.bold { font-weight: 700 }
.line { stroke: #1b1f24; stroke-width: 1.6; fill: none }
.head { fill: #1b1f24 }
.dashed { stroke-dasharray: 5 4 }
.data { fill: #f3f4f6; stroke: #8c959f }
.network { fill: #d6e8f6; stroke: #0072b2 }
.loss { fill: #fbe3d3; stroke: #d55e00 }
.text { fill: #d9f0e7; stroke: #009e73 }
.frame { fill: none; stroke: #8c959f }
.badge { fill: #1b1f24 }
.number { fill: #ffffff; font-weight: 700 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e8eb }
  .page { fill: #16181d }
  .line { stroke: #e6e8eb }
  .head, .badge { fill: #e6e8eb }
  .data { fill: #2a2e36; stroke: #8c959f }
  .network { fill: #123c5a; stroke: #56b4e9 }
  .loss { fill: #5a2f12; stroke: #e69f00 }
  .text { fill: #0d4736; stroke: #34c79a }
  .number { fill: #16181d }
}
"""


class Drawing:
    """Collects shapes; `show` displays them. Faint shapes are there, but not what it is about."""

    def __init__(self, width: int, height: int):
        self.width = width
        self.height = height
        self.shapes: list[str] = []

    def _add(self, shape: str, faint: bool) -> None:
        self.shapes.append(f'<g opacity="0.3">{shape}</g>' if faint else shape)

    def words(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "middle",
        kind: str = "",
        faint: bool = False,
    ) -> None:
        """Lines of text around the height y. a_b and a^{bc} put letters low and high."""
        lines = text.split("\n")
        top = y - (len(lines) - 1) * 0.6 * TEXT
        for i, line in enumerate(lines):
            height = top + i * 1.2 * TEXT + 0.34 * TEXT
            self._add(
                f'<text x="{x:g}" y="{height:g}" text-anchor="{anchor}" class="{kind}">'
                f"{_low_and_high(line)}</text>",
                faint,
            )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        kind: str = "data",
        *,
        corner: int = 8,
        faint: bool = False,
    ) -> None:
        """A box around the point (x, y). kind: data, network, text or loss."""
        place = (
            f'x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}"'
        )
        self._add(f'<rect {place} rx="{corner}" class="{kind}" stroke-width="1.6"/>', faint)
        if text:
            self.words(x, y, text, faint=faint)

    def arrow(
        self,
        points: Sequence[tuple[float, float]],
        *,
        dashed: bool = False,
        head: bool = True,
        faint: bool = False,
    ) -> None:
        """A line through the points, with a head at the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        kind = "line dashed" if dashed else "line"
        self._add(f'<polyline points="{path}" class="{kind}"/>', faint)
        if head:
            (x0, y0), (x1, y1) = points[-2:]
            length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
            u, v = (x1 - x0) / length, (y1 - y0) / length
            left = f"{x1 - 10 * u - 5 * v:g},{y1 - 10 * v + 5 * u:g}"
            right = f"{x1 - 10 * u + 5 * v:g},{y1 - 10 * v - 5 * u:g}"
            self._add(f'<polygon points="{x1:g},{y1:g} {left} {right}" class="head"/>', faint)

    def line(self, start: tuple[float, float], end: tuple[float, float], width: float) -> None:
        """A straight line, `width` pixels thick."""
        (x1, y1), (x2, y2) = start, end
        ends = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
        self._add(f'<line {ends} class="line" style="stroke-width: {width:g}"/>', False)

    def image(self, x: float, y: float, side: float, image: Tensor, *, faint: bool = False) -> None:
        """(3, H, W) in [-1, 1], around the point (x, y), `side` pixels high."""
        data = base64.b64encode(png(image, 1)).decode()
        width = side * image.shape[-1] / image.shape[-2]
        corner = f'x="{x - width / 2:g}" y="{y - side / 2:g}" width="{width:g}" height="{side:g}"'
        self._add(
            f'<image {corner} style="image-rendering: pixelated" '
            f'href="data:image/png;base64,{data}"/><rect {corner} class="frame"/>',
            faint,
        )

    def circle(
        self,
        x: float,
        y: float,
        radius: float,
        text: str = "",
        kind: str = "data",
        *,
        faint: bool = False,
    ) -> None:
        self._add(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{kind}"/>', faint)
        if text:
            self.words(x, y, text, kind="number" if kind == "badge" else "", faint=faint)

    def svg(self) -> str:
        size = f'width="{self.width}" height="{self.height}"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'{size}><style>{STYLE}</style><rect {size} rx="10" class="page"/>'
            f"{''.join(self.shapes)}</svg>"
        )

    def show(self, alt: str) -> None:
        """Display the drawing. alt: what it shows, in words, for a screen reader."""
        display(HTML(image_tag(self.svg().encode(), alt, self.width, kind="svg+xml")))


def _low_and_high(line: str) -> str:
    """Marks like z_t and x^2 as SVG: the letter in small, lower or higher."""

    def mark(match: re.Match) -> str:
        shift = 4 if match[1] == "_" else -6
        letters = html.escape(match[2].strip("{}"))
        return (
            f'<tspan dy="{shift}" style="font-size: 12px">{letters}</tspan>'
            f'<tspan dy="{-shift}">&#8203;</tspan>'
        )

    parts = re.split(r"([_^](?:\{[^}]*\}|\w))", line)
    return "".join(
        re.sub(r"^([_^])(.+)$", mark, part) if i % 2 else html.escape(part)
        for i, part in enumerate(parts)
    )
