"""Rows as tokens, and batches of rows of like length within a token budget.

Padding is what a CPU pays for and learns nothing from: rows of like length need almost none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from web4lora_chassis.dataset import Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not trained on; PyTorch's own convention."""


@dataclass(frozen=True)
class Encoded:
    """A row as tokens.

    Attributes:
        input_ids: Token ids.
        labels: The same ids where they are trained on, `IGNORED` elsewhere.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that are trained on."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class EncodedRows:
    """Rows as tokens, and what was left out.

    Attributes:
        rows: The rows that fit.
        rows_too_long: Rows left out because they have more than `max_length_tokens`.
        stop_tokens_added: Rows whose template ends without a stop token; one was appended.
    """

    rows: tuple[Encoded, ...]
    rows_too_long: int = 0
    stop_tokens_added: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row) for row in self.rows)

    @property
    def trained_tokens(self) -> int:
        """Those among them that are trained on."""
        return sum(row.trained_tokens for row in self.rows)

    @property
    def longest_row_tokens(self) -> int:
        """Length of the longest row."""
        return max((len(row) for row in self.rows), default=0)


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length_tokens: int
) -> EncodedRows:
    """Turn conversations into tokens; only the assistant's tokens and its stop token get labels.

    A row that is too long is left out and counted, never cut: a cut row would lose its stop token.

    Args:
        rows: The conversations.
        tokenizer: The base model's, with its own chat template.
        max_length_tokens: Longest row that is kept.
    """
    kept = []
    too_long = added = 0
    for row in rows:
        encoded, stop_added = _encode(row, tokenizer)
        if len(encoded) > max_length_tokens:
            too_long += 1
            continue
        added += stop_added
        kept.append(encoded)
    return EncodedRows(tuple(kept), too_long, added)


def _encode(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[Encoded, bool]:
    """Tokenize prompt and answer of every turn apart, as a served model meets them.

    At inference the prompt is tokenized on its own and the answer follows token by token, so joining them
    before tokenizing could train on tokens across the border that a served model never sees.
    """
    messages: list[dict[str, str]] = [message.to_json() for message in row.messages]
    input_ids: list[int] = []
    labels: list[int] = []
    rendered = ""
    stop_added = False
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        last = index == len(messages) - 1
        prompt = render(tokenizer, messages[:index], add_generation_prompt=True)
        answer = render(tokenizer, messages[: index + 1])
        if not prompt.startswith(rendered) or not answer.startswith(prompt):
            # A template that rewrites earlier turns: what was rendered so far is context only.
            input_ids, labels, rendered = [], [], ""
            answer = prompt + message["content"] if not answer.startswith(prompt) else answer
        ids = _tokens(tokenizer, prompt[len(rendered) :])
        input_ids += ids
        labels += [IGNORED] * len(ids)
        ids = _tokens(tokenizer, answer[len(prompt) :])
        trained = _up_to_stop(ids, tokenizer)
        if last:
            ids = ids[:trained] if trained else [*ids, _stop_token(tokenizer)]
            stop_added, trained = not trained, len(ids)
        input_ids += ids
        labels += [*ids[:trained], *[IGNORED] * (len(ids) - trained)]
        rendered = answer
    return Encoded(tuple(input_ids), tuple(labels)), stop_added


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return a conversation as the model's chat template writes it."""
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(text, str)
    return text


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _up_to_stop(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens there are up to the last stop token, itself included; 0 without one."""
    for index in range(len(ids) - 1, -1, -1):
        if ids[index] == _stop_token(tokenizer):
            return index + 1
    return 0


def _stop_token(tokenizer: PreTrainedTokenizerBase) -> int:
    stop: int = tokenizer.eos_token_id
    return stop


class LikeLengthBatches:
    """Batches of rows of like length; their order is shuffled anew, by seed, in every epoch.

    Every epoch has the same number of batches, and an epoch's batches depend on nothing but lengths, budget,
    seed and epoch: a resumed training skips exactly those it has seen.

    Args:
        lengths: Each row's number of tokens.
        tokens_per_batch: Most tokens in a batch, padding included. A longer row is a batch of its own.
        seed: Decides which rows of the same length meet, and the order of the batches.
        pad_to_multiple_of: Rows are padded to a multiple of this many tokens.
        shuffle: False keeps the batches in the order of their lengths.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens_per_batch: int,
        seed: int,
        *,
        pad_to_multiple_of: int = 1,
        shuffle: bool = True,
    ) -> None:
        self._lengths = lengths
        self._budget = tokens_per_batch
        self._seed = seed
        self._multiple = pad_to_multiple_of
        self._shuffle = shuffle
        self._epoch = 0
        self._count = len(self._batches(0))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches come next."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the epoch's batches as lists of row numbers."""
        return iter(self._batches(self._epoch))

    def _batches(self, epoch: int) -> list[list[int]]:
        chance = random.Random(f"{self._seed}/{epoch}")  # noqa: S311 - an order, not a secret
        order = list(range(len(self._lengths)))
        if self._shuffle:
            chance.shuffle(order)
        order.sort(key=lambda row: self._padded(self._lengths[row]))
        batches: list[list[int]] = []
        for row in order:
            longest = self._padded(self._lengths[row])
            if not batches or (len(batches[-1]) + 1) * longest > self._budget:
                batches.append([])
            batches[-1].append(row)
        if self._shuffle:
            chance.shuffle(batches)
        return batches

    def _padded(self, length: int) -> int:
        return -(-length // self._multiple) * self._multiple


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right.

    Attributes:
        pad_token_id: Fills the rows; the attention mask hides it.
        pad_to_multiple_of: Rounds the length up, where a device wants few different shapes.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask and labels, each of shape (rows, longest row)."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full((len(rows), width), self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros((len(rows), width), dtype=torch.long),
            "labels": torch.full((len(rows), width), IGNORED, dtype=torch.long),
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = torch.tensor(row["input_ids"])
            batch["attention_mask"][index, :length] = 1
            batch["labels"][index, :length] = torch.tensor(row["labels"])
        return batch
