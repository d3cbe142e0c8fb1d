"""Checks YAML against a message of the contract, which is the only schema there is.

Works on PyYAML's nodes, which know their lines, and reads scalars by the field's type, not by YAML 1.1's
guesses: `2e-4` is a number here, and `on` stays text where text is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import yaml
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from web4lora_chassis.errors import shown

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: 31,
    FieldDescriptor.CPPTYPE_INT64: 63,
    FieldDescriptor.CPPTYPE_UINT32: 32,
    FieldDescriptor.CPPTYPE_UINT64: 64,
}
_REALS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
_ODD_SIGN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")  # escapes in YAML can write them
_INTEGER = re.compile(r"[+-]?[0-9][0-9_]{0,99}")
_SIZE = re.compile(r"([0-9][0-9_.]*) *([kMGT]i?B)")
_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY_UNITS = {"KiB": 2**10, "kiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SHOWN_SIGNS = 120
_SET_BY_CLIENT = "web4.lora.v1.ArtifactRef"


@dataclass
class Checked:
    """What a walk over a file found.

    Attributes:
        values: The file as JSON data that fits the message.
        lines: Line of each key by its dotted path: `train.learning_rate`, `dataset.train_files[0]`.
        problems: What is wrong, as (line, text), in the file's order.
    """

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


def check(node: yaml.Node, message: Descriptor) -> Checked:
    """Check a document's root node against a message."""
    checked = Checked()
    walk = _Walk(message, checked)
    values = walk.message(node, message, "")
    checked.values = values if isinstance(values, dict) else {}
    return checked


def check_value(node: yaml.Node, message: Descriptor, path: str) -> tuple[list[str], Any, list[str]]:
    """Check one value given for a dotted path.

    Returns:
        The path's keys, the value as JSON data, and what is wrong.
    """
    checked = Checked()
    walk = _Walk(message, checked)
    keys: list[str] = []
    rest = path
    where: Descriptor | None = message
    descriptor: FieldDescriptor | None = None
    while rest and where is not None:
        key, _, rest = rest.partition(".")
        descriptor = _fields(where).get(key)
        if descriptor is None:
            return keys, None, [walk.unknown(key, where, ".".join(keys))]
        keys.append(key)
        if _is_map(descriptor):
            value_field = _map_value(descriptor)
            if not rest:
                break
            keys.append(rest)
            return keys, walk.scalar(node, value_field, path), [text for _, text in checked.problems]
        where = descriptor.message_type
    if rest or descriptor is None:
        return keys, None, [f"{path} is not a key here: {'.'.join(keys)} has no keys below it."]
    return keys, walk.value(node, descriptor, path), [text for _, text in checked.problems]


class _Walk:
    def __init__(self, root: Descriptor, checked: Checked) -> None:
        self._root = root
        self._checked = checked

    def message(self, node: yaml.Node, message: Descriptor, path: str) -> Any:
        """Return a mapping's values that fit a message."""
        values: dict[str, Any] = {}
        fields = _fields(message)
        for key, key_node, child in self._items(node, path, list(fields)):
            descriptor = fields.get(key)
            if descriptor is None:
                self._problem(key_node, self.unknown(key, message, path))
            elif not _is_null(child):
                value = self.value(child, descriptor, _join(path, key))
                if value is not None:
                    values[key] = value
        return values

    def value(self, node: yaml.Node, descriptor: FieldDescriptor, path: str) -> Any:
        """Return the value of a field of any form, or None after noting what is wrong."""
        if _is_map(descriptor):
            value_field = _map_value(descriptor)
            values = {
                key: self.scalar(child, value_field, _join(path, key))
                for key, _, child in self._items(node, path, [])
            }
            return {key: value for key, value in values.items() if value is not None}
        if descriptor.is_repeated:
            return self._list(node, descriptor, path)
        if descriptor.message_type is not None:
            return self.message(node, descriptor.message_type, path)
        return self.scalar(node, descriptor, path)

    def scalar(self, node: yaml.Node, descriptor: FieldDescriptor, path: str) -> Any:
        """Return a scalar, read by the field's type, or None after noting what is wrong."""
        if not isinstance(node, yaml.ScalarNode):
            self._problem(node, f"{path} needs {_wanted(descriptor)}, this is {_shape(node)}.")
            return None
        text = node.value.strip()
        kind = descriptor.cpp_type
        value: Any = None
        if kind == FieldDescriptor.CPPTYPE_STRING:
            return self._text(node, path)
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            value = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(
                text.lower()
            )
        elif kind in _INTEGERS:
            value = _integer(text, _INTEGERS[kind], sizes=descriptor.name.endswith("_bytes"))
        elif kind in _REALS:
            value = _real(text)
        elif kind == FieldDescriptor.CPPTYPE_ENUM:
            value = _enum(text, descriptor)
        if value is None:
            self._problem(node, f"{path} needs {_wanted(descriptor)}, this is {shown(node.value)}.")
        return value

    def _text(self, node: yaml.ScalarNode, path: str) -> str | None:
        if odd := _ODD_SIGN.search(node.value):
            self._problem(node, f"{path} holds U+{ord(odd[0]):04X}, which no text may hold.")
            return None
        return str(node.value)

    def unknown(self, key: str, message: Descriptor, path: str) -> str:
        """Say that a key is not one of a message's, and which one may be meant."""
        name = _join(path, shorten(key))
        names = list(_fields(message))
        places = [place for place in _places(self._root, key) if place != path]
        if places:
            return f"{name} is not a key here; it belongs to {places[0]}."
        if close := get_close_matches(key, names, n=1, cutoff=0.6):
            return f"{name} is not a key here; did you mean {close[0]}?"
        return f"{name} is not a key here; the keys are {', '.join(names)}."

    def _list(self, node: yaml.Node, descriptor: FieldDescriptor, path: str) -> Any:
        if not isinstance(node, yaml.SequenceNode):
            given = shorten(node.value) if isinstance(node, yaml.ScalarNode) else "…"
            self._problem(node, f"{path} needs a list: [{given}].")
            return None
        values = []
        for index, child in enumerate(node.value):
            place = f"{path}[{index}]"
            self._checked.lines[place] = _line(child)
            values.append(self.scalar(child, descriptor, place))
        return [value for value in values if value is not None]

    def _items(
        self, node: yaml.Node, path: str, keys: list[str]
    ) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Yield a mapping's keys, each once, and note their lines."""
        if not isinstance(node, yaml.MappingNode):
            hint = f" with the keys {', '.join(keys)}" if keys else ""
            self._problem(node, f"{path or 'The file'} needs a mapping{hint}, this is {_shape(node)}.")
            return
        seen: dict[str, int] = {}
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, f"a key must be a word, this is {_shape(key_node)}.")
                continue
            key = self._text(key_node, "a key")
            if key is None:
                continue
            name = _join(path, key)
            if key in seen:
                self._problem(
                    key_node, f"{_join(path, shorten(key))} is given twice, first on line {seen[key]}."
                )
                continue
            seen[key] = _line(key_node)
            self._checked.lines[name] = _line(key_node)
            yield key, key_node, child

    def _problem(self, node: yaml.Node, text: str) -> None:
        self._checked.problems.append((_line(node), text))


