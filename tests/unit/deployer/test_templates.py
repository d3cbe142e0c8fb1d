from __future__ import annotations

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_deployer.gguf_file import GgufFacts
from web4lora_deployer.templates import CONVERSATIONS, go_template, jinja_renderer

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% set ns = namespace(found=false) %}"
    "{% for message in messages %}{% if message['role'] == 'system' %}{% set ns.found = true %}{% endif %}"
    "{% endfor %}{% if not ns.found %}{{ 'You are a programmer.\n' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}{% else %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n' }}{% else %}"
    "{{ '### Response:\n' + message['content'] + '\n<|EOT|>\n' }}{% endif %}{% endif %}{% endfor %}"
    "{{ '### Response:\n' }}"
)


def facts(template: str, bos: str = "", **values: bool) -> GgufFacts:
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return GgufFacts("llama", 0, "", 0, template, bos, "", dict(named))


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"]
)
def test_a_template_cannot_leave_its_sandbox(template: str) -> None:
    with pytest.raises(InvalidInput):
        jinja_renderer(facts(template))(CONVERSATIONS["one question"])


@pytest.mark.parametrize(
    ("template", "bos", "system"),
    [(CHATML, "<|im_start|>", "You are kind."), (DEEPSEEK, "", "You are a programmer.\n")],
)
def test_the_system_message_that_a_template_adds_is_found(template: str, bos: str, system: str) -> None:
    own = go_template(facts(template, bos, add_bos_token=False))
    assert own is not None
    assert own.system == system


def test_the_derived_template_quotes_what_go_would_read_otherwise() -> None:
    own = go_template(
        facts("{% for m in messages %}{{ '\"{{\\\\' + m.role + '\n' + m.content }}{% endfor %}!")
    )
    assert own is not None
    assert '{{ "\\"{{\\\\user\\n" }}' in own.text


def test_a_template_that_does_more_than_put_messages_in_a_row_gives_none() -> None:
    assert go_template(facts("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")) is None
    assert go_template(facts("{{ messages[0].content }}")) is None
