"""Proves a merge: weights of the merged files against a second, independent computation in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from web4lora_chassis.errors import DataLoss

from web4lora_packager.adapter import Adapter, LowRank, Replacement
from web4lora_packager.checkpoint import Checkpoint, read_checkpoint

_ROWS = 16
# Half a unit in the last place, relative to the value; float32 is computed in float32, so it gets more.
_ROUNDING = {"F32": 2.0**-20, "F16": 2.0**-11, "BF16": 2.0**-8}
_SMALLEST = {"F32": 2.0**-126, "F16": 2.0**-24, "BF16": 2.0**-126}


def assert_merged(base: Path, adapter: Path, merged: Path, *, seed: int = 0) -> float:
    """Compare random rows of every changed tensor with base plus adapter, computed anew from the files.

    Args:
        base: The base model's folder.
        adapter: The adapter's folder.
        merged: The merged model's folder.
        seed: Chooses the rows.

    Returns:
        The largest difference.

    Raises:
        DataLoss: A difference is larger than rounding explains, or a tensor is missing.
    """
    random = np.random.default_rng(seed)
    before, after, lora = read_checkpoint(base), read_checkpoint(merged), Adapter(adapter)
    largest = 0.0
    for name, change in lora.plan().items():
        tensor = after.tensors.get(name)
        if tensor is None:
            raise DataLoss(f"{merged} lacks {name}.")
        source = name
        if name not in before.tensors:  # an output head that was tied to the embedding
            source = next(other for other in before.tensors if other.endswith("embed_tokens.weight"))
        rows = np.sort(random.choice(tensor.shape[0], min(_ROWS, tensor.shape[0]), replace=False))
        actual = _rows(after, name, rows)
        expected, magnitude = _expected(change, lora, _rows(before, source, rows), rows)
        tolerance = _ROUNDING[tensor.dtype] * np.abs(expected) + 1e-6 * magnitude + _SMALLEST[tensor.dtype]
        difference = np.abs(actual - expected)
        if not (difference <= tolerance).all():
            raise DataLoss(
                f"{tensor.path.name}: {name} is off by {difference.max():.3g} from base plus adapter.",
                fix="Package again; if it happens again, this is a defect.",
                reason="MERGE_WRONG",
            )
        largest = max(largest, float(difference.max()))
    return largest


def _expected(
    change: LowRank | Replacement, lora: Adapter, old: NDArray[np.float64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return rows of base plus adapter, and the size of the numbers that were added up for them."""
    if isinstance(change, Replacement):
        new = lora.read(change.source).astype(np.float64)[rows]
        return new, np.abs(new)
    down, up = lora.read(change.down).astype(np.float64), lora.read(change.up).astype(np.float64)
    if lora.config.fan_in_fan_out:
        terms = np.einsum("ri,or->ior", down[:, rows], up)
    else:
        terms = np.einsum("or,ri->oir", up[rows], down)
    terms *= change.scale
    return old + terms.sum(axis=-1), np.abs(old) + np.abs(terms).sum(axis=-1)


def _rows(model: Checkpoint, name: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    with safe_open(model.tensors[name].path, framework="numpy") as file:
        view: Any = file.get_slice(name)
        return np.stack([np.asarray(view[int(row)], dtype=np.float64) for row in rows])
