"""How to train: the contract's TrainSettings as frozen, checked dataclasses with their defaults filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from web4lora_chassis.errors import InvalidInput

DEFAULT_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
SCHEDULES = ("linear", "cosine", "constant")
CHECKPOINTING = ("auto", "on", "off")
DTYPES = ("auto", "bf16", "fp16", "fp32")

_CPU_TOKENS_PER_BATCH = 512
_GPU_TOKENS_PER_BATCH = 4096
_MODULE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,99}")


@dataclass(frozen=True)
class LoraSettings:
    """The adapter's shape.

    Attributes:
        rank: Rank of the update.
        alpha: The update is multiplied by alpha / rank; 0 means 2 * rank.
        dropout: Dropout on the adapter's input.
        target_modules: Names of the linear layers to adapt.
        last_layers: Adapt only the last so many decoder layers; 0 means all. The backward pass stops at the
            first adapted layer, which makes training faster.
    """

    rank: int = 16
    alpha: float = 0.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = DEFAULT_TARGET_MODULES
    last_layers: int = 0

    @property
    def scale_numerator(self) -> float:
        """Alpha, with its default filled in."""
        return self.alpha or 2.0 * self.rank


@dataclass(frozen=True)
class LossBand:
    """Where the training loss should settle."""

    low: float = 0.6
    high: float = 1.0


@dataclass(frozen=True)
class TrainSettings:
    """How to train; see the contract's TrainSettings for each field.

    Attributes:
        tokens_per_batch: Padding included; 0 means by device.
        checkpoint_steps: 0 means ten a run.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    epochs: float = 1.0
    max_steps: int = 0
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    max_length_tokens: int = 2048
    tokens_per_batch: int = 0
    gradient_accumulation: int = 1
    gradient_checkpointing: str = "auto"
    dtype: str = "auto"
    seed: int = 17
    checkpoint_steps: int = 0
    held_out_evaluations: int = 4
    loss_band: LossBand = field(default_factory=LossBand)
    write_bin: bool = True
    max_grad_norm: float = 1.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Take them from JSON data of the contract's message; absent fields get their defaults.

        Raises:
            InvalidInput: A value is out of bounds; the message names the field.
        """
        values = dict(data)
        lora = dict(values.pop("lora", {}))
        band = dict(values.pop("loss_band", {}))
        if "target_modules" in lora:
            lora["target_modules"] = tuple(lora["target_modules"]) or DEFAULT_TARGET_MODULES
        settings = cls(
            lora=LoraSettings(**_known(LoraSettings, lora)),
            loss_band=LossBand(**_known(LossBand, band)),
            **_known(cls, values),
        )
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse values out of bounds.

        Raises:
            InvalidInput: Names the field, its bounds and the value.
        """
        lora = self.lora
        _within("lora.rank", lora.rank, 1, 512)
        _within("lora.alpha", lora.alpha, 0, 1e5)
        _within("lora.dropout", lora.dropout, 0, 0.95)
        _within("lora.last_layers", lora.last_layers, 0, 10_000)
        _within("epochs", self.epochs, 0.001, 1000)
        _within("max_steps", self.max_steps, 0, 10_000_000)
        _within("learning_rate", self.learning_rate, 1e-8, 1)
        _within("warmup_ratio", self.warmup_ratio, 0, 1)
        _within("max_length_tokens", self.max_length_tokens, 8, 1 << 20)
        _within("tokens_per_batch", self.tokens_per_batch, 0, 1 << 22)
        _within("gradient_accumulation", self.gradient_accumulation, 1, 4096)
        _within("seed", self.seed, 0, (1 << 32) - 1)
        _within("checkpoint_steps", self.checkpoint_steps, 0, 10_000_000)
        _within("held_out_evaluations", self.held_out_evaluations, 0, 1000)
        _within("max_grad_norm", self.max_grad_norm, 0, 1e6)
        _within("loss_band.low", self.loss_band.low, 0, self.loss_band.high)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("gradient_checkpointing", self.gradient_checkpointing, CHECKPOINTING)
        _one_of("dtype", self.dtype, DTYPES)
        for name in lora.target_modules:
            if not _MODULE_NAME.fullmatch(name):
                raise InvalidInput(
                    f"lora.target_modules: {name!r} is not the name of a layer.",
                    fix="Use names like q_proj, k_proj, v_proj, o_proj.",
                    metadata={"field": "lora.target_modules"},
                )

    def batch_tokens(self, device: str) -> int:
        """Return the token budget of a batch on a device."""
        return self.tokens_per_batch or (_CPU_TOKENS_PER_BATCH if device == "cpu" else _GPU_TOKENS_PER_BATCH)

    def after_memory_failures(self, failures: int, device: str) -> Self:
        """Return settings that need less memory for the same update: half the batch, summed twice."""
        if failures == 0:
            return self
        budget = max(64, self.batch_tokens(device) >> failures)
        return replace(
            self, tokens_per_batch=budget, gradient_accumulation=self.gradient_accumulation << failures
        )


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are fields of a dataclass; JSON carries some numbers (64 bit, NaN) as text."""
    known = {}
    for entry in fields(kind):
        if entry.name in values:
            value = values[entry.name]
            if isinstance(entry.default, int) and not isinstance(entry.default, bool):
                value = int(value)
            elif isinstance(entry.default, float):
                value = float(value)
            known[entry.name] = value
    return known


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also false for NaN
        raise InvalidInput(
            f"{name} is {value:g}; it must lie between {low:g} and {high:g}.",
            fix=f"Correct {name}.",
            metadata={"field": name},
        )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidInput(
            f"{name} is {value!r}.", fix=f"Use one of {', '.join(allowed)}.", metadata={"field": name}
        )
