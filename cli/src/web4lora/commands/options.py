"""What commands share: option types and the examples below their help."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help='The run\'s id, or "latest".')]


def examples(*lines: str) -> str:
    """Return example lines as a command's epilog; each stays on a line of its own."""
    word = "Example" if len(lines) == 1 else "Examples"
    return "\n".join([f"{word}:", *(f"  {line}" for line in lines)])
