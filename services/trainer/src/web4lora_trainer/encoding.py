"""Rows as tokens: exactly those that a served model meets, with labels on every answer and its end of turn.

A served model is given the tokens of a prompt, tokenized as a whole, and writes its answer token by token.
The text of a conversation is tokenized once; an answer in it is trained there only if the tokens before it
are those of its prompt. Where they are not (a template that rewrites earlier turns, letters that merge across
the border), the answer becomes a row of its own: the prompt's tokens, then its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from web4lora_chassis.dataset import Message, Problem, Row, problems_error
from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_chassis.model_files.trained_conversations import IGNORED, Turn

from web4lora_trainer.answers import Answer, ChatTemplate, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS_AT_ONCE = 512


@dataclass(frozen=True)
class Encoded:
    """A row as tokens.

    Attributes:
        input_ids: Token ids.
        labels: The same ids where they are trained on, `IGNORED` elsewhere.
        turns: The answers among them.
        row: Where it came from; its messages may go on behind the last of `turns`.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    turns: tuple[Turn, ...] = ()
    row: Row | None = None

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that are trained on."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation up to the last trained answer."""
        return self.row.messages[: self.turns[-1].messages + 1] if self.row else ()


@dataclass(frozen=True)
class EncodedRows:
    """Rows as tokens, and what became of every answer.

    Attributes:
        rows: What is trained on; a conversation may be several.
        rows_too_long: Conversations left out, in whole or in part: more than `max_length_tokens`.
        answers_too_long: The answers left out with them.
        answers_excluded: Answers that the data itself excludes by a weight of 0.
        stop_tokens_added: Answers behind which the template writes no token to stop at; eos was appended.
        answers_rewritten: Answers that the template's history does not hold as a served model writes them.
        answers_left_open: Answers that never close the tag that the template's prompt opens.
        rendered_at: The date that the template wrote into them; None where it writes none.
    """

    rows: tuple[Encoded, ...]
    rows_too_long: int = 0
    answers_too_long: int = 0
    answers_excluded: int = 0
    stop_tokens_added: int = 0
    answers_rewritten: int = 0
    answers_left_open: int = 0
    rendered_at: datetime | None = None

    @property
    def answers(self) -> int:
        """Answers that are trained on."""
        return sum(len(row.turns) for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row) for row in self.rows)

    @property
    def trained_tokens(self) -> int:
        """Those among them that are trained on."""
        return sum(row.trained_tokens for row in self.rows)

    @property
    def longest_row_tokens(self) -> int:
        """Length of the longest row."""
        return max((len(row) for row in self.rows), default=0)


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length_tokens: int,
    now: datetime | None = None,
) -> EncodedRows:
    """Turn conversations into tokens; only the assistant's answers and their stop tokens get labels.

    A row that is too long is left out and counted, never cut: a cut row would lose its stop token.

    Args:
        rows: The conversations.
        tokenizer: The base model's, with its own chat template.
        max_length_tokens: Longest row that is kept.
        now: The date that the template writes, where it writes one; None is today.

    Raises:
        InvalidInput: The template is broken or refuses rows, or their answers can't be trained as they are
            served; names each by file and line.
        FailedPrecondition: The tokenizer can't say which characters a token is made of.
    """
    encoded, problems = try_rows(rows, tokenizer, max_length_tokens, now)
    if problems:
        raise refused_error(problems)
    return encoded


def refused_error(problems: Sequence[Problem]) -> InvalidInput:
    """Return the error that tells of rows that a base can't be trained on."""
    fix = "Change these rows or leave them out, or choose another base model."
    return problems_error(problems, "Nothing was trained.", fix)


