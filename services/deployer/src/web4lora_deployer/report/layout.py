"""The pipeline's picture as shapes with places: what `drawio` writes as XML and `picture` paints.

Both see the same shapes, so the picture and the diagram inside it can't differ. Lengths are in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

BOX_WIDTH = 258
GAP_X = 52
GAP_Y = 56
MARGIN = 32
HEADER_HEIGHT = 30
TOP = 96
HEADLINE_SIZE = 17
ROW_SIZE = 12
ROW_PITCH = 20
PADDING = 12


@dataclass(frozen=True)
class Text:
    """Lines of text in a rectangle, at a fixed distance from each other.

    Attributes:
        id: Unique in the diagram.
        x: Left edge of the rectangle.
        y: Upper edge.
        width: Of the rectangle.
        lines: The text; each fits the width.
        size: Of the letters.
        color: Of the letters.
        bold: Whether they are bold.
        align: "left", "right" or "center".
        pitch: From line to line.
    """

    id: str
    x: float
    y: float
    width: float
    lines: tuple[str, ...]
    size: float = ROW_SIZE
    color: str = "#334155"
    bold: bool = False
    align: str = "left"
    pitch: float = ROW_PITCH


@dataclass(frozen=True)
class Box:
    """A stage: a coloured header with its name, and a body.

    Attributes:
        id: Unique in the diagram.
        x: Left edge.
        y: Upper edge.
        width: Of the box.
        height: Of the box.
        title: In the header.
        color: Of header and border.
        texts: What lies inside; their places are the page's, not the box's.
        dashed: Whether the border is dashed: nothing is known of this stage.
    """

    id: str
    x: float
    y: float
    width: float
    height: float
    title: str
    color: str
    texts: tuple[Text, ...]
    dashed: bool = False


@dataclass(frozen=True)
class Arrow:
    """From a point on a box's border to another's, in straight lines.

    Attributes:
        id: Unique in the diagram.
        source: Id of the box it leaves.
        target: Id of the box it enters.
        exit: Where it leaves, as shares of the box's width and height.
        entry: Where it enters, likewise.
        points: All corners, both ends included.
    """

    id: str
    source: str
    target: str
    exit: tuple[float, float]
    entry: tuple[float, float]
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Diagram:
    """A page of shapes."""

    title: str
    width: float
    height: float
    texts: tuple[Text, ...]
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


@dataclass(frozen=True)
class Stage:
    """What a box tells: the time in its header, one figure in large letters, then names and values."""

    id: str
    title: str
    color: str
    time: str = ""
    headline: str = ""
    rows: tuple[tuple[str, str], ...] = ()


def place(stage: Stage, column: int, y: float, height: float) -> Box:
    """Lay a stage out as a box with its texts, each shortened to the room there is."""
    x = MARGIN + column * (BOX_WIDTH + GAP_X)
    inner, left = BOX_WIDTH - 2 * PADDING, x + PADDING
    texts: list[Text] = []
    if stage.time:
        place_of_time = (x + BOX_WIDTH - PADDING - 124, y + (HEADER_HEIGHT - ROW_PITCH) / 2, 124)
        texts.append(Text(f"{stage.id}-time", *place_of_time, (stage.time,), color="#ffffff", align="right"))
    top = y + HEADER_HEIGHT + 9
    if stage.headline:
        headline = fit(stage.headline, inner, HEADLINE_SIZE, bold=True)
        texts.append(
            Text(
                f"{stage.id}-headline",
                left,
                top,
                inner,
                (headline,),
                HEADLINE_SIZE,
                "#0f172a",
                True,
                pitch=24,
            )
        )
        top += 30
    if stage.rows:
        values = [fit(value, inner * 0.7, ROW_SIZE) for _, value in stage.rows]
        pairs = zip(stage.rows, values, strict=True)
        names = [
            fit(name, inner - _width(value, ROW_SIZE, False) - 8, ROW_SIZE) for (name, _), value in pairs
        ]
        texts.append(Text(f"{stage.id}-names", left, top, inner, tuple(names), color="#64748b"))
        texts.append(Text(f"{stage.id}-values", left, top, inner, tuple(values), align="right"))
    if not stage.headline and not stage.rows:
        texts.append(
            Text(f"{stage.id}-none", left, top, inner, ("no figures of this step",), color="#94a3b8")
        )
    empty = not stage.headline and not stage.rows
    return Box(stage.id, x, y, BOX_WIDTH, height, stage.title, stage.color, tuple(texts), empty)


def height_of(stages: list[Stage]) -> float:
    """Return the height that the fullest of some boxes needs."""
    rows = max(len(stage.rows) for stage in stages)
    headline = 30 if any(stage.headline for stage in stages) else 0
    return HEADER_HEIGHT + 9 + headline + max(rows, 1) * ROW_PITCH + 11


def connect(
    name: str, source: Box, target: Box, exit_at: tuple[float, float], entry_at: tuple[float, float]
) -> Arrow:
    """Connect two boxes, with a corner halfway between when their ends aren't level."""
    start = (source.x + exit_at[0] * source.width, source.y + exit_at[1] * source.height)
    end = (target.x + entry_at[0] * target.width, target.y + entry_at[1] * target.height)
    corners: tuple[tuple[float, float], ...] = ()
    if start[0] != end[0] and start[1] != end[1]:
        middle = (start[0] + end[0]) / 2
        corners = ((middle, start[1]), (middle, end[1]))
    return Arrow(name, source.id, target.id, exit_at, entry_at, (start, *corners, end))


def fit(text: str, width: float, size: float, bold: bool = False) -> str:
    """Shorten a text in its middle until it fits; names tell most at both their ends."""
    text = " ".join(text.split())
    if _width(text, size, bold) <= width:
        return text
    fits, too_long = 1, len(text)
    while too_long - fits > 1:
        kept = (fits + too_long) // 2
        if _width(_without_middle(text, kept), size, bold) <= width:
            fits = kept
        else:
            too_long = kept
    return _without_middle(text, fits)


def _without_middle(text: str, kept: int) -> str:
    tail = kept // 2
    return f"{text[: kept - tail].rstrip()}…{text[len(text) - tail :].lstrip()}"


def _width(text: str, size: float, bold: bool) -> float:
    return _font(size, bold).getlength(text)


@cache
def _font(size: float, bold: bool) -> FreeTypeFont:
    # Imported here: it takes a while, and only a report needs it.
    from matplotlib.font_manager import FontProperties, findfont
    from PIL import ImageFont

    path = findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal"))
    return ImageFont.truetype(path, size)
