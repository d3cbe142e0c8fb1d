"""Where text goes: results to standard output, errors and notes to standard error."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from web4lora_chassis.errors import Web4Error

_PIPE_WIDTH = 140
OK, BAD, NOTE, OPEN = "✓", "✗", "!", "?"
STYLES = {OK: "green", BAD: "red", NOTE: "yellow", OPEN: "yellow"}


def _console(*, to_stderr: bool = False) -> Console:
    """Return a console without colours of its own choice; on a pipe lines are not cut at 80 columns."""
    console = Console(stderr=to_stderr, highlight=False, emoji=False, markup=False)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = _PIPE_WIDTH
    return console


out = _console()
err = _console(to_stderr=True)


def line(text: str = "", style: str = "") -> None:
    """Print a line to standard output; it is never cut or wrapped."""
    out.print(text, style=style or None, soft_wrap=True)


def mark(sign: str, text: str) -> None:
    """Print a line that begins with a sign in its colour."""
    from rich.text import Text

    out.print(Text.assemble(("  " + sign, STYLES.get(sign, "")), " ", text), soft_wrap=True)


def error(problem: Web4Error) -> None:
    """Print what went wrong and what to do to standard error."""
    err.print(f"{BAD} {problem.message}", style="red", soft_wrap=True)
    for row in problem.fix.splitlines():
        err.print(f"  {row}", soft_wrap=True)


def note(text: str) -> None:
    """Print a line to standard error that is neither a result nor an error."""
    err.print(text, style="dim", soft_wrap=True)


def data_of(message: Message) -> dict[str, Any]:
    """Return a message as JSON data with the contract's field names."""
    data: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return data


def print_json(data: Any, *, one_line: bool = False) -> None:
    """Print JSON for programs."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False, indent=None if one_line else 2) + "\n")
    sys.stdout.flush()
