"""Writes a diagram as draw.io's XML (mxGraph cells)."""

from __future__ import annotations

import html
from xml.etree import ElementTree

from web4lora_deployer.report.layout import HEADER_HEIGHT, Arrow, Box, Diagram, Text


def to_xml(diagram: Diagram) -> str:
    """Return the diagram as the text of a .drawio file.

    Args:
        diagram: The shapes.

    Returns:
        XML, uncompressed, the same for the same diagram.
    """
    file = ElementTree.Element("mxfile", host="web4lora", type="device")
    page = ElementTree.SubElement(file, "diagram", id="pipeline", name=diagram.title)
    width, height = f"{diagram.width:g}", f"{diagram.height:g}"
    model = ElementTree.SubElement(
        page, "mxGraphModel", dx=width, dy=height, grid="1", gridSize="4", guides="1", tooltips="1",
        connect="1", arrows="1", fold="1", page="1", pageScale="1", pageWidth=width, pageHeight=height,
        math="0", shadow="0", background="#ffffff",
    )  # fmt: skip
    root = ElementTree.SubElement(model, "root")
    ElementTree.SubElement(root, "mxCell", id="0")
    _cell(root, "0", id="1")
    for text in diagram.texts:
        _text(root, text, parent="1", origin=(0.0, 0.0))
    for box in diagram.boxes:
        _box(root, box)
    for arrow in diagram.arrows:
        _arrow(root, arrow)
    return ElementTree.tostring(file, encoding="unicode")


def _cell(root: ElementTree.Element, inside: str = "1", **attributes: str) -> ElementTree.Element:
    return ElementTree.SubElement(root, "mxCell", {**attributes, "parent": inside})


def _style(**values: object) -> str:
    return "".join(f"{key}={value};" for key, value in values.items())


def _geometry(cell: ElementTree.Element, x: float, y: float, width: float, height: float) -> None:
    places = {"x": x, "y": y, "width": width, "height": height}
    attributes = {key: f"{value:g}" for key, value in places.items()} | {"as": "geometry"}
    ElementTree.SubElement(cell, "mxGeometry", attributes)


def _box(root: ElementTree.Element, box: Box) -> None:
    style = "swimlane;" + _style(
        startSize=HEADER_HEIGHT, rounded=1, arcSize=8, absoluteArcSize=1, html=1, fillColor=box.color,
        strokeColor=box.color, swimlaneFillColor="#ffffff", fontColor="#ffffff", fontSize=14, fontStyle=1,
        align="left", spacingLeft=12, collapsible=0, dashed=int(box.dashed), swimlaneLine=0,
    )  # fmt: skip
    value = html.escape(box.title)
    cell = _cell(root, id=box.id, value=value, style=style, vertex="1")
    _geometry(cell, box.x, box.y, box.width, box.height)
    for text in box.texts:
        _text(root, text, parent=box.id, origin=(box.x, box.y))


def _text(root: ElementTree.Element, text: Text, parent: str, origin: tuple[float, float]) -> None:
    style = "text;" + _style(
        html=1, align=text.align, verticalAlign="top", whiteSpace="nowrap", fontSize=f"{text.size:g}",
        fontColor=text.color, fontStyle=int(text.bold), fontFamily="Helvetica", strokeColor="none",
        fillColor="none", spacing=0, spacingTop=0, overflow="visible",
    )  # fmt: skip
    lines = "<br>".join(html.escape(line, quote=False) for line in text.lines)
    value = f'<div style="line-height: {text.pitch:g}px">{lines}</div>'
    cell = _cell(root, parent, id=text.id, value=value, style=style, vertex="1")
    height = text.pitch * len(text.lines)
    _geometry(cell, text.x - origin[0], text.y - origin[1], text.width, height)


def _arrow(root: ElementTree.Element, arrow: Arrow) -> None:
    style = _style(
        edgeStyle="orthogonalEdgeStyle", rounded=1, html=1, strokeColor="#64748b", strokeWidth=2,
        endArrow="block", endFill=1, exitX=arrow.exit[0], exitY=arrow.exit[1], exitDx=0, exitDy=0,
        entryX=arrow.entry[0], entryY=arrow.entry[1], entryDx=0, entryDy=0,
    )  # fmt: skip
    cell = _cell(root, id=arrow.id, style=style, edge="1", source=arrow.source, target=arrow.target)
    geometry = ElementTree.SubElement(cell, "mxGeometry", {"relative": "1", "as": "geometry"})
    corners = arrow.points[1:-1]
    if corners:
        array = ElementTree.SubElement(geometry, "Array", {"as": "points"})
        for x, y in corners:
            ElementTree.SubElement(array, "mxPoint", x=f"{x:g}", y=f"{y:g}")
