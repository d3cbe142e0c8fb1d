"""A model of a million weights whose answer is known beforehand: after token n comes token n + 1.

Each token has a random vector of ones and minus ones; the row of the output matrix for token n + 1 is the
vector of token n, and the one layer between adds little. So any set of instructions that computes right, with
any quantization, gives the same answer; one that computes garbage or not-a-number gives another.
"""

from __future__ import annotations

import random
import struct
from array import array
from pathlib import Path

TOKENS = 512
# Multiples of 256, so that every block type and the tile kernels of AMX and VNNI are really entered.
_WIDTH, _INNER, _HEADS, _CONTEXT = 256, 512, 4, 512
_SPECIAL = ("<unk>", "<s>", "</s>")
_UINT32, _FLOAT32, _STRING, _ARRAY, _INT32 = 4, 6, 8, 9, 5
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_ALIGNMENT = 32

TYPES = {
    "attn_q": "q8_0", "attn_k": "q4_0", "attn_v": "q5_0", "attn_output": "q5_k",
    "ffn_gate": "q4_k", "ffn_up": "iq4_xs", "ffn_down": "q6_k",
}  # fmt: skip
"""Which quantization each tensor is to get, so that one file enters the kernels of all common ones."""


def write_tiny_model(path: Path) -> None:
    """Write the model as a GGUF of 32-bit weights, always the same."""
    source = random.Random(0)  # noqa: S311 - weights, no secret

    def small(rows: int, columns: int) -> tuple[list[int], array[float]]:
        return [columns, rows], array("f", (source.uniform(-0.02, 0.02) for _ in range(rows * columns)))

    ones = ([_WIDTH], array("f", [1.0] * _WIDTH))
    vectors = [array("f", source.choices((-1.0, 1.0), k=_WIDTH)) for _ in range(TOKENS)]
    tensors = {
        "token_embd.weight": ([_WIDTH, TOKENS], _joined(vectors)),
        "blk.0.attn_norm.weight": ones,
        "blk.0.attn_q.weight": small(_WIDTH, _WIDTH),
        "blk.0.attn_k.weight": small(_WIDTH, _WIDTH),
        "blk.0.attn_v.weight": small(_WIDTH, _WIDTH),
        "blk.0.attn_output.weight": small(_WIDTH, _WIDTH),
        "blk.0.ffn_norm.weight": ones,
        "blk.0.ffn_gate.weight": small(_INNER, _WIDTH),
        "blk.0.ffn_up.weight": small(_INNER, _WIDTH),
        "blk.0.ffn_down.weight": small(_WIDTH, _INNER),
        "output_norm.weight": ones,
        "output.weight": ([_WIDTH, TOKENS], _joined([vectors[-1], *vectors[:-1]])),
    }
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(_facts()))]
    header += [_text(key) + value for key, value in _facts().items()]
    offset, data = 0, []
    for name, (shape, values) in tensors.items():
        raw = struct.pack(f"<{len(values)}f", *values)
        header.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset))
        offset += len(raw)  # every size is a multiple of the alignment
        data.append(raw)
    start = b"".join(header)
    path.write_bytes(start + bytes(-len(start) % _ALIGNMENT) + b"".join(data))


def _facts() -> dict[str, bytes]:
    """Return the metadata: the shape, and a tokenizer that llama.cpp takes."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    words = [f"\u2581{number}" for number in range(TOKENS - len(_SPECIAL) - len(bytes_))]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * len(bytes_), *[_NORMAL] * len(words)]
    pieces = [_text(piece) for piece in (*_SPECIAL, *bytes_, *words)]
    numbers = {
        "llama.context_length": _CONTEXT,
        "llama.embedding_length": _WIDTH,
        "llama.block_count": 1,
        "llama.feed_forward_length": _INNER,
        "llama.attention.head_count": _HEADS,
        "llama.rope.dimension_count": _WIDTH // _HEADS,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {
        "general.architecture": struct.pack("<I", _STRING) + _text("llama"),
        **{key: struct.pack("<II", _UINT32, number) for key, number in numbers.items()},
        "llama.attention.layer_norm_rms_epsilon": struct.pack("<If", _FLOAT32, 1e-5),
        "tokenizer.ggml.model": struct.pack("<I", _STRING) + _text("llama"),
        "tokenizer.ggml.tokens": struct.pack("<IIQ", _ARRAY, _STRING, TOKENS) + b"".join(pieces),
        "tokenizer.ggml.scores": struct.pack(f"<IIQ{TOKENS}f", _ARRAY, _FLOAT32, TOKENS, *[0.0] * TOKENS),
        "tokenizer.ggml.token_type": struct.pack(f"<IIQ{TOKENS}i", _ARRAY, _INT32, TOKENS, *kinds),
    }


def _joined(rows: list[array[float]]) -> array[float]:
    values = array("f")
    for row in rows:
        values.extend(row)
    return values


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
