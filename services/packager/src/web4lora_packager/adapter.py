"""A LoRA adapter in PEFT's form: what it changes in its base, by how much, and what we refuse to guess."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from web4lora_chassis.errors import FailedPrecondition, InvalidInput

from web4lora_packager.checkpoint import read_json

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What of an adapter is read; never adapter_model.bin, which is a pickle."""

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")

# Keys of adapter_config.json that a merge need not look at: they steer training or name things.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "tokenizer_files",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "fan_in_fan_out", "lora_alpha", "modules_to_save", "peft_type", "r",
    "rank_pattern", "use_rslora",
}  # fmt: skip
# Of these the base's own weights were changed before training; merging needs more than the adapter.
_INITIAL_WEIGHTS = {True, False, "gaussian", "orthogonal", "eva"}


@dataclass(frozen=True)
class LoraConfig:
    """What a merge needs of adapter_config.json.

    Attributes:
        rank: Rank where no pattern says otherwise.
        alpha: Alpha where no pattern says otherwise.
        rank_pattern: Rank by pattern of module names.
        alpha_pattern: Alpha by pattern of module names.
        rank_stabilized: Scale by alpha / sqrt(rank) rather than alpha / rank.
        fan_in_fan_out: The base stores its weights as (in, out), as GPT-2 does.
        modules_to_save: Modules that were trained whole.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool
    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of B @ A for a module, given the rank that its tensors have."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)
        return alpha / (sqrt(rank) if self.rank_stabilized else rank)

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration gives a module."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank)


@dataclass(frozen=True)
class LowRank:
    """Adds scale * B @ A to a weight.

    Attributes:
        module: The module's name in the base.
        down: Name of A in the adapter, of shape (rank, in).
        up: Name of B in the adapter, of shape (out, rank).
        rank: Their common dimension.
        scale: Factor of the product.
    """

    module: str
    down: str
    up: str
    rank: int
    scale: float


@dataclass(frozen=True)
class Replacement:
    """Puts another tensor in a weight's place.

    Attributes:
        source: Its name in the adapter.
    """

    source: str


class Adapter:
    """An adapter's configuration and tensors. Tensors are read from disk when they are asked for.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.

    Raises:
        InvalidInput: A file is missing or broken.
        FailedPrecondition: It is of a kind that is not merged here.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ADAPTER_FILES[1]
        self.config = _config(read_json(folder / ADAPTER_FILES[0]), folder / ADAPTER_FILES[0])
        self._file: Any = None
        try:
            self._file = safe_open(self.path, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise InvalidInput(f"{self.path} can't be read: {error}.", fix="Train again.") from error
        names: list[str] = self._file.keys()
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}

    def read(self, name: str) -> NDArray[np.float32]:
        """Return a tensor.

        Raises:
            InvalidInput: It has values that are no numbers.
        """
        tensor = np.asarray(self._file.get_tensor(name), dtype=np.float32)
        if not np.isfinite(tensor).all():
            raise InvalidInput(
                f"{self.path}: {name} has values that are not finite.",
                fix="Training went wrong there: lower the learning rate and train again.",
                reason="ADAPTER_NOT_FINITE",
            )
        return tensor

    def plan(self) -> dict[str, LowRank | Replacement]:
        """Return what the adapter does to each weight of its base, by the weight's name.

        Every tensor of the adapter is used exactly once.

        Raises:
            FailedPrecondition: A tensor is left over, misses its partner or has an unexpected shape.
        """
        changes: dict[str, LowRank | Replacement] = {}
        pairs: dict[str, dict[str, str]] = {}
        for name in sorted(self.shapes):
            inner = name.removeprefix(_PREFIX)
            if match := _LORA.fullmatch(inner):
                pairs.setdefault(match["module"], {})[match["part"]] = name
            elif inner != name and self._saved_whole(inner):
                changes[inner] = Replacement(name)
            else:
                raise self._refused(f"its tensor {name} is of no kind that is merged here")
        for module, pair in pairs.items():
            target = f"{module}.weight"
            if set(pair) != {"A", "B"} or target in changes:
                raise self._refused(f"{module} needs lora_A and lora_B and nothing else")
            changes[target] = self._low_rank(module, pair["A"], pair["B"])
        if not changes:
            raise self._refused("it holds no tensors")
        return changes

    def _low_rank(self, module: str, down: str, up: str) -> LowRank:
        a, b = self.shapes[down], self.shapes[up]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0:
            raise self._refused(f"{module} has lora_A of shape {a} and lora_B of shape {b}")
        rank = a[0]
        if rank != self.config.rank_of(module):
            raise self._refused(
                f"{module} has rank {rank}, adapter_config.json says {self.config.rank_of(module)}"
            )
        return LowRank(module, down, up, rank, self.config.scale(module, rank))

    def _saved_whole(self, name: str) -> bool:
        """Return True when a tensor belongs to a module that was trained whole."""
        module = name.rpartition(".")[0]
        return any(module == saved or module.endswith(f".{saved}") for saved in self.config.modules_to_save)

    def _refused(self, why: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"{self.path} can't be merged: {why}.",
            fix="Merge adapters as the trainer makes them: LoRA on linear layers.",
            reason="ADAPTER_UNSUPPORTED",
        )


def _config(data: Mapping[str, Any], path: Path) -> LoraConfig:
    """Read the configuration; what would change the result and is not handled here is refused."""
    for key, value in data.items():
        if key not in _READ | _WITHOUT_EFFECT and not _unset(key, value):
            raise _unsupported(path, f"{key}: {json.dumps(value)[:60]}")
    if data.get("peft_type") != "LORA":
        raise _unsupported(path, f"peft_type: {data.get('peft_type')}")
    if data.get("bias", "none") != "none":
        raise _unsupported(path, f"bias: {data['bias']}")
    if data.get("init_lora_weights", True) not in _INITIAL_WEIGHTS:
        raise _unsupported(path, f"init_lora_weights: {data['init_lora_weights']}")
    try:
        return LoraConfig(
            rank=int(data["r"]),
            alpha=float(data["lora_alpha"]),
            rank_pattern={str(k): int(v) for k, v in (data.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (data.get("alpha_pattern") or {}).items()},
            rank_stabilized=bool(data.get("use_rslora", False)),
            fan_in_fan_out=bool(data.get("fan_in_fan_out", False)),
            modules_to_save=tuple(data.get("modules_to_save") or ()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path} is not PEFT's: {error!r}.", fix="Train again.") from error


def _unset(key: str, value: Any) -> bool:
    """Return True for a feature of PEFT that is off; loftq_config is written as {} or as its defaults."""
    return not value or key == "loftq_config"


def _unsupported(path: Path, what: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path}: an adapter with {what} is not merged here.",
        fix="Train plain LoRA: no DoRA, no trained biases, no weights that change the base.",
        reason="ADAPTER_UNSUPPORTED",
    )


def _pattern(patterns: Iterable[str], module: str) -> str:
    """Return the first pattern that a module's name ends with, as PEFT matches them, or the name itself."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module
