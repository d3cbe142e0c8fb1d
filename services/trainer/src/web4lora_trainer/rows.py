"""The rows of a training, as tokens: those to train on, and the held-out ones to measure on."""

from __future__ import annotations

import random
from datetime import datetime
from typing import TYPE_CHECKING

from web4lora_chassis.dataset import Dataset
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.pipeline.train import TrainSettings

from web4lora_trainer.device import Device
from web4lora_trainer.encoding import EncodedRows, refused_error, try_rows
from web4lora_trainer.preflight import epochs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HELD_OUT_SHARE = 0.02
_MIN_HELD_OUT_ROWS = 16


def encode_dataset(
    settings: TrainSettings, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, now: datetime
) -> tuple[EncodedRows, EncodedRows]:
    """Return the rows to train on and the held-out ones as tokens.

    Args:
        settings: How to train.
        dataset: The rows.
        tokenizer: The base model's.
        now: The date that the chat template writes, where it writes one.

    Raises:
        InvalidInput: The chat template is broken, or refuses rows.
        FailedPrecondition: Every training row is too long.
    """
    train, problems = try_rows(dataset.train, tokenizer, settings.longest_row_tokens, now)
    held_out, more = try_rows(dataset.held_out, tokenizer, settings.longest_row_tokens, now)
    if problems or more:
        raise refused_error([*problems, *more])
    if not train.rows:
        raise FailedPrecondition(
            f"All {train.rows_too_long} training rows have more than {settings.longest_row_tokens} tokens.",
            fix="Raise max_length_tokens, or shorten the rows.",
            reason="ROWS_TOO_LONG",
        )
    return train, held_out


def sampled(
    train: EncodedRows, held_out: EncodedRows, settings: TrainSettings, device: Device
) -> EncodedRows:
    """Return the held-out rows to measure on: a fixed sample that costs a few percent of the training."""
    rows = list(held_out.rows)
    random.Random(settings.seed).shuffle(rows)  # noqa: S311 - a sample, not a secret
    budget = _HELD_OUT_SHARE * train.tokens * epochs(train, settings, device)
    tokens = chosen = 0
    while chosen < len(rows) and (chosen < _MIN_HELD_OUT_ROWS or tokens + len(rows[chosen]) <= budget):
        tokens += len(rows[chosen])
        chosen += 1
    return EncodedRows(tuple(rows[:chosen]))
