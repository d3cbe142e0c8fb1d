"""Proves a merged GGUF by what PEFT makes of base and adapter. Imports torch, in the converter's process.

Nothing here is shared with the merge: PEFT's own layers compute each update, and Transformers' class says
which parameters are one. The converter, for once in 32 bit, brings their values into the GGUF's names and
arrangement; rows that are not looked at go through it as NaN. What the file holds must then be the expected
value, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from web4lora_chassis.errors import DataLoss
from web4lora_chassis.model_files.gguf import GgufTensor, read_gguf
from web4lora_chassis.model_files.model_folder import read_model_folder
from web4lora_chassis.model_files.safetensors import Tensor

from web4lora_packager.proof import SLACK, Model, pieces, updates_of

_STORED: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_ADDING = 2.0**-22  # of adding two numbers in float32, relative to the sum
_BLOCK_WEIGHTS = 4 << 20


class Leaf:
    """A tensor of the files as the converter's own `LocalTensor` is, its values those expected.

    Attributes:
        name: Its name in the files.
        dtype: Always F32.
        shape: Its sizes, as in the files.
        touched: The adapter changes it.
        looked_at: Number of values that are not NaN; known when it was read.
        slack: By how much an update may be off, another order of its sums being as right.
        compared: Number of values that were compared with the GGUF's.
    """

    dtype = "F32"

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: Callable[[Leaf], NDArray[np.float32]],
        *,
        touched: bool,
    ) -> None:
        self.name = name
        self.shape = shape
        self.touched = touched
        self.looked_at = self.compared = 0
        self.slack = 0.0
        self._rows = rows

    def mmap_bytes(self) -> NDArray[np.uint8]:
        """Return the bytes of the values, NaN where a row is not looked at."""
        values = self._rows(self)
        self.looked_at = int(np.count_nonzero(~np.isnan(values)))
        return values.reshape(-1).view(np.uint8)


@dataclass
class _Found:
    """What the comparison found."""

    max_abs_error: float = 0.0
    compared: int = 0
    done_bytes: int = 0


class Expected:
    """The tensors that a merged model is made of, by PEFT.

    Args:
        base: The base model's folder.
        adapter: The adapter's folder.
        seed: Chooses the rows to look at.

    Raises:
        FailedPrecondition: PEFT finds another set of tensors than the adapter has.
        InvalidInput: Transformers knows no such model, or a file is broken.
    """

    def __init__(self, base: Path, adapter: Path, *, seed: int = 0) -> None:
        self._folder = read_model_folder(base)
        self._model = Model(base)
        self._updates = updates_of(base, adapter)
        self._random = torch.Generator().manual_seed(seed)
        stored = self._model.names
        self._of_tensor = {stored[name]: update for name, update in self._updates.items() if name in stored}
        self._added = {
            name: self._folder.tensors[tensor]
            for name in self._model.parameters
            if name not in stored and self._parted(name) and (tensor := self._model.tensor_of(name))
        }
        self._of_tensor |= {name: self._updates[name] for name in self._added if name in self._updates}
        self.leaves: dict[str, Leaf] = {}

    def sources(self, shard: str, found: Mapping[str, Any]) -> dict[str, Any]:
        """Return a file's tensors for the converter, sorted by name.

        Args:
            shard: The file's name.
            found: The converter's own tensors of that file, by name.
        """
        shards = self._folder.shards
        here = next(each for each in shards if each.path.name == shard)
        tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in here.tensors}
        if here is shards[-1]:
            tensors |= self._added
        sources = dict(found)
        for name, tensor in tensors.items():
            if tensor.dtype not in _STORED:
                continue
            update = self._of_tensor.get(name)
            leaf = Leaf(name, tensor.shape, self._rows(tensor.name, update), touched=update is not None)
            self.leaves[name] = sources[name] = leaf
        return dict(sorted(sources.items()))

    def compare(self, gguf: Path, tensors: dict[str, Any], to_eager: Callable[[Any], Any]) -> dict[str, Any]:
        """Compare a GGUF with what the converter makes of the expected tensors.

        Args:
            gguf: The 16-bit file.
            tensors: The converter's lazy tensors, by the GGUF's names; each is taken out when compared.
            to_eager: Evaluates one.

        Returns:
            `max_abs_error`, the largest difference among what the adapter changes, and `compared`, the number
            of tensors that it changes.

        Raises:
            DataLoss: The file is not base plus adapter, or something could not be compared.
        """
        header = read_gguf(gguf)
        places = {tensor.name: tensor for tensor in header.tensors}
        if odd := sorted(places.keys() ^ tensors.keys()):
            raise _wrong(gguf, f"{odd[0]} is only in one of the file and what it should be made of")
        found = _Found()
        total = sum(tensor.size_bytes for tensor in header.tensors)
        for name in list(tensors):
            lazy = tensors.pop(name)
            leaves = list(dict.fromkeys(_leaves(lazy)))
            expected = np.asarray(to_eager(lazy))
            self._compare(gguf, header.data_at, places[name], expected, leaves, found)
            found.done_bytes += places[name].size_bytes
            print(f"Writing: {100 * found.done_bytes // max(1, total)}%", flush=True)  # noqa: T201 - progress
        missed = [leaf.name for leaf in self.leaves.values() if leaf.touched and not _whole(leaf)]
        missed += sorted(self._of_tensor.keys() - self.leaves.keys())
        missed += sorted(name for name in self._updates if self._model.tensor_of(name) is None)
        if missed:
            raise _wrong(gguf, f"the adapter changes {missed[0]}, which nothing was compared with")
        found.compared = sum(leaf.touched for leaf in self.leaves.values())
        if not found.compared:
            raise _wrong(gguf, "the adapter changes nothing, so nothing could be compared")
        return {"max_abs_error": found.max_abs_error, "compared": found.compared}

    def _parted(self, name: str) -> bool:
        """Return True when an adapter changes a parameter, or one that is the same, so that they part."""
        tied = self._model.tied
        group = tied.get(name, name)
        same = {group, *(one for one, other in tied.items() if other == group)}
        return len(same) > 1 and not same.isdisjoint(self._updates)

    def _rows(self, origin: str, update: Any) -> Callable[[Leaf], NDArray[np.float32]]:
        def rows(leaf: Leaf) -> NDArray[np.float32]:
            values = np.full(leaf.shape, np.nan, np.float32)
            for start, end in pieces(leaf.shape, self._random):
                old = self._model.files.rows(origin, start, end).float()
                new = old
                if update is not None:
                    new, size = update(old, start, end)
                    leaf.slack = max(leaf.slack, SLACK * float((size - old.abs()).max()))
                if leaf.shape:
                    values[start:end] = new.numpy()
                else:
                    values[...] = new.numpy()
            return values

        return rows

    def _compare(
        self,
        gguf: Path,
        data_at: int,
        place: GgufTensor,
        expected: NDArray[np.float32],
        leaves: list[Leaf],
        found: _Found,
    ) -> None:
        stored = _STORED.get(place.type)
        if stored is None or tuple(reversed(place.shape)) != expected.shape:
            raise _wrong(
                gguf, f"{place.name} is {place.type} of {place.shape}, not of {expected.shape[::-1]}"
            )
        file = np.memmap(gguf, dtype=stored, mode="r", offset=data_at + place.offset, shape=expected.size)
        slack = max((leaf.slack for leaf in leaves), default=0.0)
        touched = any(leaf.touched for leaf in leaves)
        flat, compared = expected.reshape(-1), 0
        for start in range(0, flat.size, _BLOCK_WEIGHTS):
            wanted = flat[start : start + _BLOCK_WEIGHTS]
            known = ~np.isnan(wanted)
            wanted = wanted[known]
            if not wanted.size:
                continue
            held = np.asarray(file[start : start + _BLOCK_WEIGHTS])[known].astype(np.float32)
            off = slack + (_ADDING * np.abs(wanted) if touched else 0.0)
            with np.errstate(over="ignore"):
                low, high = ((wanted + by).astype(stored).astype(np.float32) for by in (-off, off))
            difference = float(np.abs(held - wanted).max())
            if not ((low <= held) & (held <= high)).all():
                raise _wrong(gguf, f"{place.name} is off by {difference:.3g} from what PEFT makes of it")
            compared += wanted.size
            if touched:
                found.max_abs_error = max(found.max_abs_error, difference)
        if compared == sum(leaf.looked_at for leaf in leaves):
            for leaf in leaves:
                leaf.compared += leaf.looked_at
        elif len(leaves) == 1:  # part of it; the rest must be in others
            leaves[0].compared += compared


def _whole(leaf: Leaf) -> bool:
    return 0 < leaf.looked_at <= leaf.compared


def _leaves(lazy: Any) -> Iterator[Leaf]:
    """Yield the tensors of the files that a lazy tensor is made of."""
    if isinstance(lazy, Leaf):
        yield lazy
    elif isinstance(lazy, list | tuple):
        for each in lazy:
            yield from _leaves(each)
    elif hasattr(type(lazy), "to_eager"):
        yield from _leaves(lazy._args)
        yield from _leaves(list(lazy._kwargs.values()))


def _wrong(gguf: Path, why: str) -> DataLoss:
    return DataLoss(
        f"{gguf} is not base plus adapter: {why}.",
        fix="Package again; if it happens again, this is a defect.",
        reason="MERGE_WRONG",
    )
