"""Batches of rows of like length within a token budget.

Padding is what a CPU pays for and learns nothing from: rows of like length need almost none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from web4lora_chassis.model_files.trained_conversations import IGNORED

if TYPE_CHECKING:
    import torch


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
