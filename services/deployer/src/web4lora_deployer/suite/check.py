"""What a grader says about one answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One result of a grader.

    Attributes:
        name: Its name, for example "tool_call.valid".
        passed: Whether the answer passed.
        reason: Why it did not, for people; empty when it passed.
    """

    name: str
    passed: bool
    reason: str = ""


def check(name: str, reason: str) -> Check:
    """Make a check from the reason why it failed; an empty one means that it passed."""
    return Check(name, not reason, reason)


def shorten(text: object, limit: int = 80) -> str:
    """Cut a text to `limit` characters, on one line, for use in a reason."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
