"""The template gate: what a runtime puts into a model is, token by token, what training put there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from web4lora_chassis.errors import FailedPrecondition, InvalidInput

from web4lora_deployer.gguf_file import GgufFacts
from web4lora_deployer.templates import CONVERSATIONS, Message, Render, jinja_renderer

DIFFERS = "TEMPLATE_DIFFERS"
_BEFORE, _AFTER = 4, 6


@dataclass(frozen=True)
class Token:
    """A token and the text it stands for."""

    id: int
    piece: str


class Tokenize(Protocol):
    """A model's tokenizer, see `runtimes.tokens.Tokenizer`."""

    def prompt(self, text: str) -> list[Token]:
        """Return the tokens of a rendered prompt as they go into the model."""


@dataclass(frozen=True)
class Served:
    """How a runtime tells what it puts into a model.

    Attributes:
        count: Returns how many tokens a conversation was for the model that answered it.
        render: Returns the prompt that a conversation becomes; None where the runtime does not tell.
        system: The system message that the runtime gives to a conversation without one; may be empty.
    """

    count: Callable[[Sequence[Message]], int]
    render: Render | None = None
    system: str = ""


@dataclass(frozen=True)
class Difference:
    """Where a runtime's prompt differs from training's.

    Attributes:
        conversation: Which one, in words.
        where: Which turn of it.
        index: The first token that differs, counted from 0.
        trained: Training's tokens.
        served: The runtime's.
    """

    conversation: str
    where: str
    index: int
    trained: tuple[Token, ...]
    served: tuple[Token, ...]

    def __str__(self) -> str:
        """Show the first token that differs, with its surroundings."""
        shown = [_around(tokens, self.index) for tokens in (self.trained, self.served)]
        place = f"with {self.conversation}, {self.where}, token {self.index}"
        return f"{place}: trained {shown[0]}; served {shown[1]}"


@dataclass(frozen=True)
class CountDifference:
    """A runtime that renders alike, but puts more or fewer tokens into the model than training did."""

    conversation: str
    trained: int
    served: int

    def __str__(self) -> str:
        """Give both numbers, and the usual cause."""
        return (
            f"with {self.conversation}, the model was given {self.served} tokens where training gave "
            f"{self.trained}: the token that begins a prompt may be doubled or missing"
        )


def compare(facts: GgufFacts, tokenizer: Tokenize, served: Served) -> Difference | CountDifference | None:
    """Compare a runtime's prompts with training's, token by token; None when all are equal.

    A conversation that the model's own template refuses is left out. Whether the beginning-of-sequence token
    stands in the template or is left to the tokenizer makes no difference; that it is there once does.

    Args:
        facts: The model's.
        tokenizer: The model's own.
        served: The runtime.

    Raises:
        Web4Error: The runtime or the tokenizer is out of reach.
    """
    trained = jinja_renderer(facts)
    for name, messages in CONVERSATIONS.items():
        conversation = list(messages)
        if served.system and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": served.system})
        try:
            text = trained(conversation)
        except InvalidInput:
            continue
        wanted = tokenizer.prompt(text)
        if served.render is not None:
            got = tokenizer.prompt(served.render(messages))
            if got != wanted:
                return _difference(name, conversation, text, wanted, got)
        counted = served.count(messages)
        if counted != len(wanted):
            return CountDifference(name, len(wanted), counted)
    return None


def require_same_prompts(what: str, facts: GgufFacts, tokenizer: Tokenize, served: Served) -> None:
    """Refuse a runtime that uses the model's own template and yet differs; see `compare`.

    Args:
        what: Names the model in the error.
        facts: The model's. One without a template has nothing to compare.
        tokenizer: The model's own.
        served: The runtime.

    Raises:
        FailedPrecondition: The prompts differ.
    """
    difference = compare(facts, tokenizer, served) if facts.chat_template else None
    if difference is not None:
        raise FailedPrecondition(
            f"{what} would not be served the prompts it was trained on: {difference}",
            fix="The runtime reads the model's chat template otherwise than training does; another target "
            "may not.",
            reason=DIFFERS,
        )


def _difference(
    name: str, messages: Sequence[Message], text: str, wanted: list[Token], got: list[Token]
) -> Difference:
    pairs = zip(wanted, got, strict=False)
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(got)))
    left = sum(len(token.piece) for token in wanted[index:])
    return Difference(name, _turn(text, len(text) - left, messages), index, tuple(wanted), tuple(got))


def _turn(text: str, place: int, messages: Sequence[Message]) -> str:
    """Return in which turn a place of a rendered prompt is."""
    end = 0
    for number, message in enumerate(messages, start=1):
        found = text.find(message["content"], end)
        end = found + len(message["content"]) if found >= 0 else end
        if place < end:
            return f"in turn {number} ({message['role']})"
    return "where the answer begins"


def _around(tokens: Sequence[Token], index: int) -> str:
    """Return a token with its id, and the text around it."""
    before = "".join(token.piece for token in tokens[max(0, index - _BEFORE) : index])
    after = "".join(token.piece for token in tokens[index + 1 : index + 1 + _AFTER])
    if index >= len(tokens):
        return f"{_quoted(before)} and then nothing"
    token = tokens[index]
    return f"{_quoted(before)} then {_quoted(token.piece)} ({token.id}) then {_quoted(after)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
