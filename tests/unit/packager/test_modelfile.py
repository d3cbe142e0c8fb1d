"""Modelfiles: what stands in them, and that Ollama's parser reads the texts back unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.modelfile import licence_of
from web4lora_packager.chat_template import Tokenizer, read_tokenizer
from web4lora_packager.modelfile import ModelParameters, default_system, modelfile, stop_texts

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are \"Smol\".<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (s if loop.index0 == 0 else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MARKED = (
    "{%- for m in messages -%}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{%- endfor -%}"
)
ADDED = {
    "<|im_start|>": 1,
    "<|im_end|>": 2,
    "<|im_end|>x": 9,
    "<end_of_turn>": 3,
    "<s>": 4,
    "</s>": 5,
    "<eos>": 6,
}


def _tokenizer(template: str, ends: tuple[int, ...] = (), eos: str = "</s>") -> Tokenizer:
    return Tokenizer(template, ADDED, {"bos_token": "<s>", "eos_token": eos}, ends)


@pytest.mark.parametrize(
    ("template", "system"),
    [(CHATML, ""), (SMOLLM, 'You are "Smol".'), (LLAMA2, ""), (GEMMA, ""), (MARKED, ""), ("", "")],
)
def test_the_default_system_message_is_found(template: str, system: str) -> None:
    assert default_system(_tokenizer(template)) == system


@pytest.mark.parametrize(
    ("template", "ends", "eos", "stop"),
    [
        (CHATML, (2, 5), "<|im_end|>", ("<|im_end|>", "</s>")),
        (CHATML, (5,), "</s>", ("<|im_end|>", "</s>")),  # ends turns with another token than texts
        (LLAMA2, (5,), "</s>", ("</s>",)),
        (GEMMA, (6, 3), "<eos>", ("<end_of_turn>", "<eos>")),
        (MARKED, (), "</s>", ("<|im_end|>", "</s>")),
        ("", (99,), "</s>", ("</s>",)),
    ],
)
def test_stop_texts(template: str, ends: tuple[int, ...], eos: str, stop: tuple[str, ...]) -> None:
    assert stop_texts(_tokenizer(template, ends, eos)) == stop


def test_a_whole_modelfile() -> None:
    parameters = ModelParameters(("<|im_end|>", "</s>"), 'You are "Smol".', 0.0, 4096, "Apache-2.0")
    assert modelfile("model.Q4_K_M.gguf", parameters) == (
        "FROM ./model.Q4_K_M.gguf\n"
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "</s>"\n'
        "PARAMETER temperature 0\n"
        "PARAMETER num_ctx 4096\n"
        'SYSTEM "You are "Smol"."\n'
        'LICENSE "Apache-2.0"\n'
    )


def test_absent_texts_leave_no_line() -> None:
    text = modelfile("m.gguf", ModelParameters((), "", 0.7, 2048, ""))
    assert text == "FROM ./m.gguf\nPARAMETER temperature 0.7\nPARAMETER num_ctx 2048\n"


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        'say "hi"',
        '"whole"',
        '""two first',
        "two\nlines",
        'a line with "quotes"\nand more',
        '"first\nlast"',
        "  leading and trailing  ",
        "ends with newline\n",
        'has """three""" inside\nof a line',
        "# no comment\nFROM x",
        "tab\tand\\backslash\\n",
    ],
)
def test_ollama_reads_texts_back(text: str) -> None:
    written = modelfile("m.gguf", ModelParameters(("</s>",), text, 0, 1, ""))
    assert _ollama_reads(written) == [
        ("from", "./m.gguf"),
        ("parameter", "stop </s>"),
        ("parameter", "temperature 0"),
        ("parameter", "num_ctx 1"),
        ("system", text),
    ]


@pytest.mark.parametrize("text", ['one "\ntwo """\nthree', '"""\nfenced\n'])
def test_a_text_that_no_quotes_can_hold_is_refused(text: str) -> None:
    for system, licence, said in (
        (text, "", "The system message of the base's"),
        ("", text, "The base's licence"),
    ):
        with pytest.raises(InvalidInput, match=f"{said}.* can't be written in a Modelfile"):
            modelfile("m.gguf", ModelParameters((), system, 0, 1, licence))


def _ollama_reads(text: str) -> list[tuple[str, str]]:
    """Read a Modelfile as Ollama does: a value ends at the first line at whose end its quotes close."""
    commands: list[tuple[str, str]] = []
    name, value = "", ""
    for line in text.split("\n"):
        if not name and not line.strip():
            continue
        if not name:
            name, _, line = line.partition(" ")
            if name == "PARAMETER":
                parameter, _, line = line.partition(" ")
                name = f"{name} {parameter}"
        value = f"{value}\n{line}" if value else line
        unquoted = _unquote(value.strip())
        if unquoted is not None:
            command, _, parameter = name.partition(" ")
            commands.append((command.lower(), f"{parameter} {unquoted}".lstrip() if parameter else unquoted))
            name, value = "", ""
    assert not name, f"{name} is not closed"
    return commands


def _unquote(text: str) -> str | None:
    if text.startswith('"""'):
        return text[3:-3] if len(text) >= 6 and text.endswith('"""') else None
    if text.startswith('"'):
        return text[1:-1] if len(text) >= 2 and text.endswith('"') else None
    return text


