"""Merges an adapter into its base, tensor by tensor: W + s * B @ A in float32, rounded once to W's type.

Untouched tensors are copied byte for byte, and so is every other file. Memory stays at a block of rows and
one adapter pair, whatever the model's size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from web4lora_chassis.errors import FailedPrecondition, InvalidInput

from web4lora_packager.adapter import Adapter, LowRank, Replacement
from web4lora_packager.checkpoint import (
    FLOATS,
    INDEX_NAME,
    Checkpoint,
    Tensor,
    header_of,
    read_checkpoint,
    read_json,
)

_BLOCK_ELEMENTS = 8 << 20
_CHUNK_BYTES = 16 << 20
_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"
# Without their sign, numbers of a type are ordered as integers are. Beyond the largest finite one are
# infinities and NaN. By type: the integer type, all bits but the sign's, the largest finite number.
_BITS: Mapping[str, tuple[Any, int, int]] = {
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F7F_FFFF),
    "F16": (np.uint16, 0x7FFF, 0x7BFF),
    "BF16": (np.uint16, 0x7FFF, 0x7F7F),
}


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        adapter_tensors: Adapter tensors, each used exactly once.
        merged_tensors: Base tensors that were changed or added.
        relative_effect: Frobenius norm of all changes over that of the weights they changed.
        max_abs_weight: Largest absolute value in the merged model's floating-point tensors.
        dtype: The type that most of the model's weights have: F32, F16 or BF16.
        size_bytes: Sum of the sizes of the merged tensors.
    """

    adapter_tensors: int
    merged_tensors: int
    relative_effect: float
    max_abs_weight: float
    dtype: str
    size_bytes: int


@dataclass
class _Tally:
    """Figures that grow while tensors are written."""

    advance: Callable[[int], None]
    change_squared: float = 0.0
    weight_squared: float = 0.0
    max_abs: float = 0.0
    bytes_by_type: dict[str, int] = field(default_factory=dict)

    def wrote(self, tensor: Tensor, data: NDArray[Any]) -> None:
        """Take a piece of a tensor in, as it was written; refuse numbers that are none."""
        self.advance(data.nbytes)
        self.bytes_by_type[tensor.dtype] = self.bytes_by_type.get(tensor.dtype, 0) + data.nbytes
        if tensor.dtype not in FLOATS or not data.size:
            return
        unsigned, mask, limit = _BITS[tensor.dtype]
        largest = (data.view(unsigned) & unsigned(mask)).max()
        if largest > limit:
            raise FailedPrecondition(
                f"{tensor.path.name}: {tensor.name} has, after merging, values that are not finite.",
                fix="The base's type is too narrow for this adapter, or the base is broken.",
                reason="MERGE_NOT_FINITE",
            )
        value = np.asarray([largest], dtype=unsigned).view(FLOATS[tensor.dtype]).astype(np.float32)[0]
        self.max_abs = max(self.max_abs, float(value))


def merge(base: Path, adapter: Path, target: Path, advance: Callable[[int], None]) -> Merged:
    """Write base plus adapter as a checkpoint of the base's own layout.

    Args:
        base: The base model's folder.
        adapter: The adapter's folder.
        target: The folder to write; made here, must be empty.
        advance: Called with the number of bytes of weights just written.

    Raises:
        InvalidInput: A file is missing or broken.
        FailedPrecondition: The adapter is of a kind that is not merged here, does not fit the base, changes
            nothing, or gives numbers that are not finite.
    """
    model, lora = read_checkpoint(base), Adapter(adapter)
    changes = lora.plan()
    untied = _untied_head(model, changes)
    _check_fit(model, lora, changes, untied)
    target.mkdir(parents=True, exist_ok=True)
    _copy_files(model, target, untied)
    tally = _Tally(advance)
    last = model.shards[-1]
    for shard in model.shards:
        added = untied if shard is last else None
        with (target / shard.path.name).open("xb") as out:
            out.write(header_of(shard, added) if added else shard.header)
            for tensor in shard.tensors:
                _write(out, tensor, changes.get(tensor.name), lora, tally)
            if added:
                _write(out, added, changes.get(_HEAD), lora, tally)
    if tally.change_squared == 0:
        raise FailedPrecondition(
            f"{lora.path} changes nothing: merged and base weights are equal.",
            fix="Train longer, or with a higher learning rate: its updates are 0 or vanish in rounding.",
            reason="ADAPTER_WITHOUT_EFFECT",
        )
    return Merged(
        adapter_tensors=len(lora.shapes),
        merged_tensors=len(changes),
        relative_effect=sqrt(tally.change_squared / tally.weight_squared) if tally.weight_squared else 1.0,
        max_abs_weight=tally.max_abs,
        dtype=max(tally.bytes_by_type, key=lambda name: tally.bytes_by_type[name]),
        size_bytes=sum(tally.bytes_by_type.values()),
    )


