"""What we read of a GGUF file: its shape and its chat template, never its weights nor its long lists.

The `gguf` package's reader takes seconds for a vocabulary of 50,000 tokens: it makes an array of each.
"""

from __future__ import annotations

import math
import struct
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
    """

    architecture: str
    context_tokens: int
    quantization: str
    parameters: int
    chat_template: str
    bos: str
    eos: str
    values: dict[str, Value] = field(default_factory=dict)

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
    architecture = str(values.get("general.architecture", ""))
    file_type = values.get("general.file_type")
    return GgufFacts(
        architecture=architecture,
        context_tokens=int(values.get(f"{architecture}.context_length", 0)),
        quantization=_FILE_TYPES.get(file_type, "") if isinstance(file_type, int) else "",
        parameters=sum(_weights(file) for _ in range(tensors)),
        chat_template=str(values.get("tokenizer.chat_template", "")),
        bos=_token(tokens, values.get("tokenizer.ggml.bos_token_id")),
        eos=_token(tokens, values.get("tokenizer.ggml.eos_token_id")),
        values=values,
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


def _weights(file: BinaryIO) -> int:
    """Read one tensor's entry; return how many weights it has."""
    _text(file)
    dimensions = int(_number(file, "<I"))
    if dimensions > 8:
        raise ValueError(f"a tensor of {dimensions} dimensions is not believable")
    size = math.prod(int(_number(file, "<Q")) for _ in range(dimensions))
    file.seek(4 + 8, 1)  # its type and its offset
    return size


def _token(tokens: list[str], index: object) -> str:
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else ""
