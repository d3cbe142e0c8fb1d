"""Merges an adapter into its base, tensor by tensor: W + s * B @ A in float32, rounded once.

DoRA gives each row of that sum a trained length.

`Merge` says which tensors change and gives their values, for `stream` to hand to llama.cpp's converter;
`merge` writes them as a checkpoint. There untouched tensors are copied byte for byte, and so is every other
file. Memory stays at a block of rows and one adapter pair, whatever the model's size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

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
        rounding_error: Frobenius norm of what rounding took from the changed weights, over that of the
            changes: 0 when all of the training survived it.
        max_abs_weight: Largest absolute value in the merged model's floating-point tensors.
    """

    adapter_tensors: int
    merged_tensors: int
    relative_effect: float
    rounding_error: float
    max_abs_weight: float


@dataclass
class Tally:
    """Figures that grow while tensors are made."""

    change_squared: float = 0.0
    weight_squared: float = 0.0
    update_squared: float = 0.0
    lost_squared: float = 0.0
    max_abs: float = 0.0

    def saw(self, tensor: Tensor, dtype: str, data: NDArray[Any]) -> None:
        """Take a piece of a tensor in, in its type's name; refuse numbers that are none."""
        if dtype not in FLOATS or not data.size:
            return
        unsigned, mask, limit = _BITS[dtype]
        largest = (data.view(unsigned) & unsigned(mask)).max()
        if largest > limit:
            raise FailedPrecondition(
                f"{tensor.path.name}: {tensor.name} has, after merging {ADAPTER_FILES[1]}, "
                "values that are not finite.",
                fix="The base's type is too narrow for this adapter, or the base is broken.",
                reason="MERGE_NOT_FINITE",
            )
        value = np.asarray([largest], dtype=unsigned).view(FLOATS[dtype]).astype(np.float32)[0]
        self.max_abs = max(self.max_abs, float(value))

    def rounded(self, old: NDArray[np.float32], new: NDArray[np.float32], kept: NDArray[Any]) -> None:
        """Take in rows as they were, as merging makes them, and as they are kept."""
        stored = kept.astype(np.float32)
        for name, rows in (
            ("change_squared", stored - old),
            ("weight_squared", old),
            ("update_squared", new - old),
            ("lost_squared", stored - new),
        ):
            setattr(self, name, getattr(self, name) + float(np.vdot(rows, rows)))


@dataclass(frozen=True)
class Change:
    """What happens to a tensor of the files.

    Attributes:
        change: What the adapter does.
        transposed: The tensor is stored as (in, out).
    """

    change: LowRank | Replacement
    transposed: bool


