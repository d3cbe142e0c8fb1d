"""A checkpoint's safetensors files as they lie on disk: headers, and where each tensor's bytes are."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
from web4lora_chassis.errors import InvalidInput

INDEX_NAME: Final = "model.safetensors.index.json"
FLOATS: Final[Mapping[str, np.dtype[Any]]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The data types that can be merged into."""

_HEADER_LIMIT_BYTES = 100 << 20
_SIZES_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        name: Its name.
        dtype: As safetensors names it: F32, F16, BF16, ….
        shape: Its shape.
        path: The file.
        offset: Where its bytes start in the file.
        size_bytes: How many there are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        path: The file.
        header: Its first bytes, length and JSON, as they are.
        metadata: The header's free text.
        tensors: Its tensors in the order of their bytes.
    """

    path: Path
    header: bytes
    metadata: Mapping[str, str]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder.

    Attributes:
        folder: Where it is.
        config: Its config.json.
        shards: Its weights.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of its tensors."""
        return sum(tensor.size_bytes for shard in self.shards for tensor in shard.tensors)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's configuration and headers.

    Args:
        folder: Holds config.json and one or more *.safetensors.

    Raises:
        InvalidInput: A file is missing or can't be read; the message names it.
    """
    config = read_json(folder / "config.json")
    index = folder / INDEX_NAME
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise InvalidInput(f"{folder} has no *.safetensors.", fix="Only safetensors are read, never pickles.")
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise InvalidInput(f"{index}: there is no weight file {name!r}.", fix="Fetch the model again.")
    checkpoint = Checkpoint(folder, config, tuple(read_shard(folder / name) for name in names))
    if len(checkpoint.tensors) != sum(len(shard.tensors) for shard in checkpoint.shards):
        raise InvalidInput(f"{folder} holds a tensor in two of its files.", fix="Fetch the model again.")
    return checkpoint


def read_shard(path: Path) -> Shard:
    """Read a safetensors file's header and check that it fits the file.

    Raises:
        InvalidInput: It is not such a file, or it was cut off.
    """
    try:
        with path.open("rb") as file:
            length_bytes = file.read(8)
            (length,) = struct.unpack("<Q", length_bytes)
            if not 2 <= length <= _HEADER_LIMIT_BYTES:
                raise ValueError(f"a header of {length} bytes")
            text = file.read(length)
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        start = 8 + length
        tensors = [_tensor(name, entry, path, start) for name, entry in entries.items()]
        tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
        for tensor, end in zip(tensors, [*(t.offset for t in tensors[1:]), path.stat().st_size], strict=True):
            if tensor.offset + tensor.size_bytes != end:
                raise ValueError(f"{tensor.name} does not end where the next one starts")
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{path} can't be read as safetensors: {error}.", fix="Fetch the file again."
        ) from error
    return Shard(path, length_bytes + text, metadata, tuple(tensors))


def header_of(shard: Shard, added: Tensor) -> bytes:
    """Return the first bytes of a file that holds a shard's tensors and, behind them, one more."""
    entries: dict[str, Any] = {"__metadata__": dict(shard.metadata)} if shard.metadata else {}
    position = 0
    for tensor in (*shard.tensors, added):
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size_bytes],
        }
        position += tensor.size_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InvalidInput: There is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} can't be read as JSON: {error}.") from error
    if not isinstance(data, dict):
        raise InvalidInput(f"{path} holds no JSON object.")
    return data


def _tensor(name: str, entry: Mapping[str, Any], path: Path, start: int) -> Tensor:
    shape = tuple(int(size) for size in entry["shape"])
    first, last = entry["data_offsets"]
    if 8 * (last - first) != prod(shape) * _SIZES_BITS[entry["dtype"]]:
        raise ValueError(f"{name} has other bytes than its shape needs")
    return Tensor(name, entry["dtype"], shape, path, start + first, last - first)
