"""One line of chat data as a row, or what is wrong with it.

A key that is not used is no detail: `functions` or a `weight` change what is learnt. So each key of a row
is used, or is known to describe the row only, or the row is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from web4lora_chassis.dataset_formats import MESSAGES, as_messages
from web4lora_chassis.dataset_tools import ToolCall, read_calls, read_tools
from web4lora_chassis.jsonl import Problem, Wrong, kind_of, parse_object, quoted

ROLES = ("system", "user", "assistant", "tool")

_DESCRIBES = frozenset(
    {
        "author", "category", "check", "comment", "comments", "created", "created_at", "dataset", "date",
        "difficulty", "domain", "hash", "idx", "index", "lang", "language", "licence", "license", "meta",
        "metadata", "note", "notes", "origin", "source", "sources", "split", "subset", "tag", "tags", "time",
        "timestamp", "title", "topic", "updated_at", "url", "uuid", "version",
    }
)  # fmt: skip
"""Keys of a row or a message that describe it and are never trained on; so do names that end with `_id`."""
_OTHER_FORMS = {
    "prompt": 'give the "completion" beside it',
    "instruction": 'give the "output" beside it',
    "text": 'split it into "user" and "assistant" messages: only answers are trained on',
}
_TOOLS = 'write the functions as "tools", the calls as "tool_calls", or put them into "meta"'
_WEIGHT = 'give each "assistant" message a "weight" of 0 or 1, or drop the row'
_ROW_FIXES = {
    **dict.fromkeys(("functions", "tool_choice", "function_call"), _TOOLS),
    **dict.fromkeys(("weight", "weights", "train", "training", "mask", "loss_mask"), _WEIGHT),
    "system": 'make it the first message, with the role "system"',
}
_ROW_FIX = 'put it into "meta", which training never reads, if it only describes the row'
_REASONINGS = ("reasoning_content", "reasoning", "thinking")
_MESSAGE_FIXES = {
    "function_call": 'write it as "tool_calls", and give the row its "tools"',
    "thoughts": 'name it "reasoning_content"',
    "tool_calls": "only the assistant calls tools",
    "tool_call_id": 'only a message with the role "tool" answers a call',
    **dict.fromkeys(_REASONINGS, "only the assistant reasons"),
    "name": 'write the name into "content", or leave it out',
}
_USED = {
    "assistant": frozenset({"tool_calls", *_REASONINGS}),
    "tool": frozenset({"tool_call_id", "name"}),
}
_MESSAGE_FIX = 'write it into "content", or put it into "meta" if it only describes the message'


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: One of `ROLES`.
        content: Its text; blank only beside calls of tools.
        trained: An answer is trained on; False where its `weight` is 0.
        reasoning: What the assistant thinks before its answer; may be empty.
        tool_calls: The tools that the assistant calls.
        tool_call_id: Of a tool's message: the call that it answers; may be empty.
        name: Of a tool's message: the tool; may be empty.
    """

    role: str
    content: str
    trained: bool = True
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as chat templates take it."""
        data: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            data["reasoning_content"] = self.reasoning
        if self.tool_calls:
            data["tool_calls"] = [call.to_json() for call in self.tool_calls]
        if self.tool_call_id:
            data["tool_call_id"] = self.tool_call_id
        if self.name:
            data["name"] = self.name
        return data


@dataclass(frozen=True)
class Row:
    """One conversation.

    Attributes:
        file: The file it came from, as the caller names it.
        line: Its line, from 1.
        id: The row's own id, or empty.
        core: Which skill it teaches, or empty.
        messages: Optional system, then user and assistant in turn, tools' results behind their calls; the
            last is the assistant's.
        tools: What the assistant may call, as chat templates take it.
        source_format: The form that it came in, see `dataset_formats`.
        check: What an answer to it is held to, see `graders`; never trained on. None where there is none.
    """

    file: str
    line: int
    id: str
    core: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    source_format: str = MESSAGES
    check: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def place(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"

    @property
    def question(self) -> str:
        """What the user says, in all of its turns: rows that agree in it ask for the same."""
        return "\n".join(message.content.strip() for message in self.messages if message.role == "user")


def read_row(line: bytes, name: str, number: int) -> Row | Problem:
    """Return the row that a line holds, or the first thing that is wrong with it.

    Args:
        line: The line, without a byte order mark.
        name: What to call the file.
        number: The line's number, from 1.
    """
    try:
        data = parse_object(line)
        for key in ("id", "core"):
            _check_text(data, key)
        data, source_format = as_messages(data)
        messages = _messages(data)
        _check_keys(data, {"id", "core", "messages", "tools"}, _ROW_FIXES, _ROW_FIX, "the row")
        tools = read_tools(data.get("tools"))
        turns: list[Message] = []
        for entry in messages:
            turns.append(_message(entry, turns, tools))
        _check_tools_text([tools, [turn.to_json() for turn in turns if turn.tool_calls]])
        _check_answers(turns)
    except Wrong as wrong:
        return Problem(name, number, wrong.message, wrong.fix)
    check = data.get("check")
    return Row(
        name, number, data.get("id", ""), data.get("core", ""), tuple(turns), tools, source_format,
        check if isinstance(check, dict) else None,
    )  # fmt: skip


def _check_text(data: Mapping[str, Any], key: str) -> None:
    value = data.get(key, "")
    if not isinstance(value, str):
        raise Wrong(f'"{key}" is {kind_of(value)}, not text', "quote it, or leave it out")
    if _unprintable(value):
        raise Wrong(f'"{key}" holds a NUL or half a character (a lone surrogate)', "remove it")


def _messages(data: Mapping[str, Any]) -> list[Any]:
    if "messages" not in data:
        for key, fix in _OTHER_FORMS.items():
            if key in data:
                raise Wrong(f'there is "{key}" where "messages" is needed', fix)
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Wrong(
            '"messages" is missing, empty or not a list',
            'add "messages": [{"role": "user", "content": "…"}, …]',
        )
    return messages


def _check_keys(
    data: Mapping[str, Any], used: Iterable[str], fixes: Mapping[str, str], otherwise: str, owner: str
) -> None:
    """Refuse a key that is neither used nor known to describe only; an empty one says nothing."""
    for key, value in data.items():
        if key in used or value is None or value in ("", [], {}):
            continue
        if key in fixes or not (key in _DESCRIBES or key.endswith("_id")):
            are = "are" if key.endswith("s") else "is"
            raise Wrong(f"{owner} has {quoted(key)}, which {are} not trained on", fixes.get(key, otherwise))


def _message(entry: Any, before: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Message:
    """Return a turn.

    Raises:
        Wrong: Something is wrong with it.
    """
    place = f"message {len(before) + 1}"
    if not isinstance(entry, dict) or not isinstance(entry.get("role"), str):
        raise Wrong(f'{place} has no "role"', 'write {"role": "user", "content": "…"}')
    role = entry["role"]
    if role not in ROLES:
        raise Wrong(f"{place} has the role {quoted(role)}", f"use one of {', '.join(ROLES)}")
    used = {"role", "content", "weight", "train"} | _USED.get(role, frozenset())
    _check_keys(entry, used, _MESSAGE_FIXES, _MESSAGE_FIX, place)
    content = _content(entry.get("content"), place)
    calls = read_calls(entry["tool_calls"], place, tools) if entry.get("tool_calls") else ()
    reasoning = _reasoning(entry, place)
    if not content.strip() and not calls:
        raise Wrong(f'{place}, from "{role}", has no text', 'give "content" some text, or drop the row')
    if _unprintable(content + reasoning):
        raise Wrong(f"{place} holds a NUL or half a character (a lone surrogate)", "remove it")
    if role == "system" and before:
        raise Wrong(f'{place} is from "system"', "put the one system message first")
    previous = before[-1].role if before else ""
    if role == "tool":
        return _result(entry, place, content, before)
    if role != "tool" and _open_calls(before) and role == "user":
        raise Wrong(f"{place} comes where the result of a tool call is due", 'give it in a "tool" message')
    if role == "assistant" and previous not in ("user", "tool"):
        raise Wrong(f'{place}, from "assistant", follows no user', "let user and assistant take turns")
    if role == "user" and previous in ("user", "tool"):
        what = (
            "a second user message in a row" if previous == "user" else "from the user behind a tool's result"
        )
        raise Wrong(f"{place} is {what}", "let user and assistant take turns")
    if role == "assistant" and _calls_nothing(content):
        raise Wrong(f"{place} calls a tool without a name", 'name it in "tool", or drop the row')
    return Message(role, content, _trained(entry, place), reasoning, calls)


def _open_calls(before: Sequence[Message]) -> bool:
    """Tell whether the last message calls tools, so that their results are due."""
    return bool(before) and bool(before[-1].tool_calls)


def _result(entry: Mapping[str, Any], place: str, content: str, before: Sequence[Message]) -> Message:
    """Return a tool's message."""
    calling = next((turn for turn in reversed(before) if turn.role != "tool"), None)
    if calling is None or not calling.tool_calls:
        raise Wrong(f"{place}, from a tool, follows no call", 'give the "tool_calls" before it')
    answered = entry.get("tool_call_id") or ""
    name = entry.get("name") or ""
    if not isinstance(answered, str) or not isinstance(name, str):
        raise Wrong(f'{place} has a "tool_call_id" or "name" that is no text', "quote it, or leave it out")
    known = [call.id for call in calling.tool_calls if call.id]
    if answered and known and answered not in known:
        raise Wrong(f"{place} answers the call {quoted(answered)}, which was not made", "correct its id")
    _trained(entry, place)
    return Message("tool", content, tool_call_id=answered, name=name)


