"""A LoRA adapter in PEFT's form: what it changes in its base, by how much, and what we refuse to guess."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, shown
from web4lora_chassis.model_files.model_folder import read_json
from web4lora_chassis.model_files.safetensors import read_shard

from web4lora_packager.tensors import FLOATS, blocks

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What of an adapter is read; never adapter_model.bin, which is a pickle."""

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|magnitude_vector)(?:(?<=[AB])\.weight)?")

# Keys of adapter_config.json that a merge need not look at: they steer training or name things, or the base's
# own layers decide (fan_in_fan_out).
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_dropout",
    "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "tokenizer_files",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "lora_alpha", "modules_to_save", "peft_type", "r",
    "rank_pattern", "use_dora", "use_rslora",
}  # fmt: skip
# Of these the base's own weights were changed before training; merging needs more than the adapter.
_INITIAL_WEIGHTS = (True, False, "gaussian", "orthogonal", "eva")
_RANK_LIMIT, _ALPHA_LIMIT = 1 << 16, 1e9
_PATTERN_SIGNS, _PATTERN_REPEATS, _PATTERN_ALTERNATIVES = 200, 2, 8
_REPEATS = re.compile(r"(?<!\\)[*+?{]")
_RISKY = re.compile(r"\(\?|\)[*+?{]|\\[0-9\\]")
_T = TypeVar("_T")
_AGAIN = "Train again, or bring the adapter as PEFT wrote it."


@dataclass(frozen=True)
class LoraConfig:
    """What a merge needs of adapter_config.json.

    Attributes:
        rank: Rank where no pattern says otherwise.
        alpha: Alpha where no pattern says otherwise.
        rank_pattern: Rank by pattern of module names.
        alpha_pattern: Alpha by pattern of module names.
        rank_stabilized: Scale by alpha / sqrt(rank) rather than alpha / rank.
        dora: The updated weight's rows are given trained lengths.
        modules_to_save: Modules that were trained whole.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool
    dora: bool
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
    """Adds scale * B @ A to a weight; with DoRA each row of the sum then gets a length of its own.

    Attributes:
        module: The module's name in the base.
        down: Name of A in the adapter, of shape (rank, in).
        up: Name of B in the adapter, of shape (out, rank).
        rank: Their common dimension.
        scale: Factor of the product.
        magnitude: Name of the lengths in the adapter, of shape (out,); None where it is plain LoRA.
    """

    module: str
    down: str
    up: str
    rank: int
    scale: float
    magnitude: str | None = None


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
        self._tensors = {tensor.name: tensor for tensor in read_shard(self.path).tensors}
        for tensor in self._tensors.values():
            if tensor.dtype not in FLOATS:
                raise self._refused(f"its tensor {tensor.name} is of type {tensor.dtype}")
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> NDArray[np.float32]:
        """Return a tensor whole.

        Raises:
            InvalidInput: It has values that are no numbers.
        """
        return np.concatenate([rows for _, rows in self.blocks(name)])

    def blocks(self, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield a tensor's rows, some at a time, each with the number of its first row.

        Raises:
            InvalidInput: It has values that are no numbers.
        """
        for start, rows in blocks(self._tensors[name]):
            if not np.isfinite(rows).all():
                raise InvalidInput(
                    f"{self.path}: {name} has values that are not finite.",
                    fix="Training went wrong there: lower the learning rate and train again.",
                    reason="ADAPTER_NOT_FINITE",
                )
            yield start, rows

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
            if inner == name:  # PEFT would not load it; beside one with the prefix it would count twice
                raise self._refused(f"its tensor {name} does not begin with {_PREFIX}")
            if match := _LORA.fullmatch(inner):
                pairs.setdefault(match["module"], {})[match["part"]] = name
            elif self._saved_whole(inner):
                changes[inner] = Replacement(name)
            else:
                raise self._refused(f"its tensor {name} is of no kind that is merged here")
        parts = ("A", "B", "magnitude_vector") if self.config.dora else ("A", "B")
        for module, found in pairs.items():
            target = f"{module}.weight"
            if set(found) != set(parts) or target in changes:
                needed = " and ".join(f"lora_{part}" for part in parts)
                raise self._refused(f"{module} needs {needed} and nothing else")
            changes[target] = self._low_rank(module, *(found[part] for part in parts))
        if not changes:
            raise self._refused("it holds no tensors")
        return changes

    def _low_rank(self, module: str, down: str, up: str, magnitude: str | None = None) -> LowRank:
        a, b = self.shapes[down], self.shapes[up]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0:
            raise self._refused(f"{module} has lora_A of shape {a} and lora_B of shape {b}")
        rank = a[0]
        if rank != self.config.rank_of(module):
            raise self._refused(
                f"{module} has rank {rank}, adapter_config.json says {self.config.rank_of(module)}"
            )
        if magnitude is not None and self.shapes[magnitude] != (b[0],):
            raise self._refused(f"{magnitude} is of shape {self.shapes[magnitude]}, not {(b[0],)}")
        return LowRank(module, down, up, rank, self.config.scale(module, rank), magnitude)

    def _saved_whole(self, name: str) -> bool:
        """Return True when a tensor is of a module that was trained whole: by its name's end, as for PEFT."""
        return name.rpartition(".")[0].endswith(self.config.modules_to_save)

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
            raise _unsupported(path, f"{shown(key)}: {shown(value)}")
    for key, default, handled in (
        ("peft_type", None, ("LORA",)),
        ("bias", "none", ("none",)),
        ("init_lora_weights", True, _INITIAL_WEIGHTS),
    ):
        value = data.get(key, default)
        if not any(value is each or (isinstance(value, str) and value == each) for each in handled):
            raise _unsupported(path, f"{key}: {shown(value)}")
    try:
        return LoraConfig(
            rank=_rank(data["r"], "r"),
            alpha=_alpha(data["lora_alpha"], "lora_alpha"),
            rank_pattern=_patterns(data, "rank_pattern", _rank),
            alpha_pattern=_patterns(data, "alpha_pattern", _alpha),
            rank_stabilized=_flag(data.get("use_rslora"), "use_rslora"),
            dora=_flag(data.get("use_dora"), "use_dora"),
            modules_to_save=_modules(data.get("modules_to_save")),
        )
    except KeyError as error:
        raise InvalidInput(f"{path} is not PEFT's: {error} is missing.", fix=_AGAIN) from error
    except ValueError as error:
        raise InvalidInput(f"{path} is not PEFT's: {error}.", fix=_AGAIN) from error


