"""Reads a pipeline file: YAML, checked key by key, with every problem's line."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.json_format import MessageToDict, ParseDict
from web4.lora.v1 import gateway_pb2
from web4lora_chassis.errors import InvalidInput, Web4Error
from web4lora_chassis.pipeline.check import problems_of
from web4lora_chassis.pipeline.verify import BAD_SUITE

from web4lora.home import short
from web4lora.schema import check, check_value, shorten
from web4lora.yaml_file import compose, is_there

BAD_PIPELINE = "BAD_PIPELINE"
_PROBLEMS_SHOWN = 20
_SWEEP = "sweep"
_SWEEP_EXAMPLE = "train.lora.rank: [8, 16]"
_SWEEP_RUNS = 100
_LEFT_ALONE = "deploy.promote=never"
"""Of a sweep's runs: the one that is to serve is chosen once they are compared."""


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
        sweep: The lists of values under `sweep`, by key, as YAML texts; one of each makes a run.
        sweep_values: Those among them that this pipeline has.
    """

    path: Path
    pipeline: gateway_pb2.Pipeline
    places: Mapping[str, str]
    train_files: tuple[Path, ...]
    eval_files: tuple[Path, ...]
    suite_file: Path | None
    sweep: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sweep_values: Mapping[str, str] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """Return where a key stands, or the nearest one above it that was given."""
        name = key.removeprefix("pipeline.")
        while name:
            if place := self.places.get(name):
                return place
            name = name.rpartition(".")[0]
        return str(short(self.path))

    def located(self, error: Web4Error) -> Web4Error:
        """Return an error of a service with the places that it speaks of in front of its lines."""
        keys = error.metadata.get("field", "").splitlines()
        if error.reason != BAD_SUITE and not keys:
            return error
        lines = error.message.splitlines()
        if error.reason == BAD_SUITE:  # behind those of keys
            lines[len(keys) :] = [self._in_suite(line) for line in lines[len(keys) :]]
        lines[: len(keys)] = [f"{self.place(key)}: {line}" for key, line in zip(keys, lines, strict=False)]
        return type(error)("\n".join(lines), fix=error.fix, reason=error.reason, metadata=error.metadata)

    def _in_suite(self, line: str) -> str:
        """Return a line that begins with a file of the stored suite with that file as it is called here."""
        stored, colon, rest = line.partition(":")
        if self.suite_file is None or not colon:  # "… and 3 more"
            return line
        path = self.suite_file if stored == "suite.yaml" else self.suite_file.parent / stored
        return f"{short(path)}{colon}{rest}"


class WrongPipeline(InvalidInput):
    """A pipeline file is wrong.

    Attributes:
        problems: A line each.
        file: What could be read of it.
    """

    def __init__(self, problems: list[str], file: PipelineFile) -> None:
        shown = problems[:_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"… and {len(problems) - len(shown)} more, {len(problems)} in all")
        super().__init__(
            "\n".join(shown),
            fix="Nothing was started.",
            reason="BAD_PIPELINE",
            metadata={"problems": len(problems)},
        )
        self.problems, self.file = problems, file


def read_sweep(path: Path, overrides: Iterable[str] = ()) -> list[PipelineFile]:
    """Read a pipeline file with a sweep: a pipeline for each combination of its values.

    A sweep's runs leave the name people call where it is, unless `deploy.promote` says otherwise: which of
    them is to serve is decided once they are compared.

    Args:
        path: The file.
        overrides: Settings that win over the file, and over the sweep.

    Returns:
        The pipelines, the last key's values changing first; none when the file has no sweep.

    Raises:
        NotFound: The file can't be read.
        WrongPipeline: Something in it is wrong, or the sweep has too many runs.
    """
    overrides = list(overrides)
    file = read_pipeline(path, overrides)
    given = {text.partition("=")[0] for text in overrides}
    sweep = {key: values for key, values in file.sweep.items() if key not in given}
    if not sweep:
        return []
    count = math.prod(len(values) for values in sweep.values())
    if count > _SWEEP_RUNS:
        text = f"{file.place('sweep')}: sweep has {count:,} combinations; {_SWEEP_RUNS} runs are the most."
        raise WrongPipeline([text], file)
    files = []
    kept = [] if file.pipeline.deploy.HasField("promote") else [_LEFT_ALONE]
    for combination in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, combination, strict=True))
        made = read_pipeline(path, [*overrides, *kept], chosen)
        files.append(replace(made, sweep_values=chosen))
    return files


def changed_pipeline(pipeline: gateway_pb2.Pipeline, overrides: Iterable[str]) -> gateway_pb2.Pipeline:
    """Return a pipeline with some settings changed.

    Args:
        pipeline: What a run ran, with its defaults filled in.
        overrides: The settings, as `train.epochs=2`.

    Raises:
        InvalidInput: A setting is wrong; all of them are named.
    """
    values = MessageToDict(pipeline, preserving_proto_field_name=True)
    problems = [problem for text in overrides for problem in _override(values, {}, text)]
    if problems:
        raise InvalidInput("\n".join(problems), fix="Nothing was started.", reason=BAD_PIPELINE)
    return ParseDict(values, gateway_pb2.Pipeline())


def read_pipeline(
    path: Path, overrides: Iterable[str] = (), chosen: Mapping[str, str] | None = None
) -> PipelineFile:
    """Read a pipeline file. What stands under `sweep` is read, and left alone: see `read_sweep`.

    Args:
        path: The file. Relative paths in it are relative to its folder.
        overrides: Settings that win over the file, as `train.epochs=2`.
        chosen: Of the file's sweep a value for each key, as YAML texts.

    Raises:
        NotFound: The file can't be read.
        InvalidInput: It is not YAML.
        WrongPipeline: Something in it is wrong; the message holds the first 20 problems and their count.
    """
    node = compose(path, "a pipeline file", "examples/web4/demo.yaml", BAD_PIPELINE)
    name = str(short(path))
    sweep = _taken_out(node, name)
    checked = check(node, gateway_pb2.Pipeline.DESCRIPTOR)
    problems = [f"{name}:{line}: {text}" for line, text in checked.problems] + sweep.problems
    values = checked.values
    places = {key: f"{name}:{line}" for key, line in checked.lines.items()} | sweep.places
    for key, text in (chosen or {}).items():
        problems += _override(
            values, places, f"{key}={text}", f"{sweep.places.get(f'sweep.{key}', name)}: sweep"
        )
    for override in overrides:
        problems += _override(values, places, override)
    files = _Files(path.parent, places, problems)
    train_files = files.found(values, "dataset", "train_files")
    eval_files = files.found(values, "dataset", "eval_files")
    suite_file = files.found_one(values, "verify", "suite_file")
    files.resolve_model(values.get("base", {}))
    file = PipelineFile(
        path=path,
        pipeline=ParseDict(values, gateway_pb2.Pipeline()),
        places=places,
        train_files=train_files,
        eval_files=eval_files,
        suite_file=suite_file,
        sweep=sweep.values,
    )
    found = [] if problems else [f"{name}: {text}" for text in _missing(values)]
    found += _rule_problems(file, beside=not problems)
    if problems or found:
        raise WrongPipeline(_by_line(problems + found, name), file)
    return file


@dataclass
class _Sweep:
    """What stands under `sweep`: the values of each key as YAML texts, where they stand, what is wrong."""

    values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def _taken_out(node: yaml.Node, name: str) -> _Sweep:
    """Take `sweep` out of a file's root node, which is then a pipeline alone."""
    sweep = _Sweep()
    if not isinstance(node, yaml.MappingNode):
        return sweep
    found = [pair for pair in node.value if pair[0].value == _SWEEP]
    node.value = [pair for pair in node.value if pair[0].value != _SWEEP]
    for key_node, child in found:
        place = f"{name}:{key_node.start_mark.line + 1}"
        sweep.places[_SWEEP] = place
        if not isinstance(child, yaml.MappingNode):
            sweep.problems.append(f"{place}: sweep needs keys with lists, for example {_SWEEP_EXAMPLE}.")
            continue
        for inner, values in child.value:
            place = f"{name}:{inner.start_mark.line + 1}"
            if not isinstance(values, yaml.SequenceNode) or not values.value:
                sweep.problems.append(f"{place}: sweep: {inner.value} needs a list of values.")
                continue
            sweep.places[f"{_SWEEP}.{inner.value}"] = place
            sweep.values[str(inner.value)] = tuple(_text(value) for value in values.value)
    return sweep


