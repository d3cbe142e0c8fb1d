"""The comparison itself, with a tokenizer of one token a sign; the runtimes' tests have real ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from unit.deployer.test_templates import CHATML, DEEPSEEK, facts
from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_deployer.template_gate import (
    CountDifference,
    Difference,
    Served,
    Token,
    compare,
    require_same_prompts,
)
from web4lora_deployer.templates import Message, Render, jinja_renderer


class Signs:
    """A tokenizer of one token a sign.

    Args:
        head: What it puts before every prompt, unless it is there.
    """

    def __init__(self, head: str = "") -> None:
        self._head = head

    def prompt(self, text: str) -> list[Token]:
        whole = text if text.startswith(self._head) else self._head + text
        return [Token(ord(sign), sign) for sign in whole]


def served_by(render: Render, head: str = "", system: str = "") -> Served:
    """A runtime that puts into the model what it renders."""
    return Served(lambda messages: len(Signs(head).prompt(render(messages))), render, system)


def chatml_of_ollama(messages: Sequence[Message]) -> str:
    turns = "".join(f"<|im_start|>{item['role']}\n{item['content']}<|im_end|>\n" for item in messages)
    return turns + "<|im_start|>assistant\n"


def test_equal_prompts_do_not_differ() -> None:
    model = facts(CHATML)
    assert compare(model, Signs(), served_by(jinja_renderer(model))) is None


def test_a_default_system_message_that_is_not_served_is_named_with_its_place() -> None:
    difference = compare(facts(CHATML), Signs(), served_by(chatml_of_ollama))
    assert isinstance(difference, Difference)
    assert difference.conversation == "one question"
    assert difference.index == len("<|im_start|>")
    assert str(difference) == (
        "with one question, in turn 1 (user), token 12: "
        'trained "rt|>" then "s" (115) then "ystem\\n"; served "rt|>" then "u" (117) then "ser\\nWh"'
    )


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("with a number", "with no number", "in turn 1 (system)"),
        ("user\nWhat", "User\nWhat", "in turn 2 (user)"),
        ("5<|im_end|>", "5 <|im_end|>", "in turn 4 (user)"),  # behind the third one's text
        ("assistant\n", "assistant", "where the answer begins"),
    ],
)
def test_a_difference_names_its_turn(old: str, new: str, where: str) -> None:
    model = facts(CHATML)
    render = jinja_renderer(model)

    def served(messages: Sequence[Message]) -> str:
        text = render(messages)
        return new.join(text.rsplit(old, 1)) if len(messages) == 4 else text

    difference = compare(model, Signs(), served_by(served))
    assert isinstance(difference, Difference)
    assert (difference.conversation, difference.where) == ("a system message and two turns", where)


def test_a_token_that_the_tokenizer_adds_is_no_difference() -> None:
    model = facts(DEEPSEEK, "<s>", add_bos_token=True)
    render = jinja_renderer(model)
    served = served_by(lambda messages: render(messages).removeprefix("<s>"), "<s>")
    assert compare(model, Signs("<s>"), served) is None


def test_a_token_that_nobody_adds_is_a_difference() -> None:
    model = facts(DEEPSEEK, "<s>", add_bos_token=False)
    render = jinja_renderer(model)
    difference = compare(model, Signs(), served_by(lambda messages: render(messages).removeprefix("<s>")))
    assert isinstance(difference, Difference)
    assert difference.index == 0


def test_a_beginning_that_is_doubled_shows_in_the_number_of_tokens() -> None:
    model = facts(DEEPSEEK, "<s>", add_bos_token=True)
    render = jinja_renderer(model)
    doubled = Served(lambda messages: len(render(messages)) + len("<s>"), render)
    difference = compare(model, Signs("<s>"), doubled)
    assert isinstance(difference, CountDifference)
    assert difference.served == difference.trained + 3
    assert "may be doubled or missing" in str(difference)


def test_a_system_message_of_one_s_own_is_what_training_would_have_had() -> None:
    model = facts(CHATML)
    render = jinja_renderer(model)

    def served(messages: Sequence[Message]) -> str:
        own = [] if messages[0]["role"] == "system" else [{"role": "system", "content": "Be brief."}]
        return render([*own, *messages])

    assert compare(model, Signs(), served_by(served, system="Be brief.")) is None
    assert compare(model, Signs(), served_by(served)) is not None


def test_a_conversation_that_the_model_refuses_is_not_compared() -> None:
    model = facts("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}x")
    assert compare(model, Signs(), served_by(lambda _: "x")) is None
    with pytest.raises(InvalidInput, match="no"):
        jinja_renderer(model)([{"role": "system", "content": ""}])


def test_a_runtime_that_differs_is_refused_and_a_model_without_a_template_is_not() -> None:
    with pytest.raises(FailedPrecondition, match="demo would not be served the prompts") as caught:
        require_same_prompts("demo", facts(CHATML), Signs(), served_by(chatml_of_ollama))
    assert caught.value.reason == "TEMPLATE_DIFFERS"
    require_same_prompts("demo", facts(""), Signs(), served_by(chatml_of_ollama))
