"""Which stage changed the model: how likely each next token of trained answers is, before and after it.

The answers are those that training kept, token by token as it had them: nothing is sampled, so two stages
are asked exactly the same. What Transformers and PEFT say is made by `expected`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import httpx2
from web4lora_chassis.errors import DataLoss
from web4lora_chassis.model_files.trained_conversations import TrainedConversations

TOP_TOKENS = 20
_ASKED_TOKENS = 100  # of llama-server: its likeliest may be others
_ANSWERS, _ANSWER_TOKENS, _ROW_TOKENS = 40, 16, 1024
_CALL_SECONDS = 600.0
_LEAST = 1e-9  # probability, where rounding leaves nothing

NEAR_TIE = 0.5
"""Two tokens are a near tie when the less likely one has at least this share of the other's probability."""
LIMIT = 0.1
"""Of the Kullback-Leibler divergence at any token, in nats, that converting to 16 bit may give."""

Likely = Mapping[int, float]
"""Natural logarithms of the likeliest tokens' probabilities, the likeliest first."""


@dataclass(frozen=True)
class Answer:
    """A trained answer, or its beginning.

    Attributes:
        id: File and line in the training data, and the turn where the line has several.
        tokens: Ids of prompt and answer.
        start: Number of them that are the prompt.
    """

    id: str
    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Said:
    """What a stage's model says of answers.

    Attributes:
        likely: For each answer, for each of its tokens: what was likely in its place.
        texts: Tokens' texts, as far as they are known.
    """

    likely: tuple[tuple[Likely, ...], ...]
    texts: Mapping[int, str]


@dataclass(frozen=True)
class Changed:
    """The first token of an answer for which another one is the likeliest after a stage.

    Attributes:
        id: The answer's.
        token: The token's number in the answer, from 1.
        before: The likeliest token's text before the stage.
        after: And after it.
        before_probability: Probability of `before` before the stage.
        after_probability: Probability of `after`, likewise before the stage.
        kl: Kullback-Leibler divergence there, in nats.
        near_tie: The stage had to choose between two that were nearly as likely.
    """

    id: str
    token: int
    before: str
    after: str
    before_probability: float
    after_probability: float
    kl: float
    near_tie: bool


@dataclass(frozen=True)
class Gate:
    """What a stage was held against; see the contract's StageGate."""

    stage: str
    name: str
    measured: str
    limit: str
    passed: bool = True
    answers: int = 0
    changed: tuple[Changed, ...] = ()


def kept_answers(kept: TrainedConversations) -> tuple[Answer, ...]:
    """Return the answers to ask about: beginnings of those that training kept, none in a very long row."""
    found = []
    for conversation in kept.conversations:
        for number, turn in enumerate(conversation.turns, 1):
            stop = conversation.labels.index(turn.stop_token, turn.prompt_tokens) + 1
            end = min(stop, turn.prompt_tokens + _ANSWER_TOKENS)
            if end > _ROW_TOKENS:
                continue
            name = f"{conversation.file}:{conversation.line}"
            name += f", turn {number}" if len(conversation.turns) > 1 else ""
            found.append(Answer(name, conversation.input_ids[:end], turn.prompt_tokens))
    return tuple(found[:_ANSWERS])


def ask_server(endpoint: str, answers: Iterable[Answer], name: str) -> Said:
    """Ask llama-server how likely each next token is, one after the other, as when it answers.

    Args:
        endpoint: Its address, with /v1.
        answers: What to ask about.
        name: The file's name, for messages.

    Raises:
        DataLoss: It does not answer.
    """
    likely, texts = [], dict[int, str]()
    with httpx2.Client(
        base_url=endpoint.removesuffix("/v1"), timeout=_CALL_SECONDS, trust_env=False
    ) as client:
        for answer in answers:
            row = []
            for end in range(answer.start, len(answer.tokens)):
                # Told only when the token chosen is no part of a sign: so it is a letter. No bias is in them.
                body = {
                    "prompt": answer.tokens[:end], "n_predict": 1, "n_probs": _ASKED_TOKENS, "temperature": 0,
                    "cache_prompt": True, "logit_bias": [["a", 100]],
                }  # fmt: skip
                try:
                    told = client.post("/completion", json=body)
                    told.raise_for_status()
                    found = told.json()["completion_probabilities"][0]["top_logprobs"]
                    row.append({int(each["id"]): float(each["logprob"]) for each in found})
                    texts |= {int(each["id"]): str(each["token"]) for each in found}
                except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                    raise DataLoss(
                        f"{name} failed its check: it loads, but does not tell how likely tokens are: "
                        f"{error!r}.",
                        fix="Package again.",
                        reason="GGUF_CHECK_FAILED",
                    ) from error
            likely.append(tuple(row))
    return Said(tuple(likely), texts)


