"""What a GGUF file says of itself, read from its header."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from web4lora_chassis.errors import DataLoss


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF file's header.

    Attributes:
        architecture: llama.cpp's name for the model's architecture.
        tensors: Number of tensors.
        parameters: Number of weights.
        weight_bytes: Sum of the tensors' sizes.
        chat_template: The chat template; empty when there is none.
        bos_id: Id of the token that begins a text, or None.
        eos_id: Id of the token that ends one, or None.
        context_tokens: Context length that the model was trained for, or None.
        kind: What the file says that it holds: "model", "adapter"; empty when it does not say.
        alpha: What a LoRA adapter is scaled by, over its rank; None for other files.
    """

    architecture: str
    tensors: int
    parameters: int
    weight_bytes: int
    chat_template: str
    bos_id: int | None
    eos_id: int | None
    context_tokens: int | None
    kind: str = ""
    alpha: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Weights' bits over parameters."""
        return 8 * self.weight_bytes / self.parameters


def read_header(path: Path) -> GgufHeader:
    """Read a GGUF file's header.

    Raises:
        DataLoss: It is no GGUF file, or an empty one.
    """
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise DataLoss(f"{path} can't be read as GGUF: {error}.", reason="GGUF_BROKEN") from error
    architecture = _value(reader, "general.architecture")
    alpha = _value(reader, "adapter.lora.alpha")
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    if not architecture or not parameters:
        raise DataLoss(f"{path} holds no model.", reason="GGUF_BROKEN")
    return GgufHeader(
        architecture=str(architecture),
        tensors=len(reader.tensors),
        parameters=parameters,
        weight_bytes=sum(int(tensor.n_bytes) for tensor in reader.tensors),
        chat_template=str(_value(reader, "tokenizer.chat_template") or ""),
        bos_id=_number(reader, "tokenizer.ggml.bos_token_id"),
        eos_id=_number(reader, "tokenizer.ggml.eos_token_id"),
        context_tokens=_number(reader, f"{architecture}.context_length"),
        kind=str(_value(reader, "general.type") or ""),
        alpha=float(alpha) if alpha is not None else None,
    )


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return field.contents() if field else None


def _number(reader: Any, key: str) -> int | None:
    value = _value(reader, key)
    return int(value) if value is not None else None
