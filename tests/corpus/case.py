"""What the corpus is made of: kinds of files that come from outside, and ways in which one is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]
"""Writes into a folder, or damages what is there."""


@dataclass(frozen=True)
class Case:
    """A damaged or hostile file.

    Attributes:
        name: What is wrong with it, in words.
        damage: Makes it of a whole one.
        says: A pattern that the error's message must hold.
        readers: Those of the kind's readers that must refuse it; empty for all.
    """

    name: str
    damage: Change
    says: str = ""
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: Of the kind.
        whole: Writes a whole one into a folder, with what else its readers need.
        readers: The product's own functions that read such files, by the part that calls them: each takes
            the folder, and another that must be empty when reading has failed.
        cases: At least five.
        names: A pattern that tells people which file is meant; every message must hold it.
        lines: Most lines of a message: one, where a reader does not say all problems at once.
        modules: Imported before the first case, because that takes seconds.
    """

    name: str
    whole: Change
    readers: Mapping[str, Callable[[Path, Path], object]]
    cases: tuple[Case, ...]
    names: str
    lines: int = 1
    modules: tuple[str, ...] = ()


def holds(name: str, content: bytes | str) -> Change:
    """Return a change that puts other content into a file."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def edited(name: str, change: Callable[[Any], object]) -> Change:
    """Return a change of a JSON file's data; a text in it may hold half a pair of surrogates."""

    def apply(folder: Path) -> None:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        change(data)
        (folder / name).write_text(json.dumps(data), encoding="utf-8")

    return apply


def having(name: str, **values: Any) -> Change:
    """Return a change that sets keys of a JSON object, in a new file when there is none."""

    def apply(folder: Path) -> None:
        path = folder / name
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps({**data, **values}), encoding="utf-8")

    return apply


DEEP = 100_000
NO_JSON: Mapping[str, bytes] = {
    "empty": b"",
    "no JSON": b"{oops",
    "cut off": b'{"a": [1, 2',
    "zeros": bytes(64),
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "nested 100,000 deep": b"[" * DEEP + b"]" * DEEP,
    "an object 100,000 deep": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}
"""What any JSON file that must hold an object may hold instead."""


def no_json(name: str, says: str = "", readers: tuple[str, ...] = ()) -> tuple[Case, ...]:
    """Return the cases of a JSON file that holds no JSON object."""
    return tuple(Case(f"{name}: {what}", holds(name, data), says, readers) for what, data in NO_JSON.items())
