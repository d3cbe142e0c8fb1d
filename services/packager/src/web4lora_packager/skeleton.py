"""A model as Transformers builds it, without its weights. Imports torch, so it runs in a child process.

Which weights are one and the same, and which are stored as (in, out), is decided by the class that
Transformers takes for a configuration, not by keys of the configuration or of an adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.model_folder import read_model_folder


def build(folder: Path, *, with_buffers: bool = False) -> Any:
    """Return the model of a folder's configuration, its weights without memory.

    Args:
        folder: The model.
        with_buffers: What it computes from its configuration alone has memory, and all is float32.

    Raises:
        InvalidInput: Transformers knows no such model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        auto: Any = AutoModelForCausalLM
        if with_buffers:
            with init_empty_weights(include_buffers=False):
                return auto.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.device("meta"):
            return auto.from_config(config, attn_implementation="eager")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise InvalidInput(
            f"{folder / 'config.json'} is no language model that Transformers can build: {error}",
            fix="Use a base model of an architecture that Transformers knows.",
        ) from error


def file_names(model: Any, files: Collection[str]) -> dict[str, str]:
    """Return under which name a model's files have each parameter; those that they lack are left out.

    Files may leave out the prefix of the model's body, as GPT-2's own does.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        for candidate in (name, name.removeprefix(prefix), f"{prefix}{name}"):
            if candidate in files:
                found[name] = candidate
                break
    return found


def tied(model: Any) -> dict[str, str]:
    """Return, for each parameter that is another one, that other's name."""
    first: dict[int, str] = {}
    pairs: dict[str, str] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, weight in parameters:
        first.setdefault(id(weight), name)
        if first[id(weight)] != name:
            pairs[name] = first[id(weight)]
    return pairs


def describe(folder: Path) -> Mapping[str, Any]:
    """Return a base's `Layout` as JSON data.

    Raises:
        InvalidInput: Transformers knows no such model, or the folder is broken.
    """
    model, files = build(folder), read_model_folder(folder)
    transposed = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)]
    return {
        "names": file_names(model, files.tensors),
        "tied": tied(model),
        "transposed": transposed,
    }
