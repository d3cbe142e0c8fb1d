from __future__ import annotations

from dataclasses import replace

from web4lora_chassis.model_files.gguf import GgufHeader
from web4lora_deployer.prompts.go_template import CONVERSATIONS, chat_template, go_template

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


def facts(template: str, bos: str = "", **values: bool) -> GgufHeader:
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return GgufHeader({"tokenizer.chat_template": template, **named}, special_tokens={"bos_token": bos})


def test_a_template_is_given_the_model_s_special_tokens() -> None:
    model = replace(
        facts("{{ bos_token }}{{ eos_token is defined }}{{ unk_token }}{{ pad_token }}"),
        special_tokens={"bos_token": "<s>", "unk_token": "?"},
    )
    assert chat_template(model).render(CONVERSATIONS["one question"]) == "<s>False?"


def test_the_derived_template_quotes_what_go_would_read_otherwise() -> None:
    own = go_template(
        facts("{% for m in messages %}{{ '\"{{\\\\' + m.role + '\n' + m.content }}{% endfor %}!")
    )
    assert own is not None
    assert '{{ "\\"{{\\\\user\\n" }}' in own


def test_a_template_that_does_more_than_put_messages_in_a_row_gives_none() -> None:
    assert go_template(facts("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")) is None
    assert go_template(facts("{{ messages[0].content }}")) is None


def test_a_template_that_takes_no_system_message_gives_one_without() -> None:
    own = go_template(
        facts(
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
            "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}<assistant>"
        )
    )
    assert own is not None
    assert '{{ "<user>" }}{{ .Content }}' in own
