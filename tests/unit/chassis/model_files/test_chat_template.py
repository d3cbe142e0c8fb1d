"""The one renderer against Transformers' own, and against templates that mean harm."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.chat_template import (
    Bounds,
    BrokenTemplate,
    ChatTemplate,
    default_template,
    template_in,
)

from tests.unit.chassis.model_files.chat_templates import CHATML, FAMILIES, GEMMA, ZEPHYR

PUBLISHED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
"""Those of real models, as TRL brings them, some with the marks of what is trained on."""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says <b>how</b> it is; für „alle“.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
SYSTEM, ASK = {"role": "system", "content": "Be brief."}, {"role": "user", "content": " What is 2 + 3?\n"}
ANSWER = {"role": "assistant", "content": "<think>\nadd\n</think>\n\n5 ☃"}
REASONED = {"role": "assistant", "content": "5", "reasoning": "add"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "weather", "arguments": {"place": "Köln"}}}],
}
RESULT = {"role": "tool", "content": "rain"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [ASK],
    "system": [SYSTEM, ASK],
    "two turns": [ASK, ANSWER, ASK],
    "system and two turns": [SYSTEM, ASK, ANSWER, ASK],
    "a whole conversation": [SYSTEM, ASK, REASONED],
    "out of order": [ASK, ASK],
    "content in parts": [{"role": "user", "content": [{"type": "text", "text": "What is 2 + 3?"}]}],
    "a call": [SYSTEM, ASK, CALL, RESULT, RESULT, ANSWER, ASK],
}


def tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, **{**SPECIAL, **more}
    )


def outcome(render: Callable[..., object], *args: Any, **named: Any) -> str:
    """What rendering gives; the same word for every refusal."""
    try:
        return str(render(*args, **named))
    except Exception:  # noqa: BLE001 - whichever it is
        return "REFUSED"


def compare(template: str) -> set[str]:
    """Render every conversation by Transformers and by ours; return what came out."""
    theirs, ours = tokenizer(chat_template=template), ChatTemplate(template, SPECIAL)
    seen = set()
    for name, messages in CONVERSATIONS.items():
        for tools in (None, [TOOL]):
            for answer_next in (True, False):
                how = {"add_generation_prompt": answer_next, "tokenize": False}
                wanted = outcome(theirs.apply_chat_template, messages, tools=tools, **how)
                got = outcome(ours.render, messages, answer_next=answer_next, tools=tools)
                if got != wanted:  # a template that writes the date, at midnight
                    wanted = outcome(theirs.apply_chat_template, messages, tools=tools, **how)
                assert got == wanted, (name, tools, answer_next)
                seen.add(wanted)
    ours.close()
    return seen - {"REFUSED"}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_renders_as_transformers_does(family: str) -> None:
    assert len(compare(FAMILIES[family])) > 3  # it was no comparison of nothing


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_templates_render_as_transformers_does(file: Path) -> None:
    assert len(compare(file.read_text(encoding="utf-8"))) > 2


def test_the_published_templates_are_of_many_families() -> None:
    families = {re.split(r"[\d_]", file.stem)[0] for file in PUBLISHED}
    assert {"cohere", "deepseek", "gemma", "gptoss", "llama", "phi", "qwen"} <= families


def test_a_token_that_a_tokenizer_has_not_is_undefined() -> None:
    text = "{{ bos_token is defined }}{{ bos_token }}{{ eos_token }}"
    assert ChatTemplate(text, {"eos_token": "</s>"}).render([ASK]) == "False</s>"


def write(folder: Path, files: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL, **files.pop("config", {})
    }  # fmt: skip
    tokenizer().save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    return config


NAMED = [{"name": "tool_use", "template": "X"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": CHATML},
        {"chat_template.jinja": ZEPHYR.replace("\n", "\r\n")},
        {"chat_template.jinja": "a\rb\r\nc{{ 'x\r\ny' }}"},
        {"chat_template.jinja": "\ufeffmarked"},
        {"chat_template.jinja": "T\n", "config": {"chat_template": "other"}},
        {"config": {"chat_template": "T\n"}},
        {"config": {"chat_template": "a\r\nb{{ 'x\r\ny' }}\r\n"}},
        {"config": {"chat_template": NAMED}},
    ],
)  # fmt: skip
def test_a_folder_s_template_is_the_one_that_transformers_takes(
    tmp_path: Path, files: dict[str, Any]
) -> None:
    config = write(tmp_path, dict(files))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    wanted = theirs.apply_chat_template([ASK], tokenize=False)
    assert ChatTemplate(template_in(tmp_path, config), SPECIAL).render([ASK], answer_next=False) == wanted
    if "chat_template.jinja" in files:
        assert template_in(tmp_path, config) == theirs.chat_template


def test_named_templates_without_a_default_are_none() -> None:
    assert default_template(NAMED) == default_template({"default": "D", "rag": "R"}) == "D"
    assert default_template(NAMED[:1]) == default_template(None) == default_template([3, "x"]) == ""


def test_a_template_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{")
    with pytest.raises(InvalidInput, match="can't be read"):
        template_in(tmp_path, {})


@pytest.mark.parametrize(
    ("template", "system"), [(CHATML, "You are helpful."), (GEMMA, ""), (ZEPHYR, ""), ("", "")]
)
def test_the_system_message_that_a_template_adds_is_found(template: str, system: str) -> None:
    assert ChatTemplate(template, SPECIAL).default_system() == system


SMALL = Bounds(cpu_seconds=1, memory_bytes=256 << 20, output_bytes=1 << 20)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
        ("{{ 'a' * 10**12 }}", "memory"),
        ("{% set n = namespace(s='a') %}"
         "{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "memory"),
        ("{{ 'a' | center(10**10) }}", "memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "memory"),
        ("{{" + "(" * 9999 + ")" * 9999 + "}}", "memory"),
        ("{{ 'abc' * 1000000 }}", "3,000,000 signs"),
        ("a\n{% if %}", "can't be parsed: line 2"),
        ("{% generation %}", "can't be parsed: line 1"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'x' %}", "no loader"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set n = namespace(__init__=1) %}", "__init__"),
        ("{{ raise_exception('No\nsystem.') }}", "refuses a conversation: No system."),
    ],
)  # fmt: skip
def test_a_hostile_or_broken_template_ends_in_one_line(template: str, said: str) -> None:
    hostile = ChatTemplate(template, SPECIAL, SMALL)
    for _ in range(2):  # its process may be gone; the second time is as the first
        with pytest.raises(InvalidInput, match=said) as caught:
            hostile.render([ASK])
        assert "\n" not in caught.value.message
        assert len(caught.value.message) < 700


def test_it_goes_on_after_a_refusal() -> None:
    template = ChatTemplate(GEMMA, SPECIAL)
    with pytest.raises(InvalidInput, match="System role not supported"):
        template.render([SYSTEM, ASK])
    assert template.render([ASK]).startswith("<s><start_of_turn>user")


@pytest.mark.parametrize(
    ("template", "broken"),
    [
        ("{% if %}", True),
        ("{{ 'a' * 10**12 }}", True),
        ("{{ raise_exception('no') }}", False),
        ("{{ 1 / 0 }}", False),
    ],
)
def test_a_template_that_is_of_no_use_is_told_from_one_that_refuses(template: str, broken: bool) -> None:
    with pytest.raises(InvalidInput) as caught:
        ChatTemplate(template, SPECIAL, SMALL).render([ASK])
    assert isinstance(caught.value, BrokenTemplate) is broken


DATED = (
    "{% macro day() %}{{ strftime_now('%d %B %Y') }}{% endmacro %}{% if messages[0].role != 'system' %}"
    "[{{ day() }}]{% endif %}{% for m in messages %}"
    "{% if m.role == 'system' %}[{{ m.content }}]{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_a_template_writes_the_date_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    template, then = ChatTemplate(DATED), datetime(2024, 2, 29, 23, 59)
    assert template.dated
    assert not ChatTemplate(CHATML).dated
    assert template.render([ASK], now=then).startswith("[29 February 2024]")
    assert template.default_system(then) == "29 February 2024"
    before = datetime.now()
    today = template.render([ASK])
    assert today.partition("]")[0][1:] in {f"{day:%d %B %Y}" for day in (before, datetime.now())}


def test_it_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    template = ChatTemplate("x")
    template.render([ASK])
    child = template._process
    assert child is not None
    environment = Path(f"/proc/{child.pid}/environ")
    if environment.exists():
        assert environment.read_bytes().split(b"\0")[:-1] == [b"TZ=UTC"]
    template.close()
    assert child.poll() is not None


def test_signs_that_are_no_text_pass() -> None:
    assert (
        ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": "a\ud800b"}])
        == "a\ud800b"
    )
