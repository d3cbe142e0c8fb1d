"""The record of what training gave a model: a few conversations of its own data, with their token ids.

Training writes it into the adapter, the packager copies it beside each GGUF, and what is served is held
against it, token by token. It comes from a store, so it is read as anything from outside: bounded, and
checked field by field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import InvalidInput, shown

TRAINED_CONVERSATIONS = "trained_conversations.json"
"""The file's name, in the adapter and beside each GGUF. An adapter from elsewhere has none."""
MAX_CONVERSATIONS = 8
IGNORED = -100
"""The label of a token that is not trained on; PyTorch's own convention."""

_FORMAT = "web4lora.trained_conversations/1"
_MAX_BYTES = 16 << 20
_MAX_ID = 1 << 31
_MAX_NAME = 200


@dataclass(frozen=True)
class Turn:
    """A trained answer in a row's tokens.

    Attributes:
        messages: How many messages come before it.
        prompt_tokens: A served model is given exactly so many of the row's tokens for them.
        stop_token: Id of the token that ends the answer, trained too.
    """

    messages: int
    prompt_tokens: int
    stop_token: int


@dataclass(frozen=True)
class Conversation:
    """A conversation as it was trained.

    Attributes:
        file: Where the data has it.
        line: The line there.
        messages: Role and content of each turn, up to the last trained answer.
        input_ids: Token ids.
        labels: The same ids where they are trained on, `IGNORED` elsewhere.
        turns: The answers among them.
        tools: What the assistant was told that it may call, as chat templates take it.
    """

    file: str
    line: int
    messages: tuple[Mapping[str, Any], ...]
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class TrainedConversations:
    """The record.

    Attributes:
        conversations: A few of those that were trained.
        system: The system message that most conversations of the data have, empty where most have none; None
            when the record does not say.
        rendered_at: The time that the chat template wrote; None where it writes none.
    """

    conversations: tuple[Conversation, ...]
    system: str | None = None
    rendered_at: datetime | None = None

    def write(self, folder: Path) -> None:
        """Write the record into a folder, under its name."""
        data: dict[str, Any] = {"format": _FORMAT}
        if self.system is not None:
            data["system"] = self.system
        if self.rendered_at:
            data["rendered_at"] = self.rendered_at.isoformat()
        data["conversations"] = [asdict(each) for each in self.conversations]
        text = json.dumps(data, ensure_ascii=False)
        (folder / TRAINED_CONVERSATIONS).write_text(text + "\n", encoding="utf-8")


def require_small(size_bytes: int) -> None:
    """Refuse a record that is too large to be one, before it is fetched or read.

    Raises:
        InvalidInput: It is.
    """
    if size_bytes > _MAX_BYTES:
        raise _broken(f"it has {size_bytes:,} bytes, more than {_MAX_BYTES:,}")


def read_trained_conversations(path: Path) -> TrainedConversations:
    """Read a record.

    Raises:
        InvalidInput: It is of another format, or contradicts itself.
    """
    try:
        require_small(path.stat().st_size)
        return _record(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(str(error)) from error


def _broken(problem: str) -> InvalidInput:
    return InvalidInput(
        f"{TRAINED_CONVERSATIONS} can't be used: {problem}.",
        fix="Train again: `web4lora run FILE --from train`.",
        reason="TRAINING_RECORD_BROKEN",
    )


def _record(data: object) -> TrainedConversations:
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        said = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"its format is {str(said)[:80]!r}, not {_FORMAT!r}")
    found = _list(data.get("conversations"), "conversations", MAX_CONVERSATIONS)
    return TrainedConversations(
        conversations=tuple(_conversation(each, f"conversation {at}") for at, each in enumerate(found, 1)),
        system=None if data.get("system") is None else _text(data["system"], "system"),
        rendered_at=None if data.get("rendered_at") is None else _time(data["rendered_at"]),
    )


def _conversation(data: object, where: str) -> Conversation:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is no object")
    messages = _messages(data.get("messages"), where)
    ids = _ids(data.get("input_ids"), f"{where}: input_ids")
    labels = _list(data.get("labels"), f"{where}: labels", len(ids))
    if len(labels) != len(ids) or any(
        type(label) is not int or label not in (IGNORED, token)
        for label, token in zip(labels, ids, strict=True)
    ):
        raise ValueError(f"{where}: labels do not go with input_ids")
    turns = _list(data.get("turns"), f"{where}: turns", len(messages))
    return Conversation(
        file=" ".join(_text(data.get("file"), f"{where}: file").split())[:_MAX_NAME],
        line=_number(data.get("line"), f"{where}: line", least=0, most=_MAX_ID),
        messages=messages,
        input_ids=ids,
        labels=tuple(labels),
        turns=tuple(_turn(turn, where, len(messages), labels) for turn in turns),
        tools=_tools(data.get("tools", []), where),
    )


def _turn(data: object, where: str, messages: int, labels: list[Any]) -> Turn:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: a turn is no object")
    count = _number(data.get("messages"), f"{where}: messages of a turn", least=1, most=messages)
    length = _number(data.get("prompt_tokens"), f"{where}: prompt_tokens", least=1, most=len(labels) - 1)
    stop = data.get("stop_token")
    if type(stop) is not int or stop < 0 or stop not in labels[length:]:
        raise ValueError(f"{where}: stop_token {shown(stop, 20)} is not trained behind the prompt")
    return Turn(count, length, stop)


def _messages(value: object, where: str) -> tuple[dict[str, Any], ...]:
    messages = _list(value, f"{where}: messages", _MAX_ID)
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise ValueError(f"{where}: a message has no role")
    json.dumps(messages, ensure_ascii=False, allow_nan=False).encode()  # as it will be sent
    return tuple(messages)


def _tools(value: object, where: str) -> tuple[dict[str, Any], ...]:
    tools = _list(value, f"{where}: tools", _MAX_ID)
    if not all(isinstance(tool, dict) and isinstance(tool.get("function"), dict) for tool in tools):
        raise ValueError(f"{where}: a tool has no function")
    json.dumps(tools, ensure_ascii=False, allow_nan=False).encode()  # as it will be sent
    return tuple(tools)


def _ids(value: object, what: str) -> tuple[int, ...]:
    ids = _list(value, what, _MAX_ID)
    if not all(type(token) is int and 0 <= token < _MAX_ID for token in ids):
        raise ValueError(f"{what} are not all token ids")
    return tuple(ids)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is no text")
    value.encode()  # half a surrogate pair is none
    return value


def _time(value: object) -> datetime:
    return datetime.fromisoformat(_text(value, "rendered_at")).replace(tzinfo=None)


def _list(value: object, what: str, most: int) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is no list")
    if len(value) > most:
        raise ValueError(f"{what} has {len(value):,} entries, more than {most:,}")
    return value


def _number(value: object, what: str, *, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {str(value)[:20]!r}, not {least} to {most}")
    return value
