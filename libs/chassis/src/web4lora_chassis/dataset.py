"""The form of chat data: JSON Lines with `messages`, read and checked row by row.

The command checks files before they travel and the trainer before it trains, by the same rules. A row:

    {"id": "tool-0001", "core": "tool", "messages": [{"role": "user", "content": "…"}, …]}

`id` and `core` may be absent; other keys are the graders' business and ignored.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import InvalidInput, NotFound

ROLES = ("system", "user", "assistant")
_LINE_LIMIT_BYTES = 4 << 20
_PROBLEMS_SHOWN = 20
_OTHER_FORMS = {
    "conversations": 'Rename it to "messages", "from" to "role" and "value" to "content".',
    "prompt": 'Put the prompt into a "user" message and the completion into an "assistant" message.',
    "instruction": 'Put instruction and input into a "user" message, the output into an "assistant" one.',
    "text": 'Split it into "user" and "assistant" messages: only answers are trained on.',
}


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: One of `ROLES`.
        content: Its text, never blank.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One chat to train on or to measure with.

    Attributes:
        file: The file it came from, as the caller names it.
        line: Its line, from 1.
        id: Its own id; empty when it has none.
        core: The part of the data it belongs to, for example "tool"; empty when it names none.
        messages: The chat; the last one is the wanted answer.
    """

    file: str
    line: int
    id: str
    core: str
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The chat without the wanted answer."""
        return self.messages[:-1]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row.

    Attributes:
        file: The file, as the caller names it.
        line: The line, from 1.
        message: What is wrong.
        fix: What to do about it; may be empty.
    """

    file: str
    line: int
    message: str
    fix: str = ""

    def __str__(self) -> str:
        """Return `file:line: message fix`."""
        return f"{self.file}:{self.line}: {self.message}{' ' if self.fix else ''}{self.fix}"


def check_rows(path: Path, name: str = "") -> Iterator[Row | Problem]:
    """Read a file of chat data; blank lines are skipped.

    Args:
        path: The file.
        name: What to call it in rows and problems; its path when empty.

    Yields:
        In the file's order a `Row` for each good line and a `Problem` for each bad one.

    Raises:
        NotFound: The file is not there or can't be read.
    """
    name = name or str(path)
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(_LINE_LIMIT_BYTES + 1):
                number += 1
                if len(raw) > _LINE_LIMIT_BYTES:
                    while raw and not raw.endswith(b"\n"):
                        raw = file.readline(_LINE_LIMIT_BYTES)
                    yield Problem(name, number, f"the line is longer than {_LINE_LIMIT_BYTES >> 20} MiB.")
                    continue
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                if raw.strip():
                    yield _row(raw, name, number)
    except OSError as error:
        raise NotFound(
            f"{name} can't be read: {error.strerror}.", fix="Correct the path.", metadata={"file": name}
        ) from error


def problems_error(problems: Sequence[Problem], consequence: str) -> InvalidInput:
    """Return the error that tells of bad rows: the first 20, then the count.

    Args:
        problems: At least one problem.
        consequence: What was not done because of them: "Nothing was trained."
    """
    lines = [str(problem) for problem in problems[:_PROBLEMS_SHOWN]]
    if len(problems) > _PROBLEMS_SHOWN:
        lines.append(f"… {len(problems) - _PROBLEMS_SHOWN} more, {len(problems)} bad rows in all")
    return InvalidInput(
        "\n".join(lines),
        fix=f"{consequence} Correct the rows, or drop them: `web4lora dataset check FILE --drop GOOD_FILE`.",
        reason="BAD_ROWS",
        metadata={"problems": len(problems), "file": problems[0].file, "line": problems[0].line},
    )


def repetitions(train: Iterable[Row], held_out: Iterable[Row]) -> Iterator[Problem]:
    """Yield what stops nothing but deserves a look: rows that occur twice, and held-out prompts trained on.

    Args:
        train: The rows to train on.
        held_out: The rows to measure with.
    """
    seen: dict[tuple[Message, ...], Row] = {}
    prompts: dict[tuple[Message, ...], Row] = {}
    for row in train:
        if first := seen.get(row.messages):
            yield Problem(row.file, row.line, f"the same row as {first.file}:{first.line}.")
        seen.setdefault(row.messages, row)
        prompts.setdefault(row.prompt, row)
    for row in held_out:
        if first := prompts.get(row.prompt):
            yield Problem(
                row.file,
                row.line,
                f"this held-out prompt is trained on too, {first.file}:{first.line}.",
                "Scores on it say nothing about new prompts.",
            )


def _row(raw: bytes, name: str, number: int) -> Row | Problem:
    """Return the row that a line holds, or the first thing that is wrong with it."""

    def problem(message: str, fix: str = "") -> Problem:
        return Problem(name, number, message, fix)

    try:
        data = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return problem(f"byte {error.start + 1} is not UTF-8.", "Save the file as UTF-8.")
    except json.JSONDecodeError as error:
        hint = "One JSON object a line; a list over several lines is not JSON Lines."
        return problem(f"not JSON at column {error.colno}: {error.msg}.", hint)
    except RecursionError:
        return problem("the JSON is nested too deeply.")
    if not isinstance(data, dict):
        return problem(f"a JSON object is needed, this is {_kind(data)}.")
    if "messages" not in data:
        for key, fix in _OTHER_FORMS.items():
            if key in data:
                return problem(f'there is "{key}" where "messages" is needed.', fix)
        return problem('"messages" is missing.')
    for key in ("id", "core"):
        if not isinstance(data.get(key, ""), str):
            return problem(f'"{key}" must be text, this is {_kind(data[key])}.')
    messages = data["messages"]
    if not isinstance(messages, list) or not messages:
        return problem('"messages" must be a list with at least one user and one assistant message.')
    for place, message in enumerate(messages, start=1):
        if wrong := _message_problem(message, place):
            return problem(*wrong)
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        return problem(f'the last message is from "{role}"; training needs an answer from "assistant" last.')
    if all(message["role"] != "user" for message in messages):
        return problem('there is no message from "user".')
    turns = tuple(Message(message["role"], message["content"]) for message in messages)
    return Row(name, number, data.get("id", ""), data.get("core", ""), turns)


def _message_problem(message: Any, place: int) -> tuple[str, str] | None:
    """Return what is wrong with a message and what to do, or None."""
    if not isinstance(message, Mapping):
        return f"message {place} must be an object, this is {_kind(message)}.", ""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        shown = json.dumps(role, ensure_ascii=False) if "role" in message else "missing"
        return f"the role of message {place} is {shown}; it must be one of {', '.join(ROLES)}.", ""
    if role == "system" and place > 1:
        return f'message {place} is from "system"; only the first one may be.', ""
    if message.get("tool_calls"):
        return (
            f'message {place} has "tool_calls", which are not trained on.',
            'Write the call as text into "content".',
        )
    if not isinstance(content, str):
        shown = _kind(content) if "content" in message else "missing"
        return f'"content" of message {place} must be text, this is {shown}.', ""
    if not content.strip():
        return f'"content" of message {place} (from "{role}") is empty.', ""
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        return f'"content" of message {place} has half a character (a lone surrogate).', ""
    return None


def _kind(value: Any) -> str:
    """Name a JSON value's type for people."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
