"""A base model's folder as a decoder: its layers and their shapes, read from its headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.model_folder import ModelFolder, read_model_folder
from web4lora_chassis.pipeline.train import ALL_LINEAR, LoraSettings

from web4lora_trainer.broken_base import broken, of_the_base

_FLOATS = ("F32", "F16", "BF16")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Decoder(ModelFolder):
    """A base model's folder, of a decoder with numbered layers."""

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

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
        return sum(prod(shape) for shape in self.layer_shapes)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.text_config["hidden_size"])

    @property
    def vocabulary(self) -> int:
        """Number of tokens the head scores."""
        return int(self.text_config["vocab_size"])

    def adapted(self, lora: LoraSettings) -> dict[str, tuple[int, int]]:
        """Return the layers that an adapter would change: their shapes by name.

        Raises:
            InvalidInput: A setting names no linear layer of this model; the message lists those there are.
        """
        last = lora.last_layers
        first = self.layers - last if 0 < last < self.layers else 0
        found: dict[str, tuple[int, int]] = {}
        for module in self.target_modules(lora):
            matching = {
                name.removesuffix(".weight"): (shape[0], shape[1])
                for name, shape in self.shapes.items()
                if name.endswith(f".{module}.weight")
                and len(shape) == 2
                and (layer := _LAYER.search(name))
                and int(layer[1]) >= first
            }
            if not matching:
                raise InvalidInput(
                    f"train.lora.target_modules: the base model has no linear layer {module!r}.",
                    fix=f"It has {', '.join(self._linear_names())}.",
                    metadata={"field": "train.lora.target_modules"},
                )
            found |= matching
        for setting, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
            for pattern in patterns:
                if not any(f".{name}".endswith(f".{pattern}") for name in found):
                    raise InvalidInput(
                        f"train.lora.{setting}: no adapted layer's name ends with {pattern!r}.",
                        fix=f"The adapted layers are {', '.join(self.target_modules(lora))}.",
                        metadata={"field": f"train.lora.{setting}"},
                    )
        return found

    def target_modules(self, lora: LoraSettings) -> tuple[str, ...]:
        """Return the names of the layers to adapt; "all-linear" is every linear one of the decoder's."""
        return tuple(self._linear_names()) if ALL_LINEAR in lora.target_modules else lora.target_modules

    def _linear_names(self) -> list[str]:
        return sorted(
            {
                name.split(".")[-2]
                for name, shape in self.shapes.items()
                if len(shape) == 2 and _LAYER.search(name)
            }
        )


def read_decoder(folder: Path) -> Decoder:
    """Check a base model's folder and read its headers.

    Args:
        folder: Holds config.json, the weights as safetensors, and tokenizer.json.

    Raises:
        InvalidInput: Something is missing, contradicts itself, is a pickle, needs code, or can't be read or
            trained on.
    """
    with of_the_base():
        model = read_model_folder(folder)
    for name, tensor in model.tensors.items():
        if tensor.dtype not in _FLOATS:
            raise broken(
                f"{tensor.path.name}: {name} is of type {tensor.dtype}; "
                "only F32, F16 and BF16 can be trained on and merged.",
                "Use the 16-bit original.",
            )
    if not (folder / "tokenizer.json").is_file():
        raise broken(f"{folder} has no tokenizer.json.", "Save the model's fast tokenizer into the folder.")
    if "quantization_config" in model.config:
        raise broken(
            f"{folder / 'config.json'} is of a quantized model; its adapter could not be merged exactly.",
            "Use the 16-bit original.",
        )
    if not any(_LAYER.search(name) for name in model.tensors):
        raise broken(
            f"{folder} has no decoder layers: no tensor is called `….layers.0.…`, as {min(model.tensors)} "
            "is not.",
            "Choose a decoder model whose layers have such names.",
        )
    return Decoder(model.folder, model.config, model.shards)
