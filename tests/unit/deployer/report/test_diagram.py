from __future__ import annotations

import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from web4lora_deployer.report import ReportFacts
from web4lora_deployer.report.diagram import draw, write_diagram
from web4lora_deployer.report.drawio import to_xml
from web4lora_deployer.report.facts import summarize
from web4lora_deployer.report.layout import Box, Diagram, Text, fit


def diagram_of(facts: ReportFacts) -> Diagram:
    return draw(facts, summarize(facts))


def all_texts(diagram: Diagram) -> list[Text]:
    return [*diagram.texts, *(text for box in diagram.boxes for text in box.texts)]


def words_of(diagram: Diagram) -> list[str]:
    return [line for text in all_texts(diagram) for line in text.lines]


def embedded_xml(path: Path) -> str:
    """Read it as draw.io does: the text chunk "mxfile" ahead of the picture's data."""
    data = path.read_bytes()
    at = 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        key, _, value = data[at + 8 : at + 8 + length].partition(b"\0")
        if kind == b"tEXt" and key == b"mxfile":
            return unquote(value.decode("latin-1"))
        assert kind != b"IDAT", "draw.io stops looking here"
        at += 12 + length
    raise AssertionError("no mxfile")


class _Lines(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def handle_data(self, data: str) -> None:
        self.lines.append(data)


def test_the_picture_carries_the_diagram_it_shows(tmp_path: Path, facts: ReportFacts) -> None:
    write_diagram(tmp_path / "d.png", facts, summarize(facts))
    root = ElementTree.fromstring(embedded_xml(tmp_path / "d.png"))  # noqa: S314
    diagram = diagram_of(facts)
    cells = {cell.get("id"): cell for cell in root.iter("mxCell")}
    assert root.tag == "mxfile"
    for box in diagram.boxes:
        assert cells[box.id].get("value") == box.title
        place = cells[box.id].find("mxGeometry")
        assert place is not None
        assert (float(place.get("x", "")), float(place.get("y", ""))) == (box.x, box.y)
    for text in all_texts(diagram):
        parser = _Lines()
        parser.feed(cells[text.id].get("value", ""))
        assert tuple(parser.lines) == text.lines
    for arrow in diagram.arrows:
        assert (cells[arrow.id].get("source"), cells[arrow.id].get("target")) == (arrow.source, arrow.target)
    assert len(cells) == 2 + len(diagram.boxes) + len(all_texts(diagram)) + len(diagram.arrows)
    known = set(cells)
    assert all(cell.get("parent") in known for key, cell in cells.items() if key != "0")


def test_it_tells_the_runs_own_figures(facts: ReportFacts) -> None:
    words = words_of(diagram_of(facts))
    for figure in (
        "run_2026-11-22_1", "840 rows", "107,648", "34,610", "loss 0.31", "226", "602 tokens/s", "3 min 41 s",
        "271 MB", "105 MB (−61 %)", "145 MB −47 %", "131 tokens/s", "100 % → 97.5 %", "b1-0c1e570", "312 MB",
    ):  # fmt: skip
        assert figure in words, figure


def test_what_is_unknown_is_left_out(facts: ReportFacts) -> None:
    bare = replace(facts, run={}, reference=None)
    diagram = diagram_of(bare)
    empty = {box.id for box in diagram.boxes if box.dashed}
    assert {"dataset", "train", "base", "merge", "gguf"} == empty
    text = " ".join(words_of(diagram))
    assert "None" not in text
    assert "loss" not in text


def test_odd_facts_do_not_break_it(facts: ReportFacts) -> None:
    run = {"train": {"device": "x" * 500}, "base": {"source": 'a<b>&"$x_{1}$'}, "dataset": None, "stages": []}
    ElementTree.fromstring(to_xml(diagram_of(replace(facts, run=run))))  # noqa: S314


def overlap(one: Box, other: Box) -> bool:
    apart = one.x + one.width <= other.x or other.x + other.width <= one.x
    return not (apart or one.y + one.height <= other.y or other.y + other.height <= one.y)


@pytest.mark.parametrize("long_names", [False, True])
def test_nothing_overlaps_or_sticks_out(facts: ReportFacts, long_names: bool) -> None:
    if long_names:
        model = replace(facts.deployed.model, id="n" * 90, endpoint="http://" + "h" * 200, target="t" * 80)
        run = {**facts.run, "run_id": "r" * 200, "name": "名" * 90}
        facts = replace(facts, deployed=replace(facts.deployed, model=model), run=run)
    diagram = diagram_of(facts)
    boxes = diagram.boxes
    assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    for box in boxes:
        assert box.x >= 0
        assert box.x + box.width <= diagram.width
        assert box.y + box.height <= diagram.height
        for text in box.texts:
            assert box.x <= text.x
            assert text.x + text.width <= box.x + box.width
            assert text.y + text.pitch * len(text.lines) <= box.y + box.height
            assert all(fit(line, text.width, text.size, text.bold) == line for line in text.lines)


def test_arrows_touch_their_boxes(facts: ReportFacts) -> None:
    diagram = diagram_of(facts)
    boxes = {box.id: box for box in diagram.boxes}
    for arrow in diagram.arrows:
        for (x, y), box in ((arrow.points[0], boxes[arrow.source]), (arrow.points[-1], boxes[arrow.target])):
            on_side = x in (box.x, box.x + box.width) and box.y <= y <= box.y + box.height
            on_edge = y in (box.y, box.y + box.height) and box.x <= x <= box.x + box.width
            assert on_side or on_edge
        pairs = zip(arrow.points, arrow.points[1:], strict=False)
        assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairs), "straight lines only"


def test_long_names_keep_both_ends() -> None:
    short = fit("qwen2.5-coder-7b-instruct-with-a-long-name-Q4_K_M", 150, 12)
    assert "…" in short
    assert short.startswith("qwen")
    assert short.endswith("K_M")
    assert fit("short", 150, 12) == "short"
