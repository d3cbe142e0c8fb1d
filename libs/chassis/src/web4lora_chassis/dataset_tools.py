"""Tools and calls of them in chat data, in the form of OpenAI's chat API that templates and runtimes take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from web4lora_chassis.jsonl import Wrong, kind_of, quoted

_TOOL = '{"type": "function", "function": {"name": "…", "description": "…", "parameters": {…}}}'
_CALL = '{"type": "function", "function": {"name": "…", "arguments": {…}}}'


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool in an answer.

    Attributes:
        name: The tool's.
        arguments: By name.
        id: By which the tool's message names it; may be empty.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as chat templates take it, the arguments as an object."""
        call = {"type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}
        return {"id": self.id, **call} if self.id else call


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Return a row's tools, each with its name, description and parameters, as runtimes pass them on.

    llama.cpp reads these three of a tool and writes them in this order, so nothing else could be served.

    Args:
        value: A list, or one as JSON text, of tools with or without their wrapping in `function`.

    Raises:
        Wrong: Something is wrong with it.
    """
    if isinstance(value, str):
        value = _parsed(value, '"tools"', "write a list of tools")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Wrong(f'"tools" is {kind_of(value)}, not a list', f"write [{_TOOL}, …]")
    tools: list[dict[str, Any]] = []
    for number, entry in enumerate(value, start=1):
        place = f"tool {number}"
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not _named(function):
            raise Wrong(f"{place} has no name", f"write {_TOOL}")
        description, parameters = function.get("description") or "", function.get("parameters") or {}
        if not isinstance(description, str) or not isinstance(parameters, dict):
            raise Wrong(f"{place} has no text as description, or no schema as parameters", f"write {_TOOL}")
        if any(tool["function"]["name"] == function["name"] for tool in tools):
            raise Wrong(f"{place} has the name of another one", "give each tool its own name")
        own = {"name": function["name"], "description": description, "parameters": parameters}
        tools.append({"type": "function", "function": own})
    return tuple(tools)


def read_calls(value: Any, place: str, tools: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    """Return the calls of a message.

    Args:
        value: Its `tool_calls`.
        place: Names the message.
        tools: Those of the row: a runtime reads calls in an answer only where tools were given.

    Raises:
        Wrong: Something is wrong with one.
    """
    if not isinstance(value, list):
        raise Wrong(f'{place} has {kind_of(value)} as its "tool_calls"', f"write [{_CALL}]")
    if value and not tools:
        raise Wrong(
            f'{place} calls a tool, and the row has no "tools"',
            f'give the row "tools": [{_TOOL}]; a runtime looks for calls only where it was given tools',
        )
    names = [tool["function"]["name"] for tool in tools]
    calls = []
    for number, entry in enumerate(value, start=1):
        where = f"call {number} of {place}"
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not _named(function):
            raise Wrong(f"{where} has no name", f"write {_CALL}")
        if function["name"] not in names:
            raise Wrong(
                f"{where} is of {quoted(function['name'])}, which is none of the row's tools",
                f"use one of {', '.join(names)}, or add it to the tools",
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", f"the arguments of {where}", "write an object")
        if not isinstance(arguments, dict):
            raise Wrong(f"{where} has {kind_of(arguments)} as its arguments", "write an object")
        identity = entry.get("id") or ""
        if not isinstance(identity, str):
            raise Wrong(f"{where} has {kind_of(identity)} as its id", "write text, or leave it out")
        calls.append(ToolCall(function["name"], arguments, identity))
    return tuple(calls)


def _named(function: Mapping[str, Any]) -> bool:
    return isinstance(function.get("name"), str) and bool(function["name"].strip())


def _parsed(text: str, what: str, fix: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Wrong(f"{what} are text that is not JSON", fix) from error
