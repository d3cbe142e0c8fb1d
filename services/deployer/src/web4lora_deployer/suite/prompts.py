"""Reads a suite's prompts: JSON Lines as chat data is read, each line a prompt with its check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.graders import Grader
from web4lora_chassis.graders.check import shorten
from web4lora_chassis.jsonl import Problem, Wrong, parse_object, read_lines

from web4lora_deployer.suite.problems import Problems
from web4lora_deployer.suite.spec import Prompt


def read_prompts(
    path: Path, name: Path, core: str, grader: Grader, seen: dict[str, str], problems: Problems
) -> list[Prompt]:
    """Return a file's prompts.

    Args:
        path: The file.
        name: What to call it.
        core: The core that it belongs to.
        grader: Checks what each prompt's answer is held to.
        seen: The ids used so far and where; those of this file are added.
        problems: Takes what is wrong with its lines.
    """
    prompts = []
    for item in read_lines(path, str(name)):
        with problems.noted():
            if isinstance(item, Problem):
                raise InvalidInput(f"{item}.")
            number, line = item
            where = f"{name}:{number}"
            prompt = _read_row(line, where, core, grader)
            if prompt.id in seen:
                raise InvalidInput(
                    f'{where}: the id "{shorten(prompt.id)}" was used before, at {seen[prompt.id]}.'
                )
            seen[prompt.id] = where
            prompts.append(prompt)
    return prompts


def _read_row(line: bytes, where: str, core: str, grader: Grader) -> Prompt:
    try:
        row = parse_object(line)
        json.dumps(row, ensure_ascii=False).encode()
    except Wrong as wrong:
        raise InvalidInput(f"{where}: {wrong.message}; {wrong.fix}.") from wrong
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{where}: holds half of a pair of surrogates, which no server takes.") from error
    if problem := _row_problem(row, core):
        raise InvalidInput(f"{where}: {problem}.")
    if problem := grader.validate_check(row["check"]):
        raise InvalidInput(f"{where}: {problem}.")
    *messages, last = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    return Prompt(row["id"], core, tuple(messages), last["content"], row["check"])


def _row_problem(row: Mapping[str, Any], core: str) -> str:
    for key in ("id", "core", "messages", "check"):
        if key not in row:
            return f'the key "{key}" is missing'
    if unknown := set(row) - {"id", "core", "messages", "check"}:
        return f'unknown key "{shorten(min(unknown))}"'
    if not isinstance(row["id"], str) or not row["id"]:
        return "id must be a text"
    if row["core"] != core:
        return f"core is {shorten(json.dumps(row['core']))}, but suite.yaml has this file under {core}"
    if not isinstance(row["check"], dict):
        return "check must be an object"
    return _messages_problem(row["messages"])


def _messages_problem(messages: Any) -> str:
    if not isinstance(messages, list) or len(messages) < 2:
        return "messages must be a list of at least two: a question and the wanted answer"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            return f'message {number} must have the keys "role" and "content", and no others'
        if message["role"] not in ("system", "user", "assistant"):
            return f"message {number}: the role {shorten(json.dumps(message['role']))} is unknown"
        if not isinstance(message["content"], str) or not message["content"].strip():
            return f"message {number} has no text"
    if messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        return 'the last two messages must be from "user" and from "assistant", the wanted answer'
    return ""