def _rank(value: object, name: str) -> int:
    if type(value) is not int or not 0 < value <= _RANK_LIMIT:
        raise ValueError(f"{name} is {shown(value)}, not a whole number from 1 to {_RANK_LIMIT:,}")
    return value


def _alpha(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _ALPHA_LIMIT:
        raise ValueError(f"{name} is {shown(value)}, not a number above 0 and up to {_ALPHA_LIMIT:,}")
    return float(value)


def _flag(value: object, name: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, neither true nor false")
    return bool(value)


def _patterns(data: Mapping[str, Any], key: str, read: Callable[[object, str], _T]) -> dict[str, _T]:
    """Return what a configuration gives by pattern of module names, each of which must be safe to match."""
    given = data.get(key) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{key} is {shown(given)}, no object")
    for pattern in given:
        _check_pattern(pattern, key)
    return {pattern: read(value, f"{key} of {shown(pattern)}") for pattern, value in given.items()}


def _check_pattern(pattern: str, key: str) -> None:
    """Refuse a pattern that is no regular expression, or could take longer to match than anyone waits.

    Matching is quick as long as nothing that repeats is repeated, and there are few ways to match at all.
    """
    if (
        len(pattern) > _PATTERN_SIGNS
        or len(_REPEATS.findall(pattern)) > _PATTERN_REPEATS
        or pattern.count("|") > _PATTERN_ALTERNATIVES
        or _RISKY.search(pattern)
    ):
        raise ValueError(f"{key} has the pattern {shown(pattern)}, which may take too long to match")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key} has the pattern {shown(pattern)}, which is none: {error}") from error


def _modules(value: object) -> tuple[str, ...]:
    names = value or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"modules_to_save is {shown(value)}, no list of names")
    return tuple(names)


def _unset(key: str, value: Any) -> bool:
    """Return True for a feature of PEFT that is off; loftq_config is written as {} or as its defaults."""
    return not value or key == "loftq_config"


def _unsupported(path: Path, what: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path}: an adapter with {what} is not merged here.",
        fix="Train LoRA or DoRA: no trained biases, no weights that change the base.",
        reason="ADAPTER_UNSUPPORTED",
    )


def _pattern(patterns: Iterable[str], module: str) -> str:
    """Return the first pattern that a module's name ends with, as PEFT matches them, or the name itself."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module
