"""Messages of the contract as JSON data, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)
_Reader = Callable[[Any], Any]

_LONG = frozenset(
    (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_SINT64,
     FieldDescriptor.TYPE_FIXED64, FieldDescriptor.TYPE_SFIXED64)
)  # fmt: skip
"""JSON has them as texts."""
_NOT_FINITE = frozenset(("NaN", "Infinity", "-Infinity"))


class _Unusual(ValueError):
    """A value is not as `to_json` writes it."""


def to_json(message: Message) -> dict[str, Any]:
    """Return a message as JSON data with the contract's own field names; absent fields are left out."""
    data: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return data


def from_json(made: type[M], data: Mapping[str, Any]) -> M:
    """Return the message that JSON data describes; what the contract does not know of it is left out.

    What `to_json` wrote is read by protobuf's constructors: several times as fast as by its JSON parser, and
    every list reads every run of its page. All that is written otherwise is left to that parser.

    Raises:
        google.protobuf.json_format.ParseError: It is no such message.
    """
    try:
        return made(**_fields(made.DESCRIPTOR, data))
    except (ValueError, TypeError, AttributeError):
        return ParseDict(dict(data), made(), ignore_unknown_fields=True)


def _fields(descriptor: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a message's constructor takes.

    Raises:
        ValueError, TypeError, AttributeError: It is not as `to_json` writes it.
    """
    readers = _readers(descriptor)
    found = {}
    for name, value in data.items():
        reader = readers.get(name)
        if reader is not None and value is not None:
            found[name] = reader(value)
        elif reader is None and name in descriptor.fields_by_camelcase_name:
            raise _Unusual(name)
    return found


@functools.cache
def _readers(descriptor: Any) -> dict[str, _Reader]:
    return {field.name: _reader(field) for field in descriptor.fields}


def _reader(field: FieldDescriptor) -> _Reader:
    """Return what reads a field."""
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return _map_reader(kind.fields_by_name["key"], kind.fields_by_name["value"])
    one = _value_reader(field)
    return functools.partial(_list, one) if field.is_repeated else one


def _list(one: _Reader, values: Any) -> list[Any]:
    if not isinstance(values, list):  # a text is a sequence too
        raise _Unusual(values)
    return [one(value) for value in values]


def _map_reader(key: FieldDescriptor, value: FieldDescriptor) -> _Reader:
    if key.type != FieldDescriptor.TYPE_STRING or value.message_type is not None:
        return _refuse
    one = _value_reader(value)
    return lambda values: {name: one(each) for name, each in values.items()}


def _value_reader(field: FieldDescriptor) -> _Reader:
    kind = field.message_type
    if kind is not None:
        ours = not kind.full_name.startswith("google.protobuf.")
        return functools.partial(_fields, kind) if ours else _refuse
    if field.enum_type is not None:
        return functools.partial(_word, field.enum_type.values_by_name)
    if field.type in _LONG:
        return _whole
    readers: dict[int, _Reader] = {
        FieldDescriptor.TYPE_STRING: functools.partial(_of_type, str),
        FieldDescriptor.TYPE_BOOL: functools.partial(_of_type, bool),
        FieldDescriptor.TYPE_INT32: functools.partial(_of_type, int),
        FieldDescriptor.TYPE_UINT32: functools.partial(_of_type, int),
        FieldDescriptor.TYPE_DOUBLE: _number,
        FieldDescriptor.TYPE_FLOAT: _number,
    }
    return readers.get(field.type, _refuse)


def _of_type(wanted: type, value: Any) -> Any:
    if type(value) is not wanted:
        raise _Unusual(value)
    return value


def _word(words: Mapping[str, Any], value: Any) -> int:
    if value not in words:
        raise _Unusual(value)
    return int(words[value].number)


def _whole(value: Any) -> int:
    if not isinstance(value, str) or not value.lstrip("-").isdecimal():
        raise _Unusual(value)
    return int(value)


def _number(value: Any) -> float:
    if type(value) is float or type(value) is int or (isinstance(value, str) and value in _NOT_FINITE):
        return float(value)
    raise _Unusual(value)


def _refuse(value: Any) -> Any:
    raise _Unusual(value)
