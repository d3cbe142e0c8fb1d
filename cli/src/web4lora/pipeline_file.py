"""Reads a pipeline file: YAML, checked key by key, with every problem's line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.json_format import ParseDict
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.errors import InvalidInput, NotFound, Web4Error

from web4lora.home import short
from web4lora.schema import check, check_value

_LIMIT_BYTES = 1 << 20
_PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class PipelineFile:
    """A pipeline and where each of its keys stands.

    Attributes:
        path: The file.
        pipeline: What it says. Its dataset and suite are not stored yet.
        places: Where each key stands, by its dotted path: `demo.yaml:12`, or the `--set` that gave it.
        train_files: The files to train on.
        eval_files: The held-out files.
        suite_file: The test suite; absent when the pipeline names none.
    """

    path: Path
    pipeline: gateway_pb2.Pipeline
    places: Mapping[str, str]
    train_files: tuple[Path, ...]
    eval_files: tuple[Path, ...]
    suite_file: Path | None

    def place(self, key: str) -> str:
        """Return where a key stands, or the nearest one above it that was given."""
        name = key.removeprefix("pipeline.")
        while name:
            if place := self.places.get(name):
                return place
            name = name.rpartition(".")[0]
        return str(short(self.path))

    def located(self, error: Web4Error) -> Web4Error:
        """Return an error of a service with the place in this file that it speaks of in front."""
        if not (key := error.metadata.get("field")):
            return error
        return type(error)(
            f"{self.place(key)}: {error.message}",
            fix=error.fix,
            reason=error.reason,
            metadata=error.metadata,
        )


def read_pipeline(path: Path, overrides: Iterable[str] = ()) -> PipelineFile:
    """Read a pipeline file.

    Args:
        path: The file. Relative paths in it are relative to its folder.
        overrides: Settings that win over the file, as `train.epochs=2`.

    Raises:
        NotFound: The file can't be read.
        InvalidInput: Something in it is wrong; the message holds the first 20 problems and their count.
    """
    node = _compose(path)
    checked = check(node, gateway_pb2.Pipeline.DESCRIPTOR)
    name = str(short(path))
    problems = [f"{name}:{line}: {text}" for line, text in checked.problems]
    values = checked.values
    places = {key: f"{name}:{line}" for key, line in checked.lines.items()}
    for override in overrides:
        problems += _override(values, places, override)
    files = _Files(path.parent, places, problems)
    train_files = files.found(values, "dataset", "train_files")
    eval_files = files.found(values, "dataset", "eval_files")
    suite_file = files.found_one(values, "verify", "suite_file")
    files.resolve_model(values.get("base", {}))
    problems += [] if problems else [f"{name}: {text}" for text in _missing(values)]
    if problems:
        raise _error(problems)
    return PipelineFile(
        path=path,
        pipeline=ParseDict(values, gateway_pb2.Pipeline()),
        places=places,
        train_files=train_files,
        eval_files=eval_files,
        suite_file=suite_file,
    )


def _compose(path: Path) -> yaml.Node:
    """Return the root node of a YAML file."""
    name = short(path)
    try:
        with path.open("rb") as file:
            data = file.read(_LIMIT_BYTES + 1)
    except OSError as error:
        raise NotFound(
            f"{name} can't be read: {error.strerror}.", fix="Name a pipeline file, for example demo.yaml."
        ) from error
    if len(data) > _LIMIT_BYTES:
        raise InvalidInput(f"{name} is larger than 1 MiB: it can't be a pipeline file.")
    try:
        node = yaml.compose(data.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name}: byte {error.start + 1} is not UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = error.problem or error.context
        raise InvalidInput(f"{name}:{line}: not YAML: {problem}.", reason="BAD_PIPELINE") from error
    except yaml.YAMLError as error:
        raise InvalidInput(f"{name}: not YAML: {error}.", reason="BAD_PIPELINE") from error
    if node is None:
        raise InvalidInput(f"{name} is empty.", fix="examples/web4/demo.yaml shows every key.")
    return node


def _override(values: dict[str, Any], places: dict[str, str], text: str) -> list[str]:
    """Set one value; return what is wrong with it."""
    path, equals, value = text.partition("=")
    shown = f"--set {text}"
    if not equals or not path:
        return [f"{shown}: write key=value, for example --set train.epochs=2"]
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader) or yaml.ScalarNode("tag:yaml.org,2002:str", "")
    except yaml.YAMLError:
        return [f"{shown}: {value!r} is not a YAML value."]
    keys, found, problems = check_value(node, gateway_pb2.Pipeline.DESCRIPTOR, path)
    if problems:
        return [f"{shown}: {problem}" for problem in problems]
    place = values
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = found
    for key in [key for key in places if key.startswith(f"{path}[")]:
        del places[key]
    places[path] = shown
    return []


def _missing(values: Mapping[str, Any]) -> list[str]:
    """Say which keys every pipeline needs and this one lacks."""
    wanted = {
        "name": (values.get("name"), "name: web4-demo"),
        "dataset.train_files": (values.get("dataset", {}).get("train_files"), "train_files: [train.jsonl]"),
        "base.model": (values.get("base", {}).get("model"), "model: smollm2-135m-instruct"),
    }
    return [f"{key} is missing; add `{example}`." for key, (value, example) in wanted.items() if not value]


class _Files:
    """Finds the files that a pipeline names, relative to its own folder."""

    def __init__(self, folder: Path, places: Mapping[str, str], problems: list[str]) -> None:
        self._folder = folder
        self._places = places
        self._problems = problems

    def found(self, values: Mapping[str, Any], section: str, key: str) -> tuple[Path, ...]:
        """Return the files of a list, noting those that are not there."""
        names = values.get(section, {}).get(key) or []
        name = f"{section}.{key}"
        return tuple(self._file(text, (f"{name}[{index}]", name)) for index, text in enumerate(names))

    def found_one(self, values: Mapping[str, Any], section: str, key: str) -> Path | None:
        """Return the file of a key, noting when it is not there."""
        text = values.get(section, {}).get(key)
        return self._file(text, (f"{section}.{key}",)) if text else None

    def resolve_model(self, base: dict[str, Any]) -> None:
        """Make a base model's path absolute, because it is read from another folder; leave hub ids alone."""
        model = base.get("model")
        if not isinstance(model, str) or not model:
            return
        path = self._resolved(model)
        named_as_path = model.startswith(("./", "../", "~", "/")) or model.endswith(".gguf")
        if not named_as_path and not path.is_dir():
            return
        if not model.startswith("/") and not path.exists():  # "/…" may lie on the trainer's machine
            self._note(("base.model", "base"), f"base.model: {model} is not there.")
        base["model"] = str(path)

    def _file(self, text: str, keys: tuple[str, ...]) -> Path:
        path = self._resolved(text)
        if not path.is_file():
            self._note(keys, f"{keys[-1]}: {text} is not there.")
        return path

    def _resolved(self, text: str) -> Path:
        return (self._folder / Path(text).expanduser()).absolute()

    def _note(self, keys: tuple[str, ...], text: str) -> None:
        self._problems.append(f"{next(self._places[key] for key in keys if key in self._places)}: {text}")


def _error(problems: list[str]) -> InvalidInput:
    shown = problems[:_PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"… and {len(problems) - len(shown)} more, {len(problems)} in all")
    return InvalidInput(
        "\n".join(shown),
        fix="Nothing was started.",
        reason="BAD_PIPELINE",
        metadata={"problems": len(problems)},
    )
