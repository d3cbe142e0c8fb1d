"""What a checkpoint folder holds, read from its headers alone: shapes, sizes, tokenizer files."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import InvalidInput

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Everything of a tokenizer; copied byte for byte, because saving it anew changes its format."""

_MAX_HEADER_BYTES = 100 << 20
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A base model's folder.

    Attributes:
        folder: Where it is.
        config: Its config.json.
        shapes: Every tensor's shape by name.
        size_bytes: Sum of the sizes of its weight files.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    size_bytes: int

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(_product(shape) for shape in self.shapes.values())

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return 1 + max((int(found[1]) for name in self.shapes if (found := _LAYER.search(name))), default=-1)

    @property
    def layer_shapes(self) -> list[tuple[int, int]]:
        """Outputs and inputs of the linear layers of the last decoder layer."""
        mark = f".layers.{self.layers - 1}."
        return [
            (shape[0], shape[1]) for name, shape in self.shapes.items() if mark in name and len(shape) == 2
        ]

    @property
    def layer_parameters(self) -> int:
        """Number of weights in the linear layers of one decoder layer."""
        return sum(_product(shape) for shape in self.layer_shapes)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the configuration."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.text_config["hidden_size"])

    @property
    def vocabulary(self) -> int:
        """Number of tokens the head scores."""
        return int(self.text_config["vocab_size"])

    def linear_shapes(self, modules: tuple[str, ...], last_layers: int) -> list[tuple[int, int]]:
        """Return the shapes of the layers that an adapter would change.

        Raises:
            InvalidInput: A module names no linear layer of this model; the message lists those there are.
        """
        first = self.layers - last_layers if 0 < last_layers < self.layers else 0
        found: list[tuple[int, int]] = []
        for module in modules:
            matching = [
                (shape[0], shape[1])
                for name, shape in self.shapes.items()
                if name.endswith(f".{module}.weight")
                and len(shape) == 2
                and (layer := _LAYER.search(name))
                and int(layer[1]) >= first
            ]
            if not matching:
                raise InvalidInput(
                    f"lora.target_modules: the base model has no linear layer {module!r}.",
                    fix=f"It has {', '.join(self._linear_names())}.",
                    metadata={"field": "lora.target_modules"},
                )
            found += matching
        return found

    def _linear_names(self) -> list[str]:
        return sorted(
            {
                name.split(".")[-2]
                for name, shape in self.shapes.items()
                if len(shape) == 2 and _LAYER.search(name)
            }
        )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check a base model's folder and read its headers.

    Args:
        folder: Holds config.json, *.safetensors and tokenizer.json.

    Raises:
        InvalidInput: Something is missing, is a pickle, needs remote code, or can't be read.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder.", fix="Name a checkpoint's folder.")
    config = _read_json(folder / "config.json")
    if "auto_map" in config:
        raise InvalidInput(
            f"{folder / 'config.json'} asks for code of its own (`auto_map`); remote code is never run.",
            fix="Choose a model whose architecture transformers knows.",
            reason="REMOTE_CODE",
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = any(next(folder.glob(pattern), None) for pattern in _PICKLES)
        raise InvalidInput(
            f"{folder} has no *.safetensors" + (", only pickled weights." if pickles else "."),
            fix="Convert the weights to safetensors; pickles can run code and are never read.",
            reason="NO_SAFETENSORS",
        )
    if not (folder / "tokenizer.json").is_file():
        raise InvalidInput(
            f"{folder} has no tokenizer.json.", fix="Save the model's fast tokenizer into the folder."
        )
    if "quantization_config" in config:
        raise InvalidInput(
            f"{folder / 'config.json'} is of a quantized model; its adapter could not be merged exactly.",
            fix="Use the 16-bit original.",
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weights:
        shapes.update(read_shapes(path))
    return Checkpoint(folder, config, shapes, sum(path.stat().st_size for path in weights))


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file, from its header.

    Raises:
        InvalidInput: It is not such a file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        return {
            name: tuple(int(size) for size in entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{path} can't be read as safetensors: {error}.", fix="Fetch the file again."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{path} can't be read as JSON: {error}.", fix="Name a checkpoint's folder."
        ) from error
    if not isinstance(data, dict):
        raise InvalidInput(f"{path} holds no JSON object.", fix="Name a checkpoint's folder.")
    return data


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
