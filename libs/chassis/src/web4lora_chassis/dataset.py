"""The form of chat data: JSON Lines with `messages`, read and checked before anything is loaded.

The command checks files before they travel and the trainer before it trains, by the same rules. A row:

    {"id": "tool-0001", "core": "tool", "messages": [{"role": "user", "content": "…"}, …]}

`id` and `core` may be absent; other keys are the graders' business and left alone.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import InvalidInput, NotFound

ROLES = ("system", "user", "assistant")
PROBLEMS_SHOWN = 20
_MAX_LINE_BYTES = 4 << 20
_WARNINGS_SHOWN = 50
_OTHER_FORMS = {
    "conversations": 'rename it to "messages", "from" to "role" and "value" to "content"',
    "prompt": 'put the prompt into a "user" message and the completion into an "assistant" one',
    "instruction": 'put instruction and input into a "user" message, the output into an "assistant" one',
    "text": 'split it into "user" and "assistant" messages: only answers are trained on',
}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: One of `ROLES`.
        content: Its text, never blank.
    """

    role: str
    content: str

    def to_json(self) -> dict[str, str]:
        """Return it as chat templates take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Row:
    """One conversation.

    Attributes:
        file: The file it came from, as the caller names it.
        line: Its line, from 1.
        id: The row's own id, or empty.
        core: Which skill it teaches, or empty.
        messages: Optional system, then user and assistant in turn; the last is the assistant's.
    """

    file: str
    line: int
    id: str
    core: str
    messages: tuple[Message, ...]

    @property
    def place(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"


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


@dataclass(frozen=True)
class Dataset:
    """Checked data.

    Attributes:
        train: Rows to train on.
        held_out: Rows that are never trained on.
        warnings: What deserves a look but stops nothing, as `file:line: text`.
    """

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    warnings: tuple[str, ...]

    @property
    def rows_by_core(self) -> Mapping[str, int]:
        """Training rows by core; rows without one are left out."""
        return dict(sorted(Counter(row.core for row in self.train if row.core).items()))


def read_dataset(train_files: Sequence[Path], held_out_files: Sequence[Path] = ()) -> Dataset:
    """Read and check chat data.

    Args:
        train_files: JSON Lines files to train on.
        held_out_files: JSON Lines files that are only measured on.

    Returns:
        The checked rows, in the files' order.

    Raises:
        InvalidInput: Something is wrong; the message holds the first 20 problems and their count.
        NotFound: A file is not there or can't be read.
    """
    ids: dict[str, str] = {}
    problems: list[Problem] = []
    rows: dict[bool, list[Row]] = {True: [], False: []}
    for path, is_train in [(path, True) for path in train_files] + [(path, False) for path in held_out_files]:
        for item in check_rows(path, path.name, ids):
            if isinstance(item, Row):
                rows[is_train].append(item)
            else:
                problems.append(item)
    if not rows[True] and not problems:
        names = ", ".join(path.name for path in train_files) or "the dataset"
        problems.append(Problem(names, 0, "there is no row to train on", "give at least one row"))
    if problems:
        raise problems_error(problems, "Nothing was trained.")
    return Dataset(tuple(rows[True]), tuple(rows[False]), tuple(_warnings(rows[True], rows[False])))


def check_rows(path: Path, name: str = "", ids: dict[str, str] | None = None) -> Iterator[Row | Problem]:
    """Read a file of chat data; blank lines are skipped.

    Args:
        path: The file.
        name: What to call it in rows and problems; its path when empty.
        ids: The ids used so far and where; those of this file are added. Ids are unique over all files of a
            dataset.

    Yields:
        In the file's order a `Row` for each good line and a `Problem` for each bad one.

    Raises:
        NotFound: The file is not there or can't be read.
    """
    name = name or str(path)
    ids = {} if ids is None else ids
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(_MAX_LINE_BYTES)
                    yield Problem(name, number, "the line is longer than 4 MiB", "shorten or split the row")
                    continue
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield _unique(_read_row(line, name, number), ids)
    except OSError as error:
        raise NotFound(
            f"{name} can't be read: {error.strerror}.", fix="Name a readable file.", metadata={"file": name}
        ) from error


def problems_error(problems: Sequence[Problem], consequence: str) -> InvalidInput:
    """Return the error that tells of bad rows: the first 20, then the count.

    Args:
        problems: At least one.
        consequence: What was not done because of them: "Nothing was trained."
    """
    lines = [str(problem) for problem in problems[:PROBLEMS_SHOWN]]
    if len(problems) > PROBLEMS_SHOWN:
        lines.append(f"… and {len(problems) - PROBLEMS_SHOWN} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return InvalidInput(
        "\n".join(lines) + f"\n{count} in the dataset. {consequence}",
        fix="Correct the rows, or keep the good ones: `web4lora dataset check FILE --drop GOOD_FILE`.",
        reason="DATASET_INVALID",
        metadata={"problems": len(problems)},
    )


def repetitions(train: Iterable[Row], held_out: Iterable[Row]) -> Iterator[Problem]:
    """Yield what stops nothing but deserves a look: rows with the same user text.

    Args:
        train: Rows to train on.
        held_out: Rows that are never trained on.
    """
    seen: dict[tuple[str, ...], Row] = {}
    for row in train:
        if first := seen.get(_question(row)):
            same = " and the same answer" if first.messages == row.messages else ""
            yield Problem(
                row.file, row.line, f"the same user text{same} as {first.place}", "one of them may be enough"
            )
        seen.setdefault(_question(row), row)
    for row in held_out:
        if first := seen.get(_question(row)):
            yield Problem(
                row.file,
                row.line,
                f"held out, but the same user text is trained on at {first.place}",
                "a score on it says nothing about new questions",
            )


def _question(row: Row) -> tuple[str, ...]:
    return tuple(message.content.strip() for message in row.messages if message.role == "user")


def _warnings(train: Iterable[Row], held_out: Iterable[Row]) -> Iterator[str]:
    found = list(repetitions(train, held_out))
    yield from map(str, found[:_WARNINGS_SHOWN])
    if len(found) > _WARNINGS_SHOWN:
        yield f"… and {len(found) - _WARNINGS_SHOWN} more of this kind"


def _unique(item: Row | Problem, ids: dict[str, str]) -> Row | Problem:
    """Refuse a row whose id was used before."""
    if isinstance(item, Problem) or not item.id:
        return item
    if item.id in ids:
        return Problem(
            item.file, item.line, f'the id "{item.id}" was used at {ids[item.id]}', "give each row its own id"
        )
    ids[item.id] = item.place
    return item


def _read_row(line: bytes, name: str, number: int) -> Row | Problem:
    """Return the row that a line holds, or the first thing that is wrong with it."""

    def problem(message: str, fix: str) -> Problem:
        return Problem(name, number, message, fix)

    try:
        data = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return problem(f"not UTF-8 at byte {error.start + 1}", "save the file as UTF-8")
    except json.JSONDecodeError as error:
        return problem(f"not JSON at column {error.colno}: {error.msg}", "write one JSON object on the line")
    except RecursionError:
        return problem("nested too deeply", 'write {"messages": [...]} only')
    if not isinstance(data, dict):
        return problem(f"{_kind(data)}, not an object", 'write {"messages": [...]}')
    for key in ("id", "core"):
        if not isinstance(data.get(key, ""), str):
            return problem(f'"{key}" is {_kind(data[key])}, not text', "quote it, or leave it out")
        if _unprintable(data.get(key, "")):
            return problem(f'"{key}" holds a NUL or half a character (a lone surrogate)', "remove it")
    if "messages" not in data:
        for key, fix in _OTHER_FORMS.items():
            if key in data:
                return problem(f'there is "{key}" where "messages" is needed', fix)
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        return problem(
            '"messages" is missing, empty or not a list',
            'add "messages": [{"role": "user", "content": "…"}, …]',
        )
    turns: list[Message] = []
    for entry in messages:
        if wrong := _message_problem(entry, turns):
            return problem(*wrong)
        turns.append(Message(entry["role"], entry["content"]))
    if turns[-1].role != "assistant":
        return problem(
            f'the last message is from "{turns[-1].role}"', 'training needs an answer from "assistant" last'
        )
    return Row(name, number, data.get("id", ""), data.get("core", ""), tuple(turns))


def _message_problem(entry: Any, before: Sequence[Message]) -> tuple[str, str] | None:
    """Say what is wrong with a turn, if anything, and what to do."""
    place = f"message {len(before) + 1}"
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
        return f'{place} has no "role"', 'write {"role": "user", "content": "…"}'
    role, content = entry["role"], entry.get("content")
    if role not in ROLES:
        return f"{place} has the role {json.dumps(role)}", f"use one of {', '.join(ROLES)}"
    if entry.get("tool_calls"):
        return f'{place} has "tool_calls", which are not trained on', 'write the call as text into "content"'
    if not isinstance(content, str) or not content.strip():
        return f'{place}, from "{role}", has no text', 'give "content" some text, or drop the row'
    if _unprintable(content):
        return f"{place} holds a NUL or half a character (a lone surrogate)", "remove it"
    if role == "system" and before:
        return f'{place} is from "system"', "put the one system message first"
    previous = before[-1].role if before else ""
    if role == "assistant" and previous != "user":
        return f'{place}, from "assistant", follows no user', "let user and assistant take turns"
    if role == "user" and previous == "user":
        return f"{place} is a second user message in a row", "let user and assistant take turns"
    return None


def _unprintable(text: str) -> bool:
    """True when neither a tokenizer nor the contract could take the text."""
    return "\x00" in text or any("\ud800" <= char <= "\udfff" for char in text)


def _kind(value: Any) -> str:
    """Name a JSON value's type for people."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
