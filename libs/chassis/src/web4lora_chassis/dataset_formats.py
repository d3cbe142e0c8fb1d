"""The forms that chat data comes in, recognised by their keys and read as `messages`.

| form | keys |
| --- | --- |
| messages | `messages`, with `tools` where tools are called |
| prompt and completion | `prompt`, `completion`: texts, or lists of messages |
| Alpaca | `instruction`, `input`, `output`, with `system` and `history` |
| ShareGPT | `conversations` of `from` and `value`, with `system` and `tools` |

A key that a form does not have stays in the row: what it means is for `dataset_row` to judge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from web4lora_chassis.jsonl import Wrong, kind_of, quoted

MESSAGES = "messages"
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "chatgpt": "assistant", "system": "system", "observation": "tool", "tool": "tool",
}  # fmt: skip
_SHAREGPT_CALL = "function_call"


def as_messages(data: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return a row with its conversation as `messages`, and the name of the form that it came in.

    Raises:
        Wrong: It has another form's keys, but not what they must hold.
    """
    if MESSAGES in data:
        return dict(data), MESSAGES
    for name, keys, read in _FORMS:
        if all(key in data for key in keys):
            return read(data), name
    return dict(data), MESSAGES


def _prompt_and_completion(data: Mapping[str, Any]) -> dict[str, Any]:
    prompt, completion = data["prompt"], data["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        # Only the completion is trained on, as TRL does.
        before = [
            {**entry, "weight": 0} if isinstance(entry, dict) and entry.get("role") == "assistant" else entry
            for entry in prompt
        ]
        return {**_rest(data, "prompt", "completion"), MESSAGES: [*before, *completion]}
    messages = [
        {"role": "user", "content": _text(data, "prompt")},
        {"role": "assistant", "content": _text(data, "completion")},
    ]
    return {**_rest(data, "prompt", "completion"), MESSAGES: messages}


def _alpaca(data: Mapping[str, Any]) -> dict[str, Any]:
    messages = _system(data)
    for number, pair in enumerate(_list(data, "history"), start=1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise Wrong(
                f'entry {number} of "history" is no question with its answer', 'write ["question", "answer"]'
            )
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = [_text(data, "instruction"), _text(data, "input") if data.get("input") else ""]
    messages += [
        {"role": "user", "content": "\n\n".join(text for text in asked if text)},
        {"role": "assistant", "content": _text(data, "output")},
    ]
    return {**_rest(data, "instruction", "input", "output", "system", "history"), MESSAGES: messages}


def _sharegpt(data: Mapping[str, Any]) -> dict[str, Any]:
    messages = _system(data)
    for number, entry in enumerate(_list(data, "conversations"), start=1):
        place = f'entry {number} of "conversations"'
        if not isinstance(entry, dict) or not isinstance(entry.get("from"), str):
            raise Wrong(f'{place} has no "from"', 'write {"from": "human", "value": "…"}')
        rest = _rest(entry, "from", "value")
        if entry["from"] == _SHAREGPT_CALL:
            messages.append({**rest, "role": "assistant", "tool_calls": _calls(entry.get("value"), place)})
            continue
        role = _SHAREGPT_ROLES.get(entry["from"])
        if role is None:
            names = ", ".join((*_SHAREGPT_ROLES, _SHAREGPT_CALL))
            raise Wrong(f"{place} is from {quoted(entry['from'])}", f"use one of {names}")
        messages.append({**rest, "role": role, "content": entry.get("value")})
    return {**_rest(data, "conversations", "system"), MESSAGES: messages}


_FORMS: tuple[tuple[str, tuple[str, ...], Callable[[Mapping[str, Any]], dict[str, Any]]], ...] = (
    ("prompt and completion", ("prompt", "completion"), _prompt_and_completion),
    ("Alpaca", ("instruction", "output"), _alpaca),
    ("ShareGPT", ("conversations",), _sharegpt),
)


def _calls(value: Any, place: str) -> list[Any]:
    """Return a call written as JSON, or a list of them."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict | list) or not found:
        raise Wrong(f"{place} holds no call as JSON", 'write {"name": "…", "arguments": {…}} as its value')
    return found if isinstance(found, list) else [found]


def _system(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _text(data, "system")}] if data.get("system") else []


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data[key]
    if not isinstance(value, str):
        raise Wrong(f"{quoted(key)} is {kind_of(value)}, not text", "write text")
    return value


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key) or []
    if not isinstance(value, list):
        raise Wrong(f"{quoted(key)} is {kind_of(value)}, not a list", "write a list")
    return value


def _rest(data: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in used}
