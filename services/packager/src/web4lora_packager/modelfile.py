"""The Modelfile for Ollama: stop tokens, temperature, context, licence and the base's default system message.

Ollama renders no default system message of its own, so a base that has one needs it as SYSTEM; else what it
is served differs from what it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from web4lora_chassis.model_files.modelfile import LICENCE, STOP, SYSTEM, quoted

from web4lora_packager.chat_template import Tokenizer

_USER = "3f2a user 9c1e"
_ANSWER = "7b4d answer 2e8f"


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
        *(f"PARAMETER stop {quoted(stop, STOP)}" for stop in parameters.stop),
        f"PARAMETER temperature {parameters.temperature:g}",
        f"PARAMETER num_ctx {parameters.context_tokens}",
    ]
    if parameters.system:
        lines.append(f"SYSTEM {quoted(parameters.system, SYSTEM)}")
    if parameters.licence:
        lines.append(f"LICENSE {quoted(parameters.licence, LICENCE)}")
    return "\n".join(lines) + "\n"


def stop_texts(tokenizer: Tokenizer, trained: Sequence[int] = ()) -> tuple[str, ...]:
    """Return what ends an answer: the end-of-turn token first, then every end-of-text token.

    Args:
        tokenizer: The base's.
        trained: Ids of the tokens that training put behind answers.
    """
    texts = {number: text for text, number in tokenizer.added.items()}
    found = [texts.get(number, "") for number in trained]
    found += [_end_of_turn(tokenizer), *(texts.get(number, "") for number in tokenizer.end_ids)]
    found.append(tokenizer.special.get("eos_token", ""))
    return tuple(dict.fromkeys(text for text in found if text))


def default_system(tokenizer: Tokenizer, now: datetime | None = None) -> str:
    """Return the system message that the chat template puts in when there is none, or an empty text.

    Args:
        tokenizer: The base's.
        now: The date that it writes, where it writes one.
    """
    return tokenizer.renderer.default_system(now)


def _end_of_turn(tokenizer: Tokenizer) -> str:
    """Return the token that the chat template puts behind an answer, or an empty text."""
    if not tokenizer.chat_template:
        return ""
    turns = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    rest = tokenizer.render(turns, answer_next=False).rpartition(_ANSWER)[2].lstrip()
    return max((text for text in tokenizer.added if text and rest.startswith(text)), key=len, default="")
