"""Compares the ids that training uses with those that llama.cpp's own tokenizer gives, before training.

Neither side shares code with the other: training's come from Hugging Face's tokenizer, these from
llama-tokenize on the GGUF that the converter makes. Whatever the reason for a difference, a served model
would read other tokens than it was trained on.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from web4lora_chassis import process
from web4lora_chassis.dataset import Problem
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.model_files.trained_conversations import IGNORED

from web4lora_trainer.encoding import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TEXTS = 16
"""Each costs a start of llama-tokenize: it reads the vocabulary anew."""
_TIMEOUT_SECONDS = 300.0
_CONTEXT = 24
_END = re.compile(r"EOG token\s+= (\d+) ")
_LAST_OF_VOCABULARY = "max token length"
_EATEN = "and eaten by the base's tokenizer"


@dataclass(frozen=True)
class TrainedText:
    """A text as training reads it.

    Attributes:
        place: Its row, as file:line.
        text: What a server renders for it: the conversation so far, by the chat template.
        ids: The tokens that training uses for it.
    """

    place: str
    text: str
    ids: tuple[int, ...]


Tokenize = Callable[[str], list[int]]


def llama_tokenize(program: Path, gguf: Path) -> Tokenize:
    """Return what tokenizes a text as llama-server does: special tokens parsed, BOS as the GGUF says."""

    def tokenize(text: str) -> list[int]:
        command: list[str | Path] = [
            program, "-m", gguf, "--stdin", "--ids", "--no-escape", "--log-disable",
        ]  # fmt: skip
        with tempfile.TemporaryFile() as given:
            given.write(text.encode("utf-8"))
            given.seek(0)
            child = process.start(command, stdin=given, stderr=subprocess.DEVNULL, env={"LC_ALL": "C.UTF-8"})
            try:
                output, _ = child.communicate(timeout=_TIMEOUT_SECONDS)
            finally:
                child.kill()
        try:
            ids = json.loads(output.decode("utf-8").strip().splitlines()[-1])
        except (ValueError, IndexError) as error:
            raise FailedPrecondition(
                f"llama.cpp can't load this base model's tokenizer (exit code {child.returncode}).",
                fix="Take tokenizer.json as the model's makers publish it, or choose another base model.",
                reason="BASE_NOT_CONVERTIBLE",
                metadata={"field": "base.model"},
            ) from error
        return [int(number) for number in ids]

    return tokenize


def llama_ends(program: Path, gguf: Path) -> frozenset[int]:
    """Return the tokens at which llama.cpp ends every answer: eos, and what it takes for one by its name.

    They are in the log alone, and a thread writes that which the program doesn't wait for at its end. So it
    is read while the program waits for its input, up to the vocabulary's last line.

    Raises:
        FailedPrecondition: That line never came: the ends are not known, which is not the same as none.
    """
    command: list[str | Path] = [program, "-m", gguf, "--stdin", "--ids", "--verbosity", "4"]
    child = process.start(command, stdin=subprocess.PIPE, env={"LC_ALL": "C.UTF-8"})
    limit = threading.Timer(_TIMEOUT_SECONDS, child.kill)
    limit.start()
    ends: set[int] = set()
    try:
        for line in child.stdout or ():
            text = line.decode("utf-8", errors="replace")
            ends.update(int(number) for number in _END.findall(text))
            if _LAST_OF_VOCABULARY in text:
                return frozenset(ends)
    finally:
        limit.cancel()
        child.kill()
        child.communicate()
    raise FailedPrecondition(
        "llama.cpp does not say at which tokens it ends answers.",
        fix="Take tokenizer.json as the model's makers publish it, or choose another base model.",
        reason="BASE_NOT_CONVERTIBLE",
        metadata={"field": "base.model"},
    )


def cut_answers(
    rows: Sequence[Encoded], ends: Collection[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Problem]:
    """Yield the trained answers that hold, before their end, a token at which llama.cpp would end them."""
    for row in rows:
        for turn in row.turns:
            behind = itertools.takewhile(lambda label: label != IGNORED, row.labels[turn.prompt_tokens :])
            found = next((token for token in list(behind)[:-1] if token in ends), None)
            if found is not None and row.row is not None:
                yield Problem(
                    row.row.file,
                    row.row.line,
                    f"message {turn.messages + 1} holds {tokenizer.convert_ids_to_tokens(found)}, at which a "
                    "served model ends its answer: it would stop there",
                    "remove it",
                )


def compare_tokens(
    texts: Sequence[TrainedText], tokenize: Tokenize, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Compare texts as trained with their tokens by llama.cpp.

    Args:
        texts: What to compare; at most `MOST_TEXTS` of them are, spread over all.
        tokenize: Gives llama.cpp's tokens of a text.
        tokenizer: The base's, to put tokens into words.

    Returns:
        One line on what was compared.

    Raises:
        FailedPrecondition: There is nothing to compare, or the first text that differs is named.
    """
    chosen = texts[:: -(-len(texts) // MOST_TEXTS)] if texts else ()
    if not chosen:
        raise FailedPrecondition(
            "There is no conversation to compare training's tokens with llama.cpp's on.",
            fix="Add rows that the chat template can render.",
            reason="NOTHING_COMPARED",
        )
    bos = str(tokenizer.bos_token or "")
    adds_bos = bos != "" and tokenize("")[:1] == [tokenizer.bos_token_id]
    # llama-server takes away the BOS that the template writes, where it adds one itself.
    given = [text.text.removeprefix(bos) if adds_bos else text.text for text in chosen]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for text, served in zip(chosen, pool.map(tokenize, given), strict=True):
            if served != list(text.ids):
                raise _differs(text, served, tokenizer)
    rows = len({text.place for text in chosen})
    return f"llama.cpp reads the tokens that training uses: {rows} rows, {len(chosen)} texts compared"


def _differs(text: TrainedText, served: list[int], tokenizer: PreTrainedTokenizerBase) -> FailedPrecondition:
    """Name the first token that differs."""
    trained = list(text.ids)
    at = next(
        (number for number, pair in enumerate(zip(trained, served, strict=False)) if pair[0] != pair[1]),
        min(len(trained), len(served)),
    )
    before = tokenizer.decode(trained[max(0, at - 3) : at])
    words = (
        f"{text.place}: {len(trained)} tokens are trained where llama.cpp reads {len(served)}; the first "
        f"that differs is number {at + 1}, behind {str(before)[-_CONTEXT:]!r}: "
        f"{_word(trained, at, tokenizer)} in training, {_word(served, at, tokenizer)} when served. "
        f"{_why(trained, served, at, tokenizer)}"
    )
    return FailedPrecondition(
        words.strip(),
        fix="Take the tokenizer's files as the model's makers publish them, or choose another base model: "
        "what is served must be what was trained.",
        reason="TOKENS_DIFFER",
        metadata={"field": "base.model"},
    )


def _word(ids: Sequence[int], at: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a token as text with its id."""
    if at >= len(ids):
        return "nothing"
    return f"{tokenizer.convert_ids_to_tokens(ids[at])!r} ({ids[at]})"


def _why(trained: list[int], served: list[int], at: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Guess the reason of a difference, where it is one of the known kinds."""
    bos = tokenizer.bos_token_id
    if bos is not None and served == [bos, *trained]:
        return f"llama.cpp puts {tokenizer.bos_token} in front, as add_bos_token says; training does not."
    if bos is not None and trained == [bos, *served]:
        return f"Training puts {tokenizer.bos_token} in front; llama.cpp does not."
    added = tokenizer.added_tokens_decoder
    behind = added.get(trained[at - 1]) if at else None
    ahead = added.get(trained[at]) if at < len(trained) else None
    if behind is not None and behind.rstrip and at < len(served):
        blank = tokenizer.decode([served[at]])
        if not str(blank).strip():
            return f"{str(blank)!r} after {behind.content} is kept by llama.cpp, {_EATEN} (rstrip)."
    if ahead is not None and ahead.lstrip:
        return f"Blanks before {ahead.content} are kept by llama.cpp, {_EATEN} (lstrip)."
    return ""
