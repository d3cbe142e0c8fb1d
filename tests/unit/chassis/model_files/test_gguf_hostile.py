"""GGUF files that are damaged or meant to harm: one line each, in bounded time and memory."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.model_files import gguf
from web4lora_chassis.model_files.gguf import read_gguf

STRING, ARRAY, U32, F32, BOOL, U64 = 8, 9, 4, 6, 7, 10


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def header(*pairs: bytes, tensors: int = 0, keys: int | None = None, version: int = 3) -> bytes:
    count = len(pairs) if keys is None else keys
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + b"".join(pairs)


def a_list(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body


def nested(depth: int) -> bytes:
    return b"".join(a_list(ARRAY, 1) for _ in range(depth)) + a_list(U32, 0)


def tensor(name: bytes, dimensions: int, *sizes: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", dimensions, *sizes, kind, offset)


ARCHITECTURE = pair(b"general.architecture", STRING, text(b"llama"))
HOSTILE = {
    "empty": b"",
    "another format": b"PK\x03\x04" + bytes(100),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "version 0": header(version=0),
    "version of the future": header(version=4_000_000_000),
    "2^40 numbers in 60 bytes": header(pair(b"a", ARRAY, a_list(U32, 1 << 40))),
    "2^40 texts": header(pair(b"tokenizer.ggml.tokens", ARRAY, a_list(STRING, 1 << 40))),
    "2^64 - 1 numbers": header(pair(b"a", ARRAY, a_list(U64, (1 << 64) - 1))),
    "ten million lists": header(pair(b"a", ARRAY, a_list(ARRAY, 10_000_000))),
    "a list 100,000 deep": header(pair(b"a", ARRAY, nested(100_000))),
    "a list of no kind": header(pair(b"a", ARRAY, a_list(77, 1, bytes(8)))),
    "a value of no kind": header(pair(b"a", 77, bytes(8))),
    "a text of 2^63": header(text(b"a") + struct.pack("<IQ", STRING, 1 << 63)),
    "a key of 2^40": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 40),
    "2^40 keys": header(keys=1 << 40),
    "2^40 tensors": header(ARCHITECTURE, tensors=1 << 40),
    "one key fewer than it says": header(ARCHITECTURE, keys=2),
    "a tensor of 2^31 dimensions": header(ARCHITECTURE, tensor(b"w", 1 << 31, 1), tensors=1, keys=1),
    "a context that is a text": header(
        ARCHITECTURE, pair(b"llama.context_length", STRING, text(b"many"))
    ),
    "a context below 0": header(ARCHITECTURE, pair(b"llama.context_length", 5, struct.pack("<i", -1))),
    "a context that is no number": header(
        ARCHITECTURE, pair(b"llama.context_length", F32, struct.pack("<f", float("nan")))
    ),
    "an endless context": header(
        ARCHITECTURE, pair(b"llama.context_length", F32, struct.pack("<f", float("inf")))
    ),
    "an alignment of 0": header(ARCHITECTURE, pair(b"general.alignment", U32, struct.pack("<I", 0))),
    "an alignment that is a text": header(ARCHITECTURE, pair(b"general.alignment", STRING, text(b"x"))),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_each_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(InvalidInput) as caught:
        read_gguf(path)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300
    assert caught.value.fix


WITHOUT_A_MODEL = {
    "split counts that are texts": header(ARCHITECTURE, pair(b"split.count", STRING, text(b"x"))),
    "sizes beyond 2^64": header(ARCHITECTURE, tensor(b"w", 8, *[1 << 63] * 8), tensors=1, keys=1),
    "an offset at the end of the world": header(
        ARCHITECTURE, tensor(b"w", 1, 4, offset=(1 << 64) - 1), tensors=1, keys=1
    ),
    "a name that is no UTF-8": header(pair(b"\xff\xfe", STRING, text(b"\xff"))),
    "a token id beyond the vocabulary": header(
        ARCHITECTURE, pair(b"tokenizer.ggml.bos_token_id", U32, struct.pack("<I", 1 << 31))
    ),
    "no architecture": header(),
    "nothing but zeros behind it": header(ARCHITECTURE) + bytes(1 << 20),
}


@pytest.mark.parametrize("name", WITHOUT_A_MODEL)
def test_odd_but_readable_ones_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(WITHOUT_A_MODEL[name])
    found = read_gguf(path)
    found.cache_bytes(1 << 20)
    assert not found.special_tokens


@pytest.mark.parametrize("place", ["absent.gguf", "."])
def test_no_file_is_said_too(tmp_path: Path, place: str) -> None:
    with pytest.raises(NotFound):
        read_gguf(tmp_path / place)


def test_a_file_full_of_entries_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many empty entries fit into a file of gigabytes as would take minutes to read."""
    monkeypatch.setattr(gguf, "_VALUES_LIMIT", 100_000)
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:
        file.write(header(ARCHITECTURE, tensors=2_000_000, keys=1))
        file.truncate(64 << 20)  # zeros: tensors without a name or a size
    with pytest.raises(InvalidInput, match="more than 100,000 values"):
        read_gguf(path)


def test_bytes_changed_at_random_end_in_words_or_in_facts(tmp_path: Path) -> None:
    whole = header(
        ARCHITECTURE,
        pair(b"llama.context_length", U32, struct.pack("<I", 2048)),
        pair(b"tokenizer.ggml.tokens", ARRAY, a_list(STRING, 3, text(b"a") + text(b"b") + text(b"c"))),
        pair(b"tokenizer.ggml.add_bos_token", BOOL, b"\x01"),
        tensor(b"w", 2, 4, 4),
        tensors=1, keys=4,
    )  # fmt: skip
    chance = random.Random(7)
    path = tmp_path / "x.gguf"
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        path.write_bytes(data[: chance.randint(1, len(data))] if chance.random() < 0.2 else data)
        try:
            read_gguf(path).cache_bytes(128)
        except InvalidInput:
            continue
