"""How to package: every setting of `package`, its bounds and its default, and the quantization types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from web4lora_chassis.pipeline.rules import (
    Choice,
    Flag,
    Names,
    Number,
    Problem,
    StageSettings,
    Wrong,
    setting,
)

TYPES = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL",
    "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M",
    "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
"""The quantization types that can be asked for."""
NEED_MATRIX = frozenset(
    {"IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}
)
"""Those that llama-quantize refuses, or ruins the model with, without an importance matrix."""
DEFAULT_CONTEXT_TOKENS = 4096
"""The context length where none is asked for and the model has no less."""
CONTEXT_TOKENS = Number(
    low=128, high=1 << 20, default_text=f"{DEFAULT_CONTEXT_TOKENS} or the model's own when that is less"
)
"""Of a Modelfile and of a deployment."""
TEMPERATURE = Number(0.0, low=0, high=2)
"""Of requests that name none."""

_MATRIX_CHUNKS = 100
_OTHER_NAMES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's own


def context_problems(lengths: Mapping[str, int], most: int) -> Iterator[Problem]:
    """Yield the contexts that are longer than a base model was made for.

    Args:
        lengths: In tokens, by setting: "package.context_tokens".
        most: What the model was made for; 0 when that is unknown.
    """
    for name, tokens in sorted(lengths.items()):
        if most and tokens > most:
            yield Problem(
                name,
                f"{tokens} is more than the {most} tokens that the base model was made for.",
                f"Set it to {most} at most, or leave it out.",
            )


@dataclass(frozen=True)
class PackageSettings(StageSettings):
    """How to package.

    Attributes:
        quantizations: Quantization types, in the order asked for; the first one is deployed.
        gguf_type: Format of the 16-bit GGUF: auto, F16 or BF16.
        context_tokens: Context length for the Modelfile; None takes 4096, or the model's own when shorter.
        temperature: Sampling temperature for the Modelfile.
        importance_matrix: Quantize with an importance matrix.
        importance_matrix_chunks: Its calibration text, in chunks of 512 tokens; None takes 100, or
            what there is.
        adapter_gguf: Also make the adapter's own GGUF, and its base's, quantized to the first type.
        formats: What is written: gguf, which is always among them, and safetensors, the merged checkpoint.
        importance_matrix_from: What the importance matrix is measured with: base, once for base and data, or
            merged, for each run.
    """

    quantizations: tuple[str, ...] = setting(
        Names(
            ("Q4_K_M",),
            "a quantization type",
            f"The types are {', '.join(TYPES)}; the 16-bit GGUF is made anyway.",
            known=TYPES,
            other=_OTHER_NAMES,
            most=8,
        )
    )
    gguf_type: str = setting(Choice(("auto", "F16", "BF16"), "auto"))
    context_tokens: int | None = setting(CONTEXT_TOKENS)
    temperature: float = setting(TEMPERATURE)
    importance_matrix: bool = setting(Flag(False))
    importance_matrix_chunks: int | None = setting(
        Number(low=1, high=10_000, default_text=f"{_MATRIX_CHUNKS}; less when the training data has less")
    )
    adapter_gguf: bool = setting(Flag(False))
    formats: tuple[str, ...] = setting(
        Names(("gguf",), "a format", "The formats are gguf and safetensors.", known=("gguf", "safetensors"))
    )
    importance_matrix_from: str = setting(Choice(("base", "merged"), "base"))

    @property
    def matrix_chunks(self) -> int:
        """Chunks of calibration text, at most, with the default filled in."""
        return self.importance_matrix_chunks or _MATRIX_CHUNKS

    def between(self) -> Iterator[Wrong]:
        """See `StageSettings.between`."""
        needy = [name for name in self.quantizations if name in NEED_MATRIX]
        if needy and not self.importance_matrix:
            need = "needs" if len(needy) == 1 else "need"
            yield (
                "quantizations",
                f"{', '.join(needy)} {need} an importance matrix.",
                "Set package.importance_matrix to true, or choose a larger type.",
            )
        if "gguf" not in self.formats:
            yield "formats", "it lacks gguf, which is what is deployed.", "Add gguf."
        if self.adapter_gguf and self.quantizations[0] in NEED_MATRIX:
            yield (
                "adapter_gguf",
                f"the base is quantized to {self.quantizations[0]} too, without the importance matrix that "
                "this type needs.",
                "Put another type first.",
            )