def _reasoning(entry: Mapping[str, Any], place: str) -> str:
    """Return what an assistant's message thinks first, under the name that it has there."""
    given = [name for name in _REASONINGS if entry.get(name)]
    if len(given) > 1:
        raise Wrong(f"{place} has {quoted(given[0])} and {quoted(given[1])}", "keep one of them")
    value = entry[given[0]] if given else ""
    if not isinstance(value, str):
        raise Wrong(f"{place} has {kind_of(value)} as its {quoted(given[0])}", "write text")
    return value


def _calls_nothing(content: str) -> bool:
    """True for a tool call, in the form that the tests of tool calls take, whose tool has no name."""
    if '"tool"' not in content or not content.lstrip().startswith("{"):
        return False
    try:
        call = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return set(call) == {"tool", "args"} and isinstance(call["tool"], str) and not call["tool"].strip()


def _content(content: Any, place: str) -> str:
    """Return a message's text; parts are joined by a line break, as llama-server joins them."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Wrong(f'{place} has {kind_of(content)} as its "content"', "write text")
    texts = []
    for number, part in enumerate(content, start=1):
        where = f"{place}, part {number} of its content,"
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            what = f"is of the type {quoted(kind)}" if isinstance(kind, str) else "is no part"
            raise Wrong(
                f"{where} {what}; only text is trained on", 'write {"type": "text", "text": "…"}, or text'
            )
        _check_keys(part, {"type", "text"}, {}, "keep type and text alone", where)
        texts.append(part["text"])
    return "\n".join(texts)


def _trained(entry: Mapping[str, Any], place: str) -> bool:
    """Return what `weight` and `train` say of a message; without them an answer is trained on."""
    weight, train = entry.get("weight"), entry.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise Wrong(f'{place} has the "weight" {quoted(weight)}', "use 0 (not trained on) or 1 (trained on)")
    if train is not None and not isinstance(train, bool):
        raise Wrong(f'{place} has {kind_of(train)} as its "train"', "use true or false")
    said = {bool(value) for value in (weight, train) if value is not None}
    if len(said) > 1:
        raise Wrong(f'"weight" and "train" of {place} contradict each other', "keep one of them")
    if True in said and entry["role"] != "assistant":
        raise Wrong(
            f'{place}, from "{entry["role"]}", asks to be trained on', "only answers of the assistant are"
        )
    return False not in said


def _check_answers(turns: Sequence[Message]) -> None:
    if turns[-1].role != "assistant":
        raise Wrong(
            f'the last message is from "{turns[-1].role}"', 'training needs an answer from "assistant" last'
        )
    if not any(turn.trained for turn in turns if turn.role == "assistant"):
        raise Wrong("no answer in it is trained on: every weight is 0", "drop the row")


def _check_tools_text(data: Any) -> None:
    text = json.dumps(data, ensure_ascii=False)
    if _unprintable(text) or "\\u0000" in text:
        raise Wrong("a tool or a call holds a NUL or half a character (a lone surrogate)", "remove it")


def _unprintable(text: str) -> bool:
    """True when neither a tokenizer nor the contract could take the text."""
    return "\x00" in text or any("\ud800" <= char <= "\udfff" for char in text)