def _untied_head(model: Checkpoint, changes: dict[str, LowRank | Replacement]) -> Tensor | None:
    """Return the output head to add when it shared the embedding's weights and the adapter parts the two.

    Raises:
        FailedPrecondition: It is not clear which tensor they share.
    """
    parted = [name for name in changes if name == _HEAD or name.endswith(_EMBEDDING)]
    if not parted or not model.config.get("tie_word_embeddings", False) or _HEAD in model.tensors:
        return None
    embeddings = [tensor for name, tensor in model.tensors.items() if name.endswith(_EMBEDDING)]
    if len(embeddings) != 1:
        raise FailedPrecondition(
            f"{model.folder}: the adapter changes {parted[0]}, which is tied, and its partner is not known.",
            fix="Train without the embedding and the output head.",
            reason="ADAPTER_UNSUPPORTED",
        )
    return replace(embeddings[0], name=_HEAD)


def _check_fit(
    model: Checkpoint, lora: Adapter, changes: dict[str, LowRank | Replacement], untied: Tensor | None
) -> None:
    """Refuse an adapter whose targets the base lacks, or has in another shape or type."""
    tensors = model.tensors | ({_HEAD: untied} if untied else {})
    for name, change in changes.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise _misfit(lora, f"it changes {name}, which the base does not have")
        if tensor.dtype not in FLOATS:
            raise _misfit(lora, f"the base's {name} is of type {tensor.dtype}")
        if isinstance(change, Replacement):
            shape = lora.shapes[change.source]
        else:
            shape = (lora.shapes[change.up][0], lora.shapes[change.down][1])
            shape = shape[::-1] if lora.config.fan_in_fan_out else shape
        if shape != tensor.shape:
            raise _misfit(lora, f"{name} is {tensor.shape} in the base and {shape} in the adapter")


def _misfit(lora: Adapter, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{lora.path} does not fit this base model: {why}.",
        fix="Use the base model that it was trained on.",
        reason="ADAPTER_MISFIT",
    )


def _write(
    out: IO[bytes], tensor: Tensor, change: LowRank | Replacement | None, lora: Adapter, tally: _Tally
) -> None:
    """Write a tensor, changed or as it is."""
    if change is None:
        for data in _chunks(tensor):
            out.write(data.data)
            tally.wrote(tensor, data)
        return
    rows = _updated(tensor, change, lora) if isinstance(change, LowRank) else _replaced(tensor, change, lora)
    for old, new in rows:
        with np.errstate(over="ignore"):  # an infinity is refused when it is counted
            rounded = new.astype(FLOATS[tensor.dtype])
        out.write(rounded.tobytes())
        tally.wrote(tensor, rounded)
        difference = rounded.astype(np.float32) - old
        tally.change_squared += float(np.vdot(difference, difference))
        tally.weight_squared += float(np.vdot(old, old))


def _updated(
    tensor: Tensor, change: LowRank, lora: Adapter
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yield blocks of rows of a weight as they were and with the low-rank product added, in float32."""
    down, up = lora.read(change.down), lora.read(change.up)
    left, right = (down.T, up.T) if lora.config.fan_in_fan_out else (up, down)
    for start, old in _blocks(tensor):
        product = left[start : start + len(old)] @ right
        yield old, old + np.float32(change.scale) * product


def _replaced(
    tensor: Tensor, change: Replacement, lora: Adapter
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yield blocks of rows of a weight as they were and as the adapter has them, in float32."""
    whole = lora.read(change.source)
    for start, old in _blocks(tensor):
        yield old, whole[start : start + len(old)]


def _blocks(tensor: Tensor) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield a tensor's rows in float32, some at a time, each with the number of its first row."""
    dtype = FLOATS[tensor.dtype]
    width = int(np.prod(tensor.shape[1:], dtype=np.int64))
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        for start in range(0, tensor.shape[0], step):
            rows = min(step, tensor.shape[0] - start)
            data = np.fromfile(file, dtype=dtype, count=rows * width)
            yield start, data.reshape(rows, *tensor.shape[1:]).astype(np.float32)


def _chunks(tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
    """Yield a tensor's bytes."""
    left = tensor.size_bytes
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        while left:
            data = np.fromfile(file, dtype=np.uint8, count=min(left, _CHUNK_BYTES))
            if not data.size:
                raise InvalidInput(f"{tensor.path} ends within {tensor.name}.", fix="Fetch the file again.")
            left -= data.size
            yield data


def _copy_files(model: Checkpoint, target: Path, untied: Tensor | None) -> None:
    """Copy everything but the weights, byte for byte; only an untied head changes configuration and index."""
    weights = {shard.path.name for shard in model.shards}
    for path in sorted(model.folder.iterdir()):
        if path.is_file() and path.name not in weights and path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
    if untied is None:
        return
    config = {**model.config, "tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (model.folder / INDEX_NAME).is_file():
        index = read_json(model.folder / INDEX_NAME)
        index["weight_map"][_HEAD] = model.shards[-1].path.name
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += untied.size_bytes
        (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
