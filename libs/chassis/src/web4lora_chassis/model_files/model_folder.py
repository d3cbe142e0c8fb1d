"""A model's folder as Transformers saves it: known by exact file names, without pickles and without code.

Index, files, headers and sizes must agree before anything trains on the model, merges into it or converts it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import InvalidInput, shown
from web4lora_chassis.model_files.safetensors import Shard, Tensor, read_shard

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
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

MODEL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES, INDEX_NAME)
"""What a model is made of, beside its weights and its licence."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
"""A file's name without a folder, or anything that a shell or a pattern would take for more."""
_LICENCE = re.compile(
    r"(LICEN[CS]E|NOTICE)([._-](MODEL|CODE|MIT|APACHE|(APACHE-)?2\.0))?(\.(TXT|MD))?", re.IGNORECASE
)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_NO_SETTINGS = ("tokenizer.json", "vocab.json", INDEX_NAME)
"""Large, and with names of others' making: a token may be called anything."""
_MAX_JSON_BYTES = 64 << 20
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder.

    Attributes:
        folder: Where it is.
        config: Its config.json.
        shards: Its weights, by the files' names in order.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of its tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the configuration."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, Mapping) else self.config

    def files(self) -> dict[str, Path]:
        """Return the files that make up the model, by name; whatever else lies in the folder is left out."""
        weights = {shard.path.name for shard in self.shards}
        return {
            path.name: path
            for path in sorted(self.folder.iterdir())
            if path.is_file() and (path.name in weights or is_model_file(path.name))
        }


def is_model_file(name: str) -> bool:
    """Tell whether a file belongs to a model beside its weights: by its exact name, or as a licence."""
    return name in MODEL_FILES or bool(_LICENCE.fullmatch(name))


def is_weights(name: str) -> bool:
    """Tell whether a name is that of a safetensors file, and of nothing else that it could be taken for."""
    return name.endswith(".safetensors") and bool(_PLAIN_NAME.fullmatch(name))


def named(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    every = sorted(names)
    more = len(every) - _NAMES_SHOWN
    return ", ".join(every[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model's folder.

    Raises:
        InvalidInput: There is none.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has more than {_MAX_JSON_BYTES >> 20} MB")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _broken(f"{path.parent} has no {path.name}.", "Name a model's whole folder.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(f"{path} can't be read as JSON: {error}.") from error
    if not isinstance(data, dict):
        raise _broken(f"{path} holds no JSON object.")
    return data


def refuse_remote_code(folder: Path) -> None:
    """Refuse a model that brings code of its own.

    Raises:
        InvalidInput: A JSON file of the folder has the key `auto_map`, anywhere in it, or can't be read.
    """
    for path in sorted(folder.glob("*.json")):
        if path.name in _NO_SETTINGS:
            continue
        try:
            found = path.is_file() and "auto_map" in _keys(read_json(path))
        except InvalidInput:
            if path.name in MODEL_FILES:
                raise
            continue  # not the model's, so nothing reads it
        if found:
            raise _broken(
                f"{path} asks for code of its own (`auto_map`); remote code is never run.",
                "Choose a model whose architecture and tokenizer transformers knows, without `auto_map`.",
                "REMOTE_CODE",
            )


def read_model_folder(folder: Path) -> ModelFolder:
    """Read a model's configuration and the headers of its weights, once all are found to agree.

    Args:
        folder: Holds config.json, and the weights as safetensors.

    Raises:
        InvalidInput: They do not agree, or something is missing, is a pickle, needs code or can't be read.
            The message names the file and the tensor.
    """
    if not folder.is_dir():
        raise _broken(f"{folder} is not a folder.", "Name a model's folder.")
    config = read_json(folder / "config.json")
    refuse_remote_code(folder)
    return ModelFolder(folder, config, tuple(_shards(folder)))


def _shards(folder: Path) -> list[Shard]:
    index = folder / INDEX_NAME
    if index.is_file():
        return _sharded(folder, _weight_map(index))
    names = {path.name for path in folder.glob("*.safetensors")}
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if SINGLE_NAME in names:
        if shards:
            raise _broken(
                f"{folder} holds {SINGLE_NAME} and {named(shards)}, but no {INDEX_NAME}.",
                "Remove those that don't belong to the model.",
            )
        return [read_shard(folder / SINGLE_NAME)]
    if shards:
        raise _broken(
            f"{folder} holds {named(shards)}, but no {INDEX_NAME}: whether any is missing can't be told.",
            "Fetch the index too.",
        )
    raise _no_weights(folder, names)


def _no_weights(folder: Path, names: set[str]) -> InvalidInput:
    if names:
        return _broken(
            f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}, only {named(names)}.",
            "Save it with save_pretrained, or give the file its usual name.",
            "NO_SAFETENSORS",
        )
    pickles = any(next(folder.glob(pattern), None) for pattern in _PICKLES)
    return _broken(
        f"{folder} has no *.safetensors" + (", only pickled weights." if pickles else "."),
        "Convert the weights to safetensors; pickles can run code and are never read.",
        "NO_SAFETENSORS",
    )


def _weight_map(index: Path) -> Mapping[str, str]:
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise _broken(f"{index} has no weight_map.")
    for tensor, name in entries.items():
        if not isinstance(name, str) or not is_weights(name):
            raise _broken(
                f"{index}: {shown(tensor)} is said to lie in {shown(name)}, which is no safetensors file "
                "here."
            )
    return entries


def _sharded(folder: Path, weight_map: Mapping[str, str]) -> list[Shard]:
    """Read the files that the index names, and compare each with what the index says of it."""
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise _broken(
            f"{INDEX_NAME} names {named(missing)}, which {folder} lacks.", "Fetch the rest of the model."
        )
    stray = [
        path.name
        for path in folder.glob("*.safetensors")
        if path.name not in names and (_SHARD.fullmatch(path.name) or path.name == SINGLE_NAME)
    ]
    if stray:
        raise _broken(
            f"{folder} holds {named(stray)}, which {INDEX_NAME} does not name.",
            "Remove what doesn't belong to the model, or fetch the index that goes with it.",
        )
    shards = [read_shard(folder / name) for name in names]
    found: dict[str, Tensor] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if other := found.get(tensor.name):
            raise _broken(f"{tensor.name} lies in two files: {other.path.name} and {tensor.path.name}.")
        found[tensor.name] = tensor
    absent = [name for name in weight_map if name not in found]
    if absent:
        raise _broken(f"{INDEX_NAME} names {named(absent)}; {weight_map[absent[0]]} has no such tensor.")
    for tensor in found.values():
        if tensor.name not in weight_map:
            raise _broken(f"{tensor.path.name} holds {tensor.name}, which {INDEX_NAME} does not name.")
        if weight_map[tensor.name] != tensor.path.name:
            raise _broken(
                f"{INDEX_NAME} says that {tensor.name} lies in {weight_map[tensor.name]}; "
                f"it lies in {tensor.path.name}."
            )
    return shards


def _keys(data: object) -> Iterator[str]:
    """Yield every key of JSON data."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _broken(text: str, fix: str = "Fetch the model again.", reason: str = "MODEL_BROKEN") -> InvalidInput:
    return InvalidInput(text, fix=fix, reason=reason)