def compare(
    stage: str, answers: Sequence[Answer], before: Said, after: Said, *, limit: float | None = None
) -> Gate:
    """Tell what a stage changed.

    Args:
        stage: Its name.
        answers: What both were asked about.
        before: What the model said before the stage.
        after: And after it.
        limit: Largest divergence allowed at any token, in nats; None allows any.
    """
    changed, divergences = [], []
    for answer, old, new in zip(answers, before.likely, after.likely, strict=True):
        places = [divergence(one, other) for one, other in zip(old, new, strict=True)]
        divergences += places
        odd = next((at for at in range(len(old)) if _first(old[at]) != _first(new[at])), None)
        if odd is not None:
            texts = {**before.texts, **after.texts}
            changed.append(_changed(answer, odd, old[odd], new[odd], places[odd], texts))
    mean = sum(divergences) / len(divergences)
    largest = max(divergences)
    return Gate(
        stage,
        "same next tokens",
        f"{len(changed)} of {len(answers)} answers change{_ties(changed)}; divergence {mean:.2g}, "
        f"at most {largest:.2g}",
        "none" if limit is None else f"divergence at most {limit:g} at any token",
        limit is None or largest <= limit,
        len(answers),
        tuple(changed),
    )


def divergence(before: Likely, after: Likely) -> float:
    """Return the Kullback-Leibler divergence in nats, the tokens that were not likely before taken as one.

    It is never above that of all tokens. One that is not told of after a stage counts as the least likely
    that is. It is infinite where a probability is no number.
    """
    tokens = list(before)[:TOP_TOKENS]
    least = min(after.values())
    p = [math.exp(before[token]) for token in tokens]
    q = [math.exp(after.get(token, least)) for token in tokens]
    p.append(max(_LEAST, 1 - sum(p)))
    q.append(max(_LEAST, 1 - sum(q)))
    pairs = zip(p, q, strict=True)
    total = sum(one * math.log(max(one, _LEAST) / max(other, _LEAST)) for one, other in pairs)
    return math.inf if math.isnan(sum(p) + sum(q)) else max(0.0, total)


def summary(gates: Iterable[Gate]) -> str:
    """Return in a line which stages changed answers."""
    compared = [gate for gate in gates if gate.answers]
    if not compared:
        return ""
    found = [
        f"{gate.stage}, {len(gate.changed)} of {gate.answers} answers{_ties(gate.changed)}"
        for gate in compared
        if gate.changed
    ]
    return (
        f"changed at: {'; '.join(found)}"
        if found
        else f"no stage changed any of {compared[0].answers} answers"
    )


def _first(likely: Likely) -> int:
    return max(likely, key=lambda token: likely[token])


def _changed(
    answer: Answer, at: int, old: Likely, new: Likely, kl: float, texts: Mapping[int, str]
) -> Changed:
    one, other = _first(old), _first(new)
    was = math.exp(old[one])
    rival = math.exp(old.get(other, min(old.values())))
    return Changed(
        answer.id, at + 1, texts.get(one) or f"token {one}", texts.get(other) or f"token {other}",
        was, rival, kl, rival >= NEAR_TIE * was,
    )  # fmt: skip


def _ties(changed: Sequence[Changed]) -> str:
    if not changed:
        return ""
    odd = [each.id for each in changed if not each.near_tie]
    return ", all near ties" + (f" but {', '.join(odd)}" if odd else "")
