"""Chat data as JSON Lines: read and checked before anything is loaded.

A row is `{"id": …, "core": …, "messages": [{"role": …, "content": …}, …]}`; `id` and `core` may be absent,
other keys are left alone (`check` is the graders').
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import InvalidInput

PROBLEMS_SHOWN = 20
_MAX_FILE_BYTES = 4 << 30
_MAX_LINE_BYTES = 4 << 20
_WARNINGS_SHOWN = 50


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def to_json(self) -> dict[str, str]:
        """Return it as chat templates take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Row:
    """One conversation.

    Attributes:
        id: The row's own id, or empty.
        core: Which skill it teaches, or empty.
        messages: Optional system, then user and assistant in turn; the last is the assistant's.
        place: `file:line`.
    """

    id: str
    core: str
    messages: tuple[Message, ...]
    place: str


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


class _Findings:
    """Collects problems: the first few in full, all of them by count."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, place: str, wrong: str, fix: str) -> None:
        self.count += 1
        if len(self.shown) < PROBLEMS_SHOWN:
            self.shown.append(f"{place}: {wrong}; {fix}")


def read_dataset(train_files: Sequence[Path], held_out_files: Sequence[Path] = ()) -> Dataset:
    """Read and check chat data.

    Args:
        train_files: JSON Lines files to train on.
        held_out_files: JSON Lines files that are only measured on.

    Returns:
        The checked rows, in the files' order.

    Raises:
        InvalidInput: Something is wrong; the message holds the first 20 problems as
            `file:line: what is wrong; what to do`, then their total.
    """
    findings = _Findings()
    ids: dict[str, str] = {}
    train = [row for path in train_files for row in _read_file(path, findings, ids)]
    held_out = [row for path in held_out_files for row in _read_file(path, findings, ids)]
    if not train and not findings.count:
        names = ", ".join(path.name for path in train_files) or "no file given"
        findings.add(names, "there is no row to train on", "give at least one JSONL row with `messages`")
    if findings.count:
        more = findings.count - len(findings.shown)
        lines = [*findings.shown, *([f"… and {more} more"] if more else [])]
        problems = "1 problem" if findings.count == 1 else f"{findings.count} problems"
        raise InvalidInput(
            "\n".join(lines) + f"\n{problems} in the dataset. Nothing was trained.",
            fix="Correct the rows named above.",
            reason="DATASET_INVALID",
            metadata={"problems": findings.count},
        )
    return Dataset(tuple(train), tuple(held_out), tuple(_warnings(train, held_out)))


def _read_file(path: Path, findings: _Findings, ids: dict[str, str]) -> Iterator[Row]:
    """Yield a file's good rows; note what is wrong with the others."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > _MAX_FILE_BYTES:
            findings.add(
                path.name, f"the file has {size_bytes >> 20} MiB", "split it into files of at most 4 GiB"
            )
            return
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                place = f"{path.name}:{number}"
                if len(line) > _MAX_LINE_BYTES:
                    findings.add(place, "the line is longer than 4 MiB", "shorten or split the row")
                    return
                if line.strip():
                    row = _read_row(line, place, findings, ids)
                    if row is not None:
                        yield row
    except OSError as error:
        findings.add(path.name, f"can't be read: {error.strerror}", "name a readable file")


def _read_row(line: bytes, place: str, findings: _Findings, ids: dict[str, str]) -> Row | None:
    try:
        data = json.loads(line.decode("utf-8-sig" if place.endswith(":1") else "utf-8"))
    except UnicodeDecodeError as error:
        findings.add(place, f"not UTF-8 at byte {error.start}", "save the file as UTF-8")
        return None
    except json.JSONDecodeError as error:
        findings.add(
            place, f"not JSON at column {error.colno}: {error.msg}", "write one JSON object on the line"
        )
        return None
    except RecursionError:
        findings.add(place, "nested too deeply", 'write {"messages": [...]} only')
        return None
    if not isinstance(data, dict):
        findings.add(place, f"a JSON {type(data).__name__}, not an object", 'write {"messages": [...]}')
        return None
    messages = _read_messages(data.get("messages"), place, findings)
    names = {name: data.get(name, "") for name in ("id", "core")}
    for name, value in names.items():
        if not isinstance(value, str):
            findings.add(place, f"`{name}` is not text", "quote it, or leave it out")
            return None
    row_id = names["id"]
    if row_id and row_id in ids:
        findings.add(place, f"id {row_id!r} was used at {ids[row_id]}", "give each row an id of its own")
        return None
    ids[row_id] = place
    return Row(row_id, names["core"], messages, place) if messages else None


def _read_messages(data: Any, place: str, findings: _Findings) -> tuple[Message, ...]:
    """Return the turns of a row, or nothing after noting what is wrong with the first bad one."""
    if not isinstance(data, list) or not data:
        findings.add(
            place, "`messages` is missing or not a list", 'add "messages": [{"role": …, "content": …}, …]'
        )
        return ()
    messages: list[Message] = []
    for index, entry in enumerate(data, start=1):
        problem = _message_problem(entry, index, messages)
        if problem:
            findings.add(place, *problem)
            return ()
        messages.append(Message(entry["role"], entry["content"]))
    if messages[-1].role != "assistant":
        findings.add(
            place,
            f'the last message is from "{messages[-1].role}"',
            'training needs an answer from "assistant" last',
        )
        return ()
    return tuple(messages)


def _message_problem(entry: Any, index: int, before: Sequence[Message]) -> tuple[str, str] | None:
    """Say what is wrong with a turn, if anything, and what to do."""
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
        return f"message {index} has no `role`", 'write {"role": "user", "content": "…"}'
    role, content = entry["role"], entry.get("content")
    if role not in ("system", "user", "assistant"):
        return f"message {index} has the role {role!r}", "use system, user or assistant"
    if not isinstance(content, str) or not content.strip():
        return f"message {index} ({role}) has no text", "give `content` some text, or drop the row"
    if "\x00" in content:
        return f"message {index} ({role}) holds a NUL character", "remove it"
    if role == "system" and before:
        return f"message {index} is from system", "put the one system message first"
    previous = before[-1].role if before else ""
    if role == "assistant" and previous != "user":
        return f"message {index} from assistant follows no user", "let user and assistant take turns"
    if role == "user" and previous == "user":
        return f"message {index} is a second user message in a row", "let user and assistant take turns"
    return None


def _warnings(train: Iterable[Row], held_out: Iterable[Row]) -> Iterator[str]:
    """Yield what deserves a look: the same question twice, or a held-out question that is trained on."""
    found = list(_repeated(train, held_out))
    yield from found[:_WARNINGS_SHOWN]
    if len(found) > _WARNINGS_SHOWN:
        yield f"… and {len(found) - _WARNINGS_SHOWN} more of this kind"


def _repeated(train: Iterable[Row], held_out: Iterable[Row]) -> Iterator[str]:
    seen: dict[tuple[str, ...], Row] = {}
    for row in train:
        key = _question(row)
        if key in seen:
            same = " and the same answer" if seen[key].messages == row.messages else ""
            yield f"{row.place}: the same user text{same} as {seen[key].place}"
        seen.setdefault(key, row)
    for row in held_out:
        if (key := _question(row)) in seen:
            yield f"{row.place}: held out, but the same user text is trained on at {seen[key].place}"


def _question(row: Row) -> tuple[str, ...]:
    return tuple(message.content.strip() for message in row.messages if message.role == "user")
