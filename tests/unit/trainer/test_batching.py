from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis.dataset import Message, Row
from web4lora_chassis.model_files.trained_conversations import IGNORED
from web4lora_trainer.base_model import load_tokenizer
from web4lora_trainer.batching import Collator, LikeLengthBatches
from web4lora_trainer.encoding import Encoded, encode_rows


def row(*turns: tuple[str, str]) -> Row:
    return Row("a", 1, "", "", tuple(Message(role, content) for role, content in turns))


def trained(encoded: Encoded, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in encoded.labels if label != IGNORED]))


def with_template(base: Path, folder: Path, template: str) -> Any:
    for path in base.iterdir():
        if "token" in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    (folder / "config.json").write_text((base / "config.json").read_text())
    return load_tokenizer(folder)


def test_only_the_answer_and_its_stop_token_are_trained_on(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    conversation = row(
        ("system", "be a helper"), ("user", "question <one>?"), ("assistant", "red  green\n 12")
    )
    encoded = encode_rows([conversation], tokenizer, 256).rows[0]
    assert trained(encoded, tokenizer) == "red  green\n 12<|im_end|>"
    asked = [m.to_json() for m in conversation.messages[:-1]]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert list(encoded.input_ids[: len(ids)]) == ids, "training sees other prompt tokens than serving"
    assert encoded.labels[: len(ids)] == (IGNORED,) * len(ids)
    assert encoded.input_ids[-1] == tokenizer.eos_token_id


def test_every_turn_of_the_assistant_is_trained_on(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    conversation = row(("user", "one"), ("assistant", "red"), ("user", "two"), ("assistant", "blue"))
    encoded = encode_rows([conversation], tokenizer, 256).rows[0]
    assert trained(encoded, tokenizer) == "red<|im_end|>blue<|im_end|>"
    messages = [m.to_json() for m in conversation.messages]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(encoded.input_ids) + "\n" == whole, "the template's own system message is kept"


def test_a_template_without_stop_token_gets_one(tiny_base: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = with_template(tiny_base, tmp_path, template)
    rows = encode_rows([row(("user", "one"), ("assistant", "red"))], tokenizer, 256)
    assert rows.stop_tokens_added == 1
    assert trained(rows.rows[0], tokenizer) == "red\n<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_trains_the_last_answer(
    tiny_base: Path, tmp_path: Path
) -> None:
    template = (
        "{% for m in messages %}{% set old = m['role'] == 'assistant' and not loop.last %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + ('-' if old else m['content']) + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(tiny_base, tmp_path, template)
    turns = row(("user", "one"), ("assistant", "red"), ("user", "two"), ("assistant", "blue"))
    encoded = encode_rows([turns], tokenizer, 256).rows[0]
    assert trained(encoded, tokenizer) == "blue<|im_end|>"
    assert "red" not in tokenizer.decode(encoded.input_ids)


def test_rows_too_long_are_left_out_and_counted_never_cut(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    short, long = row(("user", "one"), ("assistant", "red")), row(("user", "one " * 50), ("assistant", "red"))
    rows = encode_rows([short, long, short], tokenizer, 60)
    assert len(rows.rows) == 2
    assert rows.rows_too_long == 1
    assert rows.longest_row_tokens <= 60
    assert rows.trained_tokens == 2 * (rows.rows[0].trained_tokens)


LENGTHS = [5, 90, 7, 7, 30, 31, 29, 64, 3, 200, 12, 12, 12, 45]


@pytest.mark.parametrize("multiple", [1, 8])
def test_batches_stay_in_the_budget_and_hold_every_row_once(multiple: int) -> None:
    batches = LikeLengthBatches(LENGTHS, 100, seed=1, pad_to_multiple_of=multiple)
    found = list(batches)
    assert len(found) == len(batches)
    assert sorted(row for batch in found for row in batch) == list(range(len(LENGTHS)))
    for batch in found:
        longest = -(-max(LENGTHS[row] for row in batch) // multiple) * multiple
        assert len(batch) == 1 or longest * len(batch) <= 100


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    def epochs(seed: int) -> list[list[list[int]]]:
        batches, result = LikeLengthBatches(LENGTHS * 5, 60, seed), []
        for epoch in range(3):
            batches.set_epoch(epoch)
            result.append(list(batches))
            assert len(result[-1]) == len(batches)
        return result

    assert epochs(1) == epochs(1)
    assert epochs(1)[0] != epochs(1)[1]
    assert epochs(1) != epochs(2)


def test_like_lengths_need_little_padding() -> None:
    lengths = [40 + (index * 37) % 160 for index in range(400)]
    batches = LikeLengthBatches(lengths, 512, seed=3)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.02 * sum(lengths)


def test_padding_is_on_the_right_and_has_no_labels() -> None:
    rows: Sequence[Any] = [{"input_ids": [4, 5], "labels": [IGNORED, 5]}, {"input_ids": [7], "labels": [7]}]
    batch = Collator(pad_token_id=2, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[4, 5, 2, 2], [7, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 5, IGNORED, IGNORED], [7, IGNORED, IGNORED, IGNORED]]
