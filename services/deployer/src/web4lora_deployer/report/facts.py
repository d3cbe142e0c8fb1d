"""What a report is made from, and what the caller gets back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from web4lora_deployer.report.advice import advice
from web4lora_deployer.report.marks import visible
from web4lora_deployer.suite import (
    Answer,
    Budgets,
    Gate,
    Latency,
    Measurements,
    Score,
    State,
    Suite,
    SuiteResult,
    judge,
    score_suite,
    state_of,
    verdict,
)

_SAMPLE_CHARACTERS = 2000


@dataclass(frozen=True)
class ServedModel:
    """A model under test. What is empty or 0 is unknown and left out of the report.

    Attributes:
        label: Heads its column: "Q4_K_M", "16 bit", "base".
        id: Its immutable name, for example "web4-demo:v1a2b3c4d".
        digest: Of the GGUF.
        size_bytes: Of the GGUF.
        target: The runtime: "llama-server".
        endpoint: Address of its API.
        runtime_version: Version of the runtime.
        context_tokens: Longest prompt and answer together.
        parallel: Requests that the runtime answers at once.
    """

    label: str
    id: str = ""
    digest: str = ""
    size_bytes: int = 0
    target: str = ""
    endpoint: str = ""
    runtime_version: str = ""
    context_tokens: int = 0
    parallel: int = 0


@dataclass(frozen=True)
class Measured:
    """A model and what the suite found."""

    model: ServedModel
    result: SuiteResult


@dataclass(frozen=True)
class SpeedLimit:
    """What llama-bench reaches on the deployed model's file, one request after the other.

    Attributes:
        prompt_tokens: Length of its prompts, the suite's mean.
        answer_tokens: Length of its answers, the suite's mean.
        answer_tokens_per_second: Speed of answers alone.
        all_tokens_per_second: Speed of prompts and answers together.
        threads: That it used.
    """

    prompt_tokens: int
    answer_tokens: int
    answer_tokens_per_second: float
    all_tokens_per_second: float
    threads: int


@dataclass(frozen=True)
class Difference:
    """A prompt that two models answered differently.

    Attributes:
        id: The prompt's.
        core: Its core.
        cause: One of `CAUSES`.
        reason: Why, as far as can be told, for people.
        text: The deployed model's answer.
        other_text: The other one's.
    """

    id: str
    core: str
    cause: str
    reason: str
    text: str
    other_text: str


CAUSES: Mapping[str, str] = {
    "prompt": "another prompt was read: template, BOS or context",
    "refused": "a server refused the prompt",
    "end": "the same words, but one answer ended earlier",
    "rounding": "a near tie, decided by rounding",
    "unexplained": "hardly rounding alone; a suite with `repeats` tells whether one server wavers as much",
    "text": "other words",
}


@dataclass(frozen=True)
class Comparison:
    """The deployed model's answers beside those of another model.

    Attributes:
        other: The other model.
        same_file: Whether both serve the same bytes; None when that is unknown.
        differences: The prompts that were answered differently, in the suite's order.
    """

    other: Measured
    same_file: bool | None
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class ReportFacts:
    """What a report is made from.

    Attributes:
        name: Name of the report: what people call the model.
        suite: The prompts.
        deployed: The model that was deployed.
        reference: The 16-bit model that drops are measured from.
        base: The untrained base model.
        budgets: The limits.
        run: run.json: facts of the run so far; every key is optional.
        previous: eval.json of the last time.
        measured_at: When; now when absent.
        speed_limit: What llama-bench reaches on the deployed model's file; None when it was not measured.
        with_diagram: Whether the pipeline is drawn; a model that no run made has none.
        comparisons: Answers compared one by one with those of other models; the first one is `reference`.
    """

    name: str
    suite: Suite
    deployed: Measured
    reference: Measured | None = None
    base: Measured | None = None
    budgets: Budgets = field(default_factory=Budgets)
    run: Mapping[str, Any] = field(default_factory=dict)
    previous: Mapping[str, Any] | None = None
    measured_at: datetime | None = None
    speed_limit: SpeedLimit | None = None
    with_diagram: bool = True
    comparisons: tuple[Comparison, ...] = ()

    @property
    def models(self) -> dict[str, Measured]:
        """The models by role, in the order of columns: base, reference, deployed."""
        roles = {"base": self.base, "reference": self.reference, "deployed": self.deployed}
        return {role: measured for role, measured in roles.items() if measured}

    @property
    def all_models(self) -> tuple[Measured, ...]:
        """The models and those that answers alone were compared with."""
        known = tuple(self.models.values())
        others = (comparison.other for comparison in self.comparisons)
        return known + tuple(other for other in others if other not in known)

    @property
    def reference_label(self) -> str:
        """What drops are measured from, in words."""
        return self.reference.model.label if self.reference else "16 bit"

    @property
    def size_reduction(self) -> float | None:
        """How much smaller the deployed file is than the 16-bit one, 0 to 1; None when a size is unknown."""
        before = self.reference.model.size_bytes if self.reference else 0
        before = before or int(fact(self.run, "package", "reference", "size_bytes") or 0)
        now = self.deployed.model.size_bytes
        return 1 - now / before if before and now else None


@dataclass(frozen=True)
class Sample:
    """A prompt and the answer of the deployed model; see the contract's Sample."""

    core: str
    prompt: str
    answer: str
    passed: bool


