"""What we read of a GGUF file: its shape and its chat template, never its weights nor its long lists.

The `gguf` package's reader takes seconds for a vocabulary of 50,000 tokens: it makes an array of each.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from web4lora_chassis.errors import InvalidInput

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
_COUNT_LIMIT = 10_000_000
_CACHE_VALUE_BYTES = 2  # llama-server keeps keys and values in 16 bit
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
}  # fmt: skip

_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1),
    25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17),
}  # fmt: skip
"""Of each type of tensor: weights in a block, and the block's bytes."""
_ALIGNMENT = 32

Value = str | int | float | bool


@dataclass(frozen=True)
class GgufFacts:
    """A model's metadata.

    Attributes:
        architecture: For example llama.
        context_tokens: The longest context the model was made for; 0 when it doesn't say.
        quantization: For example Q4_K_M; empty when unknown.
        parameters: Number of its weights.
        chat_template: Jinja; empty when it has none.
        bos: Text of the token that begins a prompt; empty when it has none.
        eos: Text of the token that ends an answer; empty when it has none.
        values: The simple values by key; lists are left out.
        end_bytes: Where the last tensor ends: a shorter file is cut off.
        shapes: Sizes of each tensor by its name, the length of a row first.
    """

    architecture: str
    context_tokens: int
    quantization: str
    parameters: int
    chat_template: str
    bos: str
    eos: str
    values: dict[str, Value] = field(default_factory=dict)
    end_bytes: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def cache_bytes(self, tokens: int) -> int:
        """Return the size of the key-value cache for so many tokens of context, full attention assumed."""
        heads = self._number("attention.head_count") or 1
        width = self._number("embedding_length") // heads
        keys = self._number("attention.key_length") or width
        held = self._number("attention.value_length") or width
        kv_heads = self._number("attention.head_count_kv") or heads
        return tokens * self._number("block_count") * kv_heads * (keys + held) * _CACHE_VALUE_BYTES

    def _number(self, name: str) -> int:
        value = self.values.get(f"{self.architecture}.{name}", 0)
        return 0 if isinstance(value, str) else int(value)


