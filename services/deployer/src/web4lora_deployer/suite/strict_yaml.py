"""YAML into typed models: each unknown key and each wrong type is a line with file and line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from web4lora_chassis.errors import InvalidInput, shown
from web4lora_chassis.graders.check import shorten

_FIX = "examples/web4 holds a suite and its rule file, with every key."

_LIMIT_SIGNS = 1 << 20
_DEEPEST = 20
_OPENS = (
    yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken,
)  # fmt: skip
_CLOSES = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


class StrictModel(BaseModel):
    """A model that takes no unknown keys and converts no types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Model = TypeVar("Model", bound=StrictModel)


@dataclass(frozen=True)
class Document:
    """A YAML text that could be parsed.

    Attributes:
        name: The file's name, for messages.
        node: Where everything stands.
        data: What it says, unchecked.
    """

    name: str
    node: yaml.MappingNode
    data: Any

    def model(self, model: type[Model]) -> Model:
        """Return it as a model.

        Raises:
            InvalidInput: A line a problem: file, line and what is wrong.
        """
        wrong = list(_given_twice(self.node))
        made: Model | None = None
        try:
            made = model.model_validate(self.data)
        except ValidationError as error:
            found = [_wrong(dict(each), self.node, model) for each in error.errors()]
            # A misspelt key is missing too; its misspelling says more.
            meant = {each.meant for each in found if each.meant}
            first: dict[tuple[str, ...], _Wrong] = {}
            for each in found:  # what fits none of several types is there once for each of them
                if each.path not in meant:
                    first.setdefault(each.path, each)
            wrong += first.values()
        if made is None or wrong:
            wrong.sort(key=lambda each: each.line)
            raise InvalidInput("\n".join(f"{self.name}:{each.line}: {each.text}" for each in wrong))
        return made


@dataclass(frozen=True)
class _Wrong:
    """What is wrong with a key, at which line, and which key was meant where that is known."""

    line: int
    path: tuple[str, ...]
    text: str
    meant: tuple[str, ...] = ()


def read_yaml(text: str, name: str) -> Document:
    """Parse a YAML text.

    Args:
        text: The YAML.
        name: The file's name, for messages.

    Raises:
        InvalidInput: One line: file, line and what is wrong.
    """
    if len(text) > _LIMIT_SIGNS:
        raise InvalidInput(f"{name} has more than {_LIMIT_SIGNS:,} signs.", fix=_FIX)
    depth = 0
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, _OPENS) - isinstance(token, _CLOSES)
            if depth > _DEEPEST:  # each level makes every token take longer to read
                line = token.start_mark.line + 1
                raise InvalidInput(f"{name}:{line}: nested more than {_DEEPEST} deep.", fix=_FIX)
            # Aliases can make a small file huge, and no file of ours needs them.
            if isinstance(token, yaml.AliasToken):
                raise InvalidInput(f"{name}:{token.start_mark.line + 1}: aliases (*name) are not taken.")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = shorten(error.problem or error.context, 160)
        raise InvalidInput(f"{name}:{line}: {problem}.", fix=_FIX) from error
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else shorten(error, 160)
        raise InvalidInput(f"{name}: not YAML: {why}.", fix=_FIX) from error
    if not isinstance(node, yaml.MappingNode):
        raise InvalidInput(f"{name}: must be a mapping of keys to values.", fix=_FIX)
    return Document(name, node, data)


def _given_twice(node: yaml.Node) -> Iterator[_Wrong]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _given_twice(item)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            yield _Wrong(key.start_mark.line + 1, (), f'the key "{shorten(key.value)}" is given twice.')
        seen.add(key.value)
        yield from _given_twice(value)


def _wrong(error: dict[str, Any], node: yaml.Node, model: type[StrictModel]) -> _Wrong:
    # Pydantic's own steps, such as "str" of a union or "[key]", are no keys of the file: they find no node.
    path: list[str] = []
    line = 1
    for step in error["loc"]:
        found = _child(node, step)
        if found is not None:
            line, node = found
            path.append(str(step))
    place = tuple(path)
    key = str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, path[:-1])
        near = difflib.get_close_matches(key, known, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}."
        text = f'{_dotted(path[:-1])}unknown key "{shorten(key)}"; {hint}'
        return _Wrong(line, place, text, (*place[:-1], near[0]) if near else ())
    if error["type"] == "missing":
        return _Wrong(line, (*place, key), f'{_dotted(path)}the key "{key}" is missing.')
    message = str(error["msg"]).removeprefix("Value error, ")
    value = "" if error["type"] == "value_error" else f", not {shown(error['input'], 40)}"
    return _Wrong(line, place, f"{_dotted(path)}{message[0].lower()}{message[1:]}{value}.")


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
