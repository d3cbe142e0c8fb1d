"""How Transformers reads a base: what a merge must know beyond the files, asked of it in a child process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from web4lora_packager.child import ask


@dataclass(frozen=True)
class Layout:
    """How a model's parameters lie in its files.

    Attributes:
        names: The tensor in the files by the parameter's name; a parameter that they lack is left out.
        tied: Parameters that are one with another, by name, and that other's name.
        transposed: Weights that are stored as (in, out), as GPT-2's are.
    """

    names: Mapping[str, str]
    tied: Mapping[str, str]
    transposed: frozenset[str]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """Read what `skeleton.describe` returns."""
        return cls(dict(data["names"]), dict(data["tied"]), frozenset(data["transposed"]))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data, as `from_json` reads it."""
        return {
            "names": dict(self.names),
            "tied": dict(self.tied),
            "transposed": sorted(self.transposed),
        }


def read_layout(base: Path, adapter: Path, home: Path) -> Layout:
    """Ask Transformers for a base's layout, and PEFT whether an adapter has the tensors that it has on it.

    Args:
        base: The base model's folder.
        adapter: The adapter's folder.
        home: The child's home folder.

    Raises:
        InvalidInput: Transformers knows no such model, or the folder is broken.
        FailedPrecondition: The adapter lacks tensors, or has others.
        Internal: The child failed.
    """
    return Layout.from_json(ask("describe", home, base, adapter))