@dataclass(frozen=True)
class VerifySummary:
    """What a report says, for the caller; see the contract's VerifyResult.

    Attributes:
        scores: Scores by check.
        gates: Limits.
        state: Of all limits together.
        verdict: The verdict in words.
        time_to_first_token_seconds: Median, one request at a time; 0 when not measured.
        tokens_per_second: Median of one request at a time; 0 when not measured.
        memory_bytes: Of the runtime under test; 0 when unknown.
        samples: The first prompt of each core with its answer.
        advice: What to do about limits that were missed or are undecided, a sentence each.
        files: What was written.
    """

    scores: tuple[Score, ...]
    gates: tuple[Gate, ...]
    state: State
    verdict: str
    time_to_first_token_seconds: float
    tokens_per_second: float
    memory_bytes: int
    samples: tuple[Sample, ...]
    advice: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every limit was shown to be kept."""
        return self.state is State.PASSED

    def gates_that(self, state: State) -> tuple[Gate, ...]:
        """Return the limits that came out so."""
        return tuple(gate for gate in self.gates if gate.state is state)


def summarize(facts: ReportFacts) -> VerifySummary:
    """Score the answers and hold everything against the limits."""
    deployed = facts.deployed.result
    reference = facts.reference.result if facts.reference else None
    base = facts.base.result if facts.base else None
    scores = score_suite(facts.suite, deployed, reference, base)
    alone = single_latency(deployed)
    speed = alone.tokens_per_second if alone else None
    measured = Measurements(facts.size_reduction, speed, deployed.memory_bytes or None)
    gates = judge(scores, measured, facts.budgets)
    return VerifySummary(
        scores=scores,
        gates=gates,
        state=state_of(gates),
        verdict=verdict(gates),
        time_to_first_token_seconds=alone.first_token_seconds if alone else 0.0,
        tokens_per_second=speed or 0.0,
        memory_bytes=deployed.memory_bytes,
        samples=tuple(_samples(facts.suite, deployed)),
        advice=advice(scores, gates, facts.budgets, "" if facts.with_diagram else facts.reference_label),
    )


def single_latency(result: SuiteResult) -> Latency | None:
    """Return the speed with the fewest requests at once."""
    return min(result.latency, key=lambda latency: latency.requests_at_once, default=None)


def fact(run: Mapping[str, Any], *path: str) -> Any:
    """Look a fact of the run up; None when it, or something on the way, is missing."""
    value: Any = run
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _samples(suite: Suite, result: SuiteResult) -> list[Sample]:
    # The first prompt of the file, whether it passed or not: choosing would flatter the model.
    by_id: dict[str, Answer] = {answer.id: answer for answer in result.answers}
    samples = []
    for core in suite.cores:
        prompt = next(prompt for prompt in suite.prompts if prompt.core == core.name)
        answer = by_id[prompt.id]
        question, text = _shown(prompt.question), _shown(answer.reply.text)
        samples.append(Sample(core.name, question, text, answer.passed))
    return samples


def _shown(text: str) -> str:
    """Return a text as a terminal may show it, its beginning when it is long."""
    head = visible(text.strip()[:_SAMPLE_CHARACTERS])
    return head if len(text.strip()) <= _SAMPLE_CHARACTERS else f"{head} …"
