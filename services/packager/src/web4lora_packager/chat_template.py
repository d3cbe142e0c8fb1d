"""What a base's tokenizer files say that matters for packaging: chat template, special tokens, ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import InvalidInput, shown
from web4lora_chassis.model_files.chat_template import SPECIAL_TOKENS, ChatTemplate, Message, template_in
from web4lora_chassis.model_files.model_folder import read_json

_ID_LIMIT = 1 << 31


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

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, answer_next: bool
    ) -> str:
        """Return a conversation as the model reads it.

        Args:
            messages: Role and content of each turn.
            tools: What the assistant may call.
            answer_next: End with the beginning of the assistant's turn.

        Raises:
            InvalidInput: The template refuses these messages or is broken.
        """
        return self.renderer.render(messages, tools=list(tools) or None, answer_next=answer_next)

    @cached_property
    def renderer(self) -> ChatTemplate:
        """The template, ready to render."""
        return ChatTemplate(self.chat_template, self.special)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer's files of a model's folder.

    Raises:
        InvalidInput: A file is missing or broken.
    """
    config = _read(folder / "tokenizer_config.json")
    added = _added(_read(folder / "tokenizer.json"), folder / "tokenizer.json")
    named = {**_read(folder / "special_tokens_map.json"), **config}
    special = {role: text for role in SPECIAL_TOKENS if (text := _text(named.get(role)))}
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        given = _read(folder / name).get("eos_token_id")
        ends += given if isinstance(given, list) else [given] if given is not None else []
    return Tokenizer(template_in(folder, config), added, special, tuple(dict.fromkeys(ends)))


def _added(data: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Return the ids of the added tokens by their text.

    Raises:
        InvalidInput: One of them is none; what the trainer lets in has no such.
    """
    given = data.get("added_tokens") or []
    added: dict[str, int] = {}
    for token in given if isinstance(given, list) else [given]:
        text, number = (token.get("content"), token.get("id")) if isinstance(token, dict) else ("", -1)
        if not isinstance(text, str) or type(number) is not int or not _is_token(text, number):
            raise InvalidInput(
                f"{path} has the added token {shown(token)}, which is no text with an id.",
                fix="Fetch the model again.",
                reason="MODEL_BROKEN",
            )
        added[text] = number
    return added


def _is_token(text: str, number: int) -> bool:
    """Tell whether this can be a token: halves of surrogate pairs can't, and ids have 31 bits."""
    return 0 <= number < _ID_LIMIT and not any("\ud800" <= sign <= "\udfff" for sign in text)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
