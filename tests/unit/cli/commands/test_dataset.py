from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner
from web4lora.commands.dataset import app, check
from web4lora.views import console
from web4lora.views.dataset import show_example
from web4lora_chassis.dataset import Row, check_rows
from web4lora_chassis.errors import InvalidInput

ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.mark.parametrize("named", [{"files": 2}, {"files": 1, "eval_files": 1}])
def test_a_file_that_is_named_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, int]
) -> None:
    """Each of its rows would be told to be the same as itself."""
    (tmp_path / "rows.jsonl").write_text(ROW)
    monkeypatch.chdir(tmp_path)
    ways = [Path("rows.jsonl"), tmp_path / "rows.jsonl"]
    files, held_out = ways[: named["files"]], ways[: named.get("eval_files", 0)]
    with pytest.raises(InvalidInput, match=r"rows\.jsonl is named twice"):
        check(files, held_out)


def shown(path: Path, *options: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["check", str(path), *options], catch_exceptions=False)
    assert done.exit_code == code
    return done.stdout


def chat(question: str, answer: str, **more: object) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    return json.dumps({"messages": turns}) + "\n"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    context = {"role": "assistant", "content": "first", "weight": 0}
    several = {
        "messages": [
            *json.loads(chat("a", "b"))["messages"][:1],
            context,
            *json.loads(chat("c", "d"))["messages"],
        ]
    }
    alpaca = {"instruction": "e", "output": "f"}
    path.write_text(
        chat("question", "an answer")
        + chat("g", "h" * 99)
        + json.dumps(several)
        + "\n"
        + json.dumps(alpaca)
        + "\n"
    )
    return path


def test_the_check_counts_measures_and_shows_one_row(rows: Path) -> None:
    text = shown(rows)
    assert "✓ 4 good rows" in text
    assert "! 1 of 5 answers have a weight of 0: not trained on" in text
    assert f"{rows}: 1 row is in the form of Alpaca, read as messages" in text
    assert "characters of a conversation: 2 to 100, half have 17 or less" in text
    assert [line.split()[:4] for line in text.splitlines() if "up to" in line] == [
        ["up", "to", "64", "3"], ["up", "to", "128", "1"],
    ]  # fmt: skip
    assert text.splitlines()[-3:] == [
        f"  {rows}:1, as it is trained:",
        "    user: question",
        "    assistant, trained: an answer",
    ]


@pytest.mark.parametrize("no_colour", [False, True])
def test_what_is_trained_has_a_colour_unless_there_are_to_be_none(
    rows: Path, monkeypatch: pytest.MonkeyPatch, no_colour: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour:
        monkeypatch.setenv("NO_COLOR", "1")
    coloured = console._console()
    monkeypatch.setattr("web4lora.views.dataset.out", coloured)
    with coloured.capture() as captured:
        show_example(next(row for row in check_rows(rows) if isinstance(row, Row)))
    assert ("\x1b[32man answer" in captured.get()) is not no_colour


def test_a_held_out_row_that_is_trained_on_fails_the_check_unless_allowed(rows: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text(chat("question", "another"))
    text = shown(rows, "--eval", str(held_out), code=1)
    assert f"✗ {held_out}:1: held out, but the same user text is trained on at {rows}:1" in text
    text = shown(rows, "--eval", str(held_out), "--allow-duplicates")
    assert f"! {held_out}:1: held out, but the same user text" in text
