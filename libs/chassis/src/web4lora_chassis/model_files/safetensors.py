"""The header of a safetensors file: which tensors it holds and where; it must fit the file to its last byte.

Libraries read the tensors themselves. What they say of a broken file names neither the file nor the tensor.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import InvalidInput

_MAX_HEADER_BYTES = 100 << 20
_MAX_NAME = 300
_MAX_DIMENSIONS = 8
_MAX_NUMBER = 1 << 63
_SIZES_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
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
    """One safetensors file: all of a model's weights, or a part of them.

    Attributes:
        path: The file.
        header: Its first bytes, length and JSON, as they are.
        metadata: The header's free text.
        tensors: Its tensors in the order of their bytes; at least one.
    """

    path: Path
    header: bytes
    metadata: Mapping[str, str]
    tensors: tuple[Tensor, ...]


def read_shard(path: Path) -> Shard:
    """Read a safetensors file's header, which must fit the file's size.

    Raises:
        InvalidInput: It is not such a file, or was cut off, or bytes of it belong to no tensor or to two.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length_bytes = file.read(8)
            (length,) = struct.unpack("<Q", length_bytes)
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            text = file.read(length)
        if len(text) < length:
            raise ValueError(f"its header has {length} bytes, the file only {size}")
        entries = json.loads(text, object_pairs_hook=_once)
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is no text")
        start = 8 + length
        tensors = [_tensor(name, entry, path, start) for name, entry in entries.items()]
        if not tensors:
            raise ValueError("it holds no tensors")
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(f"{path} can't be read as safetensors: {error}.") from error
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
    _check_places(path, tensors, start, size)
    return Shard(path, length_bytes + text, metadata, tuple(tensors))


def _check_places(path: Path, tensors: Iterable[Tensor], start: int, size: int) -> None:
    """Check that the tensors lie one behind the other, from the header's end to the file's."""
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise _broken(f"{path}: {tensor.name} does not begin where the tensor before it ends.")
        end += tensor.size_bytes
        if end > size:
            raise _broken(f"{path} was cut off: it has {size:,} bytes, and {tensor.name} reaches to {end:,}.")
    if end < size:
        raise _broken(f"{path} has {size - end:,} bytes behind its last tensor.")


def _tensor(name: str, entry: Mapping[str, Any], path: Path, start: int) -> Tensor:
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise ValueError(f"{name[:80]!r} is no name of a tensor")
    dtype, (first, last) = entry["dtype"], entry["data_offsets"]
    shape = tuple(entry["shape"])
    if len(shape) > _MAX_DIMENSIONS or not all(
        type(number) is int and 0 <= number < _MAX_NUMBER for number in (*shape, first, last)
    ):
        raise ValueError(f"{name} has odd numbers in its shape or place")
    if dtype not in _SIZES_BYTES:
        raise ValueError(f"{name} is of the unknown type {str(dtype)[:40]!r}")
    if last - first != prod(shape) * _SIZES_BYTES[dtype]:
        raise ValueError(
            f"{name} has {last - first} bytes, its shape {list(shape)} in {dtype} another number"
        )
    return Tensor(name, dtype, shape, path, start + first, last - first)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON pairs, each name once."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("it names something twice")
    return made


def _broken(text: str) -> InvalidInput:
    return InvalidInput(text, fix="Fetch the file again.", reason="MODEL_BROKEN")
