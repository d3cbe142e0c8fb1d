"""Writes the reference in docs/api.md from the contract: `python proto/make_docs.py`, as `make format` does.

Whatever stands above the mark in docs/api.md is written by hand; all below it is made of the comments.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "api.md"
MARK = "<!-- All below is made by proto/make_docs.py from proto/web4/lora/v1/. -->\n"
_PACKAGE = "web4.lora.v1"
# Numbers of descriptor.proto's own fields, of which the paths of comments are made.
_MESSAGES, _ENUMS, _SERVICES, _INNER = 4, 5, 6, 2

_Field = FieldDescriptorProto
_Comments = Mapping[tuple[int, ...], str]


def contract() -> list[FileDescriptorProto]:
    """Return the files of the contract with their comments, sorted by name.

    Raises:
        subprocess.CalledProcessError: buf refuses them; it has said why.
    """
    buf = Path(sys.executable).with_name("buf")
    built = subprocess.run(
        [buf, "build", "--as-file-descriptor-set", "-o", "-#format=binpb"],
        cwd=HERE,
        check=True,
        stdout=subprocess.PIPE,
    )
    files = FileDescriptorSet.FromString(built.stdout).file
    return sorted((file for file in files if file.package == _PACKAGE), key=lambda file: file.name)


def reference(files: list[FileDescriptorProto]) -> str:
    """Return the reference as Markdown: the services first, then each file's messages and enums."""
    services = [
        block
        for file in files
        for index, service in enumerate(file.service)
        for block in _service(service, _comments(file), (_SERVICES, index))
    ]
    types = [block for file in files for block in _types(file)]
    return "\n\n".join(["## Services", *services, "## Messages", *types]) + "\n"


def document(text: str, files: list[FileDescriptorProto]) -> str:
    """Return a text of docs/api.md with the reference anew."""
    head, mark, _ = text.partition(MARK)
    if not mark:
        raise SystemExit(f"{DOCUMENT}: the line {MARK.strip()} is missing; the reference goes below it.")
    return f"{head}{MARK}\n{reference(files)}"


def _service(service: ServiceDescriptorProto, comments: _Comments, path: tuple[int, ...]) -> Iterator[str]:
    yield f"### {service.name}"
    yield comments[path]
    for index, method in enumerate(service.method):
        request, response = (_link(name) for name in (method.input_type, method.output_type))
        yield f"#### {service.name}/{method.name}"
        yield f"{request} → {'stream of ' if method.server_streaming else ''}{response}"
        yield _with_errors(comments[(*path, _INNER, index)])


def _types(file: FileDescriptorProto) -> Iterator[str]:
    comments = _comments(file)
    yield f"### From {Path(file.name).name}"
    for index, message in enumerate(file.message_type):
        yield from _message(message, comments, (_MESSAGES, index))
    for index, enum in enumerate(file.enum_type):
        yield from _enum(enum, comments, (_ENUMS, index))


def _message(message: DescriptorProto, comments: _Comments, path: tuple[int, ...]) -> Iterator[str]:
    yield f"#### {message.name}"
    yield comments[path]
    maps = {entry.name: entry for entry in message.nested_type if entry.options.map_entry}
    rows = [
        f"| {field.number} | `{field.name}` | {_type(message, field, maps)} "
        f"| {_cell(comments[(*path, _INNER, index)])} |"
        for index, field in enumerate(message.field)
    ]
    if rows:
        yield "\n".join(["| | field | type | |", "| --: | --- | --- | --- |", *rows])


def _enum(enum: EnumDescriptorProto, comments: _Comments, path: tuple[int, ...]) -> Iterator[str]:
    yield f"#### {enum.name}"
    yield comments[path]
    rows = [
        f"| {value.number} | `{value.name}` | {_cell(comments[(*path, _INNER, index)])} |"
        for index, value in enumerate(enum.value)
    ]
    yield "\n".join(["| | value | |", "| --: | --- | --- |", *rows])


def _type(message: DescriptorProto, field: _Field, maps: Mapping[str, DescriptorProto]) -> str:
    """Return a field's type in words: repeated, optional, map and oneof included."""
    entry = maps.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        return f"map of {_single(entry.field[0])} to {_single(entry.field[1])}"
    if field.label == _Field.LABEL_REPEATED:
        return f"repeated {_single(field)}"
    if field.proto3_optional:
        return f"optional {_single(field)}"
    if field.HasField("oneof_index"):
        return f"{_single(field)}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return _single(field)


def _single(field: _Field) -> str:
    if field.type in (_Field.TYPE_MESSAGE, _Field.TYPE_ENUM):
        return _link(field.type_name)
    return _Field.Type.Name(field.type).removeprefix("TYPE_").lower()


def _link(name: str) -> str:
    """Return a link to a type's own heading; a type from elsewhere is named in full."""
    short = name.rpartition(".")[2]
    return f"[{short}](#{short.lower()})" if name.startswith(f".{_PACKAGE}.") else f"`{name[1:]}`"


def _comments(file: FileDescriptorProto) -> _Comments:
    """Return the comments of a file by the paths of what they are on; lint demands one for each element."""
    return {
        tuple(place.path): _escaped(" ".join(place.leading_comments.split()))
        for place in file.source_code_info.location
        if place.leading_comments
    }


def _escaped(text: str) -> str:
    """Return a comment as Markdown that shows it letter by letter; what it has in `…` stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*<\[])", r"\\\1", part) for part in parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _with_errors(text: str) -> str:
    """Put the errors of a call in a paragraph of their own."""
    said, found, errors = text.partition(" Errors: ")
    return f"{said}\n\nErrors: {errors}" if found else said


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text("utf-8"), contract()), "utf-8")
