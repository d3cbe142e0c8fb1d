"""How to train: every setting of `train`, its bounds and its default."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.pipeline.rules import (
    Choice,
    Flag,
    Names,
    Number,
    NumbersByName,
    StageSettings,
    Text,
    Wrong,
    setting,
)

ALL_LINEAR = "all-linear"
"""Stands for every linear layer of the decoder's layers, as in PEFT."""
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt",
)  # fmt: skip
"""Transformers' names of the schedules that need no figures of their own and no held-out loss."""
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
"""Transformers' names of the optimizers that come with torch and Transformers."""
REPORTS = ("tensorboard", "trackio", "mlflow", "wandb")
"""Transformers' names of what it can report to that keeps everything on the machine."""
_LAYER_NAME = r"[A-Za-z_][A-Za-z0-9_.]{0,99}"
_MAX_LENGTH_TOKENS = 2048
_CPU_TOKENS_PER_BATCH = 512
_GPU_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class LoraSettings(StageSettings):
    """The adapter's shape.

    Attributes:
        rank: Rank of the update.
        alpha: The update is multiplied by alpha / rank; None means 2 * rank.
        dropout: Dropout on the adapter's input.
        target_modules: Names of the linear layers to adapt.
        last_layers: Adapt only the last so many decoder layers; 0 means all. The backward pass stops at the
            first adapted layer, which makes training faster.
        use_rslora: The update is multiplied by alpha / sqrt(rank) instead; PEFT's name.
        use_dora: The updated weight's rows get trained lengths (DoRA); PEFT's name.
        rank_pattern: Rank of the layers whose names end so; PEFT's name.
        alpha_pattern: Alpha of the layers whose names end so; PEFT's name.
    """

    rank: int = setting(Number(16, low=1, high=512))
    alpha: float | None = setting(Number(above=0, high=1e5, default_text="2 * rank"))
    dropout: float = setting(Number(0.0, low=0, high=0.95))
    target_modules: tuple[str, ...] = setting(
        Names(
            ("q_proj", "k_proj", "v_proj", "o_proj"),
            "the name of a layer",
            "Use names like q_proj, k_proj, v_proj, o_proj.",
            pattern=rf"{_LAYER_NAME}|{ALL_LINEAR}",
        )
    )
    last_layers: int = setting(Number(0, low=0, high=10_000))
    use_rslora: bool = setting(Flag(False))
    use_dora: bool = setting(Flag(False))
    rank_pattern: Mapping[str, int] = setting(NumbersByName(Number(low=1, high=512), _LAYER_NAME))
    alpha_pattern: Mapping[str, float] = setting(NumbersByName(Number(above=0, high=1e5), _LAYER_NAME))

    def between(self) -> Iterator[Wrong]:
        """See `StageSettings.between`."""
        if ALL_LINEAR in self.target_modules and len(self.target_modules) > 1:
            yield "target_modules", f"{ALL_LINEAR} names every layer already.", "Name it alone."

    def rank_of(self, module: str) -> int:
        """Return the rank of an adapted layer, by its name in the model."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)

    @property
    def scale_numerator(self) -> float:
        """Alpha, with its default filled in."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


def _matching(patterns: Iterable[str], module: str) -> str:
    """Return the first name that a module's ends with, as PEFT finds it; empty when none does."""
    return next((name for name in patterns if f".{module}".endswith(f".{name}")), "")


@dataclass(frozen=True)
class LossBand(StageSettings):
    """Where the training loss should settle."""

    low: float = setting(Number(0.6, low=0))
    high: float = setting(Number(1.0, above=0))

    def between(self) -> Iterator[Wrong]:
        """See `StageSettings.between`."""
        if self.low >= self.high:
            yield "", f"low {self.low:g} must be below high {self.high:g} (defaults 0.6 and 1.0).", ""


