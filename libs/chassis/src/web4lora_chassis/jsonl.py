"""JSON Lines, as everything here reads them: chat data, and the prompts of a suite.

One rule holds for all: UTF-8, with a byte order mark or without; a line ends with a line feed, before which a
carriage return may stand, and with nothing else that may be taken for a line's end; blank lines count and
are skipped.
"""

from __future__ import annotations

import codecs
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from web4lora_chassis.errors import NotFound

_MAX_LINE_BYTES = 4 << 20
_MAX_ARRAY_BYTES = 16 << 20
_LINES_FROM_ARRAY = (
    "import json,sys; [print(json.dumps(row)) for row in json.load(open(sys.argv[1], encoding='utf-8-sig'))]"
)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row.

    Attributes:
        file: The file, as the caller names it.
        line: The line, from 1; 0 for the file as a whole.
        message: What is wrong.
        fix: What to do about it.
    """

    file: str
    line: int
    message: str
    fix: str

    def __str__(self) -> str:
        """Return `file:line: message; fix`."""
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.message}; {self.fix}"


class Wrong(Exception):
    """What is wrong with a line, and what to do."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message, fix)
        self.message, self.fix = message, fix


def read_lines(path: Path, name: str) -> Iterator[tuple[int, bytes] | Problem]:
    """Read a file's lines; blank ones are skipped.

    Args:
        path: The file.
        name: What to call it in problems.

    Yields:
        Each line with its number, from 1, or a `Problem` in its place; one for the file as a whole when it
        holds no line, or is of another form.

    Raises:
        NotFound: The file is not there or can't be read.
    """
    number = rows = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not rows and line.strip() and (problem := _no_lines(path, name, line)):
                    yield problem
                    return
                if len(line) > _MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(_MAX_LINE_BYTES)
                    rows += 1
                    yield Problem(name, number, "the line is longer than 4 MiB", "shorten or split the row")
                elif line.strip():
                    rows += 1
                    yield number, line
    except OSError as error:
        raise NotFound(
            f"{name} can't be read: {error.strerror}.", fix="Name a readable file.", metadata={"file": name}
        ) from error
    if not rows:
        what = "it has blank lines only" if number else "it is empty"
        yield Problem(name, 0, f"there is no row in it, {what}", "give it a row, or leave the file out")


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object that a line holds.

    Raises:
        Wrong: It is no JSON, or another value than an object.
    """
    data = _parse(line)
    if not isinstance(data, dict):
        raise Wrong(f"{kind_of(data)}, not an object", "write one JSON object on the line")
    return data


def _parse(line: bytes) -> Any:
    try:
        return json.loads(
            line.decode("utf-8").rstrip("\r\n"), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise Wrong(f"not UTF-8 at byte {error.start + 1}", "save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise Wrong(
            f"not JSON at column {error.colno}: {error.msg}", "write one JSON object on the line"
        ) from error
    except RecursionError as error:
        raise Wrong("nested too deeply", "keep the keys that are read") from error
    except ValueError as error:  # Python bounds the digits of a number
        raise Wrong("a number has thousands of digits", "write it as text, or leave it out") from error


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is there twice: JSON's readers differ on which of the two counts."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Wrong(f"the key {quoted(key)} is there twice in one object", "keep one of them")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise Wrong(f"{name} is not JSON", "write a number, or null")


def _no_lines(path: Path, name: str, first: bytes) -> Problem | None:
    """Say so once when a file, by its first line that is not blank, is no text or no JSON Lines at all."""
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return Problem(name, 0, "it is UTF-16, not UTF-8", "save the file as UTF-8")
    if b"\x00" in first:
        return Problem(name, 0, "it is no text file", "give JSON Lines, one row on each line")
    text = first.lstrip()
    if text[:1] not in b"[{" or (text[:1] == b"{" and _is_json(first)):
        return None
    with path.open("rb") as file:
        whole = file.read(_MAX_ARRAY_BYTES).decode("utf-8-sig", "replace").lstrip()
    if text[:1] == b"[":
        try:
            data = json.loads(whole)
        except (ValueError, RecursionError):
            data = None
        many = f" of {len(data)} rows" if isinstance(data, list) else ""
        return Problem(
            name, 0, f"it is one JSON array{many}, not one row on each line",
            f'make lines of it: python3 -c "{_LINES_FROM_ARRAY}" {shlex.quote(name)} > rows.jsonl',
        )  # fmt: skip
    try:
        _, end = json.JSONDecoder().raw_decode(whole)
    except (ValueError, RecursionError):
        return None
    if "\n" not in whole[:end]:
        return None
    return Problem(name, 0, "its rows go over several lines", "write each row as JSON on one line")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def quoted(value: Any) -> str:
    """Write a value of the file so that it can be printed, in a few characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"


def kind_of(value: Any) -> str:
    """Name a JSON value's type for people."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
