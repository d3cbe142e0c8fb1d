"""Conversations as a base's chat template writes them: what each answer is behind, and how it ends.

A served model is given a prompt and goes on from there. Templates don't always write a conversation so: some
drop the reasoning of earlier answers, some begin every answer with `<think>` in the prompt but leave it out
of the history. So each answer is looked at behind its own prompt, and the history is believed only where it
agrees.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from web4lora_chassis.dataset import Message, Row
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files import chat_template as model_files
from web4lora_chassis.model_files.chat_template import SPECIAL_TOKENS, BrokenTemplate, default_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[Mapping[str, Any]]

_PROBE = "x7f3answer"
"""Stands for an answer where only what the template writes around one is wanted."""
_OPEN_TAG = re.compile(r"<(\w+)>\s*$")
_WORDS_SHOWN = 200


class Refused(Exception):
    """A row can't be trained on with this base.

    Attributes:
        message: Why.
        fix: What to do about it.
    """

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message, fix)
        self.message, self.fix = message, fix


@dataclass(frozen=True)
class Answer:
    """A trained answer of a conversation.

    Attributes:
        messages: How many messages of the row come before it.
        prompt: What a served model is given for them.
        text: What it should go on with, to the end of `stop`.
        stop: The end-of-turn token's text; empty where the template writes none.
        rewritten: The template's history does not hold the answer as a served model writes it.
        left_open: The prompt opens a tag, for example `<think>`, that the answer never closes.
    """

    messages: int
    prompt: str
    text: str
    stop: str
    rewritten: bool
    left_open: bool


class ChatTemplate:
    """A base's chat template, asked for prompts and answers.

    Args:
        tokenizer: The base model's.
        now: The date that it writes, where it writes one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, now: datetime) -> None:
        self._renderer = renderer(tokenizer)
        self._now = now
        self.stops = _stop_tokens(tokenizer)
        self._ends = _named_ends(tokenizer)
        self._stop_pattern = re.compile("|".join(map(re.escape, sorted(self.stops, key=len, reverse=True))))

    def answers(self, row: Row) -> list[Answer]:
        """Return the answers of a row that are trained on, in their order.

        Raises:
            Refused: The template takes no such row, or an answer would be trained as another text.
            BrokenTemplate: It takes none at all, or too long for one.
        """
        try:
            return [
                self._answer(row.messages, index, row.tools)
                for index, message in enumerate(row.messages)
                if message.role == "assistant" and message.trained
            ]
        except BrokenTemplate:
            raise
        except InvalidInput as error:
            raise self._refusal(row, error) from error

    @property
    def dated(self) -> bool:
        """True when it may write the date."""
        return self._renderer.dated

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        answer_next: bool = False,
    ) -> str:
        """Return a conversation as the template writes it."""
        return self._renderer.render(
            messages, answer_next=answer_next, tools=list(tools) or None, now=self._now
        )

    def _answer(self, messages: Sequence[Message], index: int, tools: Tools) -> Answer:
        """Return an answer; where tools are, in prompt and answer alone, that they are is made sure of."""
        before = [message.to_json() for message in messages[:index]]
        answer = messages[index]
        prompt = self.render(before, tools, answer_next=True)
        if tools:
            self._check_tools(before, prompt, tools)
        if answer.tool_calls:
            return self._calls(before, answer, prompt, tools)
        content = answer.content
        probe = self.render([*before, {"role": "assistant", "content": _PROBE}], tools)
        head, found, tail = probe.rpartition(_PROBE)
        if not found:
            raise Refused(
                "the base's chat template does not write the assistant's answers", "choose another base model"
            )
        ends = self._stop_pattern.search(tail)
        end, stop = (tail[: ends.end()], ends[0]) if ends else (tail, "")

        opened = prompt[len(head) :] if prompt.startswith(head) else ""
        begun = head[len(prompt) :] if head.startswith(prompt) else ""
        rest = _behind(opened, content)
        written = self.render([*before, answer.to_json()], tools)
        if answer.reasoning:
            content = self._thought(answer, prompt, written, opened, tail)
            rest = _behind(opened, content)
            written = self.render([*before, {"role": "assistant", "content": content}], tools)
        body = begun + rest
        rewritten = True
        if written.startswith(prompt) and written.endswith(tail) and len(written) >= len(prompt + tail):
            own = written[len(prompt) : len(written) - len(tail)]
            rewritten = _squeezed(rest) not in _squeezed(own)
            body = body if rewritten else own
        place = f"message {index + 1}"
        for token in filter(None, (stop, *self._ends)):
            if token in body:
                raise Refused(
                    f"{place} holds {token}, at which a served model ends its answer: it would stop there",
                    "remove it",
                )
        tag = _OPEN_TAG.search(opened)
        said = (opened + begun).split()[:1]
        if rewritten and said and rest.lstrip().startswith(said[0]):
            raise Refused(
                f"{place} begins with {said[0]}, which the base's chat template writes there itself",
                "leave it out of the answer",
            )
        left_open = tag is not None and f"</{tag[1]}>" not in body
        return Answer(index, prompt, body + end, stop, rewritten, left_open)

    def _thought(self, answer: Message, prompt: str, written: str, opened: str, tail: str) -> str:
        """Return an answer with its reasoning in front, as the template writes it or its prompt begins it.

        Raises:
            Refused: The template has no place for reasoning.
        """
        if written.startswith(prompt) and written.endswith(tail):
            own = written[len(prompt) : len(written) - len(tail)]
            squeezed = _squeezed(own)
            at = squeezed.find(_squeezed(answer.reasoning))
            if at >= 0 and _squeezed(answer.content) in squeezed[at + len(_squeezed(answer.reasoning)) :]:
                return own
        if tag := _OPEN_TAG.search(opened):  # the history leaves reasoning out, but the prompt begins it
            return f"<{tag[1]}>\n{answer.reasoning}\n</{tag[1]}>\n\n{answer.content}"
        raise Refused(
            "the base's chat template does not write its reasoning_content",
            "write it at the beginning of the content, as <think>…</think>, or leave it out",
        )

    def _calls(
        self, before: Sequence[Mapping[str, Any]], answer: Message, prompt: str, tools: Tools
    ) -> Answer:
        """Return an answer that calls tools: what the template writes behind its own prompt.

        Raises:
            Refused: It does not write every call there.
        """
        place = f"message {len(before) + 1}"
        written = self.render([*before, answer.to_json()], tools)
        own = written[len(prompt) :] if written.startswith(prompt) else ""
        wanted = [call.name for call in answer.tool_calls]
        wanted += [key for call in answer.tool_calls for key in call.arguments]
        wanted += [_squeezed(text) for text in (answer.content, answer.reasoning) if text.strip()]
        if lost := [text for text in wanted if text not in own and text not in _squeezed(own)]:
            raise Refused(
                f"{place} calls tools, and the base's chat template does not write {lost[0][:40]!r} of it "
                "behind its prompt",
                "choose a base whose template writes tool calls, or write the call as text into the content",
            )
        stop = next((token for token in self.stops if own.rstrip().endswith(token)), "")
        body = own.rstrip().removesuffix(stop)
        for token in filter(None, (stop, *self._ends)):
            if token in body:
                raise Refused(
                    f"{place} holds {token}, at which a served model ends its answer: it would stop there",
                    "remove it, or give each call a message of its own",
                )
        return Answer(len(before), prompt, body + stop, stop, rewritten=False, left_open=False)

    def _check_tools(self, before: Sequence[Mapping[str, Any]], prompt: str, tools: Tools) -> None:
        """Refuse a template that does not write the tools, or their results, into the prompt."""
        lost = [tool["function"]["name"] for tool in tools if tool["function"]["name"] not in prompt]
        if lost:
            raise Refused(
                f"the base's chat template does not write the row's tools, for example {lost[0]!r}",
                "choose a base whose template takes tools, or write them as text into the system message",
            )
        for number, message in enumerate(before, start=1):
            if message["role"] == "tool" and _squeezed(message["content"]) not in _squeezed(prompt):
                raise Refused(
                    f"the base's chat template does not write message {number}, a tool's result, as it is",
                    "choose a base whose template takes the role tool, or write it as a user's message",
                )

    def _refusal(self, row: Row, error: InvalidInput) -> Refused:
        """Put a template's refusal into words, and find out whether the system message is why."""
        words = error.message.partition(": ")[2].rstrip(".") or error.message
        words = words if len(words) <= _WORDS_SHOWN else words[: _WORDS_SHOWN - 1] + "…"
        fix = "change it to what the template takes, or leave it out"
        if row.messages[0].role == "system" and self._takes(row.messages[1:], row.tools):
            fix = "put the system message's text at the beginning of the first user message"
        return Refused(f"the base's chat template refuses it: {words}", fix)

    def _takes(self, messages: Sequence[Message], tools: Tools) -> bool:
        try:
            self.render([message.to_json() for message in messages], tools)
        except InvalidInput:
            return False
        return True