def try_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length_tokens: int,
    now: datetime | None = None,
) -> tuple[EncodedRows, list[Problem]]:
    """Do as `encode_rows`, but return what is wrong with rows beside the others.

    Raises:
        BrokenTemplate: The template takes no row at all, or too long for one.
        FailedPrecondition: The tokenizer can't say which characters a token is made of.
    """
    if not tokenizer.is_fast:
        raise FailedPrecondition(
            "The base model's tokenizer has no tokenizer.json, so its tokens can't be found in the text.",
            fix="Choose a base with a tokenizer.json, or convert this one's tokenizer.",
            reason="TOKENIZER_UNSUPPORTED",
        )
    now = now or datetime.now()
    template, tokens = ChatTemplate(tokenizer, now), _Tokens(tokenizer)
    problems: list[Problem] = []
    groups: list[tuple[Row, list[Answer]]] = []
    excluded = 0
    for row in rows:
        try:
            answers = template.answers(row)
        except Refused as refused:
            problems.append(Problem(row.file, row.line, refused.message, refused.fix))
            continue
        excluded += sum(message.role == "assistant" and not message.trained for message in row.messages)
        groups += [(row, group) for group in _groups(answers)]

    kept: list[Encoded] = []
    too_long: set[str] = set()
    answers_too_long = 0
    done: list[Answer] = []
    for start in range(0, len(groups), _TEXTS_AT_ONCE):
        part = groups[start : start + _TEXTS_AT_ONCE]
        tokens.prepare([answer.prompt for _, group in part for answer in group])
        tokens.prepare([group[-1].prompt + group[-1].text for _, group in part])
        for row, group in part:
            try:
                made = _encode(row, group, template, tokens)
            except Refused as refused:
                problems.append(Problem(row.file, row.line, refused.message, refused.fix))
                continue
            for one, answers in made:
                if len(one) > max_length_tokens:
                    too_long.add(row.place)
                    answers_too_long += len(answers)
                else:
                    kept.append(one)
                    done += answers
        tokens.forget()
    encoded = EncodedRows(
        tuple(kept),
        rows_too_long=len(too_long),
        answers_too_long=answers_too_long,
        answers_excluded=excluded,
        stop_tokens_added=sum(not answer.stop for answer in done),
        answers_rewritten=sum(answer.rewritten for answer in done),
        answers_left_open=sum(answer.left_open for answer in done),
        rendered_at=now if template.dated else None,
    )
    return encoded, problems


def _groups(answers: Sequence[Answer]) -> Iterator[list[Answer]]:
    """Yield answers of a conversation that one text holds, each behind its own prompt."""
    left = list(answers)
    while left:
        whole = left[-1].prompt + left[-1].text
        group = [
            answer for answer in left[:-1] if answer.stop and whole.startswith(answer.prompt + answer.text)
        ]
        yield [*group, left[-1]]
        left = [answer for answer in left[:-1] if answer not in group]


@dataclass(frozen=True)
class _Text:
    """A tokenized text: its token ids, and for each the character of the text behind its last one."""

    ids: list[int]
    ends: list[int]


