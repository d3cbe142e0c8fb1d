"""What running a suite found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from web4lora_chassis.graders.check import Check


@dataclass(frozen=True)
class Reply:
    """What a server answered to one request.

    Attributes:
        text: The whole answer.
        finish_reason: "stop"; "length" when it was cut off at max_tokens, "time" when it took too long.
        prompt_tokens: Tokens of the prompt; 0 when the server doesn't tell.
        output_tokens: Tokens of the answer, thinking included.
        first_token_seconds: From sending the request to the first piece of the answer or of thinking.
        seconds: From sending the request to its end.
        tokens_per_second: Speed of generation; 0 when it can't be told.
        timed_by_server: Whether that speed is the server's own figure, else measured here.
        attempts: 1, and more when the request had to be repeated.
        refused: What the server said when it refused the request as such; then there is no answer.
        cached_tokens: Tokens of the prompt that the server had read before; None when it doesn't tell.
        thought_pieces: Pieces of thinking, which is no part of `text`.
    """

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    timed_by_server: bool = False
    attempts: int = 1
    refused: str = ""
    cached_tokens: int | None = None
    thought_pieces: int = 0


@dataclass(frozen=True)
class Answer:
    """A prompt's reply, graded."""

    id: str
    core: str
    reply: Reply
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether it passed all its checks."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class Latency:
    """Speed with so many requests at once.

    Attributes:
        requests_at_once: How many.
        requests: Requests measured.
        first_token_seconds: Median time to the first token, measured here.
        slowest_first_token_seconds: The longest of them.
        tokens_per_second: Median speed of one request.
        total_tokens_per_second: Tokens of all answers by the time from the first request to the last end.
        timed_by_server: Whether `tokens_per_second` is the server's own figure.
    """

    requests_at_once: int
    requests: int
    first_token_seconds: float
    slowest_first_token_seconds: float
    tokens_per_second: float
    total_tokens_per_second: float
    timed_by_server: bool


@dataclass(frozen=True)
class SuiteResult:
    """What running a suite found.

    Attributes:
        answers: One for each prompt, in the suite's order: what it answered first.
        repeats: The answers when the prompts were asked again, each time in the suite's order.
        constrained: Answers of which the server allowed only such as fit a schema; graded apart.
        robustness: Answers to the odd prompts; their core is "robustness".
        latency: One for each number of requests at once; empty when it wasn't measured.
        memory_bytes: Largest resident memory of the runtime seen meanwhile; 0 when unknown.
        seconds: How long the prompts took, without latency and odd prompts.
        parallel: Requests sent at once.
        notes: What was left out, and why.
    """

    answers: tuple[Answer, ...]
    robustness: tuple[Answer, ...] = ()
    latency: tuple[Latency, ...] = ()
    memory_bytes: int = 0
    seconds: float = 0.0
    parallel: int = 1
    notes: tuple[str, ...] = ()
    repeats: tuple[tuple[Answer, ...], ...] = ()
    constrained: tuple[Answer, ...] = ()

    @property
    def passes(self) -> tuple[tuple[Answer, ...], ...]:
        """The answers of each time that the prompts were asked, in order; `seconds` is for all."""
        return (self.answers, *self.repeats)

    @property
    def retries(self) -> int:
        """Requests that had to be repeated."""
        all_answers = (*(a for each in self.passes for a in each), *self.constrained, *self.robustness)
        return sum(answer.reply.attempts - 1 for answer in all_answers)

    @property
    def output_tokens(self) -> int:
        """Tokens of all answers that were given in `seconds`."""
        return sum(answer.reply.output_tokens for each in self.passes for answer in each)

    def outcomes(self, check: str) -> Mapping[str, float]:
        """Share of a prompt's answers that passed a check, by the prompt's id.

        Prompts without that check are absent. Each prompt is asked equally often; asked once, it is 0 or 1.
        """
        passed: dict[str, list[bool]] = {}
        for answer in (*(a for each in self.passes for a in each), *self.constrained):
            for each in answer.checks:
                if each.name == check:
                    passed.setdefault(answer.id, []).append(each.passed)
        return {id_: sum(all_) / len(all_) for id_, all_ in passed.items()}

    def repeats_of(self, check: str) -> int:
        """How often each prompt was asked for a check."""
        first = next((a for a in self.answers if any(c.name == check for c in a.checks)), None)
        return len(self.passes) if first else 1