@dataclass(frozen=True)
class _Tensor:
    """One tensor: its name and sizes, of which type it is, and where its data is."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def weights(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Size of its data; 0 for a type that is newer than we are."""
        weights, size = _BLOCKS.get(self.kind, (1, 0))
        return -(-self.weights // weights) * size


def require_model(path: Path, facts: GgufFacts) -> None:
    """Refuse a GGUF that no runtime could answer with, before it is moved anywhere.

    Args:
        path: The file.
        facts: Its metadata.

    Raises:
        InvalidInput: It is cut off, or a part of a model: an adapter, a vocabulary, one of several files.
    """
    kind = str(facts.values.get("general.type", "model"))
    pieces = int(facts.values.get("split.count", 0))
    size = path.stat().st_size
    problem = fix = ""
    if kind == "adapter":
        problem = "is a LoRA adapter, not a model"
        fix = "Serve it on its base: `web4lora deploy BASE.gguf --name NAME --adapter NAME=ADAPTER.gguf`."
    elif kind in ("mmproj", "imatrix") or facts.architecture == "clip":
        problem = f"is no language model: it holds {kind if kind != 'model' else facts.architecture} data"
        fix = "Name the GGUF of the language model."
    elif pieces > 1:
        number = int(facts.values.get("split.no", 0)) + 1
        problem = f"is file {number} of {pieces} of a split model"
        fix = "Make one file of them first: llama-gguf-split --merge FIRST-FILE MERGED.gguf"
    elif not facts.parameters:
        problem, fix = "holds a vocabulary and no weights", "Name the GGUF of the whole model."
    elif size < facts.end_bytes:
        problem = f"is cut off: it has {size:,} of {facts.end_bytes:,} bytes"
        fix = "Copy or download it again."
    if problem:
        raise InvalidInput(f"The GGUF {problem}.", fix=fix, reason="NOT_A_WHOLE_MODEL")


def read_facts(path: Path) -> GgufFacts:
    """Read the metadata of a GGUF file.

    Raises:
        InvalidInput: It is no GGUF, or cut off.
    """
    with path.open("rb") as file:
        try:
            return _read(file)
        except (struct.error, ValueError, KeyError) as error:
            raise InvalidInput(
                f"{path.name} can't be read as a GGUF file: {error}.",
                fix="Deploy a .gguf made by the packager or by llama.cpp; if it is one, it may be cut off.",
            ) from error


def _read(file: BinaryIO) -> GgufFacts:
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = _number(file, "<I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version} is none of {_VERSIONS}")
    tensors, keys = _count(file), _count(file)
    values: dict[str, Value] = {}
    tokens: list[str] = []
    for _ in range(keys):
        key, kind = _text(file), int(_number(file, "<I"))
        if kind == _ARRAY:
            words = _array(file, keep=key == "tokenizer.ggml.tokens")
            tokens = words or tokens
        else:
            values[key] = _text(file) if kind == _STRING else _number(file, _SIMPLE[kind])
    found = [_tensor(file) for _ in range(tensors)]
    architecture = str(values.get("general.architecture", ""))
    file_type = values.get("general.file_type")
    return GgufFacts(
        architecture=architecture,
        context_tokens=int(values.get(f"{architecture}.context_length", 0)),
        quantization=_FILE_TYPES.get(file_type, "") if isinstance(file_type, int) else "",
        parameters=sum(tensor.weights for tensor in found),
        chat_template=str(values.get("tokenizer.chat_template", "")),
        bos=_token(tokens, values.get("tokenizer.ggml.bos_token_id")),
        eos=_token(tokens, values.get("tokenizer.ggml.eos_token_id")),
        values=values,
        end_bytes=_end(file.tell(), int(values.get("general.alignment", _ALIGNMENT)), found),
        shapes={tensor.name: tensor.shape for tensor in found},
    )


def _number(file: BinaryIO, form: str) -> int | float | bool:
    value: int | float | bool = struct.unpack(form, file.read(struct.calcsize(form)))[0]
    return value


def _count(file: BinaryIO) -> int:
    count = int(_number(file, "<Q"))
    if count > _COUNT_LIMIT:
        raise ValueError(f"a count of {count} is not believable")
    return count


def _text(file: BinaryIO) -> str:
    length = int(_number(file, "<Q"))
    if length > _STRING_LIMIT_BYTES:
        raise ValueError(f"a text of {length} bytes is not believable")
    data = file.read(length)
    if len(data) != length:
        raise ValueError("it ends early")
    return data.decode("utf-8", errors="replace")


def _array(file: BinaryIO, *, keep: bool) -> list[str]:
    """Read past a list; return it when it is one of texts to be kept."""
    kind, count = int(_number(file, "<I")), _count(file)
    if kind == _STRING:
        words = []
        for _ in range(count):
            word = _text(file)
            if keep:
                words.append(word)
        return words
    if kind == _ARRAY:
        for _ in range(count):
            _array(file, keep=False)
    else:
        file.seek(struct.calcsize(_SIMPLE[kind]) * count, 1)
    return []


def _tensor(file: BinaryIO) -> _Tensor:
    """Read one tensor's entry."""
    name = _text(file)
    dimensions = int(_number(file, "<I"))
    if dimensions > 8:
        raise ValueError(f"a tensor of {dimensions} dimensions is not believable")
    shape = tuple(int(_number(file, "<Q")) for _ in range(dimensions))
    return _Tensor(name, shape, kind=int(_number(file, "<I")), offset=int(_number(file, "<Q")))


def _end(header_bytes: int, alignment: int, tensors: Sequence[_Tensor]) -> int:
    """Return where the last tensor ends; where its data begins when its type is newer than we are."""
    if alignment < 1:
        raise ValueError(f"an alignment of {alignment} is not believable")
    start = -(-header_bytes // alignment) * alignment
    return max((start + tensor.offset + tensor.size_bytes for tensor in tensors), default=header_bytes)


def _token(tokens: list[str], index: object) -> str:
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else ""
