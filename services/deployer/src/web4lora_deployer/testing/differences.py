"""Why two models' greedy answers to the same prompt differ, as far as that can be told.

Two runtimes that serve the same file should say the same. Where they don't, the prompt may have been read
differently, or ended differently; else the first token that differs is looked at: llama-server is asked how
likely it and its rival are. Where they are nearly as likely, the order in which floats are added up decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
from web4lora_chassis.errors import Unavailable
from web4lora_chassis.graders.check import shorten
from web4lora_llamacpp import LlamaCpp, LlamaServer

from web4lora_deployer.report import Comparison, Difference, Measured
from web4lora_deployer.suite import Answer, Prompt, Suite

_LOAD_SECONDS = 900.0
_CALL_SECONDS = 300.0
_TOP_TOKENS = 20
_NEAR_TIE = 0.5
"""Two tokens are a near tie when the less likely one has at least this share of the other's probability.

One and the same llama-server, asked four at once in another order, took either of such tokens (SmolLM2-135M,
Q4_K_M, on a CPU): which requests share a batch changes the sums that much.
"""

Render = Callable[[Sequence[Mapping[str, str]]], str]


class Probe:
    """A llama-server of our own on the file, asked one thing at a time.

    Args:
        llama: The tools.
        file: The GGUF.
        context_tokens: Of the runtimes that are compared.
        log_file: Where its output goes.
    """

    def __init__(self, llama: LlamaCpp, file: Path, context_tokens: int, log_file: Path) -> None:
        self._server = LlamaServer(llama, file, context_tokens=context_tokens, parallel=1, log_file=log_file)

    def __enter__(self) -> Self:
        """Start it and wait until it answers."""
        self._server.start()
        self._server.wait_ready(_LOAD_SECONDS)
        base = self._server.endpoint.removesuffix("/v1")
        self._http = httpx2.Client(base_url=base, timeout=_CALL_SECONDS, trust_env=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self._http.close()
        self._server.stop()

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt that the file's own template makes of a conversation."""
        return str(self._ask("/apply-template", {"messages": [dict(m) for m in messages]})["prompt"])

    def tokens(self, text: str, *, prompt: bool) -> list[int]:
        """Return a text's token ids; a prompt's with its special tokens and BOS."""
        body = {"content": text, "add_special": prompt, "parse_special": prompt}
        return [int(token) for token in self._ask("/tokenize", body)["tokens"]]

    def next_tokens(self, tokens: Sequence[int]) -> dict[int, tuple[str, float]]:
        """Return the likeliest tokens behind others: text, and natural logarithm of the probability."""
        # A part of a sign that is chosen comes without probabilities, so a letter is; they stay as they are.
        body = {
            "prompt": list(tokens), "n_predict": 1, "n_probs": _TOP_TOKENS, "temperature": 0,
            "cache_prompt": False, "logit_bias": [["a", 100]],
        }  # fmt: skip
        found = self._ask("/completion", body)["completion_probabilities"][0]["top_logprobs"]
        return {int(each["id"]): (str(each["token"]), float(each["logprob"])) for each in found}

    def _ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            answer = self._http.post(path, json=dict(body))
            answer.raise_for_status()
        except httpx2.HTTPError as error:
            raise Unavailable(f"llama-server, asked why answers differ, failed: {error}") from error
        data: dict[str, Any] = answer.json()
        return data


@dataclass(frozen=True)
class Side:
    """One of the models that are compared.

    Attributes:
        measured: Its answers.
        render: Returns the prompt that its runtime makes of a conversation; None where it doesn't tell.
    """

    measured: Measured
    render: Render | None = None


def compare_answers(suite: Suite, one: Side, other: Side, probe: Callable[[], Probe] | None) -> Comparison:
    """Find the prompts that two models answered differently, and say why.

    Args:
        suite: What they were asked.
        one: The deployed model.
        other: Whom it is compared with.
        probe: Makes a server on the file that both serve; None when it is not at hand. Not called when
            nothing differs, or when they serve other bytes: then other words are no wonder.

    Returns:
        The comparison.

    Raises:
        Unavailable: The probe's server failed.
    """
    left, right = one.measured.model.digest, other.measured.model.digest
    same_file = left == right if left and right else None
    answers = zip(suite.prompts, one.measured.result.answers, other.measured.result.answers, strict=True)
    differing = [(prompt, a, b) for prompt, a, b in answers if a.reply.text != b.reply.text]
    names = (one.measured.model.label, other.measured.model.label)
    if not differing or not same_file or probe is None:
        found = [_difference(prompt, a, b, _plain_cause(a, b, names)) for prompt, a, b in differing]
        return Comparison(other.measured, same_file, tuple(found))
    with probe() as server:
        found = [
            _difference(prompt, a, b, _cause(prompt, a, b, names, (one.render, other.render), server))
            for prompt, a, b in differing
        ]
    return Comparison(other.measured, same_file, tuple(found))


