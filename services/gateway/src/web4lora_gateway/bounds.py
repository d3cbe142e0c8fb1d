"""Bounds and defaults of single settings: absent ones are filled, wrong ones named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.message import Message
from web4lora_chassis.errors import InvalidInput


class Rule(Protocol):
    """What a field may hold, and what it holds when absent."""

    @property
    def default(self) -> Any:
        """The value of an absent field; None leaves it absent."""

    def problem(self, value: Any) -> str:
        """Say what a value has to be, or nothing when it is right."""


@dataclass(frozen=True)
class Number:
    """A finite number between two ends; the ends belong to it unless `above` or `below` is meant."""

    default: float | None = None
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def problem(self, value: float) -> str:
        """See `Rule.problem`."""
        if math.isfinite(value) and self.low <= value <= self.high and self.above < value < self.below:
            return ""
        ends = [
            (self.low, "at least"),
            (self.above, "above"),
            (self.high, "at most"),
            (self.below, "below"),
        ]
        told = [f"{words} {end:g}" for end, words in ends if math.isfinite(end)]
        return "must be " + (" and ".join(told) or "a finite number")


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    default: str
    words: tuple[str, ...]

    def problem(self, value: str) -> str:
        """See `Rule.problem`."""
        return "" if value in self.words else f"must be one of {', '.join(self.words)}"


@dataclass(frozen=True)
class Flag:
    """Yes or no."""

    default: bool

    def problem(self, value: bool) -> str:  # noqa: ARG002 - either is right
        """See `Rule.problem`."""
        return ""


def fill(message: Message, path: str, rules: Mapping[str, Rule]) -> None:
    """Check a message's optional fields by their rules and fill the absent ones.

    Args:
        message: The settings; changed in place.
        path: Where they stand in the pipeline, for example "train.lora".
        rules: By field name.

    Raises:
        InvalidInput: A value is out of bounds; the metadata's `field` names it.
    """
    for name, rule in rules.items():
        if not message.HasField(name):
            if rule.default is not None:
                kind = type(getattr(message, name))
                setattr(message, name, kind(rule.default))
            continue
        value = getattr(message, name)
        problem = rule.problem(value)
        if problem:
            raise wrong(f"{path}.{name}", f"{value!r} {problem}.")


def wrong(field: str, text: str, fix: str = "") -> InvalidInput:
    """Return the error for a field of the pipeline."""
    return InvalidInput(
        f"{field}: {text}", fix=fix or f"Correct {field} in the pipeline file.", metadata={"field": field}
    )
