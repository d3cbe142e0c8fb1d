"""Text and tables as Markdown that GitHub shows as they are."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from web4lora_deployer.suite import State

SIGNS = {State.PASSED: "✅", State.UNDECIDED: "🟡", State.FAILED: "❌"}
_SHOWN_CHARACTERS = 1500
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Write a table whose first `left` columns are aligned left, the others right."""
    marks = [":--" if column < left else "--:" for column in range(len(head))]
    lines = [head, marks, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def visible(text: str) -> str:
    """Replace what steers a terminal or turns the direction of writing: a model may have written it."""
    return _UNSEEN.sub("\ufffd", text.replace("\r\n", "\n"))


def plain(text: str) -> str:
    """Make a text safe inside a paragraph or a table's cell: no markup, no line ends."""
    line = html.escape(" ".join(visible(text).split()), quote=False)
    # An underscore within a word is no markup.
    return re.sub(r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)


def code(text: str) -> str:
    """Show a short name as code, also within a table's cell."""
    return "`" + re.sub(r"[`|\s]+", " ", visible(text)).strip() + "`"


def fenced(text: str) -> str:
    """Show a text as it is, in a fence longer than any within it."""
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}\n… cut here"
    shown = visible(shown)
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown.strip() or '(empty)'}\n{fence}"
