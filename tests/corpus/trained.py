"""Training's record of its own data, as packager and deployer read it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.corpus.case import Case, Kind, holds, no_json
from tests.unit.chassis.model_files.test_trained_conversations import RECORD

FILE = "trained_conversations.json"


def whole(folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(RECORD))


def deployer(folder: Path, _: Path) -> None:
    from web4lora_deployer.prompts.training_record import read_record, trained_system

    trained_system(read_record(folder / FILE))


def packager(folder: Path, _: Path) -> None:
    from web4lora_packager.chat_template import Tokenizer
    from web4lora_packager.trained import read_kept, trained_stops

    trained_stops(read_kept(folder), Tokenizer("", {}, {}, ()), 300)


ROW = RECORD["conversations"][0]
TURN = ROW["turns"][0]


def stop(value: object) -> bytes:
    return json.dumps(
        {**RECORD, "conversations": [{**ROW, "turns": [{**TURN, "stop_token": value}]}]}
    ).encode()


STOPS = {
    "no token": stop(None),
    "below 0": stop(-1),
    "beyond the vocabulary": stop(300),
    "true": stop(True),
    "a half": stop(2.5),
    "infinite": stop(float("inf")),
    "of 4,000 digits": stop(10**4000),
    "a text of many lines": stop("a\nb" * 999),
}
FORMS: dict[str, object] = {
    "no format": {"conversations": []},
    "another format": {**RECORD, "format": "web4lora.trained_conversations/2"},
    "a format of a million letters": {**RECORD, "format": "x" * 1_000_000},
    "a format of many lines": {**RECORD, "format": "a\nb\x1b[31m"},
    "conversations a text": {**RECORD, "conversations": "abc"},
    "conversations a number": {**RECORD, "conversations": 7},
    "turns a number": {**RECORD, "conversations": [{**ROW, "turns": 7}]},
    "a turn that is a text": {**RECORD, "conversations": [{**ROW, "turns": ["x"]}]},
    "a message of half a character": {**RECORD, "conversations": [{**ROW, "messages": [{"role": "\ud800"}]}]},
    "ids of 2^40": {**RECORD, "conversations": [{**ROW, "input_ids": [1 << 40] * 7}]},
    "a million labels": {**RECORD, "conversations": [{**ROW, "labels": [1] * 1_000_000}]},
    "a file of a million letters in words": {**RECORD, "conversations": [{**ROW, "file": ["x"] * 1_000_000}]},
    "a line of 4,000 digits": {**RECORD, "conversations": [{**ROW, "line": 10**4000}]},
    "a system message that is a number": {**RECORD, "system": 7},
    "a system message of half a character": {**RECORD, "system": "\ud800"},
}

KIND = Kind(
    name="trained conversations",
    whole=whole,
    readers={"deployer": deployer, "packager": packager},
    cases=(
        *no_json(FILE),
        *(Case(f"form: {name}", holds(FILE, json.dumps(data))) for name, data in FORMS.items()),
        *(Case(f"stop: {name}", holds(FILE, data)) for name, data in STOPS.items()),
    ),
    names=r"trained_conversations\.json",
)  # fmt: skip
