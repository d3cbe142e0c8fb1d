"""The template gate: what a runtime puts into a model is, token by token, what training put there.

What training put there is in its own record (`training_record`). A model from elsewhere has none: it is
compared with what its own chat template and tokenizer make of a few conversations.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_chassis.jobs import Progress
from web4lora_chassis.model_files.gguf import GgufHeader

from web4lora_deployer.prompts.go_template import CONVERSATIONS, chat_template
from web4lora_deployer.prompts.training_record import read_record

log = logging.getLogger(__name__)

DIFFERS = "TEMPLATE_DIFFERS"
NOTHING = "TEMPLATE_NOT_COMPARED"
_ADD = "gguf-new-metadata --chat-template-file TEMPLATE.jinja IN.gguf OUT.gguf"
_BEFORE, _AFTER = 4, 6
_ROOM_TOKENS = 8  # for the answer, and what a runtime adds


@dataclass(frozen=True)
class Token:
    """A token and the text it stands for."""

    id: int
    piece: str


class Tokenize(Protocol):
    """A model's tokenizer, see `runtimes.tokens.Tokenizer`."""

    def served(self, text: str) -> list[Token]:
        """Return the tokens that llama.cpp makes of a rendered prompt."""

    def begun_once(self, text: str) -> list[Token]:
        """Return the same, the beginning-of-sequence token there once where the tokenizer wants one."""

    def piece(self, token: int) -> str:
        """Return the text of a token; empty when there is no such token."""


@dataclass(frozen=True)
class Prompt:
    """A conversation, and what it must become.

    Attributes:
        name: Says which one it is.
        messages: Role and content of each turn.
        ids: The tokens that the model must be given.
        stop: The token that must end its answer; None when nobody knows.
        tools: What the assistant was told that it may call.
        today: Returns what is as good at this moment: the same but for the date, which the template writes.
    """

    name: str
    messages: tuple[Mapping[str, Any], ...]
    ids: tuple[int, ...]
    stop: int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    today: Callable[[], tuple[tuple[int, ...], ...]] = tuple


@dataclass(frozen=True)
class Served:
    """How a runtime tells what it puts into a model.

    Attributes:
        count: Returns how many tokens a conversation, with its tools, was for the model that answered it.
        render: Returns the prompt that a conversation, with its tools, becomes.
        ends: Says whether a token ends an answer.
        context_tokens: The longest prompt with its answer.
    """

    count: Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], int]
    render: Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], str]
    ends: Callable[[int], bool]
    context_tokens: int


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
        lengths = (
            f" ({len(self.trained)} tokens trained, {len(self.served)} served)"
            if len(self.trained) != len(self.served)
            else ""
        )
        place = f"with {self.conversation}, {self.where}, token {self.index}"
        return f"{place}: trained {shown[0]}; served {shown[1]}{lengths}"


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


@dataclass(frozen=True)
class Endless:
    """A model whose answers the runtime does not end where training did."""

    conversation: str
    stop: Token

    def __str__(self) -> str:
        """Name the token."""
        return (
            f"with {self.conversation}, training ended the answer with {_quoted(self.stop.piece)} "
            f"({self.stop.id}), and here that token does not end an answer"
        )


Finding = Difference | CountDifference | Endless


def prompts(
    records: Iterable[Path], header: GgufHeader, tokenizer: Tokenize, report: Callable[[Progress], None]
) -> list[Prompt]:
    """Return what to compare with: training's record, or what a model from elsewhere says of itself.

    Args:
        records: Records of training; none for a model that was not made here.
        header: The model's.
        tokenizer: The model's own.
        report: Takes which of the two it is.

    Raises:
        InvalidInput: A record is broken, or the model's template is.
        FailedPrecondition: There is nothing to compare with.
    """
    today = _today(header, tokenizer)
    found = [
        Prompt(
            f"{row.file}:{row.line}, answer to message {turn.messages}",
            messages := row.messages[: turn.messages],
            ids := row.input_ids[: turn.prompt_tokens],
            turn.stop_token,
            row.tools,
            today(messages, ids, record.rendered_at, row.tools),
        )
        for record in map(read_record, records)
        for row in record.conversations
        for turn in row.turns
    ]
    said = "token by token with training's"
    if not found:
        said = "not made here: compared with the GGUF's own template"
        now = datetime.now()
        for name, text in own_prompts(header, now).items():
            messages, ids = CONVERSATIONS[name], _ids(tokenizer.begun_once(text))
            found.append(Prompt(name, messages, ids, today=today(messages, ids, now)))
        log.info(said)
    report(Progress(phase="compare templates", message=said))
    return found


def _ids(tokens: Iterable[Token]) -> tuple[int, ...]:
    return tuple(token.id for token in tokens)


