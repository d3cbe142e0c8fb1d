"""Chat templates: what training rendered, and a Go template that renders the same.

A model only answers as trained when the served prompt is the trained prompt, to the sign. Runtimes that take
the GGUF's own Jinja template are safe; Ollama swaps it for one of its own that looks alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from web4lora_chassis.errors import InvalidInput

from web4lora_deployer.gguf_file import GgufFacts

Message = dict[str, str]
Render = Callable[[Sequence[Message]], str]

_ASK = {"role": "user", "content": "What is 2 + 3?"}
_RULE = {"role": "system", "content": "Answer with a number."}
_ANSWER = {"role": "assistant", "content": "5"}
_AGAIN = {"role": "user", "content": "And doubled?"}

CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "one question": (_ASK,),
    "a system message and a question": (_RULE, _ASK),
    "two turns": (_ASK, _ANSWER, _AGAIN),
    "a system message and two turns": (_RULE, _ASK, _ANSWER, _AGAIN),
    "a system message and three turns": (_RULE, _ASK, _ANSWER, _AGAIN, _ANSWER, _ASK),
}
"""What is rendered to compare two templates."""


@dataclass(frozen=True)
class GoTemplate:
    """A template for Ollama that renders as a model's Jinja does.

    Attributes:
        text: In Go's template language.
        system: The system message that the Jinja adds when a conversation has none; empty when it adds none.
    """

    text: str
    system: str


def jinja_renderer(facts: GgufFacts) -> Render:
    """Return what renders a conversation with a model's own template, as transformers does.

    The opening of the answer is part of it.

    Raises:
        InvalidInput: Now or by the renderer: the template can't be parsed, or refuses the conversation.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    try:
        template = environment.from_string(facts.chat_template)
    except TemplateError as error:
        raise InvalidInput(f"The model's chat template can't be parsed: {error}.") from error

    def render(messages: Sequence[Message]) -> str:
        try:
            return template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=facts.bos,
                eos_token=facts.eos,
            )
        except (TemplateError, TypeError, ArithmeticError, LookupError) as error:
            raise InvalidInput(f"The model's chat template refuses a conversation: {error}.") from error

    return render


def go_template(facts: GgufFacts) -> GoTemplate | None:
    """Derive a Go template from how a model's Jinja puts messages in a row; None when it does more than that.

    Every message is taken to be its text between two fixed strings, which may depend on the one before.
    Whether that is so, `template_gate.compare` tells.
    """
    render = jinja_renderer(facts)
    system, ask, answer, again = ("SYSTEM-TEXT", "FIRST-TEXT", "ANSWER-TEXT", "SECOND-TEXT")
    messages = [
        {"role": role, "content": text}
        for role, text in (("system", system), ("user", ask), ("assistant", answer), ("user", again))
    ]
    try:
        short = _split(render(messages[:2]), (system, ask))
        long = _split(render(messages), (system, ask, answer, again))
        bare = _split(render(messages[1:2]), (ask,))
    except InvalidInput:
        return None
    if short is None or long is None or bare is None or long[:2] != short[:2] or bare[-1] != short[-1]:
        return None
    head, middle, end = short
    before_answer, before_next = long[2], long[3]
    head, begin = head.removeprefix(_added_bos(facts)), bare[0].removeprefix(_added_bos(facts))
    default = ""
    if begin.startswith(head) and begin.endswith(middle) and len(begin) > len(head) + len(middle):
        default = begin[len(head) : len(begin) - len(middle)]
        begin = middle
    text = (
        '{{ $last := "" }}{{ range .Messages }}'
        f'{{{{ if eq .Role "system" }}}}{_go(head)}{{{{ .Content }}}}'
        f'{{{{ else if eq .Role "assistant" }}}}{_go(before_answer)}{{{{ .Content }}}}'
        f'{{{{ else if eq $last "assistant" }}}}{_go(before_next)}{{{{ .Content }}}}'
        f'{{{{ else if eq $last "system" }}}}{_go(middle)}{{{{ .Content }}}}'
        f"{{{{ else }}}}{_go(begin)}{{{{ .Content }}}}{{{{ end }}}}"
        f"{{{{ $last = .Role }}}}{{{{ end }}}}{_go(end)}"
    )
    return GoTemplate(text, default)


def _refuse(message: str) -> None:
    """Serve templates as `raise_exception`."""
    raise TemplateError(message)


def _added_bos(facts: GgufFacts) -> str:
    """Return the token that the tokenizer puts before every prompt, so that no template need do so.

    In SmolLM2 that token, <|im_start|>, also begins every turn, and the tokenizer adds none.
    """
    adds = facts.values.get("tokenizer.ggml.add_bos_token")
    if isinstance(adds, bool):
        return facts.bos if adds else ""
    return facts.bos if facts.chat_template.count("bos_token") else ""


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
