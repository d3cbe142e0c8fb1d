"""How fast the suite went, beside what llama-bench reaches on the same file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from web4lora_deployer.report import words
from web4lora_deployer.report.facts import Measured, ReportFacts, SpeedLimit
from web4lora_deployer.report.marks import plain, table


@dataclass(frozen=True)
class Throughput:
    """How fast a model went through a suite.

    Attributes:
        requests_at_once: Requests under way at once.
        prompts: Requests sent.
        prompt_tokens: Tokens of all prompts; 0 when the server doesn't tell.
        cached_tokens: Those of them that were not read anew; None when the server doesn't tell.
        answer_tokens: Tokens of all answers.
        seconds: Time from the first request to the end of the last answer.
        limit: What llama-bench reaches on the same file; None when that was not measured or is another file.
    """

    requests_at_once: int
    prompts: int
    prompt_tokens: int
    cached_tokens: int | None
    answer_tokens: int
    seconds: float
    limit: SpeedLimit | None

    @property
    def answer_tokens_per_second(self) -> float:
        """Tokens of answers by the whole time, reading the prompts included."""
        return self.answer_tokens / self.seconds

    @property
    def all_tokens_per_second(self) -> float:
        """Tokens of prompts and answers by the whole time."""
        return (self.prompt_tokens + self.answer_tokens) / self.seconds

    @property
    def answer_share(self) -> float | None:
        """Share of llama-bench's speed of answers; None without one."""
        return self.answer_tokens_per_second / self.limit.answer_tokens_per_second if self.limit else None

    @property
    def all_share(self) -> float | None:
        """Share of llama-bench's speed of prompts and answers; None without one."""
        if self.limit is None or not self.prompt_tokens:
            return None
        return self.all_tokens_per_second / self.limit.all_tokens_per_second

    def to_json(self) -> dict[str, Any]:
        """Return it for eval.json."""
        limit = self.limit
        return {
            "requests_at_once": self.requests_at_once,
            "prompts": self.prompts,
            "prompt_tokens": self.prompt_tokens or None,
            "cached_tokens": self.cached_tokens,
            "answer_tokens": self.answer_tokens,
            "seconds": round(self.seconds, 3),
            "answer_tokens_per_second": round(self.answer_tokens_per_second, 2),
            "all_tokens_per_second": round(self.all_tokens_per_second, 2),
            "llama_bench_answer_share": None if limit is None else self.answer_share,
            "llama_bench_all_share": None if limit is None else self.all_share,
        }


def throughput_of(facts: ReportFacts, measured: Measured) -> Throughput | None:
    """Return how fast a model went through the suite; None when no answer has a token."""
    result = measured.result
    replies = [answer.reply for answers in result.passes for answer in answers]
    if not result.seconds or not result.output_tokens:
        return None
    counts = [reply.cached_tokens for reply in replies]
    known = [count for count in counts if count is not None]
    same_file = measured.model.digest == facts.deployed.model.digest
    return Throughput(
        requests_at_once=result.parallel,
        prompts=len(replies),
        prompt_tokens=sum(reply.prompt_tokens for reply in replies),
        cached_tokens=sum(known) if len(known) == len(counts) else None,
        answer_tokens=result.output_tokens,
        seconds=result.seconds,
        limit=facts.speed_limit if same_file else None,
    )


def throughput(facts: ReportFacts) -> str:
    """Return the section in Markdown; "" when llama-bench was not run."""
    limit = facts.speed_limit
    if limit is None:
        return ""
    rows = []
    for measured in facts.all_models:
        found = throughput_of(facts, measured)
        if found is None or found.limit is None:
            continue
        cached = "not told" if found.cached_tokens is None else f"{found.cached_tokens:,}"
        rows.append(
            [
                plain(f"{measured.model.label} ({measured.model.target or 'endpoint'})"),
                str(found.requests_at_once),
                f"{found.prompts} in {words.duration(found.seconds)}",
                f"{found.prompt_tokens:,} ({cached})",
                f"{found.answer_tokens_per_second:.1f}",
                _share(found.answer_share),
                f"{found.all_tokens_per_second:.0f}",
                _share(found.all_share),
            ]
        )
    rows.append(
        [
            "llama-bench", "1", "–", f"{limit.prompt_tokens:,} each",
            f"{limit.answer_tokens_per_second:.1f}", "100 %", f"{limit.all_tokens_per_second:.0f}", "100 %",
        ]
    )  # fmt: skip
    head = ["model", "at once", "prompts", "prompt tokens (cached)"]
    head += ["answer tokens/s", "share", "all tokens/s", "share"]
    notes = (
        "The whole suite by the clock, reading the prompts included, beside llama-bench on the same file: "
        f"its answers alone ({limit.answer_tokens} tokens) in the first share, its prompts and answers "
        f"({limit.prompt_tokens} + {limit.answer_tokens} tokens, the suite's means) in the second, one "
        f"request after the other, {words.plural(limit.threads, 'thread')}. More than 100 % comes from "
        "requests answered in one batch, and from prompts' common beginnings, which a server reads once."
    )
    return f"## Throughput\n\n{table(head, rows)}\n\n{notes}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"