def renderer(tokenizer: PreTrainedTokenizerBase) -> model_files.ChatTemplate:
    """Return a base's chat template, rendered in a process of its own with bounds on time and memory."""
    special = {
        role: str(token) for role, token in tokenizer.special_tokens_map.items() if role in SPECIAL_TOKENS
    }
    return model_files.ChatTemplate(default_template(tokenizer.chat_template), special)


def _behind(opened: str, content: str) -> str:
    """Return what is left to write of an answer when the prompt has begun it with `opened`."""
    begun = opened.strip()
    if not begun or not content.lstrip().startswith(begun):
        return content
    rest = content.lstrip()[len(begun) :]
    blanks = opened[len(opened.rstrip()) :]
    return rest.removeprefix(blanks) if rest.startswith(blanks) else rest.lstrip()


def _squeezed(text: str) -> str:
    """Return a text without white space: templates trim answers, which loses nothing."""
    return "".join(text.split())


def _stop_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens that could end a turn: special ones, eos, and those of generation_config.json."""
    stops = {
        token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return {**stops, **_named_ends(tokenizer)}


def _named_ends(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return eos and the tokens that generation_config.json names beside it."""
    numbers: list[object] = []
    try:
        path = Path(tokenizer.name_or_path) / "generation_config.json"
        given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        numbers += given if isinstance(given, list) else [given]
    except (OSError, ValueError, AttributeError):
        pass  # a base without one
    added = tokenizer.added_tokens_decoder
    ends = {
        added[number].content: number for number in numbers if isinstance(number, int) and number in added
    }
    return {**ends, str(tokenizer.eos_token): int(tokenizer.eos_token_id)}