def _write(folder: Path, files: dict[str, Any]) -> Path:
    for name, data in files.items():
        (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": "T\n", "tokenizer_config.json": {"chat_template": "other"}},
        {"chat_template.json": {"chat_template": "T\n"}},
        {"tokenizer_config.json": {"chat_template": "T\n"}},
        {
            "tokenizer_config.json": {
                "chat_template": [
                    {"name": "tool_use", "template": "X"},
                    {"name": "default", "template": "T\n"},
                ]
            }
        },
    ],
)
def test_the_template_is_found_where_transformers_has_kept_it(tmp_path: Path, files: dict[str, Any]) -> None:
    assert read_tokenizer(_write(tmp_path, files)).chat_template == "T\n"


def test_special_tokens_and_ends(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(
        _write(
            tmp_path,
            {
                "tokenizer.json": {
                    "added_tokens": [{"id": 7, "content": "<eot>"}, {"id": 8, "content": "<eos>"}]
                },
                "tokenizer_config.json": {
                    "eos_token": {"content": "<eos>", "lstrip": False},
                    "bos_token": None,
                },
                "generation_config.json": {"eos_token_id": [7, 8]},
                "config.json": {"eos_token_id": 8},
            },
        )
    )
    assert tokenizer.special == {"eos_token": "<eos>"}
    assert tokenizer.end_ids == (7, 8)
    assert stop_texts(tokenizer) == ("<eot>", "<eos>")


def test_a_broken_template_is_named() -> None:
    with pytest.raises(InvalidInput, match="chat template"):
        default_system(_tokenizer("{% if %}"))


def test_templates_reach_nothing_outside() -> None:
    with pytest.raises(InvalidInput):
        _tokenizer("{{ messages.__class__.__mro__ }}").render(
            [{"role": "user", "content": "x"}], answer_next=True
        )


def test_the_licence_file_comes_before_its_name(tmp_path: Path) -> None:
    assert licence_of(tmp_path.iterdir(), "MIT") == ("MIT", "its model card")
    (tmp_path / "LICENSE.txt").write_text("All of it.\n")
    assert licence_of(tmp_path.iterdir(), "MIT") == ("All of it.", "LICENSE.txt")


def test_a_template_with_windows_line_ends_is_the_one_that_the_converter_writes(tmp_path: Path) -> None:
    """Transformers and the converter read each line end as a line feed."""
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages[0].content }}\r\n{{ 'x' }}\r\n")
    assert read_tokenizer(tmp_path).chat_template == "{{ messages[0].content }}\n{{ 'x' }}\n"
