"""Text and tables as Markdown that GitHub shows as they are."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_SHOWN_CHARACTERS = 1500


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Write a table whose first `left` columns are aligned left, the others right."""
    marks = [":--" if column < left else "--:" for column in range(len(head))]
    lines = [head, marks, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(text: str) -> str:
    """Make a text safe inside a paragraph or a table's cell: no markup, no line ends."""
    line = html.escape(" ".join(text.split()), quote=False)
    # An underscore within a word is no markup.
    return re.sub(r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)


def code(text: str) -> str:
    """Show a short name as code, also within a table's cell."""
    return "`" + re.sub(r"[`|\s]+", " ", text).strip() + "`"


def fenced(text: str) -> str:
    """Show a text as it is, in a fence longer than any within it."""
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}\n… cut here"
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown.strip() or '(empty)'}\n{fence}"
