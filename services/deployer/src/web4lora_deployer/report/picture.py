"""Paints a diagram as a PNG that carries its draw.io XML."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from web4lora_deployer.report.layout import HEADER_HEIGHT, PADDING, Arrow, Box, Diagram, Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DOTS_PER_INCH = 100  # a unit of the layout is a dot of the picture, before scaling
_SCALE = 2
_POINTS = 72 / _DOTS_PER_INCH


def paint(diagram: Diagram, path: Path, xml: str) -> None:
    """Paint a diagram.

    Args:
        diagram: The shapes.
        path: The PNG to write.
        xml: The same diagram for draw.io, which looks for a text chunk "mxfile" ahead of the picture's
            data, with the XML encoded as in a URL.
    """
    # Imported here: it takes a while. The object interface leaves the process's own settings alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL.PngImagePlugin import PngInfo

    figure = Figure(
        figsize=(diagram.width / _DOTS_PER_INCH, diagram.height / _DOTS_PER_INCH), dpi=_SCALE * _DOTS_PER_INCH
    )
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, diagram.width)
    axes.set_ylim(diagram.height, 0)
    axes.axis("off")
    for text in diagram.texts:
        _text(axes, text)
    for arrow in diagram.arrows:
        _arrow(axes, arrow)
    for box in diagram.boxes:
        _box(axes, box)
    info = PngInfo()
    info.add_text("mxfile", quote(xml, safe="-_.!~*'()"))
    figure.savefig(path, format="png", facecolor="white", pil_kwargs={"pnginfo": info})


def _box(axes: Axes, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    style = "round,pad=0,rounding_size=8"
    corner = (box.x, box.y)
    body = FancyBboxPatch(corner, box.width, box.height, boxstyle=style, facecolor="white", edgecolor="none")
    header = Rectangle(corner, box.width, HEADER_HEIGHT, facecolor=box.color, edgecolor="none")
    border = FancyBboxPatch(
        corner,
        box.width,
        box.height,
        boxstyle=style,
        facecolor="none",
        edgecolor=box.color,
        linewidth=1.4,
        linestyle="--" if box.dashed else "-",
    )
    for patch in (body, header, border):
        axes.add_patch(patch)
    header.set_clip_path(body)
    middle = box.y + HEADER_HEIGHT / 2
    axes.text(
        box.x + PADDING, middle, box.title, fontsize=14 * _POINTS, color="white", weight="bold",
        va="center_baseline", family="DejaVu Sans", parse_math=False,
    )  # fmt: skip
    for text in box.texts:
        _text(axes, text)


def _text(axes: Axes, text: Text) -> None:
    x = {"left": text.x, "right": text.x + text.width, "center": text.x + text.width / 2}[text.align]
    for number, line in enumerate(text.lines):
        y = text.y + (number + 0.5) * text.pitch
        axes.text(
            x, y, line, fontsize=text.size * _POINTS, color=text.color, ha=text.align, va="center_baseline",
            weight="bold" if text.bold else "normal", family="DejaVu Sans", parse_math=False,
        )  # fmt: skip


def _arrow(axes: Axes, arrow: Arrow) -> None:
    from matplotlib.patches import FancyArrowPatch, PathPatch
    from matplotlib.path import Path as Outline

    color = "#64748b"
    outline = Outline(*_rounded(arrow.points))
    axes.add_patch(PathPatch(outline, fill=False, edgecolor=color, linewidth=1.6))
    *_, before, last = arrow.points
    head = FancyArrowPatch(
        before, last, arrowstyle="-|>", mutation_scale=12, color=color, linewidth=0, shrinkA=0, shrinkB=0
    )
    axes.add_patch(head)


def _rounded(points: tuple[tuple[float, float], ...]) -> tuple[list[tuple[float, float]], list[int]]:
    """Turn corners into small curves, as draw.io does."""
    from matplotlib.path import Path as Outline

    vertices = [points[0]]
    codes = [int(Outline.MOVETO)]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        vertices += [_towards(corner, before, 8), corner, _towards(corner, after, 8)]
        codes += [int(Outline.LINETO), int(Outline.CURVE3), int(Outline.CURVE3)]
    # The line ends before the arrow's head begins to narrow.
    vertices.append(_towards(points[-1], points[-2], 6))
    codes.append(int(Outline.LINETO))
    return vertices, codes


def _towards(start: tuple[float, float], end: tuple[float, float], distance: float) -> tuple[float, float]:
    length = ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5
    share = min(1.0, distance / length) if length else 0.0
    return (start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]))
