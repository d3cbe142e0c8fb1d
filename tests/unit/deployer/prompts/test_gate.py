"""The comparison itself, with a tokenizer of one token a sign; the runtimes' tests have real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_chassis.model_files.gguf import GgufHeader
from web4lora_deployer.prompts.gate import (
    CountDifference,
    Difference,
    Endless,
    Prompt,
    Served,
    Token,
    compare,
    prompts,
    require_same_prompts,
)
from web4lora_deployer.prompts.go_template import CONVERSATIONS, chat_template, go_template
from web4lora_deployer.runtimes.http import conversation

from tests.unit.chassis.model_files.chat_templates import QWEN_2_5
from tests.unit.chassis.model_files.test_trained_conversations import RECORD
from tests.unit.deployer.prompts.test_go_template import CHATML, DEEPSEEK, facts

Messages = Sequence[Mapping[str, Any]]
EOS = 2


class Signs:
    """A tokenizer of one token a sign.

    Args:
        head: What it puts before every prompt.
    """

    def __init__(self, head: str = "") -> None:
        self._head = head

    def served(self, text: str) -> list[Token]:
        return [Token(ord(sign), sign) for sign in self._head + text]

    def begun_once(self, text: str) -> list[Token]:
        return self.served(text.removeprefix(self._head))

    def piece(self, token: int) -> str:
        return chr(token)


def served_by(
    render: Callable[[Messages], str], head: str = "", context_tokens: int = 4096, added: int = 0
) -> Served:
    """A runtime that puts into the model what it renders."""
    return Served(
        lambda messages, _: len(Signs(head).served(render(messages))) + added,
        lambda messages, _: render(messages),
        lambda token: token == EOS,
        context_tokens,
    )


def wanted(model: GgufHeader, tokenizer: Signs | None = None) -> list[Prompt]:
    return prompts([], model, tokenizer or Signs(), lambda _: None)


def chatml_of_ollama(messages: Messages) -> str:
    turns = "".join(f"<|im_start|>{item['role']}\n{item['content']}<|im_end|>\n" for item in messages)
    return turns + "<|im_start|>assistant\n"


def test_equal_prompts_do_not_differ() -> None:
    model = facts(CHATML)
    assert compare(wanted(model), Signs(), served_by(chat_template(model).render)) is None


def test_a_default_system_message_that_is_not_served_is_named_with_its_place() -> None:
    difference = compare(wanted(facts(CHATML)), Signs(), served_by(chatml_of_ollama))
    assert isinstance(difference, Difference)
    assert difference.conversation == "one question"
    assert difference.index == len("<|im_start|>")
    assert str(difference).startswith(
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
    render = chat_template(model).render

    def served(messages: Messages) -> str:
        text = render(messages)
        return new.join(text.rsplit(old, 1)) if len(messages) == 4 else text

    difference = compare(wanted(model), Signs(), served_by(served))
    assert isinstance(difference, Difference)
    assert (difference.conversation, difference.where) == ("a system message and two turns", where)


def test_a_beginning_that_a_model_from_elsewhere_has_twice_or_not_at_all_is_a_difference() -> None:
    model = facts(DEEPSEEK, "<", add_bos_token=True)
    render = chat_template(model).render
    bare = wanted(model, Signs("<"))
    assert compare(bare, Signs("<"), served_by(lambda m: render(m).removeprefix("<"), "<")) is None
    for tokenizer, served in (
        (Signs("<"), served_by(render, "<")),
        (Signs(), served_by(lambda m: render(m).removeprefix("<"))),
    ):
        assert isinstance(compare(bare, tokenizer, served), Difference)


def test_a_beginning_that_only_shows_in_the_number_of_tokens_is_found() -> None:
    model = facts(CHATML)
    difference = compare(wanted(model), Signs(), served_by(chat_template(model).render, added=1))
    assert isinstance(difference, CountDifference)
    assert difference.served == difference.trained + 1
    assert "may be doubled or missing" in str(difference)


def test_a_token_that_does_not_end_an_answer_is_named() -> None:
    prompt = Prompt("rows.jsonl:1", ({"role": "user", "content": "x"},), (ord("x"),), ord("!"))
    served = served_by(lambda messages: "x")
    finding = compare([prompt], Signs(), served)
    assert isinstance(finding, Endless)
    assert '"!" (33)' in str(finding)
    with pytest.raises(FailedPrecondition, match="would not end its answers") as caught:
        require_same_prompts("demo", [prompt], Signs(), served)
    assert caught.value.reason == "ANSWER_NOT_ENDED"


def test_a_conversation_that_the_model_refuses_is_not_compared() -> None:
    model = facts("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}x")
    assert len(wanted(model)) == len(CONVERSATIONS) - 3
    assert compare(wanted(model), Signs(), served_by(lambda _: "x")) is None


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("", "no chat template"),
        ("{{ raise_exception('never') }}", "can't be compared with anything.*never"),
        ("{% if %}", "can't be parsed"),
    ],
)
def test_a_model_with_nothing_to_compare_is_refused(template: str, said: str) -> None:
    with pytest.raises(FailedPrecondition, match=said) as caught:
        wanted(facts(template))
    assert caught.value.reason == "TEMPLATE_NOT_COMPARED"
    assert "gguf-new-metadata" in caught.value.fix


@pytest.mark.parametrize("context_tokens", [0, 20])
def test_a_context_without_room_for_a_prompt_compares_nothing(context_tokens: int) -> None:
    model = facts(CHATML)
    served = served_by(chat_template(model).render, context_tokens=context_tokens)
    with pytest.raises(FailedPrecondition, match="has no room for the shortest") as caught:
        compare(wanted(model), Signs(), served)
    assert caught.value.reason == "TEMPLATE_NOT_COMPARED"


def test_no_prompts_are_no_pass() -> None:
    with pytest.raises(FailedPrecondition):
        compare([], Signs(), served_by(lambda _: ""))


def test_a_runtime_that_differs_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="demo would not be served the prompts") as caught:
        require_same_prompts("demo", wanted(facts(CHATML)), Signs(), served_by(chatml_of_ollama))
    assert caught.value.reason == "TEMPLATE_DIFFERS"


def test_what_training_kept_is_compared_and_not_the_model_s_own_template(tmp_path: Path) -> None:
    record = tmp_path / "trained_conversations.json"
    record.write_text(json.dumps(RECORD))
    said = []
    found = prompts([record], facts(""), Signs(), lambda progress: said.append(progress.message))
    assert [(prompt.ids, prompt.stop) for prompt in found] == [((1, 5), 2), ((1, 5, 6, 2, 5), 2)]
    assert said == ["token by token with training's"]
    record.write_text("[]")
    with pytest.raises(InvalidInput):
        prompts([record], facts(CHATML), Signs(), lambda _: None)


DATED = CHATML.replace("You are kind.", "Today is ' ~ strftime_now('%d %B %Y') ~ '.")
THEN = datetime(2024, 2, 29, 12)
ASKED = ({"role": "user", "content": "a"},)


def trained_then(folder: Path, **changes: Any) -> Path:
    """A record of a training on another day."""
    ids = [ord(sign) for sign in chat_template(facts(DATED)).render(ASKED, now=THEN)]
    turn = {"messages": 1, "prompt_tokens": len(ids), "stop_token": EOS}
    conversation = {
        "file": "train/rows.jsonl", "line": 1, "messages": [*ASKED, {"role": "assistant", "content": "b"}],
        "input_ids": [*ids, EOS], "labels": [-100] * len(ids) + [EOS], "turns": [turn],
    }  # fmt: skip
    record = {**RECORD, "rendered_at": THEN.isoformat(), "conversations": [conversation], **changes}
    (folder / "trained_conversations.json").write_text(json.dumps(record))
    return folder / "trained_conversations.json"


def test_a_model_whose_template_writes_the_date_is_served_on_another_day(tmp_path: Path) -> None:
    template = chat_template(facts(DATED))
    found = prompts([trained_then(tmp_path)], facts(DATED), Signs(), lambda _: None)
    assert compare(found, Signs(), served_by(template.render)) is None
    assert compare(found, Signs(), served_by(lambda m: template.render(m, now=datetime.now(UTC)))) is None
    assert compare(found, Signs(), served_by(lambda m: template.render(m, now=THEN))) is None
    short = served_by(template.render, added=1)
    assert isinstance(compare(found, Signs(), short), CountDifference)


@pytest.mark.parametrize(
    "render",
    [
        lambda text: text.replace("Today is", "today is"),
        lambda text: text.replace(str(datetime.now().year), "1999"),
        lambda text: text + " ",
    ],
)
def test_what_differs_in_more_than_the_date_is_still_a_difference(
    tmp_path: Path, render: Callable[[str], str]
) -> None:
    template = chat_template(facts(DATED))
    found = prompts([trained_then(tmp_path)], facts(DATED), Signs(), lambda _: None)
    finding = compare(found, Signs(), served_by(lambda m: render(template.render(m))))
    assert isinstance(finding, Difference)


@pytest.mark.parametrize("changes", [{"rendered_at": None}, {"rendered_at": "2023-01-01T00:00:00"}])
def test_a_date_counts_only_where_the_template_gives_training_s_own_tokens_at_it(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    found = prompts([trained_then(tmp_path, **changes)], facts(DATED), Signs(), lambda _: None)
    finding = compare(found, Signs(), served_by(chat_template(facts(DATED)).render))
    assert isinstance(finding, Difference)


def test_a_template_for_ollama_holds_the_date_that_it_is_given() -> None:
    own = go_template(
        facts("{% for m in messages %}{{ strftime_now('%Y') ~ m.role ~ m.content }}{% endfor %}!"), THEN
    )
    assert own is not None
    assert "2024user" in own


TOOL = {"type": "function", "function": {"name": "paint", "description": "", "parameters": {}}}
CALLED = {
    "role": "assistant", "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "paint", "arguments": {"colour": "röt"}}}],
}  # fmt: skip


def trained_with_tools(folder: Path) -> Path:
    """A record of a training on a call's result, made by the template of another process."""
    messages = [*ASKED, CALLED, {"role": "tool", "content": "done"}]
    text = chat_template(facts(QWEN_2_5)).render(messages, tools=[TOOL])
    ids = [ord(sign) for sign in text]
    conversation = {
        "file": "train/rows.jsonl", "line": 1, "messages": [*messages, {"role": "assistant", "content": "b"}],
        "input_ids": [*ids, EOS], "labels": [-100] * len(ids) + [EOS], "tools": [TOOL],
        "turns": [{"messages": 3, "prompt_tokens": len(ids), "stop_token": EOS}],
    }  # fmt: skip
    record = {**RECORD, "conversations": [conversation]}
    (folder / "trained_conversations.json").write_text(json.dumps(record))
    return folder / "trained_conversations.json"


def test_a_runtime_is_asked_with_the_tools_that_training_had(tmp_path: Path) -> None:
    template = chat_template(facts(QWEN_2_5))
    found = prompts([trained_with_tools(tmp_path)], facts(QWEN_2_5), Signs(), lambda _: None)

    def served(render: Callable[[Messages, Messages], str]) -> Served:
        return Served(lambda *asked: len(render(*asked)), render, lambda token: token == EOS, 4096)

    with_tools = served(lambda messages, tools: template.render(messages, tools=list(tools)))
    assert compare(found, Signs(), with_tools) is None
    without = served(lambda messages, _: template.render(messages))
    assert isinstance(compare(found, Signs(), without), Difference)


def test_calls_are_sent_as_openais_api_has_them() -> None:
    sent = conversation([*ASKED, CALLED], [TOOL])
    assert sent["tools"] == [TOOL]
    assert sent["messages"][0] == ASKED[0]
    [call] = sent["messages"][1]["tool_calls"]
    assert call["function"] == {"name": "paint", "arguments": '{"colour": "röt"}'}
    assert conversation(ASKED, ()) == {"messages": list(ASKED)}