def _text(node: yaml.Node) -> str:
    """Return a node as one line of YAML."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    if isinstance(node, yaml.CollectionNode):
        node.flow_style = True  # on one line
    return yaml.serialize(node, width=sys.maxsize).strip()


def _override(values: dict[str, Any], places: dict[str, str], text: str, by: str = "--set") -> list[str]:
    """Set one value; return what is wrong with it. `by` says what gives it."""
    path, equals, value = text.partition("=")
    shown = f"{by} {text}"
    if not equals or not path:
        return [f"{shown}: write key=value, for example --set train.epochs=2"]
    try:
        node = yaml.compose(value or "''", Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        node = None
    if node is None:
        return [f"{shown}: {value!r} is not a YAML value."]
    keys, found, problems = check_value(node, gateway_pb2.Pipeline.DESCRIPTOR, path)
    if problems:
        return [f"{shown}: {problem}" for problem in problems]
    place = values
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = found
    for key in [key for key in places if key.startswith((f"{path}[", f"{path}."))]:
        del places[key]
    places[path] = shown
    return []


def _rule_problems(file: PipelineFile, *, beside: bool) -> list[str]:
    """Say which values the pipeline's rules refuse.

    Args:
        file: The pipeline.
        beside: Also those that are wrong beside others alone: not to be told while some couldn't be read.
    """
    found = []
    for problem in problems_of(file.pipeline):
        if problem.field == "name" and not file.pipeline.name:
            continue  # missing, which is said already
        if problem.field == "base.model" and not file.pipeline.base.model:
            continue
        if beside or not problem.between:
            place = file.places.get(problem.field + problem.entry) or file.place(problem.field)
            found.append(f"{place}: {problem} {problem.fix}".rstrip())
    return found


def _by_line(problems: list[str], name: str) -> list[str]:
    """Return problems in the order of their lines in the file; those without one come last."""
    line = re.compile(re.escape(name) + r":([0-9]+):")
    return sorted(problems, key=lambda text: int(found[1]) if (found := line.match(text)) else sys.maxsize)


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
        path = self._resolved(model, ("base.model", "base"))
        named_as_path = model.startswith(("./", "../", "~", "/")) or model.endswith(".gguf")
        if not named_as_path and not is_there(path.is_dir):
            return
        if not model.startswith("/") and not is_there(path.exists):  # "/…" may lie on the trainer's machine
            self._note(("base.model", "base"), f"base.model: {shorten(model)} is not there.")
        base["model"] = str(path)

    def _file(self, text: str, keys: tuple[str, ...]) -> Path:
        path = self._resolved(text, keys)
        if not is_there(path.is_file):
            self._note(keys, f"{keys[-1]}: {shorten(text)} is not there.")
        return path

    def _resolved(self, text: str, keys: tuple[str, ...]) -> Path:
        path = Path(text)
        try:
            path = path.expanduser()
        except RuntimeError:
            self._note(keys, f"{keys[0]}: {text} begins with the home folder of someone unknown here.")
        return (self._folder / path).absolute()

    def _note(self, keys: tuple[str, ...], text: str) -> None:
        self._problems.append(f"{next(self._places[key] for key in keys if key in self._places)}: {text}")
