"""What a suite is, once read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from web4lora_chassis.graders import ENDS, ENDS_TITLES, GRADERS
from web4lora_chassis.graders.style import StyleRules
from web4lora_chassis.graders.tool_call import CONSTRAINED_TITLES


@dataclass(frozen=True)
class Prompt:
    """One question with its check.

    Attributes:
        id: Unique in the suite.
        core: The core it belongs to.
        messages: What is sent: role and content.
        expected: The wanted answer; not sent.
        check: What its grader needs.
    """

    id: str
    core: str
    messages: tuple[Mapping[str, str], ...]
    expected: str
    check: Mapping[str, Any]

    @property
    def question(self) -> str:
        """The last thing the user says."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


@dataclass(frozen=True)
class Core:
    """A skill under test.

    Attributes:
        name: As the prompts call it.
        title: For people.
        grader: One of `GRADERS`.
        max_tokens: Where an answer is cut off.
        rules: Of the style grader.
        json_schema: Asked once more with answers held to this schema, and scored apart; None doesn't.
    """

    name: str
    title: str
    grader: str
    max_tokens: int
    rules: StyleRules
    json_schema: Mapping[str, Any] | None = None

    @property
    def titles(self) -> Mapping[str, str]:
        """The scores that it yields: name and title."""
        titles = GRADERS[self.grader].titles
        return titles if self.json_schema is None else {**titles, **CONSTRAINED_TITLES}


@dataclass(frozen=True)
class LatencySpec:
    """How speed is measured.

    Attributes:
        requests_at_once: Each is a measurement of its own.
        requests: Requests of each measurement.
        max_tokens: Longest answer.
    """

    requests_at_once: tuple[int, ...]
    requests: int
    max_tokens: int


@dataclass(frozen=True)
class RobustnessSpec:
    """Which odd prompts are sent.

    Attributes:
        long_prompt_percent: How much of the context a long prompt fills; 0 sends none.
        unicode: Whether prompts with scripts, signs and emoji of all kinds are sent.
        max_tokens: Where an answer is cut off.
    """

    long_prompt_percent: int
    unicode: bool
    max_tokens: int


@dataclass(frozen=True)
class Suite:
    """Prompts with checks.

    Attributes:
        name: Its name.
        seed: Sent with each request.
        timeout_seconds: Longest wait for the next piece of an answer.
        cores: The skills.
        prompts: All prompts, in the order of the files.
        latency: How speed is measured; None measures none.
        robustness: Which odd prompts are sent; None sends none.
        digest: SHA-256 over all its files: equal digests mean the same questions and checks.
        repeats: How often each prompt is asked.
        llama_bench: Whether the speed reached is compared with what llama-bench reaches on the same file.
    """

    name: str
    seed: int
    timeout_seconds: float
    cores: tuple[Core, ...]
    prompts: tuple[Prompt, ...]
    latency: LatencySpec | None
    robustness: RobustnessSpec | None
    digest: str
    repeats: int = 1
    llama_bench: bool = False

    def core(self, name: str) -> Core:
        """Return a core by name."""
        return next(core for core in self.cores if core.name == name)

    @property
    def score_titles(self) -> dict[str, str]:
        """The scores that the suite yields, in order: name and title."""
        titles: dict[str, str] = {}
        for core in self.cores:
            titles.update(core.titles)
        titles.update(ENDS_TITLES)
        return titles

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the scores, the ones that a limit may name."""
        return tuple(self.score_titles)

    def core_of_score(self, name: str) -> Core | None:
        """The core that a score is about; None for the one about all answers."""
        if name == ENDS:
            return None
        return next(core for core in self.cores if core.titles.get(name))
