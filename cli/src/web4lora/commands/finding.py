"""What runs are found by on the command line: labels, states, and how long ago."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from web4lora_chassis.errors import InvalidInput

Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="A label; may be given often.", show_default=False),
]
_AGE = re.compile(r"(\d{1,6})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def labels_of(words: Iterable[str] | None) -> dict[str, str]:
    """Return the labels that options give.

    Raises:
        InvalidInput: One has no value, or two have the same key.
    """
    labels: dict[str, str] = {}
    for word in words or ():
        key, sign, value = word.partition("=")
        if not key or not sign:
            raise InvalidInput(f"--label {word}: a label is KEY=VALUE.", fix="For example --label team=a.")
        if key in labels:
            raise InvalidInput(f"--label {word}: {key} is given twice.", fix="Give it once.")
        labels[key] = value
    return labels


def moment_of(text: str, now: datetime) -> datetime | None:
    """Return the time that an option names: an age before now (7d), or a date; None for an empty text.

    Args:
        text: 30s, 15m, 12h, 7d, 2w; or 2026-11-26, or 2026-11-26T14:00, in this machine's time zone.
        now: The present.

    Raises:
        InvalidInput: It is neither.
    """
    if not text:
        return None
    try:
        if age := _AGE.fullmatch(text):
            return now - timedelta(**{_UNITS[age[2]]: int(age[1])})
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidInput(
            f"{text!r} is no time.", fix="Write an age, as 12h or 7d, or a date, as 2026-11-26."
        ) from error