class _Tokens:
    """Tokenizes as a runtime does: with the BOS that the tokenizer adds, once, whoever else writes it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added_bos = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
        self._known: dict[str, _Text] = {}

    def prepare(self, texts: Sequence[str]) -> None:
        """Tokenize many texts at once, which is faster."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if not new:
            return
        cut = [text.removeprefix(self._added_bos) for text in new]
        found: Any = self._tokenizer(cut, add_special_tokens=False, return_offsets_mapping=True)
        for text, rest, ids, offsets in zip(
            new, cut, found["input_ids"], found["offset_mapping"], strict=True
        ):
            before = len(text) - len(rest)
            ends = [before + end for _, end in offsets]
            if self._added_bos:
                ids, ends = [self._tokenizer.bos_token_id, *ids], [before, *ends]
            self._known[text] = _Text(ids, ends)

    def forget(self) -> None:
        """Let go of all that was tokenized."""
        self._known.clear()

    def of(self, text: str) -> _Text:
        """Return a whole text's tokens."""
        self.prepare([text])
        return self._known[text]

    def of_piece(self, text: str) -> list[int]:
        """Return the tokens of a text that is no beginning."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def written(self, ids: Sequence[int]) -> str:
        """Return what tokens write."""
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    @property
    def eos(self) -> int:
        """Id of the end-of-sequence token."""
        return int(self._tokenizer.eos_token_id)


def _encode(
    row: Row, group: Sequence[Answer], template: ChatTemplate, tokens: _Tokens
) -> list[tuple[Encoded, list[Answer]]]:
    """Return answers as one row where that trains what is served, else as a row each.

    Raises:
        Refused: There are no tokens for an answer behind its prompt's.
    """
    text = tokens.of(group[-1].prompt + group[-1].text)
    labels = [IGNORED] * len(text.ids)
    turns: list[Turn] = []
    together: list[Answer] = []
    apart: list[tuple[Encoded, list[Answer]]] = []
    length = 0
    for answer in group:
        prompt = tokens.of(answer.prompt).ids
        end = len(answer.prompt) + len(answer.text)
        last = next((index for index, until in enumerate(text.ends) if until >= end), -1)
        stop = template.stops.get(answer.stop, -1)
        if (
            answer.stop
            and text.ids[: len(prompt)] == prompt
            and last >= len(prompt)
            and text.ids[last] == stop
        ):
            labels[len(prompt) : last + 1] = text.ids[len(prompt) : last + 1]
            turns.append(Turn(answer.messages, len(prompt), stop))
            together.append(answer)
            length = last + 1
        else:
            apart.append((_apart(row, answer, template, tokens), [answer]))
    if turns:
        whole = Encoded(tuple(text.ids[:length]), tuple(labels[:length]), tuple(turns), row)
        apart.append((whole, together))
    return apart


def _apart(row: Row, answer: Answer, template: ChatTemplate, tokens: _Tokens) -> Encoded:
    """Return an answer's tokens behind those of its prompt, as a served model would have to write them."""
    prompt = tokens.of(answer.prompt)
    whole = tokens.of(answer.prompt + answer.text)
    wanted = tokens.written(whole.ids)
    for ids in _continuations(answer, whole, tokens):
        if ids and tokens.written([*prompt.ids, *ids]) == wanted:
            stop = template.stops[answer.stop] if answer.stop else tokens.eos
            ids = ids if answer.stop else [*ids, stop]
            if ids[-1] != stop:
                continue
            turn = Turn(answer.messages, len(prompt.ids), stop)
            labels = [*[IGNORED] * len(prompt.ids), *ids]
            return Encoded((*prompt.ids, *ids), tuple(labels), (turn,), row)
    raise Refused(
        f"message {answer.messages + 1} has no tokens that a model could write behind its prompt",
        "begin the answer with a letter, or leave the row out",
    )


def _continuations(answer: Answer, whole: _Text, tokens: _Tokens) -> Iterator[list[int]]:
    """Yield token ids that may be the answer's: cut from the whole text, alone, or behind a line break."""
    border = len(answer.prompt)
    cut = sum(end <= border for end in whole.ends)
    yield whole.ids[cut:]
    yield tokens.of_piece(answer.text)
    line_break = tokens.of_piece("\n")
    behind = tokens.of_piece("\n" + answer.text)
    if behind[: len(line_break)] == line_break:
        yield behind[len(line_break) :]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a runtime puts a BOS before every prompt.

    It goes by what llama.cpp's converter writes into the GGUF: the tokenizer's post-processor, else
    `add_bos_token`, else the kind of vocabulary. Transformers itself may add none in spite of it.
    """
    if tokenizer.bos_token_id is None:
        return False
    folder = Path(tokenizer.name_or_path)
    try:
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ids: list[int] = tokenizer("a")["input_ids"]
        return ids[:1] == [tokenizer.bos_token_id]
    post = data.get("post_processor") or {}
    said: bool | None = None
    for processor in post.get("processors", [post]):
        if processor.get("type") == "ByteLevel" and said is None:
            said = False
        elif processor.get("type") == "TemplateProcessing":
            first = (processor.get("single") or [{}])[0].get("SpecialToken", {}).get("id")
            said = first == tokenizer.bos_token if first else said
    if said is None and isinstance(config.get("add_bos_token"), bool):
        said = config["add_bos_token"]
    if said is None:
        said = bool(data.get("model", {}).get("byte_fallback")) or (folder / "tokenizer.model").is_file()
    return said