def _difference(prompt: Prompt, one: Answer, other: Answer, why: tuple[str, str]) -> Difference:
    cause, reason = why
    return Difference(prompt.id, prompt.core, cause, reason, one.reply.text, other.reply.text)


def _plain_cause(one: Answer, other: Answer, names: tuple[str, str]) -> tuple[str, str]:
    """Tell what the answers alone say: cause and reason."""
    a, b = one.reply, other.reply
    for name, reply in zip(names, (a, b), strict=True):
        if reply.refused:
            return "refused", f"{name} refused it: {reply.refused}"
    if a.prompt_tokens and b.prompt_tokens and a.prompt_tokens != b.prompt_tokens:
        reason = (
            f"{names[0]} read {a.prompt_tokens} tokens, {names[1]} {b.prompt_tokens}: they make another "
            "prompt of the conversation"
        )
        one_more = abs(a.prompt_tokens - b.prompt_tokens) == 1
        return "prompt", f"{reason}, as when BOS is added twice" if one_more else reason
    if a.text.startswith(b.text) or b.text.startswith(a.text):
        ends = [
            f'{name} after {reply.output_tokens} tokens ("{reply.finish_reason}")'
            for name, reply in zip(names, (a, b), strict=True)
        ]
        return "end", f"the same words, but ended elsewhere: {' and '.join(ends)}"
    place = _first_difference(a.text, b.text)
    behind = shorten(a.text[max(0, place - 30) : place], 40)
    return "text", f'from character {place + 1} on, behind "{behind}"'


def _cause(
    prompt: Prompt,
    one: Answer,
    other: Answer,
    names: tuple[str, str],
    renders: tuple[Render | None, Render | None],
    probe: Probe,
) -> tuple[str, str]:
    """Tell why, with a server on the same file at hand: cause and reason."""
    own = probe.render(prompt.messages)
    for name, render in zip(names, renders, strict=True):
        theirs = own if render is None else render(prompt.messages)
        # A BOS that one of them leaves to the tokenizer is none: the numbers of tokens tell of a doubled one.
        if not theirs.endswith(own) and not own.endswith(theirs):
            place = _first_difference(theirs, own)
            return "prompt", (
                f"{name} renders the conversation otherwise than the file's template from character "
                f'{place + 1} on: "{shorten(theirs[place:], 40)}" in place of "{shorten(own[place:], 40)}"'
            )
    cause, reason = _plain_cause(one, other, names)
    shorter = min(one.reply, other.reply, key=lambda reply: len(reply.text))
    if cause in ("refused", "prompt") or (cause == "end" and shorter.finish_reason == "length"):
        return cause, reason
    asked = probe.tokens(own, prompt=True)
    said = [probe.tokens(answer.reply.text, prompt=False) for answer in (one, other)]
    place = _first_difference(*said)
    likely = probe.next_tokens([*asked, *said[0][:place]])
    return _judge(said, place, likely, names, (cause, reason))


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the index of the first item that differs, or the length of the shorter one."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (x, y) in pairs if x != y), min(len(one), len(other)))


def _judge(
    said: Sequence[Sequence[int]],
    place: int,
    likely: Mapping[int, tuple[str, float]],
    names: tuple[str, str],
    plain: tuple[str, str],
) -> tuple[str, str]:
    """Weigh the first two tokens that differ."""
    rivals: list[tuple[str, float] | None] = []
    for tokens in said:
        if place < len(tokens):
            rivals.append(likely.get(tokens[place]))
        else:  # it ended here, which a token without a text does
            rivals.append(next((found for found in likely.values() if not found[0]), None))
    first, second = rivals
    if first is None or second is None:
        return "unexplained", f"{plain[1]}; token {place + 1} is not among the {_TOP_TOKENS} likeliest"
    shown = " and ".join(
        f"{name} took {_shown(token)} ({100 * math.exp(log):.1f} %)"
        for name, (token, log) in zip(names, (first, second), strict=True)
    )
    if math.exp(-abs(first[1] - second[1])) >= _NEAR_TIE:
        return (
            "rounding",
            f"at token {place + 1} of the answer {shown}: a near tie, which rounding decides",
        )
    return "unexplained", f"at token {place + 1} of the answer {shown}: rather unlike for rounding alone"


def _shown(token: str) -> str:
    """Return a token for people; those that end an answer have no text."""
    return f'"{token}"'.replace("\n", "⏎") if token else "its end"
