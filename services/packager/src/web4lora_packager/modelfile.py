"""The Modelfile for Ollama: stop tokens, temperature, context, licence and the base's default system message.

Ollama renders no default system message of its own, so a base that has one needs it as SYSTEM; else what it
is served differs from what it was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import InvalidInput

from web4lora_packager.chat_template import Tokenizer

_USER = "3f2a user 9c1e"
_ANSWER = "7b4d answer 2e8f"
_SYSTEM = "5d6c system 1a0b"


@dataclass(frozen=True)
class ModelParameters:
    """How a model wants to be served.

    Attributes:
        stop: Texts that end an answer.
        system: The base's default system message; empty when it has none.
        temperature: For sampling.
        context_tokens: Length of the context.
        licence: The base's licence, its text or its name; empty when unknown.
    """

    stop: tuple[str, ...]
    system: str
    temperature: float
    context_tokens: int
    licence: str

    def to_json(self) -> dict[str, Any]:
        """Return it as the data of modelfile.json."""
        return {
            "stop": list(self.stop),
            "system": self.system,
            "temperature": self.temperature,
            "context_tokens": self.context_tokens,
            "license": self.licence,
        }


def modelfile(gguf_name: str, parameters: ModelParameters) -> str:
    """Return the text of a Modelfile.

    Args:
        gguf_name: The GGUF's file name, beside the Modelfile.
        parameters: How the model wants to be served.

    Raises:
        InvalidInput: A text can't be written in a Modelfile.
    """
    lines = [
        f"FROM ./{gguf_name}",
        *(f"PARAMETER stop {_quoted(stop)}" for stop in parameters.stop),
        f"PARAMETER temperature {parameters.temperature:g}",
        f"PARAMETER num_ctx {parameters.context_tokens}",
    ]
    if parameters.system:
        lines.append(f"SYSTEM {_quoted(parameters.system)}")
    if parameters.licence:
        lines.append(f"LICENSE {_quoted(parameters.licence)}")
    return "\n".join(lines) + "\n"


def stop_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return what ends an answer: the end-of-turn token first, then every end-of-text token."""
    texts = {number: text for text, number in tokenizer.added.items()}
    found = [_end_of_turn(tokenizer), *(texts.get(number, "") for number in tokenizer.end_ids)]
    found.append(tokenizer.special.get("eos_token", ""))
    return tuple(dict.fromkeys(text for text in found if text))


def default_system(tokenizer: Tokenizer) -> str:
    """Return the system message that the chat template puts in when there is none, or an empty text.

    It is found by rendering with and without a marked system message, and proved by rendering with it.
    """
    if not tokenizer.chat_template:
        return ""
    user = {"role": "user", "content": _USER}
    bare = tokenizer.render([user], answer_next=True)
    try:
        marked = tokenizer.render([{"role": "system", "content": _SYSTEM}, user], answer_next=True)
    except InvalidInput:
        return ""  # takes no system messages at all
    before, found, after = marked.partition(_SYSTEM)
    if not found or len(bare) <= len(before) + len(after):
        return ""
    if not (bare.startswith(before) and bare.endswith(after)):
        return ""
    system = bare[len(before) : len(bare) - len(after)]
    proof = tokenizer.render([{"role": "system", "content": system}, user], answer_next=True)
    return system if proof == bare else ""


def licence_of(base: Path, named: str) -> str:
    """Return the base's licence: its file's text, or the name its manifest gives."""
    for path in sorted(base.iterdir()):
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE")):
            return path.read_text(encoding="utf-8", errors="replace").strip()
    return named


def _end_of_turn(tokenizer: Tokenizer) -> str:
    """Return the token that the chat template puts behind an answer, or an empty text."""
    if not tokenizer.chat_template:
        return ""
    turns = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    rest = tokenizer.render(turns, answer_next=False).rpartition(_ANSWER)[2].lstrip()
    return max((text for text in tokenizer.added if text and rest.startswith(text)), key=len, default="")


def _quoted(text: str) -> str:
    """Quote a text so that Ollama reads it back unchanged; its quotes know no escapes."""
    for mark in ('"', '"""') if "\n" not in text else ('"""', '"'):
        if _survives(text, mark):
            return f"{mark}{text}{mark}"
    raise InvalidInput(
        f"A Modelfile can't hold this text: {text[:60]!r}….",
        fix="Change the lines that end with quotes, in its licence or template.",
    )


def _survives(text: str, mark: str) -> bool:
    """Return True when no line's end inside the text looks like the closing quotes."""
    if mark == '"' and text.startswith('""'):
        return False
    lines = (mark + text).split("\n")
    opened = ["\n".join(lines[: count + 1]).strip() for count in range(len(lines) - 1)]
    return not any(len(part) >= 2 * len(mark) and part.endswith(mark) for part in opened)
