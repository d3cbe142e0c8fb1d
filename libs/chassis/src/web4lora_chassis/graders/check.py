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
    return Check(name, not reason, well_formed(reason))


def well_formed(text: str) -> str:
    """Make a text that every encoding, format and database takes, whatever a model wrote.

    Pairs of surrogates that came apart are joined; half a pair, and NUL, become U+FFFD.
    """
    joined = text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    return joined.replace("\0", "\ufffd")


def shorten(text: object, limit: int = 80) -> str:
    """Cut a text to `limit` characters, on one line, for use in a reason."""
    whole = str(text)
    head = whole[: 4 * limit]  # an answer may have megabytes
    line = " ".join(well_formed(head).split())
    return line if len(line) <= limit and len(head) == len(whole) else line[: limit - 1] + "…"
