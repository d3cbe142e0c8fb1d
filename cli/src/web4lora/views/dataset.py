"""Shows chat data: how long its conversations are, and one of them with what is trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from rich.text import Text
from web4lora_chassis.dataset import Message, Row

from web4lora.views import human
from web4lora.views.console import line, out

_BAR_WIDTH = 40
_SHORTEST = 64
_TRAINED = "green"
_SHOWN_CHARACTERS = 600


def characters(row: Row) -> int:
    """Return the characters of a conversation; a base's own tokens are counted when a run is prepared."""
    return sum(len(_text(message)) for message in row.messages)


def show_lengths(rows: Sequence[Row]) -> None:
    """Print how many conversations have how many characters, each line twice as many as the one before."""
    lengths = sorted(characters(row) for row in rows)
    counts = Counter(max(_SHORTEST, 1 << (length - 1).bit_length()) for length in lengths)
    middle, most = lengths[len(lengths) // 2], max(counts.values())
    line()
    line(f"  characters of a conversation: {lengths[0]:,} to {lengths[-1]:,}, half have {middle:,} or less")
    top = min(counts)
    while top <= max(counts):
        bar = "█" * -(-counts[top] * _BAR_WIDTH // most)
        line(f"  {f'up to {top:,}':>18}  {counts[top]:>8,} {bar}")
        top *= 2


def show_example(row: Row) -> None:
    """Print a conversation; what is trained on has a colour, and says so where there are none."""
    line()
    line(f"  {row.place}, as it is trained:")
    if row.tools:
        names = ", ".join(tool["function"]["name"] for tool in row.tools)
        line(f"    {human.count(len(row.tools), 'tool')}: {names}", style="dim")
    for message in row.messages:
        trained = message.role == "assistant" and message.trained
        text = _text(message)
        if len(text) > _SHOWN_CHARACTERS:
            text = f"{text[:_SHOWN_CHARACTERS]}… and {len(text) - _SHOWN_CHARACTERS:,} characters more"
        style = _TRAINED if trained else "dim"
        head = f"{message.role}, trained: " if trained else f"{message.role}: "
        out.print(
            Text.assemble("    ", (head, f"bold {style}"), (text.replace("\n", "\n    "), style)),
            soft_wrap=True,
        )


def _text(message: Message) -> str:
    """Return all that a message says."""
    calls = [
        json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
        for call in message.tool_calls
    ]
    return "\n".join(text for text in (message.reasoning, message.content, *calls) if text)
