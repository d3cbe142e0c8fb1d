"""A 16-bit GGUF in which some tensors are quantized already, by another run, for llama-quantize to finish.

llama-quantize copies a tensor that has its target type. Which type that is depends on a file's names, shapes
and keys alone, never on values. So where 16-bit data are equal, the quantized data of the other file are what
quantizing would give, byte for byte.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from web4lora_chassis.model_files.gguf import GgufHeader, GgufTensor, read_gguf

_PIECE_BYTES = 64 << 20
_NO_COPY_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def write_hybrid(whole: Path, taken: Mapping[str, Path], target: Path) -> None:
    """Write a GGUF with the keys of one file, and some tensors' data and types from others.

    Args:
        whole: The 16-bit file.
        taken: For tensors that are not to be its own, the GGUF that has each quantized, by the tensor's name.
        target: The file to write.
    """
    own = read_gguf(whole)
    headers: dict[Path, GgufHeader] = {path: read_gguf(path) for path in set(taken.values())}
    places = {
        path: {tensor.name: tensor for tensor in header.tensors}
        for path, header in {**headers, whole: own}.items()
    }
    tensors = [places[taken.get(tensor.name, whole)][tensor.name] for tensor in own.tensors]
    with whole.open("rb") as source, target.open("wb") as out:
        out.write(source.read(own.entries_at))
        offset = 0
        for tensor in tensors:
            out.write(_entry(tensor, offset))
            offset += _aligned(tensor.size_bytes, own.alignment)
        for tensor in tensors:
            _pad(out, own.alignment)
            out.flush()  # what follows goes past Python's buffer
            path = taken.get(tensor.name, whole)
            start = headers.get(path, own).data_at + tensor.offset
            with path.open("rb") as given:
                _copy(given.fileno(), start, out.fileno(), tensor.size_bytes)
            out.seek(0, os.SEEK_END)
        _pad(out, own.alignment)


def _entry(tensor: GgufTensor, offset: int) -> bytes:
    """Return a tensor's entry in the header."""
    name = tensor.name.encode()
    sizes = tensor.shape
    return (
        struct.pack("<Q", len(name))
        + name
        + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.type_id, offset)
    )


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pad(out: BinaryIO, alignment: int) -> None:
    out.write(bytes(-out.tell() % alignment))


def _copy(source: int, start: int, target: int, count: int) -> None:
    """Copy bytes to where a file is; in the kernel where it can, which shares blocks where the disk can."""
    left, in_kernel = count, hasattr(os, "copy_file_range")
    while left:
        copied = 0
        if in_kernel:
            try:
                copied = os.copy_file_range(source, target, left, offset_src=start)
            except OSError as error:
                if error.errno not in _NO_COPY_IN_KERNEL:
                    raise
                in_kernel = False
                continue
        else:
            data = os.pread(source, min(left, _PIECE_BYTES), start)
            view = memoryview(data)
            while view:
                view = view[os.write(target, view) :]
            copied = len(data)
        if not copied:
            raise OSError(errno.EIO, "a GGUF ended within a tensor")
        start, left = start + copied, left - copied
