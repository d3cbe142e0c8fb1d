"""YAML into typed models: an unknown key or a wrong type is one line with file and line."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from web4lora_chassis.errors import InvalidInput

from web4lora_deployer.suite.check import shorten


class StrictModel(BaseModel):
    """A model that takes no unknown keys and converts no types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Model = TypeVar("Model", bound=StrictModel)


def parse_yaml(text: str, name: str, model: type[Model]) -> Model:
    """Parse a YAML text into a model.

    Args:
        text: The YAML.
        name: The file's name, for messages.
        model: What it must be.

    Returns:
        The model.

    Raises:
        InvalidInput: One line: file, line and what is wrong.
    """
    try:
        # Aliases can make a small file huge, and no file of ours needs them.
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken):
                raise InvalidInput(f"{name}:{token.start_mark.line + 1}: aliases (*name) are not taken.")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidInput(f"{name}:{line}: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{name}: {shorten(error, 160)}.") from error
    if not isinstance(node, yaml.MappingNode):
        raise InvalidInput(f"{name}: must be a mapping of keys to values.")
    _refuse_duplicates(node, name)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # A misspelt key is missing too; its misspelling says more.
        errors = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        raise InvalidInput(_line_about(dict(errors[0]), node, name, model)) from error


def _refuse_duplicates(node: yaml.Node, name: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, name)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            raise InvalidInput(f'{name}:{key.start_mark.line + 1}: the key "{key.value}" is given twice.')
        seen.add(key.value)
        _refuse_duplicates(value, name)


def _line_about(error: dict[str, Any], node: yaml.Node, name: str, model: type[StrictModel]) -> str:
    # Pydantic's own steps, such as "str" of a union or "[key]", are no keys of the file: they find no node.
    path: list[str] = []
    line = 1
    for step in error["loc"]:
        found = _child(node, step)
        if found is not None:
            line, node = found
            path.append(str(step))
    where = f"{name}:{line}: "
    key = str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, path[:-1])
        near = difflib.get_close_matches(key, known, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}."
        return f'{where}{_dotted(path[:-1])}unknown key "{shorten(key)}"; {hint}'
    if error["type"] == "missing":
        return f'{where}{_dotted(path)}the key "{key}" is missing.'
    message = str(error["msg"]).removeprefix("Value error, ")
    value = "" if error["type"] == "value_error" else f", not {shorten(repr(error['input']), 40)}"
    return f"{where}{_dotted(path)}{message[0].lower()}{message[1:]}{value}."


def _dotted(path: list[str]) -> str:
    return f"{'.'.join(path)}: " if path else ""


def _child(node: yaml.Node, step: Any) -> tuple[int, yaml.Node] | None:
    """Return the line and the node that a step leads to."""
    if isinstance(node, yaml.MappingNode):
        pairs = ((k.start_mark.line + 1, value) for k, value in node.value if k.value == str(step))
        return next(pairs, None)
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        item: yaml.Node = node.value[step]
        return item.start_mark.line + 1, item
    return None


def _known_keys(model: type[StrictModel], path: list[str]) -> list[str]:
    """Return the keys of the model at a path."""
    steps = iter(path)
    for step in steps:
        annotation = model.model_fields[step].annotation
        inner = _model_in(annotation)
        if inner is None:
            return []
        model = inner
        if get_origin(annotation) is dict:
            next(steps, None)  # a free name, not a key of the model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[StrictModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)
