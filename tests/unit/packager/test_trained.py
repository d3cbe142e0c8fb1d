"""The conversations that training kept: which tokens end an answer, and what is no such file."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_chassis.model_files.trained_conversations import (
    TRAINED_CONVERSATIONS,
    Conversation,
    TrainedConversations,
    Turn,
)
from web4lora_packager.chat_template import Tokenizer
from web4lora_packager.modelfile import stop_texts
from web4lora_packager.trained import read_kept, trained_stops

TOKENIZER = Tokenizer("", {"<s>": 1, "</s>": 2, "<turn_end>": 7}, {"eos_token": "</s>"}, (2,))


def _kept(folder: Path, *stops: int) -> Path:
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    rows = (Conversation("f", 1, messages, (4, stop), (-100, stop), (Turn(1, 1, stop),)) for stop in stops)
    TrainedConversations(tuple(rows)).write(folder)
    return folder


def test_an_adapter_from_elsewhere_kept_none(tmp_path: Path) -> None:
    assert trained_stops(read_kept(tmp_path), TOKENIZER, 10) == ()


@pytest.mark.parametrize(
    ("stops", "wanted"), [((), ()), ((2, 2), ()), ((7, 2, 7), (7,)), ((7, 9), (7, 9)), ((0,), (0,))]
)
def test_what_ends_an_answer_besides_eos(
    tmp_path: Path, stops: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    assert trained_stops(read_kept(_kept(tmp_path, *stops)), TOKENIZER, 10) == wanted


def test_what_is_no_token_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"{TRAINED_CONVERSATIONS} names the token 10"):
        trained_stops(read_kept(_kept(tmp_path, 7, 10)), TOKENIZER, 10)
    assert trained_stops(read_kept(tmp_path), TOKENIZER, None) == (7, 10)


def test_another_file_is_named(tmp_path: Path) -> None:
    (tmp_path / TRAINED_CONVERSATIONS).write_text("{}")
    with pytest.raises(InvalidInput, match=TRAINED_CONVERSATIONS):
        trained_stops(read_kept(tmp_path), TOKENIZER, 10)


def test_more_ends_than_a_gguf_can_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        trained_stops(read_kept(_kept(tmp_path, 2, 3, 4, 5)), TOKENIZER, 10)
    assert caught.value.reason == "STOPS_UNKNOWN"


def test_trained_stops_come_first_in_the_modelfile() -> None:
    assert stop_texts(TOKENIZER, (7,)) == ("<turn_end>", "</s>")
    assert stop_texts(TOKENIZER) == ("</s>",)


def test_the_date_of_training_is_that_of_its_record(tmp_path: Path) -> None:
    assert read_kept(tmp_path).rendered_at is None
    TrainedConversations((), rendered_at=datetime(2024, 2, 29, 12)).write(tmp_path)
    assert read_kept(tmp_path).rendered_at == datetime(2024, 2, 29, 12)
