"""A base model's chat template, rendered as transformers does it, and its special tokens."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from web4lora_chassis.errors import InvalidInput

from web4lora_packager.checkpoint import read_json

Message = Mapping[str, str]


class _Generation(Extension):
    """Lets `{% generation %}` through, which marks what is trained on."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own form

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return str(caller())


@dataclass(frozen=True)
class Tokenizer:
    """What of a tokenizer's files matters for packaging.

    Attributes:
        chat_template: The template's text; empty when there is none.
        added: Ids of the added tokens, special ones among them, by their text.
        special: Texts of the special tokens by role: eos_token, bos_token, ….
        end_ids: Ids that end generation, as config and generation config name them.
    """

    chat_template: str
    added: Mapping[str, int]
    special: Mapping[str, str]
    end_ids: tuple[int, ...]

    def render(self, messages: Sequence[Message], *, answer_next: bool) -> str:
        """Return a conversation as the model reads it.

        Args:
            messages: Role and content of each turn.
            answer_next: End with the beginning of the assistant's turn.

        Raises:
            InvalidInput: The template refuses these messages or is broken.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=answer_next, tools=None, documents=None,
                **self.special,
            )  # fmt: skip
        except jinja2.TemplateError as error:
            raise InvalidInput(f"The base's chat template can't render this: {error}.") from error


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read a checkpoint's tokenizer files.

    Raises:
        InvalidInput: A file is missing or broken.
    """
    config = _read(folder / "tokenizer_config.json")
    added = {
        str(token["content"]): int(token["id"])
        for token in _read(folder / "tokenizer.json").get("added_tokens", [])
    }
    named = {**_read(folder / "special_tokens_map.json"), **config}
    special = {
        role: text
        for role in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (text := _text(named.get(role)))
    }
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        given = _read(folder / name).get("eos_token_id")
        ends += given if isinstance(given, list) else [given] if given is not None else []
    return Tokenizer(_template(folder, config), added, special, tuple(dict.fromkeys(ends)))


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the default template from where transformers' versions have kept it."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_bytes().decode("utf-8")
    template = _read(folder / "chat_template.json").get("chat_template") or config.get("chat_template") or ""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", "")
    return str(template)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
