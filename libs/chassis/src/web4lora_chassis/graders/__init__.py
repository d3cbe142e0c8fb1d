"""The graders of answers by the name that a suite file calls them, and the names of all their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from web4lora_chassis.graders import guardrail, style, tool_call
from web4lora_chassis.graders.check import Check, check
from web4lora_chassis.graders.style import StyleRules

ENDS = "answers.ends"
ENDS_TITLES: Mapping[str, str] = {ENDS: "answers end"}
_TEMPLATE_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<｜end▁of▁sentence｜>",
    "<|EOT|>",
)


@dataclass(frozen=True)
class Grader:
    """How answers of one kind are graded.

    Attributes:
        titles: The checks that have a score and a limit of their own, by name.
        detail_titles: Further checks, which only explain the scores.
        validate_check: Says what is wrong with a prompt's `check`, "" when it is right.
        grade: Grades an answer's text.
    """

    titles: Mapping[str, str]
    detail_titles: Mapping[str, str]
    validate_check: Callable[[Mapping[str, Any]], str]
    grade: Callable[[str, Mapping[str, Any], StyleRules], list[Check]]


GRADERS: Mapping[str, Grader] = {
    "tool_call": Grader(
        tool_call.TITLES,
        tool_call.DETAIL_TITLES,
        tool_call.validate_check,
        lambda text, expected, _: tool_call.grade(text, expected),
    ),
    "style": Grader(style.TITLES, style.DETAIL_TITLES, style.validate_check, style.grade),
    "guardrail": Grader(
        guardrail.TITLES,
        guardrail.DETAIL_TITLES,
        guardrail.validate_check,
        lambda text, expected, _: guardrail.grade(text, expected),
    ),
}


def grade_end(text: str, finish_reason: str) -> Check:
    """Check that an answer ended by itself, and at the right place.

    Args:
        text: The whole answer.
        finish_reason: What the server says: "stop", or where it was cut off: "length" or "time".
    """
    if finish_reason == "length":
        return check(ENDS, "never ended: cut off at max_tokens")
    if finish_reason == "time":
        return check(ENDS, "never ended: cut off, it took too long")
    if finish_reason != "stop":
        return check(ENDS, f'finish reason "{finish_reason}"')
    leaked = next((token for token in _TEMPLATE_TOKENS if token in text), "")
    return check(ENDS, f"the template's token {leaked} is in the answer" if leaked else "")
