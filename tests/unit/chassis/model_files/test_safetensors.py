"""Headers of safetensors files: as the library wrote them, damaged, or meant to harm."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.safetensors import read_shard


def made(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(first: int, last: int, *shape: object, dtype: object = "F16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "half": np.ones((2, 3), np.float16), "none": np.ones((0, 4), np.float32),
        "one": np.array(7, np.int64), "flags": np.ones(3, np.bool_),
    }  # fmt: skip
    save_file(tensors, path, metadata={"format": "pt"})
    shard = read_shard(path)
    assert shard.metadata == {"format": "pt"}
    assert {t.name: (t.dtype, t.shape) for t in shard.tensors} == {
        "half": ("F16", (2, 3)), "none": ("F32", (0, 4)), "one": ("I64", ()), "flags": ("BOOL", (3,)),
    }  # fmt: skip
    data = path.read_bytes()
    assert data.startswith(shard.header)
    for tensor in shard.tensors:
        stored = data[tensor.offset : tensor.offset + tensor.size_bytes]
        assert stored == tensors[tensor.name].tobytes()


HOSTILE = {
    "empty": (b"", "can't be read as safetensors"),
    "seven bytes": (bytes(7), "can't be read as safetensors"),
    "no header": (bytes(8), "a header of 0 bytes"),
    "a header of 2^64 - 1 bytes": (b"\xff" * 64, "a header of 18446744073709551615 bytes"),
    "a header behind the end": (made({}, length=99), "its header has 99 bytes, the file only 10"),
    "a list": (made([]), "can't be read"),
    "no JSON": (made(b"not json at all."), "can't be read"),
    "100,000 deep": (made(b'{"a":' * 100_000), "can't be read"),
    "no tensors": (made({}), "it holds no tensors"),
    "metadata alone": (made({"__metadata__": {"a": "b"}}), "it holds no tensors"),
    "metadata that is a list": (made({"__metadata__": [], "a": entry(0, 2, 1)}, bytes(2)), "can't be read"),
    "metadata that is no text": (made({"__metadata__": {"a": 3}, "a": entry(0, 2, 1)}, bytes(2)), "no text"),
    "a name twice": (
        made(b'{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},'
             b'"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "something twice",
    ),
    "an entry that is a number": (made({"a": 3}), "can't be read"),
    "an entry without a shape": (made({"a": {"dtype": "F16", "data_offsets": [0, 0]}}), "can't be read"),
    "one offset": (made({"a": {**entry(0, 2, 1), "data_offsets": [0]}}, bytes(2)), "can't be read"),
    "a name of two lines": (made({"a\nb": entry(0, 4, 3)}, bytes(4)), "no name"),
    "a name of a million signs": (made({"a" * 1_000_000: entry(0, 4, 3)}, bytes(4)), "no name"),
    "a type of a million signs": (made({"a": entry(0, 2, 1, dtype="F" * 1_000_000)}), "unknown type"),
    "a size of 4,000 digits": (made({"a": entry(0, 2, 10**4000)}, bytes(2)), "odd numbers"),
    "a million dimensions": (made({"a": entry(0, 2, *[1] * 1_000_000)}, bytes(2)), "odd numbers"),
    "an unknown type": (made({"a": entry(0, 2, 1, dtype="F17")}, bytes(2)), "unknown type 'F17'"),
    "a type that is a list": (made({"a": entry(0, 2, 1, dtype=[])}, bytes(2)), "can't be read"),
    "a size below 0": (made({"a": entry(0, 2, -1, -1)}, bytes(2)), "odd numbers"),
    "a size of 1.0": (made({"a": entry(0, 2, 1.0)}, bytes(2)), "odd numbers"),
    "a size that is true": (made({"a": entry(0, 2, True)}, bytes(2)), "odd numbers"),
    "an offset below 0": (made({"a": entry(-2, 0, 1)}, bytes(2)), "odd numbers"),
    "an offset behind its end": (made({"a": entry(4, 2, 1)}, bytes(4)), "another number"),
    "bytes for another shape": (made({"a": entry(0, 4, 3)}, bytes(4)), "another number"),
    "sizes beyond 2^64": (made({"a": entry(0, 2, 1 << 62, 1 << 62)}, bytes(2)), "another number"),
    "beyond the end": (made({"a": entry(0, 1 << 40, 1 << 39)}, bytes(9)), "was cut off"),
    "an overlap": (made({"a": entry(0, 4, 2), "b": entry(2, 6, 2)}, bytes(6)), "b does not begin where"),
    "the same place": (made({"a": entry(0, 4, 2), "b": entry(0, 4, 2)}, bytes(4)), "does not begin where"),
    "a hole": (made({"a": entry(0, 2, 1), "b": entry(4, 6, 1)}, bytes(6)), "b does not begin where"),
    "a hole before the first": (made({"a": entry(2, 4, 1)}, bytes(4)), "a does not begin where"),
    "more behind the last": (made({"a": entry(0, 2, 1)}, bytes(9)), "7 bytes behind its last tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_each_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    data, said = HOSTILE[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=said) as caught:
        read_shard(path)
    assert "x.safetensors" in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 700
    assert caught.value.fix


def test_a_long_header_is_not_even_read(tmp_path: Path) -> None:
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", (100 << 20) + 1))
        file.truncate(1 << 30)  # sparse
    with pytest.raises(InvalidInput, match="a header of 104857601 bytes"):
        read_shard(tmp_path / "x.safetensors")


@pytest.mark.parametrize("place", ["absent.safetensors", "."])
def test_no_file_is_said_too(tmp_path: Path, place: str) -> None:
    with pytest.raises(InvalidInput, match="can't be read as safetensors"):
        read_shard(tmp_path / place)


def test_bytes_changed_at_random_end_in_words_or_in_a_header_that_fits(tmp_path: Path) -> None:
    whole = made({"__metadata__": {"format": "pt"}, "a": entry(0, 4, 2), "b": entry(4, 8, 2)}, bytes(8))
    chance = random.Random(7)
    path = tmp_path / "x.safetensors"
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.choice(
                (0, 0x22, 0x2C, 0x31, 0xFF, chance.randrange(256))
            )
        path.write_bytes(data)
        try:
            shard = read_shard(path)
        except InvalidInput:
            continue
        assert sum(tensor.size_bytes for tensor in shard.tensors) + len(shard.header) == len(data)
