from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_trainer.dataset import read_dataset


def row(user: str = "question", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "answer"}]
    return {"messages": messages, **fields}


def write(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def test_good_rows_are_read_in_order(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", row("one", id="1", core="tool"), "", row("two", id="2", core="style"))
    held_out = write(tmp_path / "b.jsonl", row("three", id="3"))
    dataset = read_dataset([train], [held_out])
    assert [r.place for r in dataset.train] == ["a.jsonl:1", "a.jsonl:3"]
    assert dataset.rows_by_core == {"style": 1, "tool": 1}
    assert len(dataset.held_out) == 1
    assert dataset.warnings == ()


def test_the_sample_rows_may_hold_system_and_several_turns(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "b"},
    ]
    dataset = read_dataset([write(tmp_path / "a.jsonl", {"messages": messages, "check": {"any": 1}})])
    assert [m.role for m in dataset.train[0].messages] == ["system", "user", "assistant", "user", "assistant"]


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{not json", "not JSON at column 2"),
        ("[1]", "not an object"),
        ({"text": "x"}, "`messages` is missing"),
        ({"messages": []}, "`messages` is missing"),
        ({"messages": ["x"]}, "message 1 has no `role`"),
        (turns("user"), 'the last message is from "user"'),
        (turns("user", "user", "assistant"), "second user message in a row"),
        (turns("assistant"), "follows no user"),
        (turns("user", "system", "assistant"), "is from system"),
        (turns("human", "assistant"), "has the role 'human'"),
        ({"messages": [{"role": "user", "content": " "}]}, "has no text"),
        ({"messages": [{"role": "user", "content": 3}]}, "has no text"),
        ({**turns("user", "assistant"), "id": 3}, "`id` is not text"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, bad: Any, words: str) -> None:
    path = write(tmp_path / "tools.jsonl", row(), bad)
    with pytest.raises(InvalidInput) as caught:
        read_dataset([path])
    assert caught.value.reason == "DATASET_INVALID"
    assert "tools.jsonl:2: " in caught.value.message
    assert words in caught.value.message
    assert "1 problem in the dataset" in caught.value.message


def test_the_first_twenty_problems_and_the_count(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *["{"] * 33)
    with pytest.raises(InvalidInput) as caught:
        read_dataset([path])
    lines = caught.value.message.splitlines()
    assert lines[0].startswith("a.jsonl:1: ")
    assert lines[19].startswith("a.jsonl:20: ")
    assert lines[20] == "… and 13 more"
    assert "33 problems" in lines[21]
    assert caught.value.metadata["problems"] == "33"


def test_other_encodings_are_refused_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    good = tmp_path / "bom.jsonl"
    good.write_bytes(b"\xef\xbb\xbf" + json.dumps(row()).encode())
    assert len(read_dataset([good]).train) == 1
    bad = tmp_path / "latin.jsonl"
    bad.write_bytes('{"messages": "ä"}\n'.encode("latin-1"))
    with pytest.raises(InvalidInput, match=r"latin\.jsonl:1: not UTF-8 at byte 14"):
        read_dataset([bad])


def test_an_id_may_be_used_once_over_all_files(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", row("one", id="x"))
    two = write(tmp_path / "b.jsonl", row("two", id="x"))
    with pytest.raises(InvalidInput, match=r"b\.jsonl:1: id 'x' was used at a\.jsonl:1"):
        read_dataset([one], [two])


def test_repeated_questions_are_warned_of(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", row("same"), row("same "))
    held_out = write(tmp_path / "b.jsonl", row("same"))
    first, second = read_dataset([train], [held_out]).warnings
    assert first.startswith("a.jsonl:2: the same user text")
    assert second.startswith("b.jsonl:1: held out, but the same user text is trained on at a.jsonl:1")


def test_nothing_to_train_on_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no row to train on"):
        read_dataset([write(tmp_path / "empty.jsonl", "")])
    with pytest.raises(InvalidInput, match=r"gone\.jsonl: can't be read"):
        read_dataset([tmp_path / "gone.jsonl"])
