"""The values of a base model's weights: no numbers at all, matrices and tokens that were never trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from web4lora_chassis.model_files.safetensors import Tensor

from web4lora_trainer.broken_base import broken

_CHUNK_BYTES = 32 << 20
_MAY_BE_ZERO = ("o_proj.weight", "down_proj.weight")
"""Matrices that write into the residual stream: zero in a block that was put between others on purpose."""
_SMALL_SHARE = 1e-3
_SAMPLED_ROWS = 512
_EXPONENT: Mapping[str, tuple[str, int]] = {
    "F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80),
}  # fmt: skip
"""Each type's bits as numbers, and which of them are all set in what is infinite or not a number."""


def check_values(tensors: Iterable[Tensor]) -> list[str]:
    """Read all weights once.

    Returns:
        What deserves a look but stops nothing.

    Raises:
        InvalidInput: A weight is infinite or not a number, or a matrix holds nothing but zeros.
    """
    notes = []
    for tensor in sorted(tensors, key=lambda tensor: (tensor.path, tensor.offset)):
        _, exponent = _EXPONENT[tensor.dtype]
        zero = True
        for bits in _chunks(tensor):
            if bool(np.any(bits & exponent == exponent)):
                raise broken(
                    f"{tensor.path.name}: {tensor.name} holds weights that are infinite or not a number.",
                    "Fetch the model again, or choose another: this one can't answer.",
                )
            zero = zero and not bool(np.any(bits << 1))  # without the sign: -0 is zero
        if zero and len(tensor.shape) > 1:
            if not tensor.name.endswith(_MAY_BE_ZERO):
                raise broken(
                    f"{tensor.path.name}: {tensor.name} holds nothing but zeros: it was never filled.",
                    "Fetch the file again.",
                )
            notes.append(f"{tensor.name} holds nothing but zeros")
    return notes


def same_values(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(bool(np.array_equal(a, b)) for a, b in zip(_chunks(one), _chunks(other), strict=True))


def untrained_rows(embedding: Tensor, rows: Mapping[int, str]) -> list[str]:
    """Return which of some tokens have an embedding that was never trained.

    That is one next to zero when compared with others, or the very same as another one's.

    Args:
        embedding: Of all tokens.
        rows: The tokens to look at, by id.
    """
    step = max(1, embedding.shape[0] // _SAMPLED_ROWS)
    usual = float(np.median([_norm(_row(embedding, row)) for row in range(0, embedding.shape[0], step)]))
    found, seen = [], dict[bytes, str]()
    for number, token in sorted(rows.items()):
        row = _row(embedding, number)
        twin = seen.setdefault(row.tobytes(), token)
        if _norm(row) < usual * _SMALL_SHARE:
            found.append(f"{token}, whose embedding is nearly zero")
        elif twin != token:
            found.append(f"{token}, whose embedding is the same as that of {twin}")
    return found


def _norm(row: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(row))


def _row(tensor: Tensor, number: int) -> NDArray[np.float32]:
    """Return a row of a matrix."""
    size = tensor.size_bytes // tensor.shape[0]
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset + number * size)
        data = file.read(size)
    if tensor.dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, "<f4" if tensor.dtype == "F32" else "<f2").astype(np.float32)


def _chunks(tensor: Tensor) -> Iterator[NDArray[np.unsignedinteger]]:
    """Yield a tensor's bits, a bounded piece at a time."""
    kind, _ = _EXPONENT[tensor.dtype]
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        left = tensor.size_bytes
        while left:
            data = file.read(min(left, _CHUNK_BYTES))
            if not data:
                raise broken(f"{tensor.path.name} was cut off within {tensor.name}.", "Fetch the file again.")
            left -= len(data)
            yield np.frombuffer(data, kind)
