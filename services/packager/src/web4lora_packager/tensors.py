"""Tensors of safetensors files: rows in float32, some at a time; the header of a file with more of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from web4lora_chassis.model_files.safetensors import Shard, Tensor

FLOATS: Final[Mapping[str, np.dtype[Any]]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The data types that can be merged into."""

_BLOCK_ELEMENTS = 4 << 20


def blocks(tensor: Tensor) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield a tensor's rows in float32, some at a time, each with the number of its first row."""
    dtype = FLOATS[tensor.dtype]
    width = prod(tensor.shape[1:])
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        for start in range(0, tensor.shape[0], step):
            rows = min(step, tensor.shape[0] - start)
            data = np.fromfile(file, dtype=dtype, count=rows * width)
            yield start, data.reshape(rows, *tensor.shape[1:]).astype(np.float32)


def header_of(shard: Shard, added: Iterable[Tensor]) -> bytes:
    """Return the first bytes of a file that holds a shard's tensors and, behind them, others."""
    entries: dict[str, Any] = {"__metadata__": dict(shard.metadata)} if shard.metadata else {}
    position = 0
    for tensor in (*shard.tensors, *added):
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size_bytes],
        }
        position += tensor.size_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
