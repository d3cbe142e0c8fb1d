"""Merges an adapter into its base, tensor by tensor: W + s * B @ A in float32, rounded once to W's type.

Untouched tensors are copied byte for byte, and so is every other file. Memory stays at a block of rows and
one adapter pair, whatever the model's size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_chassis.model_files.model_folder import (
    INDEX_NAME,
    ModelFolder,
    is_model_file,
    read_json,
    read_model_folder,
)
from web4lora_chassis.model_files.safetensors import Tensor

from web4lora_packager.adapter import ADAPTER_FILES, Adapter, LowRank, Replacement
from web4lora_packager.layout import Layout
from web4lora_packager.tensors import FLOATS, blocks, header_of

_CHUNK_BYTES = 16 << 20
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
                f"{tensor.path.name}: {tensor.name} has, after merging {ADAPTER_FILES[1]}, "
                "values that are not finite.",
                fix="The base's type is too narrow for this adapter, or the base is broken.",
                reason="MERGE_NOT_FINITE",
            )
        value = np.asarray([largest], dtype=unsigned).view(FLOATS[tensor.dtype]).astype(np.float32)[0]
        self.max_abs = max(self.max_abs, float(value))


@dataclass(frozen=True)
class _Change:
    """What happens to a tensor of the files.

    Attributes:
        change: What the adapter does.
        transposed: The tensor is stored as (in, out).
    """

    change: LowRank | Replacement
    transposed: bool


def merge(base: Path, adapter: Path, target: Path, layout: Layout, advance: Callable[[int], None]) -> Merged:
    """Write base plus adapter as a model folder of the base's own layout.

    Args:
        base: The base model's folder.
        adapter: The adapter's folder.
        target: The folder to write; made here, must be empty.
        layout: How Transformers reads the base.
        advance: Called with the number of bytes of weights just written.

    Raises:
        InvalidInput: A file is missing or broken.
        FailedPrecondition: The adapter is of a kind that is not merged here, does not fit the base, changes
            nothing, or gives numbers that are not finite.
    """
    model, lora = read_model_folder(base), Adapter(adapter)
    plan = lora.plan()
    parted = parted_ties(layout, plan)
    added = _added(model, layout, parted)
    names = {**layout.names, **{tensor.name: tensor.name for tensor in added}}
    if unknown := sorted(plan.keys() - names.keys()):
        raise _misfit(lora, f"it changes {unknown[0]}, which the base does not have")
    changes = {
        names[parameter]: _Change(change, parameter in layout.transposed)
        for parameter, change in plan.items()
    }
    _check_fit(model, lora, changes, added)
    target.mkdir(parents=True, exist_ok=True)
    _copy_files(model, target, added, untie=bool(parted))
    tally = _Tally(advance)
    last = model.shards[-1]
    for shard in model.shards:
        behind = added if shard is last else ()
        with (target / shard.path.name).open("xb") as out:
            out.write(header_of(shard, behind) if behind else shard.header)
            for tensor in (*shard.tensors, *behind):
                _write(out, tensor, changes.get(tensor.name), lora, tally)
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


def parted_ties(layout: Layout, changed: Collection[str]) -> dict[str, str]:
    """Return the tied parameters, such as head and embedding, that an adapter makes differ."""
    return {one: other for one, other in layout.tied.items() if one in changed or other in changed}


def _added(model: ModelFolder, layout: Layout, parted: Mapping[str, str]) -> tuple[Tensor, ...]:
    """Return the tensors to add to the files: those that were not stored because they were another one."""
    added = []
    for pair in parted.items():
        stored = [layout.names[name] for name in pair if name in layout.names]
        if not stored:
            raise FailedPrecondition(
                f"{model.folder} has neither {pair[0]} nor {pair[1]}, which the adapter changes.",
                fix="Fetch the base model again.",
                reason="ADAPTER_MISFIT",
            )
        added += [replace(model.tensors[stored[0]], name=name) for name in pair if name not in layout.names]
    return tuple(added)


def _check_fit(
    model: ModelFolder, lora: Adapter, changes: Mapping[str, _Change], added: tuple[Tensor, ...]
) -> None:
    """Refuse an adapter whose targets the base lacks, or has in another shape or type."""
    tensors = {**model.tensors, **{tensor.name: tensor for tensor in added}}
    for name, planned in changes.items():
        change = planned.change
        tensor = tensors[name]
        if tensor.dtype not in FLOATS:
            raise _misfit(lora, f"the base's {name} is of type {tensor.dtype}")
        if isinstance(change, Replacement):
            shape = lora.shapes[change.source]
        else:
            shape = (lora.shapes[change.up][0], lora.shapes[change.down][1])
            shape = shape[::-1] if planned.transposed else shape
        if shape != tensor.shape:
            raise _misfit(lora, f"{name} is {tensor.shape} in the base and {shape} in the adapter")


def _misfit(lora: Adapter, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{lora.path} does not fit this base model: {why}.",
        fix="Use the base model that it was trained on.",
        reason="ADAPTER_MISFIT",
    )


def _write(out: IO[bytes], tensor: Tensor, planned: _Change | None, lora: Adapter, tally: _Tally) -> None:
    """Write a tensor, changed or as it is."""
    if planned is None:
        for data in _chunks(tensor):
            out.write(data.data)
            tally.wrote(tensor, data)
        return
    change = planned.change
    if isinstance(change, LowRank):
        rows = _updated(tensor, change, lora, transposed=planned.transposed)
    else:
        rows = _replaced(tensor, change, lora)
    for old, new in rows:
        with np.errstate(over="ignore"):  # an infinity is refused when it is counted
            rounded = new.astype(FLOATS[tensor.dtype])
        out.write(rounded.tobytes())
        tally.wrote(tensor, rounded)
        difference = rounded.astype(np.float32) - old
        tally.change_squared += float(np.vdot(difference, difference))
        tally.weight_squared += float(np.vdot(old, old))


def _updated(
    tensor: Tensor, change: LowRank, lora: Adapter, *, transposed: bool
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yield blocks of rows of a weight as they were and with the low-rank product added, in float32."""
    down, up = lora.read(change.down), lora.read(change.up)
    left, right = (down.T, up.T) if transposed else (up, down)
    for start, old in blocks(tensor):
        product = left[start : start + len(old)] @ right
        yield old, old + np.float32(change.scale) * product


def _replaced(
    tensor: Tensor, change: Replacement, lora: Adapter
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yield blocks of rows of a weight as they were and as the adapter has them, in float32."""
    # Both have the same shape, so they come in the same blocks, whatever their types.
    for (_, old), (_, new) in zip(blocks(tensor), lora.blocks(change.source), strict=True):
        yield old, new


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


def _copy_files(model: ModelFolder, target: Path, added: tuple[Tensor, ...], *, untie: bool) -> None:
    """Copy the known files beside the weights, byte for byte; parted ties change configuration and index."""
    for path in sorted(model.folder.iterdir()):
        if path.is_file() and is_model_file(path.name):
            shutil.copyfile(path, target / path.name)
    if not untie:
        return
    config = {**model.config, "tie_word_embeddings": False}
    for key, part in model.config.items():  # models of more than language keep a configuration for each part
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            config[key] = {**part, "tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if added and (model.folder / INDEX_NAME).is_file():
        index = read_json(model.folder / INDEX_NAME)
        for tensor in added:
            index["weight_map"][tensor.name] = model.shards[-1].path.name
            if "total_size" in index.get("metadata", {}):
                index["metadata"]["total_size"] += tensor.size_bytes
        (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
