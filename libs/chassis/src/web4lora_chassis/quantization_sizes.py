"""How small a quantization type can make a model at best: what a size budget may ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

LEAST_BITS: Mapping[str, float] = MappingProxyType(
    {
        "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_1": 6.0, "Q5_0": 5.5, "Q5_K_M": 5.5, "Q5_K_S": 5.5,
        "Q4_1": 5.0, "Q4_0": 4.5, "Q4_K_M": 4.5, "Q4_K_S": 4.5, "IQ4_NL": 4.5, "IQ4_XS": 4.25,
        "Q3_K_L": 3.4375, "Q3_K_M": 3.4375, "Q3_K_S": 3.4375, "IQ3_M": 3.0625,
        "IQ3_S": 3.0625, "IQ3_XS": 3.0625, "IQ3_XXS": 2.5, "Q2_K": 2.625, "Q2_K_S": 2.3125, "IQ2_M": 2.3125,
        "IQ2_S": 2.3125, "IQ2_XS": 2.0625, "IQ2_XXS": 2.0625, "IQ1_M": 1.5625, "IQ1_S": 1.5625,
    }
)  # fmt: skip
"""Bits a weight of the smallest block that llama-quantize takes for a type. A file has more: some tensors get
larger blocks, and those whose rows don't fit the type's blocks, as in small models, much larger ones."""


def most_reduction(kind: str) -> float:
    """Return by how much a type can shrink a 16-bit file at best, 0 to 1, rounded down to whole percents."""
    return math.floor(100 * (1 - LEAST_BITS[kind] / 16)) / 100


def size_problem(wanted: float, kind: str) -> tuple[str, str] | None:
    """Say what is wrong with a size budget that no model can keep, and what to do; None if nothing is.

    Args:
        wanted: The smallest reduction of the file's size from 16 bit, 0 to 1.
        kind: The quantization type of the file that is deployed.
    """
    if kind not in LEAST_BITS or wanted <= most_reduction(kind):
        return None
    smaller = [other for other in LEAST_BITS if most_reduction(other) >= wanted and "I" not in other]
    best = max(smaller, key=lambda other: LEAST_BITS[other], default="")
    return (
        f"it asks for a file {100 * wanted:g} % smaller than 16 bit, and {kind} has at least "
        f"{LEAST_BITS[kind]:g} bits a weight: less than {100 * most_reduction(kind) + 1:g} % smaller.",
        "Ask for less" + (f", or for {best} or a smaller type in package.quantizations." if best else "."),
    )
