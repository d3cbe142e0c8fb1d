"""Texts in a Modelfile, as Ollama reads them: the trainer asks before it trains, the packager writes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from web4lora_chassis.errors import InvalidInput

STOP = "A stop token of the base"
SYSTEM = "The system message of the base's chat template"
LICENCE = "The base's licence"
"""What `quoted` calls them."""


def quoted(text: str, what: str) -> str:
    """Quote a text so that Ollama reads it back unchanged; its quotes know no escapes.

    Args:
        text: The text.
        what: What it is, for people: "The base's licence".

    Raises:
        InvalidInput: No quotes can hold it.
    """
    for mark in ('"', '"""') if "\n" not in text else ('"""', '"'):
        if _survives(text, mark):
            return f"{mark}{text}{mark}"
    line = next(line for line in text.split("\n") if line.rstrip().endswith('"'))
    raise InvalidInput(
        f"{what} can't be written in a Modelfile: Ollama takes the quotes at the end of its line "
        f"{line.strip()[-60:]!r} for the end of the text.",
        fix="Change the lines that end with quotes, or choose another base model.",
        reason="MODELFILE_TEXT",
    )


def licence_of(files: Iterable[Path], named: str) -> tuple[str, str]:
    """Return a base's licence, and where that comes from.

    Args:
        files: The base's files; the text of the first one that is a licence counts.
        named: Else its name, as the base's makers say it.
    """
    for path in sorted(files):
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE")):
            return path.read_text(encoding="utf-8", errors="replace").strip(), path.name
    return named, "its model card"


def _survives(text: str, mark: str) -> bool:
    """Return True when no line's end inside the text looks like the closing quotes."""
    if mark == '"' and text.startswith('""'):
        return False
    lines = (mark + text).split("\n")
    opened = ["\n".join(lines[: count + 1]).strip() for count in range(len(lines) - 1)]
    return not any(len(part) >= 2 * len(mark) and part.endswith(mark) for part in opened)
