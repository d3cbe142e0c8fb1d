"""Whatever is wrong with what a training is made from ends in one clear line, before it starts.

A table of broken datasets, bases and settings, each through what a prepare job calls: the check of its
settings, the reader of rows, and prepare. Broken adapters, which the packager reads, are in
tests/corpus/adapter.py.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from web4.lora.v1 import trainer_pb2
from web4lora_chassis.dataset import read_dataset
from web4lora_chassis.errors import Internal, Web4Error
from web4lora_trainer.prepare import prepare
from web4lora_trainer.specs import settings_of

from tests.unit.trainer.broken_bases import BROKEN, edit

ASK, SAY = {"role": "user", "content": "red or blue"}, {"role": "assistant", "content": "red"}
TOOL = {"name": "paint", "parameters": {"type": "object"}}
CALL = {"role": "assistant", "tool_calls": [{"name": "paint", "arguments": {"colour": "red"}}]}


@dataclass
class Inputs:
    """What a training is made from; a case changes one thing of it.

    Attributes:
        base: The base's folder, a copy.
        rows: The lines of the training file.
        held_out: Those of the held-out file.
        train: The run's settings.
    """

    base: Path
    rows: list[str]
    held_out: list[str]
    train: dict[str, Any]


Change = Callable[[Inputs], object]


def row(*messages: object, **more: object) -> str:
    return json.dumps({"messages": list(messages), **more})


def rows(*lines: str) -> Change:
    return lambda inputs: inputs.rows.__setitem__(slice(None), lines)


def train(**settings: Any) -> Change:
    return lambda inputs: inputs.train.update(settings)


def base(name: str) -> Change:
    return lambda inputs: BROKEN[name][0](inputs.base)


def tokenizer(**changes: Any) -> Change:
    return lambda inputs: edit(inputs.base / "tokenizer_config.json", **changes)


def template(text: str) -> Change:
    return lambda inputs: (inputs.base / "chat_template.jinja").write_text(text)


REFUSED: dict[str, tuple[Change, str]] = {
    "no row": (rows(), "there is no row in it, it is empty"),
    "no JSON": (rows("hello"), "rows.jsonl:1: not JSON at column 1"),
    "a JSON array": (rows(f"[{row(ASK, SAY)}]"), "it is one JSON array of 1 rows"),
    "no messages": (rows("{}"), '"messages" is missing'),
    "no answer": (rows(row(ASK)), 'the last message is from "user"'),
    "an empty answer": (rows(row(ASK, {**SAY, "content": " "})), "from \"assistant\", has no text"),
    "two questions in a row": (rows(row(ASK, ASK, SAY)), "message 2 is a second user message in a row"),
    "an unknown role": (rows(row({**ASK, "role": "bot"}, SAY)), 'message 1 has the role "bot"'),
    "a late system message": (rows(row(ASK, {**ASK, "role": "system"}, SAY)), "the one system message first"),
    "an id twice": (rows(row(ASK, SAY, id="x"), row(ASK, SAY, id="x")), 'rows.jsonl:2: the id "x" was used'),
    "a key twice": (rows('{"messages": [], "messages": []}'), 'the key "messages" is there twice'),
    "half a character": (rows(row(ASK, {**SAY, "content": "\ud800"})), "half a character"),
    "an image": (rows(row({**ASK, "content": [{"type": "image_url"}]}, SAY)), "only text is trained on"),
    "a preference pair": (rows(row(ASK, SAY, rejected="blue")), 'the row has "rejected"'),
    "a weight of a half": (rows(row(ASK, {**SAY, "weight": 0.5})), 'message 2 has the "weight" 0.5'),
    "no answer trained": (rows(row(ASK, {**SAY, "weight": 0})), "no answer in it is trained on"),
    "half an Alpaca row": (rows('{"instruction": "a"}'), 'give the "output" beside it'),
    "ShareGPT from nobody": (rows('{"conversations": [{"value": "a"}]}'), 'has no "from"'),
    "a completion that is no text": (rows('{"prompt": "a", "completion": 1}'), '"completion" is a number'),
    "a call without tools": (rows(row(ASK, CALL)), 'message 2 calls a tool, and the row has no "tools"'),
    "a call of another tool": (rows(row(ASK, CALL, tools=[{"name": "f"}])), "none of the row's tools"),
    "a result of no call": (rows(row(ASK, {"role": "tool", "content": "x"}, SAY)), "follows no call"),
    "a broken held-out row": (lambda inputs: inputs.held_out.append("{"), "held.jsonl:2: not JSON"),
    "every row too long": (train(max_length_tokens=8), "All 3 training rows have more than 8 tokens"),
    "an answer that holds the end": (
        rows(row(ASK, {**SAY, "content": "red<|im_end|>blue"})), "message 2 holds <|im_end|>",
    ),
    "tools for a template without": (
        rows(row(ASK, SAY, tools=[TOOL])), "does not write the row's tools, for example 'paint'",
    ),
    "reasoning for a template without": (
        rows(row(ASK, {**SAY, "reasoning_content": "because"})), "does not write its reasoning_content",
    ),
    "a template that does not parse": (template("{% for %}"), "can't be parsed"),
    "a template that refuses": (template("{{ raise_exception('no') }}"), "refuses"),
    "a template without answers": (
        template("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"),
        "does not write the assistant's answers",
    ),
    "no tokenizer": (lambda inputs: (inputs.base / "tokenizer.json").unlink(), "tokenizer"),
    "no eos": (tokenizer(eos_token=None), "end-of-sequence|eos"),
    "no configuration": (lambda inputs: (inputs.base / "config.json").unlink(), "config.json"),
    **{
        f"base: {name}": (base(name), BROKEN[name][1])
        for name in (
            "shard missing", "file cut off", "tensor missing", "matrix of another shape",
            "vocab_size of others", "eos beyond the embedding", "not a number",
            "embedding of zeros", "unknown architecture",
        )
    },
    "no such layer": (train(lora={"target_modules": ["c_attn"]}), "c_attn"),
    "a rank of 0": (train(lora={"rank": 0}), "train.lora.rank"),
    "a rate above 1": (train(learning_rate=5.0), "train.learning_rate"),
    "an unknown schedule": (train(schedule="sawtooth"), "train.schedule"),
    "an unknown number format": (train(dtype="int4"), "train.dtype"),
    "fp16 on a CPU": (train(dtype="fp16"), "A CPU computes fp16"),
    "no norm": (train(max_grad_norm=0.0), "train.max_grad_norm"),
    "a band upside down": (train(loss_band={"low": 2.0, "high": 1.0}), "low 2 must be below high 1"),
    "longer than the base": (train(max_length_tokens=4096), "more than the 256 tokens"),
}  # fmt: skip


@pytest.fixture
def inputs(tiny_base: Path, tmp_path: Path) -> Inputs:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    return Inputs(copy, [row(ASK, SAY)] * 3, [row({**ASK, "content": "yes or no"}, SAY)], {"dtype": "fp32"})


def prepared(inputs: Inputs) -> None:
    """Do what a prepare job does with a run's inputs, but for the store."""
    settings = settings_of(trainer_pb2.TrainSettings(**inputs.train))
    folder = inputs.base.parent
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in inputs.rows), "utf-8")
    (folder / "held.jsonl").write_text("".join(f"{line}\n" for line in inputs.held_out), "utf-8")
    prepare(settings, read_dataset([folder / "rows.jsonl"], [folder / "held.jsonl"]), inputs.base)


def require_one_line(error: Web4Error) -> None:
    """Behind the line that says what is wrong come the other file's, where it has the same, and the count."""
    assert not isinstance(error, Internal)
    first, *rest = error.message.splitlines()
    assert first.isprintable()
    assert len(first) < 500
    assert all(re.match(r"held\.jsonl:|\d+ problems? in the dataset\. ", line) for line in rest)
    assert error.fix or "; " in first


def test_what_is_whole_is_prepared(inputs: Inputs) -> None:
    prepared(inputs)


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_each_ends_in_one_clear_line(inputs: Inputs, change: Change, words: str) -> None:
    change(inputs)
    with pytest.raises(Web4Error, match=words) as caught:
        prepared(inputs)
    require_one_line(caught.value)


def test_there_are_forty_and_more() -> None:
    assert len(REFUSED) >= 40