@dataclass(frozen=True)
class TrainSettings(StageSettings):
    """How to train; see the contract's TrainSettings for each field.

    Attributes:
        max_length_tokens: None means 2048, at most what the model was made for; see `for_model`.
        tokens_per_batch: Padding included; None means by device.
        checkpoint_steps: 0 means ten a run.
        start_from: The run, or the digest of the adapter, to go on from; `from` in the contract.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    epochs: float = setting(Number(1.0, low=0.001, high=1000))
    max_steps: int = setting(Number(0, low=0, high=10_000_000))
    learning_rate: float = setting(Number(2e-4, low=1e-8, high=1))
    schedule: str = setting(Choice(SCHEDULES, "cosine"))
    warmup_ratio: float = setting(Number(0.03, low=0, high=1))
    max_length_tokens: int | None = setting(
        Number(
            low=8,
            high=1 << 20,
            default_text=f"{_MAX_LENGTH_TOKENS}, at most what the base model was made for",
        )
    )
    tokens_per_batch: int | None = setting(
        Number(
            low=1,
            high=1 << 22,
            default_text=f"{_CPU_TOKENS_PER_BATCH} on a CPU, {_GPU_TOKENS_PER_BATCH} elsewhere",
        )
    )
    gradient_accumulation: int = setting(Number(1, low=1, high=4096))
    gradient_checkpointing: str = setting(Choice(("auto", "on", "off"), "auto"))
    dtype: str = setting(Choice(("auto", "bf16", "fp16", "fp32"), "auto"))
    seed: int = setting(Number(17, low=0, high=(1 << 32) - 1))
    checkpoint_steps: int = setting(Number(0, low=0, high=10_000_000))
    held_out_evaluations: int = setting(Number(4, low=0, high=1000))
    probes: int = setting(Number(24, low=0, high=1000))
    patience: int = setting(Number(3, low=0, high=10))
    loss_band: LossBand = field(default_factory=LossBand)
    write_bin: bool = setting(Flag(True))
    max_grad_norm: float = setting(Number(1.0, above=0, high=1e6))
    start_from: str | None = setting(
        Text(
            r"latest|run_[0-9]{4}-[0-9]{2}-[0-9]{2}_[0-9]+|[0-9a-f]{12,64}",
            "the id of a run or the digest of an adapter",
        ),
        "from",
    )
    optim: str = setting(Choice(OPTIMIZERS, "adamw_torch"))
    loraplus_lr_ratio: float = setting(Number(1.0, low=1, high=1000))
    neftune_noise_alpha: float = setting(Number(0.0, low=0, high=1000))
    report_to: tuple[str, ...] = setting(
        Names(
            (),
            "what training can report to",
            f"Use {', '.join(REPORTS)}.",
            known=REPORTS,
            default_text="none",
        )
    )

    def for_model(self, context_tokens: int) -> Self:
        """Return settings whose longest row fits a model.

        Args:
            context_tokens: What the model was made for; 0 when that is unknown.

        Raises:
            InvalidInput: Longer rows are asked for than the model can read.
        """
        wanted = self.max_length_tokens
        if wanted and context_tokens and wanted > context_tokens:
            raise InvalidInput(
                f"train.max_length_tokens: {wanted} is more than the {context_tokens} tokens "
                "that the base model was made for.",
                fix=f"Set it to {context_tokens} at most, or leave it out.",
                metadata={"field": "train.max_length_tokens"},
            )
        most = min(_MAX_LENGTH_TOKENS, context_tokens or _MAX_LENGTH_TOKENS)
        return replace(self, max_length_tokens=wanted or most)

    @property
    def of_result(self) -> Self:
        """The settings without those that change nothing of the adapter."""
        return replace(self, report_to=())

    @property
    def longest_row_tokens(self) -> int:
        """Longest row that is trained on, with its default filled in."""
        return self.max_length_tokens or _MAX_LENGTH_TOKENS

    def batch_tokens(self, device: str) -> int:
        """Return the token budget of a batch on a device."""
        return self.tokens_per_batch or (_CPU_TOKENS_PER_BATCH if device == "cpu" else _GPU_TOKENS_PER_BATCH)
