"""Grades a tool call: one JSON object with exactly the keys `tool` and `args`, and nothing around it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from web4lora_chassis.graders.check import Check, check, shorten

TITLES: Mapping[str, str] = {
    "tool_call.valid": "tool call, valid",
    "tool_call.right_tool": "tool call, right tool",
    "tool_call.exact": "tool call, exact",
}
DETAIL_TITLES: Mapping[str, str] = {}
CONSTRAINED_TITLES: Mapping[str, str] = {
    "tool_call_constrained.valid": "tool call, constrained, valid",
    "tool_call_constrained.right_tool": "tool call, constrained, right tool",
    "tool_call_constrained.exact": "tool call, constrained, exact",
}
ANY_CALL: Mapping[str, Any] = {
    "type": "object",
    "properties": {"tool": {"type": "string", "minLength": 1}, "args": {"type": "object"}},
    "required": ["tool", "args"],
    "additionalProperties": False,
}
"""The schema that every tool call fits."""
_SHOWN_KEYS = 5


def validate_check(expected: Mapping[str, Any]) -> str:
    """Say what is wrong with a prompt's `check`; empty when it is right."""
    if set(expected) != {"tool", "args"}:
        return 'check must be {"tool": NAME, "args": {…}}'
    if not isinstance(expected["tool"], str) or not isinstance(expected["args"], dict):
        return "check.tool must be a string and check.args an object"
    if not expected["tool"].strip():
        return "check.tool is empty; name the tool that is wanted"
    return ""


def grade(text: str, expected: Mapping[str, Any]) -> list[Check]:
    """Grade one answer.

    Args:
        text: The whole answer; white space around it is ignored.
        expected: The call that is wanted: its `tool` and `args`.

    Returns:
        tool_call.valid, tool_call.right_tool and tool_call.exact.
    """
    call, invalid = _parse(text)
    wrong_tool = differs = invalid
    if call is not None:
        if call["tool"] != expected["tool"]:
            wrong_tool = differs = f'calls "{shorten(call["tool"])}", wanted "{expected["tool"]}"'
        else:
            differs = _difference(call["args"], expected["args"], "args")
    return [
        check("tool_call.valid", invalid),
        check("tool_call.right_tool", wrong_tool),
        check("tool_call.exact", differs),
    ]


def grade_constrained(text: str, expected: Mapping[str, Any]) -> list[Check]:
    """Grade an answer that was held to a schema; its checks have names of their own."""
    return [
        Check(f"tool_call_constrained.{found.name.removeprefix('tool_call.')}", found.passed, found.reason)
        for found in grade(text, expected)
    ]


def _parse(text: str) -> tuple[dict[str, Any] | None, str]:
    """Return the call, or None and why it isn't one."""
    try:
        value = json.loads(
            text.strip(), object_pairs_hook=_object_without_duplicates, parse_constant=refuse_constant
        )
    except RecursionError:
        return None, "nested too deeply"
    except ValueError as error:
        return None, f"not JSON: {shorten(error)}"
    if not isinstance(value, dict):
        return None, f"JSON, but no object: {_json(value)}"
    if set(value) != {"tool", "args"}:
        names = ", ".join(shorten(name) for name in list(value)[:_SHOWN_KEYS])
        more = f" and {len(value) - _SHOWN_KEYS} more" if len(value) > _SHOWN_KEYS else ""
        return None, f"its keys are {names or 'none'}{more}; wanted are tool and args"
    if not isinstance(value["tool"], str):
        return None, "tool is no string"
    if not value["tool"].strip():
        return None, "tool is empty"
    if not isinstance(value["args"], dict):
        return None, "args is no object"
    return value, ""


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f'the key "{shorten(twice)}" occurs twice')
    return result


def refuse_constant(name: str) -> Any:
    """Refuse what Python reads and JSON has not: NaN and Infinity."""
    raise ValueError(f"{name} is no JSON")


def _difference(found: Any, wanted: Any, where: str) -> str:
    """Say where two JSON values differ; empty when they are equal.

    Values of different JSON types differ: 1, "1" and true are three values. JSON has one type for numbers,
    so 1 and 1.0 are equal, as JSON Schema has it too. The order of keys is free, that of arrays is not.
    """
    if _json_type(found) != _json_type(wanted):
        return f"{where} is {_json(found)}, wanted {_json(wanted)}"
    if isinstance(found, dict):
        if missing := [key for key in wanted if key not in found]:
            return f"{where}.{missing[0]} is missing"
        if extra := [key for key in found if key not in wanted]:
            return f"{where}.{shorten(extra[0])} was not asked for"
        return next(
            (d for key in wanted if (d := _difference(found[key], wanted[key], f"{where}.{key}"))), ""
        )
    if isinstance(found, list):
        if len(found) != len(wanted):
            return f"{where} has {len(found)} items, wanted {len(wanted)}"
        pairs = enumerate(zip(found, wanted, strict=True))
        return next((d for i, (f, w) in pairs if (d := _difference(f, w, f"{where}[{i}]"))), "")
    return "" if found == wanted else f"{where} is {_json(found)}, wanted {_json(wanted)}"


def _json_type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, int | float) else type(value).__name__


def _json(value: Any) -> str:
    try:
        return shorten(json.dumps(value, ensure_ascii=False), 60)
    except RecursionError:  # what was just read may be nested too deeply to be written
        return f"a deeply nested {_json_type(value)}"