class Merge:
    """What an adapter makes of a base; no weight is read before it is asked for.

    Args:
        base: The base model's folder.
        adapter: The adapter's folder.
        layout: How Transformers reads the base.

    Attributes:
        base: The base model's folder.
        adapter: The adapter's folder.
        layout: How Transformers reads the base.
        model: The base.
        lora: The adapter.
        changes: What happens to each tensor that changes, by its name in the files.
        added: Tensors that the files lack, because they were another one: they come behind the last shard.
        parted: The tied parameters that the adapter makes differ.

    Raises:
        InvalidInput: A file is missing or broken.
        FailedPrecondition: The adapter is of a kind that is not merged here, or does not fit the base.
    """

    def __init__(self, base: Path, adapter: Path, layout: Layout) -> None:
        self.base, self.adapter, self.layout = base, adapter, layout
        self.model, self.lora = read_model_folder(base), Adapter(adapter)
        plan = self.lora.plan()
        self.parted = parted_ties(layout, plan)
        self.added = _added(self.model, layout, self.parted)
        names = {**layout.names, **{tensor.name: tensor.name for tensor in self.added}}
        if unknown := sorted(plan.keys() - names.keys()):
            raise _misfit(self.lora, f"it changes {unknown[0]}, which the base does not have")
        self.changes = {
            names[parameter]: Change(change, parameter in layout.transposed)
            for parameter, change in plan.items()
        }
        _check_fit(self.model, self.lora, self.changes, self.added)

    def rows(self, tensor: Tensor) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Yield blocks of rows of a tensor that changes, as they were and as they are to be, in float32."""
        planned = self.changes[tensor.name]
        if isinstance(planned.change, LowRank):
            return _updated(tensor, planned.change, self.lora, transposed=planned.transposed)
        return _replaced(tensor, planned.change, self.lora)

    def untied(self) -> dict[str, str]:
        """Return the texts of configuration and index where they say that ties were parted, by file name."""
        if not self.parted:
            return {}
        config = {**self.model.config, "tie_word_embeddings": False}
        for key, part in self.model.config.items():  # models of more than language keep one for each part
            if isinstance(part, dict) and "tie_word_embeddings" in part:
                config[key] = {**part, "tie_word_embeddings": False}
        texts = {"config.json": config}
        if self.added and (self.model.folder / INDEX_NAME).is_file():
            texts[INDEX_NAME] = index = read_json(self.model.folder / INDEX_NAME)
            for tensor in self.added:
                index["weight_map"][tensor.name] = self.model.shards[-1].path.name
                if "total_size" in index.get("metadata", {}):
                    index["metadata"]["total_size"] += tensor.size_bytes
        return {name: json.dumps(text, indent=2) + "\n" for name, text in texts.items()}

    def merged(self, tally: Tally) -> Merged:
        """Return what came of it, when all tensors were made.

        Raises:
            FailedPrecondition: Nothing changed.
        """
        if tally.change_squared == 0:
            raise FailedPrecondition(
                f"{self.lora.path} changes nothing: merged and base weights are equal.",
                fix="Train longer, or with a higher learning rate: its updates are 0 or vanish in rounding.",
                reason="ADAPTER_WITHOUT_EFFECT",
            )
        weight = tally.weight_squared
        return Merged(
            adapter_tensors=len(self.lora.shapes),
            merged_tensors=len(self.changes),
            relative_effect=sqrt(tally.change_squared / weight) if weight else 1.0,
            rounding_error=sqrt(tally.lost_squared / tally.update_squared),
            max_abs_weight=tally.max_abs,
        )


def merge(base: Path, adapter: Path, target: Path, layout: Layout, advance: Callable[[int], None]) -> Merged:
    """Write base plus adapter as a model folder of the base's own layout, in the base's own types.

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
    plan = Merge(base, adapter, layout)
    target.mkdir(parents=True, exist_ok=True)
    _copy_files(plan, target)
    tally = Tally()
    last = plan.model.shards[-1]
    for shard in plan.model.shards:
        behind = plan.added if shard is last else ()
        with (target / shard.path.name).open("xb") as out:
            out.write(header_of(shard, behind) if behind else shard.header)
            for tensor in (*shard.tensors, *behind):
                for data in _written(plan, tensor, tally):
                    out.write(data.tobytes())
                    advance(data.nbytes)
    return plan.merged(tally)


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
    model: ModelFolder, lora: Adapter, changes: Mapping[str, Change], added: tuple[Tensor, ...]
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
            if change.magnitude is not None and planned.transposed:
                raise FailedPrecondition(
                    f"{lora.path} is of DoRA, and {name} is stored as (in, out); that is not merged here.",
                    fix="Train it with use_dora: false.",
                    reason="ADAPTER_UNSUPPORTED",
                )
        if shape != tensor.shape:
            raise _misfit(lora, f"{name} is {tensor.shape} in the base and {shape} in the adapter")


def _misfit(lora: Adapter, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{lora.path} does not fit this base model: {why}.",
        fix="Use the base model that it was trained on.",
        reason="ADAPTER_MISFIT",
    )


def _written(plan: Merge, tensor: Tensor, tally: Tally) -> Iterator[NDArray[Any]]:
    """Yield a tensor's data, changed or as it is, in its own type."""
    if tensor.name not in plan.changes:
        for data in _chunks(tensor):
            tally.saw(tensor, tensor.dtype, data)
            yield data
        return
    for old, new in plan.rows(tensor):
        with np.errstate(over="ignore"):  # an infinity is refused when it is seen
            kept = new.astype(FLOATS[tensor.dtype])
        tally.saw(tensor, tensor.dtype, kept)
        tally.rounded(old, new, kept)
        yield kept


def _updated(
    tensor: Tensor, change: LowRank, lora: Adapter, *, transposed: bool
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yield blocks of rows of a weight as they were and with the low-rank change, in float32."""
    down, up = lora.read(change.down), lora.read(change.up)
    left, right = (down.T, up.T) if transposed else (up, down)
    lengths = None if change.magnitude is None else lora.read(change.magnitude)
    for start, old in blocks(tensor):
        product = left[start : start + len(old)] @ right
        new = old + np.float32(change.scale) * product
        if lengths is not None:
            with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros is refused when it is seen
                factors = lengths[start : start + len(old)] / np.linalg.norm(new, axis=1)
            new *= factors[:, np.newaxis]
        yield old, new


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


def _copy_files(plan: Merge, target: Path) -> None:
    """Copy the known files beside the weights, byte for byte; parted ties change configuration and index."""
    for path in sorted(plan.model.folder.iterdir()):
        if path.is_file() and is_model_file(path.name):
            shutil.copyfile(path, target / path.name)
    for name, text in plan.untied().items():
        (target / name).write_text(text, encoding="utf-8")