def _today(
    header: GgufHeader, tokenizer: Tokenize
) -> Callable[..., Callable[[], tuple[tuple[int, ...], ...]]]:
    """Return what says how a model's own template writes a prompt of another day, at any moment after it.

    That is the same prompt but for the date, since the template gives the very tokens of that prompt when it
    is told the time of them: that is tried first. The clock of a runtime in a container may be that of UTC.
    """
    template = chat_template(header)

    def ids(
        messages: Sequence[Mapping[str, Any]], now: datetime, tools: Sequence[Mapping[str, Any]]
    ) -> tuple[int, ...]:
        return _ids(tokenizer.begun_once(template.render(messages, tools=list(tools) or None, now=now)))

    def of(
        messages: Sequence[Mapping[str, Any]],
        trained: tuple[int, ...],
        then: datetime | None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Callable[[], tuple[tuple[int, ...], ...]]:
        try:
            if then is None or not template.dated or ids(messages, then, tools) != trained:
                return tuple
        except InvalidInput:
            return tuple
        return lambda: tuple(
            ids(messages, now.replace(tzinfo=None), tools) for now in (datetime.now(), datetime.now(UTC))
        )

    return of


def compare(wanted: Sequence[Prompt], tokenizer: Tokenize, served: Served) -> Finding | None:
    """Compare what a runtime gives a model with what it must be given; None when all is equal.

    Args:
        wanted: What it must be given.
        tokenizer: The model's own.
        served: The runtime.

    Raises:
        FailedPrecondition: Nothing could be compared, or the runtime refuses a conversation.
        Web4Error: The runtime or the tokenizer is out of reach.
    """
    counted = 0
    for prompt in wanted:
        right = {prompt.ids, *prompt.today()}
        got = tokenizer.served(served.render(prompt.messages, prompt.tools))
        ids = _ids(got)
        if ids not in right and ids not in prompt.today():  # once more: a day may have ended in between
            return _difference(prompt, tokenizer, got)
        if len(ids) + _ROOM_TOKENS > served.context_tokens:
            continue
        count = served.count(prompt.messages, prompt.tools)
        if count != len(ids):
            return CountDifference(prompt.name, len(ids), count)
        counted += 1
    if not counted:
        shortest = min((len(prompt.ids) for prompt in wanted), default=0)
        raise FailedPrecondition(
            f"No prompt could be compared with training's: a context of {served.context_tokens} tokens has "
            f"no room for the shortest of {len(wanted)}, which has {shortest}.",
            fix=f"Deploy with a context of {shortest + _ROOM_TOKENS} tokens or more (deploy.context_tokens).",
            reason=NOTHING,
        )
    ends = {prompt.stop: prompt.name for prompt in reversed(wanted)}
    for stop, name in ends.items():
        if stop is not None and not served.ends(stop):
            return Endless(name, Token(stop, tokenizer.piece(stop)))
    return None


def refusal(what: str, finding: Finding, fix: str) -> FailedPrecondition:
    """Return the error for a runtime that would not serve a model as it was trained.

    Args:
        what: Names the model and the runtime.
        finding: Where they differ.
        fix: What to do about other prompts.
    """
    if isinstance(finding, Endless):
        return FailedPrecondition(
            f"{what} would not end its answers: {finding}.",
            fix="Name that token as eos_token in the base's tokenizer_config.json, then train again.",
            reason="ANSWER_NOT_ENDED",
        )
    return FailedPrecondition(
        f"{what} would not be served the prompts it was trained on: {finding}", fix=fix, reason=DIFFERS
    )


def require_same_prompts(what: str, wanted: Sequence[Prompt], tokenizer: Tokenize, served: Served) -> None:
    """Refuse a runtime that uses the model's own template and yet differs; see `compare`.

    Args:
        what: Names the model in the error.
        wanted: What it must be given.
        tokenizer: The model's own.
        served: The runtime.

    Raises:
        FailedPrecondition: The prompts differ, or could not be compared.
    """
    finding = compare(wanted, tokenizer, served)
    if finding is not None:
        raise refusal(
            what,
            finding,
            "llama.cpp reads the model's chat template or tokenizer otherwise than training did, in "
            "every runtime. Train on a base that both read alike.",
        )


def own_prompts(header: GgufHeader, now: datetime | None = None) -> dict[str, str]:
    """Return what a model's own template makes of those of `CONVERSATIONS` that it takes, by their names.

    Args:
        header: The model's.
        now: The date that it writes, where it writes one.

    Raises:
        FailedPrecondition: It has no template, or one that refuses every conversation.
    """
    if not header.chat_template:
        raise FailedPrecondition(
            "The GGUF has no chat template: a runtime would make one up, and nobody could tell whether the "
            "model knows it.",
            fix=f"Name a GGUF of the chat or instruct version, or add the template: {_ADD}",
            reason=NOTHING,
        )
    template = chat_template(header)
    found, refused = {}, ""
    for name, messages in CONVERSATIONS.items():
        try:
            found[name] = template.render(messages, now=now)
        except InvalidInput as error:
            refused = error.message
    if not found:
        raise FailedPrecondition(
            f"The GGUF's prompts can't be compared with anything: {refused}",
            fix=f"Correct the chat template in the GGUF: {_ADD}",
            reason=NOTHING,
        )
    return found


def _difference(prompt: Prompt, tokenizer: Tokenize, got: Sequence[Token]) -> Difference:
    """Describe the first token that differs; only the pieces around it are asked for."""
    pairs = zip(prompt.ids, got, strict=False)
    shorter = min(len(prompt.ids), len(got))
    index = next((i for i, (a, b) in enumerate(pairs) if a != b.id), shorter)
    near = range(index - _BEFORE, index + _AFTER + 1)
    trained = tuple(
        Token(token, tokenizer.piece(token) if i in near else "") for i, token in enumerate(prompt.ids)
    )
    before = "".join(token.piece for token in got[:index])
    return Difference(prompt.name, _turn(before, prompt.messages), index, trained, tuple(got))


def _turn(before: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return in which turn the place is that this much of a prompt stands before."""
    end = 0
    for number, message in enumerate(messages, start=1):
        content = str(message.get("content") or "")
        found = before.find(content, end)
        if found < 0:
            return f"in turn {number} ({' '.join(str(message['role']).split())[:20]})"
        end = found + len(content)
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
