"""Causes of different answers that need no server; those that do are in the integration tests."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from web4lora_deployer.report import Measured, ServedModel
from web4lora_deployer.suite import Answer, Reply, Suite, SuiteResult, load_suite
from web4lora_deployer.testing.differences import Side, _judge, compare_answers

EXAMPLES = Path(__file__).parents[4] / "examples" / "web4"
NAMES = ("here", "there")


@pytest.fixture(scope="module")
def suite() -> Suite:
    whole = load_suite(EXAMPLES)
    return replace(whole, prompts=whole.prompts[:3])


def side(suite: Suite, name: str, digest: str, *replies: Reply) -> Side:
    answers = [
        Answer(prompt.id, prompt.core, reply, ())
        for prompt, reply in zip(suite.prompts, replies, strict=True)
    ]
    return Side(Measured(ServedModel(name, digest=digest), SuiteResult(tuple(answers))))


def reply(text: str, prompt_tokens: int = 50, **more: object) -> Reply:
    return replace(Reply(text, "stop", prompt_tokens, len(text.split())), **more)  # type: ignore[arg-type]


def no_probe() -> None:
    raise AssertionError("there was nothing to ask")


def test_equal_answers_ask_nobody(suite: Suite) -> None:
    one, other = (side(suite, name, "a" * 64, *[reply("yes")] * 3) for name in NAMES)
    found = compare_answers(suite, one, other, no_probe)  # type: ignore[arg-type]
    assert (found.same_file, found.differences) == (True, ())


def test_what_the_answers_themselves_tell(suite: Suite) -> None:
    one = side(suite, "here", "", reply("a b c"), reply("yes", 51), reply("one way"))
    other = side(
        suite, "there", "b" * 64,
        reply("a b", finish_reason="length"), reply("no"), reply("", refused="HTTP 400: too long"),
    )  # fmt: skip
    found = compare_answers(suite, one, other, None)
    assert found.same_file is None
    assert [each.cause for each in found.differences] == ["end", "prompt", "refused"]
    end, prompt, refused = (each.reason for each in found.differences)
    assert 'here after 3 tokens ("stop") and there after 2 tokens ("length")' in end
    assert "here read 51 tokens, there 50" in prompt
    assert "as when BOS is added twice" in prompt
    assert refused == "there refused it: HTTP 400: too long"


def test_other_weights_say_other_things_and_nobody_is_asked_why(suite: Suite) -> None:
    one = side(suite, "here", "a" * 64, reply("the sky is blue"), *[reply("x")] * 2)
    other = side(suite, "there", "b" * 64, reply("the sky is grey"), *[reply("x")] * 2)
    found = compare_answers(suite, one, other, no_probe)  # type: ignore[arg-type]
    assert found.same_file is False
    (difference,) = found.differences
    assert (difference.id, difference.cause) == (suite.prompts[0].id, "text")
    assert 'from character 12 on, behind "the sky is"' in difference.reason


@pytest.mark.parametrize(("chances", "cause"), [((0.41, 0.40), "rounding"), ((0.90, 0.02), "unexplained")])
def test_a_near_tie_is_rounding_and_nothing_else_is(chances: tuple[float, float], cause: str) -> None:
    likely = {7: ("blue", math.log(chances[0])), 8: ("grey", math.log(chances[1]))}
    found, reason = _judge([[1, 7], [1, 8]], 1, likely, NAMES, ("text", "somewhere"))
    assert found == cause
    assert f'at token 2 of the answer here took "blue" ({100 * chances[0]:.1f} %)' in reason


def test_an_answer_that_ends_is_weighed_by_the_token_that_ends_it() -> None:
    likely = {7: ("blue", math.log(0.5)), 2: ("", math.log(0.45))}
    assert _judge([[1, 7], [1]], 1, likely, NAMES, ("end", ""))[0] == "rounding"
    # Without one among the candidates there is nothing to weigh.
    cause, reason = _judge([[1, 7], [1, 9]], 1, likely, NAMES, ("text", "somewhere"))
    assert cause == "unexplained"
    assert "token 2 is not among the 20 likeliest" in reason
