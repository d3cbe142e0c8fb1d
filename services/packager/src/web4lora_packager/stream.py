"""The merge as llama.cpp's converter reads it: merged values where the files have old ones.

Lives in the converter's process. A tensor that changes comes in float32, so the converter rounds it once, to
the GGUF's own type; one that the files lack comes behind the last shard's. Names are those in the files,
before the converter renames anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from web4lora_chassis.model_files.safetensors import Tensor

from web4lora_packager.merge import Merge, Merged, Tally
from web4lora_packager.tensors import FLOATS

F16_MAX = 65504.0


class TooLarge(Exception):
    """A weight does not fit F16, and the caller asked to be told."""


class Source:
    """A tensor as the converter's own `LocalTensor` is: a type, a shape, and the bytes when they are needed.

    Attributes:
        dtype: Its type by safetensors' name.
        shape: Its sizes, as in the files.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], read: Callable[[], NDArray[np.uint8]]) -> None:
        self.dtype = dtype
        self.shape = shape
        self._read = read

    def mmap_bytes(self) -> NDArray[np.uint8]:
        """Return the tensor's bytes."""
        return self._read()


class Stream:
    """Merged tensors, made one at a time when the converter asks for them.

    Args:
        merge: What changes.
        gguf_type: F16 or BF16: what the converter rounds to.
        require_f16: Raise when a weight does not fit F16.
    """

    def __init__(self, merge: Merge, gguf_type: str, *, require_f16: bool) -> None:
        self._merge = merge
        self._type = FLOATS[gguf_type]
        self._require_f16 = require_f16
        self._tally = Tally()
        self._asked: set[str] = set()

    def sources(self, shard: str, found: Mapping[str, Any]) -> dict[str, Any]:
        """Return a shard's tensors, sorted by name as the converter sorts them.

        Args:
            shard: The file's name.
            found: The converter's own tensors of that file, by name.
        """
        model = self._merge.model
        here = next(each for each in model.shards if each.path.name == shard)
        behind = self._merge.added if here is model.shards[-1] else ()
        sources: dict[str, Any] = {}
        for tensor in (*here.tensors, *behind):
            if tensor.name in self._merge.changes:
                sources[tensor.name] = Source("F32", tensor.shape, self._changed(tensor))
            elif tensor in behind:
                sources[tensor.name] = Source(tensor.dtype, tensor.shape, self._copy(tensor))
            else:
                own = found[tensor.name]
                sources[tensor.name] = Source(own.dtype, own.shape, self._seen(tensor, own.mmap_bytes))
        return dict(sorted(sources.items()))

    def merged(self) -> Merged:
        """Return what came of it, when the converter is done.

        Raises:
            FailedPrecondition: Nothing changed.
            RuntimeError: The converter left out a tensor that changes.
        """
        if left := sorted(self._merge.changes.keys() - self._asked):
            raise RuntimeError(f"the converter never asked for {left[0]}, which the adapter changes")
        return self._merge.merged(self._tally)

    def _changed(self, tensor: Tensor) -> Callable[[], NDArray[np.uint8]]:
        def read() -> NDArray[np.uint8]:
            self._asked.add(tensor.name)
            values = np.empty(tensor.shape, np.float32)
            start = 0
            for old, new in self._merge.rows(tensor):
                self._saw(tensor, "F32", new)
                with np.errstate(over="ignore"):  # told by `saw`, or it is as with the converter alone
                    self._tally.rounded(old, new, new.astype(self._type))
                values[start : start + len(new)] = new
                start += len(new)
            return values.reshape(-1).view(np.uint8)

        return read

    def _copy(self, tensor: Tensor) -> Callable[[], NDArray[np.uint8]]:
        return self._seen(
            tensor,
            lambda: np.memmap(tensor.path, mode="c", offset=tensor.offset, shape=tensor.size_bytes),
        )

    def _seen(self, tensor: Tensor, read: Callable[[], NDArray[np.uint8]]) -> Callable[[], NDArray[np.uint8]]:
        def seen() -> NDArray[np.uint8]:
            data = read()
            step = 16 << 20
            for start in range(0, data.size, step):
                self._saw(tensor, tensor.dtype, data[start : start + step])
            return data

        return seen

    def _saw(self, tensor: Tensor, dtype: str, data: NDArray[Any]) -> None:
        self._tally.saw(tensor, dtype, data)
        if self._require_f16 and self._tally.max_abs > F16_MAX:
            raise TooLarge


def stream_of(request: Mapping[str, Any]) -> Stream | None:
    """Return the stream that a conversion's request asks for; None when nothing is merged."""
    if not request["merge"]:
        return None
    from web4lora_packager.layout import Layout

    asked = request["merge"]
    merge = Merge(Path(asked["base"]), Path(asked["adapter"]), Layout.from_json(asked["layout"]))
    return Stream(merge, request["type"], require_f16=request["require_f16"])
