"""Chat templates: a model's own, and a Go template that renders the same.

A model only answers as trained when the served prompt is the trained prompt, to the sign. Runtimes that take
the GGUF's own Jinja template are safe; Ollama swaps it for one of its own that looks alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.chat_template import ChatTemplate
from web4lora_chassis.model_files.gguf import GgufHeader

_ASK = {"role": "user", "content": "What is 2 + 3?"}
_RULE = {"role": "system", "content": "Answer with a number."}
_ANSWER = {"role": "assistant", "content": "5"}
_AGAIN = {"role": "user", "content": "And doubled?"}

CONVERSATIONS: dict[str, tuple[dict[str, str], ...]] = {
    "one question": (_ASK,),
    "a system message and a question": (_RULE, _ASK),
    "two turns": (_ASK, _ANSWER, _AGAIN),
    "a system message and two turns": (_RULE, _ASK, _ANSWER, _AGAIN),
    "a system message and three turns": (_RULE, _ASK, _ANSWER, _AGAIN, _ANSWER, _ASK),
}
"""What is rendered to compare two templates."""


@dataclass(frozen=True)
class GoTemplate:
    """What Ollama is told about prompts.

    Attributes:
        text: A template in Go's template language; empty for the one that Ollama picks.
        system: The system message of a conversation that has none; empty for none.
    """

    text: str
    system: str


def chat_template(header: GgufHeader) -> ChatTemplate:
    """Return a model's own template, with its special tokens."""
    return ChatTemplate(header.chat_template, header.special_tokens)


def go_template(header: GgufHeader, now: datetime | None = None) -> str | None:
    """Derive a Go template from how a model's Jinja puts messages in a row; None when it does more than that.

    Every message is taken to be its text between two fixed strings, which may depend on the one before.
    Whether that is so, `template_gate.compare` tells. A system message that the Jinja puts in by itself is
    left to the caller, see `ChatTemplate.default_system`.

    Args:
        header: The model's.
        now: The date that the Jinja writes, where it writes one: the derived one always writes that.
    """
    now = now or datetime.now()
    template = chat_template(header)
    system, ask, answer, again = ("SYSTEM-TEXT", "FIRST-TEXT", "ANSWER-TEXT", "SECOND-TEXT")
    messages = [
        {"role": role, "content": text}
        for role, text in (("system", system), ("user", ask), ("assistant", answer), ("user", again))
    ]
    try:
        bare = _split(template.render(messages[1:2], now=now), (ask,))
        turns = _split(template.render(messages[1:], now=now), (ask, answer, again))
    except InvalidInput:
        return None
    if bare is None or turns is None or bare[-1] != turns[-1]:
        return None
    begin, end = bare
    head, middle = "", begin
    try:
        ruled = _split(template.render(messages[:2], now=now), (system, ask))
    except InvalidInput:
        pass  # takes no system message
    else:
        if ruled is None or ruled[-1] != end:
            return None
        head, middle = ruled[:2]
        if template.default_system(now):
            begin = middle
    bos = _added_bos(header)
    head, begin = head.removeprefix(bos), begin.removeprefix(bos)
    _, before_answer, before_next, _ = turns
    return (
        '{{ $last := "" }}{{ range .Messages }}'
        f'{{{{ if eq .Role "system" }}}}{_go(head)}{{{{ .Content }}}}'
        f'{{{{ else if eq .Role "assistant" }}}}{_go(before_answer)}{{{{ .Content }}}}'
        f'{{{{ else if eq $last "assistant" }}}}{_go(before_next)}{{{{ .Content }}}}'
        f'{{{{ else if eq $last "system" }}}}{_go(middle)}{{{{ .Content }}}}'
        f"{{{{ else }}}}{_go(begin)}{{{{ .Content }}}}{{{{ end }}}}"
        f"{{{{ $last = .Role }}}}{{{{ end }}}}{_go(end)}"
    )


def _added_bos(header: GgufHeader) -> str:
    """Return the token that the tokenizer puts before every prompt, so that no template need do so.

    In SmolLM2 that token, <|im_start|>, also begins every turn, and the tokenizer adds none.
    """
    bos = header.special_tokens.get("bos_token", "")
    adds = header.values.get("tokenizer.ggml.add_bos_token")
    if isinstance(adds, bool):
        return bos if adds else ""
    return bos if header.chat_template.count("bos_token") else ""


def _split(text: str, parts: Sequence[str]) -> list[str] | None:
    """Return what lies before, between and after the parts; None unless each is there once, in order."""
    pieces = []
    for part in parts:
        before, found, text = text.partition(part)
        if not found or part in text:
            return None
        pieces.append(before)
    return [*pieces, text]


def _go(text: str) -> str:
    """Return a text as an action of Go's template language."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""