def _fields(message: Descriptor) -> Mapping[str, FieldDescriptor]:
    """Return the fields a file may set: references to artifacts are set by the client."""
    return {
        descriptor.name: descriptor
        for descriptor in message.fields
        if descriptor.message_type is None or descriptor.message_type.full_name != _SET_BY_CLIENT
    }


def _places(message: Descriptor, key: str, path: str = "") -> list[str]:
    """Return where in the schema a key is known, as the dotted paths of what it belongs to."""
    found = []
    for name, descriptor in _fields(message).items():
        if name == key and path:
            found.append(path)
        if descriptor.message_type is not None and not _is_map(descriptor):
            found += _places(descriptor.message_type, key, _join(path, name))
    return found


def _is_map(descriptor: FieldDescriptor) -> bool:
    kind = descriptor.message_type
    return kind is not None and bool(kind.GetOptions().map_entry)


def _map_value(descriptor: FieldDescriptor) -> FieldDescriptor:
    assert descriptor.message_type is not None
    return descriptor.message_type.fields_by_name["value"]


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def shorten(text: str) -> str:
    """Cut a key or a value of the file where it would make a line too long to read."""
    return text if len(text) <= _SHOWN_SIGNS else f"{text[: _SHOWN_SIGNS - 1]}…"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _shape(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "nothing" if _is_null(node) else shown(node.value)


def _wanted(descriptor: FieldDescriptor) -> str:
    kind = descriptor.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return "text"
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return "true or false"
    if kind in _INTEGERS:
        return "a whole number" + (", or a size like 26 GB" if descriptor.name.endswith("_bytes") else "")
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return f"one of {', '.join(_enum_names(descriptor))}"
    return "a number"


def _integer(text: str, bits: int, *, sizes: bool) -> int | None:
    value: int | None = None
    if _INTEGER.fullmatch(text):
        value = int(text.replace("_", ""))
    elif sizes and (match := _SIZE.fullmatch(text)):
        real = _real(match[1])
        value = None if real is None else round(real * {**_UNITS, **_BINARY_UNITS}[match[2]])
    return value if value is not None and -(2**bits) <= value < 2**bits else None


def _real(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _enum_names(descriptor: FieldDescriptor) -> list[str]:
    """Return an enum's values as people write them: lower case, without the enum's name, without 0."""
    return [name.lower() for name in _short_names(descriptor)]


def _short_names(descriptor: FieldDescriptor) -> dict[str, str]:
    enum = descriptor.enum_type
    assert enum is not None
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
    return {value.name.removeprefix(prefix): value.name for value in enum.values if value.number}


def _enum(text: str, descriptor: FieldDescriptor) -> str | None:
    return _short_names(descriptor).get(text.upper())
