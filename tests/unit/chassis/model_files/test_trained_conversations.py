"""The record of training: what is written is read, and a file from outside is checked."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.trained_conversations import (
    TRAINED_CONVERSATIONS,
    Conversation,
    TrainedConversations,
    Turn,
    read_trained_conversations,
)

ASK, SAY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
RECORD: dict[str, Any] = {
    "format": "web4lora.trained_conversations/1",
    "conversations": [
        {
            "file": "train/rows.jsonl",
            "line": 3,
            "messages": [ASK, SAY, ASK, SAY],
            "input_ids": [1, 5, 6, 2, 5, 6, 2],
            "labels": [-100, -100, 6, 2, -100, 6, 2],
            "turns": [
                {"messages": 1, "prompt_tokens": 2, "stop_token": 2},
                {"messages": 3, "prompt_tokens": 5, "stop_token": 2},
            ],
        }
    ],
}


def write(folder: Path, record: object) -> Path:
    path = folder / TRAINED_CONVERSATIONS
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


ROW = Conversation(
    file="train/rows.jsonl",
    line=3,
    messages=(ASK, SAY, ASK, SAY),
    input_ids=(1, 5, 6, 2, 5, 6, 2),
    labels=(-100, -100, 6, 2, -100, 6, 2),
    turns=(Turn(1, 2, 2), Turn(3, 5, 2)),
)


def test_each_conversation_is_read(tmp_path: Path) -> None:
    for nothing in ({}, {"system": None, "rendered_at": None}):
        record = write(tmp_path, {**RECORD, **nothing})
        assert read_trained_conversations(record) == TrainedConversations((ROW,))


@pytest.mark.parametrize(
    "record",
    [
        TrainedConversations(()),
        TrainedConversations((ROW,) * 8),
        TrainedConversations((ROW,), system=""),
        TrainedConversations((ROW,), system="Be brief. ☃", rendered_at=datetime(2026, 1, 31, 7, 8)),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, record: TrainedConversations) -> None:
    record.write(tmp_path)
    assert read_trained_conversations(tmp_path / TRAINED_CONVERSATIONS) == record


def test_a_long_conversation_is_no_other(tmp_path: Path) -> None:
    count = 300
    long = Conversation(
        file="f", line=1, messages=(ASK, SAY) * count,
        input_ids=(5, 6) * count, labels=(-100, 6) * count,
        turns=tuple(Turn(2 * at + 1, 2 * at + 1, 6) for at in range(count)),
    )  # fmt: skip
    TrainedConversations((long,)).write(tmp_path)
    assert read_trained_conversations(tmp_path / TRAINED_CONVERSATIONS).conversations == (long,)


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    record = copy.deepcopy(RECORD)
    change(record["conversations"][0])
    return record


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("", "Expecting value"),
        ("\x00", "Expecting value"),
        ("[" * 100_000, ""),
        ("9" * 5000, "Exceeds the limit"),
        ("[]", "its format is 'list'"),
        ({**RECORD, "format": "web4lora.trained_conversations/2"}, "conversations/2', not"),
        ({**RECORD, "conversations": {}}, "conversations is no list"),
        ({**RECORD, "conversations": [3]}, "conversation 1 is no object"),
        ({**RECORD, "conversations": RECORD["conversations"] * 9}, "9 entries, more than 8"),
        (changed(lambda c: c.pop("messages")), "messages is no list"),
        (changed(lambda c: c.update(messages=[{"content": "x"}])), "a message has no role"),
        (changed(lambda c: c["messages"][0].update(content="\ud800")), "surrogates not allowed"),
        (changed(lambda c: c["messages"][0].update(content=float("nan"))), "not JSON compliant"),
        (changed(lambda c: c.update(input_ids=[1, 5, -6, 2, 5, 6, 2])), "not all token ids"),
        (changed(lambda c: c.update(input_ids=[1, 5, True, 2, 5, 6, 2])), "not all token ids"),
        (changed(lambda c: c.update(input_ids=[1, 5, 2**40, 2, 5, 6, 2])), "not all token ids"),
        (changed(lambda c: c["labels"].pop()), "labels do not go with input_ids"),
        (changed(lambda c: c["labels"].append(2)), "8 entries, more than 7"),
        (changed(lambda c: c["labels"].__setitem__(2, 7)), "labels do not go with input_ids"),
        (changed(lambda c: c["labels"].__setitem__(0, "-100")), "labels do not go with input_ids"),
        (changed(lambda c: c.update(file=3)), "file is no text"),
        (changed(lambda c: c.update(line="3")), "line is '3'"),
        (changed(lambda c: c.update(line=-1)), "line is '-1'"),
        ({**RECORD, "system": 3}, "system is no text"),
        ({**RECORD, "system": "\ud800"}, "surrogates not allowed"),
        ({**RECORD, "rendered_at": 1.5}, "rendered_at is no text"),
        ({**RECORD, "rendered_at": "yesterday"}, "Invalid isoformat string: 'yesterday'"),
        (changed(lambda c: c.pop("turns")), "turns is no list"),
        (changed(lambda c: c.update(turns=[7])), "a turn is no object"),
        (changed(lambda c: c.update(turns=c["turns"] * 50)), "100 entries, more than 4"),
        (changed(lambda c: c["turns"][0].update(messages=0)), "messages of a turn is '0'"),
        (changed(lambda c: c["turns"][0].update(messages=5)), "messages of a turn is '5'"),
        (changed(lambda c: c["turns"][0].update(prompt_tokens=7)), "prompt_tokens is '7'"),
        (changed(lambda c: c["turns"][0].update(prompt_tokens="2")), "prompt_tokens is '2'"),
        (changed(lambda c: c["turns"][0].update(stop_token=9)), "stop_token 9 is not trained"),
        (changed(lambda c: c["turns"][0].update(stop_token=-100)), "stop_token -100 is not trained"),
        (changed(lambda c: c["turns"][0].update(stop_token=[2])), "stop_token"),
    ],
)
def test_a_record_that_can_t_be_used_ends_in_one_line(tmp_path: Path, record: object, said: str) -> None:
    with pytest.raises(InvalidInput, match=r"trained_conversations\.json can't be used: ") as caught:
        read_trained_conversations(write(tmp_path, record))
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    assert "--from train" in caught.value.fix


def test_a_name_of_several_lines_is_one(tmp_path: Path) -> None:
    path = write(tmp_path, changed(lambda c: c.update(file="a\nb" + "c" * 999)))
    (row,) = read_trained_conversations(path).conversations
    assert row.file == "a b" + "c" * 197


def test_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="can't be used"):
        read_trained_conversations(path)


def test_a_record_too_large_to_be_one_is_not_read(tmp_path: Path) -> None:
    (tmp_path / TRAINED_CONVERSATIONS).write_bytes(bytes((16 << 20) + 1))
    with pytest.raises(InvalidInput, match="more than 16,777,216"):
        read_trained_conversations(tmp_path / TRAINED_CONVERSATIONS)
