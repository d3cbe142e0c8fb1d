"""The header of a GGUF file: its keys and its tensors, never its weights nor its long lists.

The `gguf` package's reader takes seconds for a vocabulary of 50,000 tokens: it makes an array of each.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from web4lora_chassis.errors import InvalidInput, NotFound

_STRING, _ARRAY = 8, 9
_SIMPLE = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_VERSIONS = (2, 3)
_STRING_LIMIT_BYTES = 16 << 20
_HEADER_LIMIT_BYTES = 256 << 20  # the vocabulary is the most of it: 262,144 tokens take some 10 MB
_VALUES_LIMIT = 3_000_000  # a large vocabulary has 262,144 tokens and twice as many merges
_DEEPEST = 4
_LEAST_BYTES = {_STRING: 8, _ARRAY: 12, **{kind: struct.calcsize(code) for kind, code in _SIMPLE.items()}}
"""Of a value of each kind: the bytes that even an empty one takes in the file."""
_LEAST_KEY_BYTES = 8 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8
_CACHE_VALUE_BYTES = 2  # llama-server keeps keys and values in 16 bit
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
}  # fmt: skip

_TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""Of each type of tensor: its name, weights in a block, and the block's bytes."""
K_BLOCK_WEIGHTS = 256
"""Weights in a block of the K and most of the IQ types."""
_ALIGNMENT = 32

_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Of the special tokens by the names that chat templates know: what GGUF's keys call them."""
_ENDS = ("eos", "eot", "eom")

Value = str | int | float | bool


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: Its name.
        shape: Its sizes, the length of a row first.
        type_id: GGML's number for its type.
        offset: Where its bytes start, counted from where the tensors do.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int = 0
    offset: int = 0

    @property
    def type(self) -> str:
        """GGML's name for its type: F16, Q4_K, ….; its number when it is newer than we are."""
        return _TENSOR_TYPES.get(self.type_id, (str(self.type_id),))[0]

    @property
    def weights(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Size of its data; 0 for a type that is newer than we are."""
        _, weights, size = _TENSOR_TYPES.get(self.type_id, ("", 1, 0))
        return -(-self.weights // weights) * size


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        values: The simple values by key; lists are left out.
        tensors: Its tensors.
        special_tokens: Texts of its special tokens by the names that chat templates know: bos_token, …; one
            that it lacks is left out.
        end_bytes: Where the last tensor ends: a shorter file is cut off.
        entries_at: Where the tensors' entries begin, behind the keys.
        data_at: Where the tensors' data begins.
        alignment: Every tensor's data begins at a multiple of it.
    """

    values: Mapping[str, Value]
    tensors: Sequence[GgufTensor] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    end_bytes: int = 0
    entries_at: int = 0
    data_at: int = 0
    alignment: int = _ALIGNMENT

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the model's architecture, for example llama."""
        return str(self.values.get("general.architecture", ""))

    @property
    def kind(self) -> str:
        """What the file holds: model, adapter, mmproj, imatrix."""
        return str(self.values.get("general.type", "model"))

    @property
    def context_tokens(self) -> int:
        """The longest context that the model was made for; 0 when it doesn't say."""
        return self._number("context_length")

    @property
    def quantization(self) -> str:
        """Its file type, for example Q4_K_M; empty when unknown."""
        return _FILE_TYPES.get(self.number("general.file_type", -1), "")

    @property
    def chat_template(self) -> str:
        """Its chat template, in Jinja; empty when it has none."""
        return str(self.values.get("tokenizer.chat_template", ""))

    @property
    def alpha(self) -> float | None:
        """What a LoRA adapter is scaled by, over its rank; None for other files."""
        value = self.values.get("adapter.lora.alpha")
        return float(value) if isinstance(value, int | float) else None

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Sizes of each tensor by its name, the length of a row first."""
        return {tensor.name: tensor.shape for tensor in self.tensors}

    @property
    def parameters(self) -> int:
        """Number of its weights."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def weight_bytes(self) -> int:
        """Sum of the tensors' sizes."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Weights' bits over parameters."""
        return 8 * self.weight_bytes / self.parameters

    @property
    def weights_by_type(self) -> Mapping[str, int]:
        """How many weights there are of each tensor type, the most frequent first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.type] += tensor.weights
        return dict(counts.most_common())

    @property
    def odd_rows(self) -> tuple[int, ...]:
        """The rows' lengths that blocks of 256 don't fit, of matrices that are not in 32 bit."""
        lengths = {t.shape[0] for t in self.tensors if len(t.shape) > 1 and t.type != "F32"}
        return tuple(sorted(length for length in lengths if length % K_BLOCK_WEIGHTS))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that its keys say end generation."""
        return tuple(number for role in _ENDS if (number := self.token_id(role)) is not None)

    def token_id(self, role: str) -> int | None:
        """Return the id of a special token by GGUF's name for it: bos, eos, eot, …; None when it has none."""
        number = self.number(f"tokenizer.ggml.{role}_token_id", -1)
        return None if number < 0 else number

    def cache_bytes(self, tokens: int) -> int:
        """Return the size of the key-value cache for so many tokens of context, full attention assumed."""
        heads = self._number("attention.head_count") or 1
        width = self._number("embedding_length") // heads
        keys = self._number("attention.key_length") or width
        values = self._number("attention.value_length") or width
        kv_heads = self._number("attention.head_count_kv") or heads
        return tokens * self._number("block_count") * kv_heads * (keys + values) * _CACHE_VALUE_BYTES

    def number(self, key: str, default: int = 0) -> int:
        """Return a value that is a count; `default` when it is absent, or is none."""
        value = self.values.get(key)
        return value if type(value) is int and value >= 0 else default

    def _number(self, name: str) -> int:
        return self.number(f"{self.architecture}.{name}")


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, in time and memory bounded by the file's own size.

    Raises:
        InvalidInput: It is no GGUF, or cut off, or says what can't be.
        NotFound: There is no such file.
    """
    try:
        with path.open("rb") as file:
            return _header(_Reader(file, path.stat().st_size))
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise InvalidInput(
            f"{path.name} can't be read as a GGUF file: {error}.",
            fix="Name a .gguf made by the packager or by llama.cpp; if it is one, it may be cut off.",
            reason="GGUF_BROKEN",
        ) from error
    except OSError as error:
        raise NotFound(f"{path} can't be read: {error.strerror}.") from error


class _Reader:
    """Reads a header's parts one after the other; no count in it is believed before the bytes are there."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self._file = file
        self._end = min(size_bytes, _HEADER_LIMIT_BYTES)
        self._values_left = _VALUES_LIMIT

    @property
    def place(self) -> int:
        """How many bytes were read."""
        return self._file.tell()

    def magic(self) -> bytes:
        """Read the file's first four bytes."""
        return self._file.read(4)

    def number(self, code: str) -> int | float | bool:
        """Read a number by its format character of `struct`."""
        size = struct.calcsize(code)
        self._require(size)
        self._values_left -= 1
        if self._values_left < 0:
            raise ValueError(f"more than {_VALUES_LIMIT:,} values are not believable")
        value: int | float | bool = struct.unpack(code, self._file.read(size))[0]
        return value

    def integer(self, code: str) -> int:
        """Read an integer by its format character of `struct`."""
        return int(self.number(code))

    def count(self, least_bytes: int) -> int:
        """Read how many things follow, each of at least so many bytes."""
        count = self.integer("<Q")
        self._require(count * least_bytes)
        return count

    def text(self) -> str:
        """Read a text."""
        length = self.count(1)
        if length > _STRING_LIMIT_BYTES:
            raise ValueError(f"a text of {length} bytes is not believable")
        return self._file.read(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Value:
        """Read a simple value."""
        if kind == _STRING:
            return self.text()
        if kind not in _SIMPLE:
            raise ValueError(f"a value of kind {kind} is not known")
        return self.number(_SIMPLE[kind])

    def array(self, *, keep: bool, depth: int = 1) -> list[str]:
        """Read past a list; return it when it is one of texts to be kept."""
        kind = self.integer("<I")
        if kind not in _LEAST_BYTES or depth > _DEEPEST:
            raise ValueError(f"a list of kind {kind}, {depth} deep, is not known")
        count = self.count(_LEAST_BYTES[kind])
        if kind == _STRING:
            words = []
            for _ in range(count):
                word = self.text()
                if keep:
                    words.append(word)
            return words
        if kind == _ARRAY:
            for _ in range(count):
                self.array(keep=False, depth=depth + 1)
        else:
            self._file.seek(_LEAST_BYTES[kind] * count, 1)
        return []

    def tensor(self) -> GgufTensor:
        """Read one tensor's entry."""
        name = self.text()
        dimensions = self.integer("<I")
        if dimensions > 8:
            raise ValueError(f"a tensor of {dimensions} dimensions is not believable")
        shape = tuple(self.integer("<Q") for _ in range(dimensions))
        return GgufTensor(name, shape, type_id=self.integer("<I"), offset=self.integer("<Q"))

    def _require(self, count_bytes: int) -> None:
        if count_bytes > self._end - self.place:
            raise ValueError(f"it ends early, or says what can't be: {count_bytes} bytes at {self.place}")


def _header(reader: _Reader) -> GgufHeader:
    if reader.magic() != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = reader.integer("<I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version} is none of {_VERSIONS}")
    tensors, keys = reader.count(_LEAST_TENSOR_BYTES), reader.count(_LEAST_KEY_BYTES)
    values: dict[str, Value] = {}
    tokens: list[str] = []
    for _ in range(keys):
        key, kind = reader.text(), reader.integer("<I")
        if kind == _ARRAY:
            words = reader.array(keep=key == "tokenizer.ggml.tokens")
            tokens = words or tokens
        else:
            values[key] = reader.value(kind)
    entries_at = reader.place
    found = [reader.tensor() for _ in range(tensors)]
    _count(values, f"{values.get('general.architecture', '')}.context_length")
    alignment = _count(values, "general.alignment", _ALIGNMENT)
    if alignment < 1:
        raise ValueError(f"an alignment of {alignment} is not believable")
    start = -(-reader.place // alignment) * alignment
    # Where the data begins when the last tensor's type is newer than we are.
    end = max((start + each.offset + each.size_bytes for each in found), default=reader.place)
    header = GgufHeader(
        values, found, end_bytes=end, entries_at=entries_at, data_at=start, alignment=alignment
    )
    special = {name: _token(tokens, header.token_id(role)) for name, role in _SPECIAL_TOKENS.items()}
    return replace(header, special_tokens={name: text for name, text in special.items() if text})


def _count(values: Mapping[str, Value], key: str, default: int = 0) -> int:
    """Return a value that has to be a whole number, not below 0."""
    value = values.get(key, default)
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} is {str(value)[:80]!r}, no count")
    return value


def _token(tokens: list[str], number: int | None) -> str:
    return tokens[number] if number is not None and number < len(tokens) else ""
