"""The limits that a verdict goes by, and whether they were kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from web4lora_chassis.errors import InvalidInput

from web4lora_deployer.suite.scores import Score
from web4lora_deployer.suite.spec import Suite
from web4lora_deployer.suite.statistics import prompts_to_settle


@dataclass(frozen=True)
class Budgets:
    """Limits; None sets no limit. See the contract's Budgets.

    Attributes:
        max_score_drop_points: Largest drop of a score from 16 bit to the deployed model.
        min_size_reduction: Smallest reduction of the file's size from 16 bit, 0 to 1.
        min_tokens_per_second: Slowest generation of one request.
        max_memory_bytes: Largest resident memory of the runtime.
        min_score_percent: Lowest score by name of the check.
    """

    max_score_drop_points: float | None = 2.0
    min_size_reduction: float | None = None
    min_tokens_per_second: float | None = None
    max_memory_bytes: int | None = None
    min_score_percent: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate:
    """One limit and whether it was kept; see the contract's Gate.

    Attributes:
        name: Name of the limit.
        limit: The limit in words.
        measured: What was measured, in words.
        passed: Whether it was kept.
        note: What the measurement can't tell.
        settled: False when the interval reaches to both sides of the limit.
    """

    name: str
    limit: str
    measured: str
    passed: bool
    note: str = ""
    settled: bool = True


@dataclass(frozen=True)
class Measurements:
    """What the limits other than scores are compared with; None where it was not measured."""

    size_reduction: float | None
    tokens_per_second: float | None
    memory_bytes: int | None


def check_budgets(suite: Suite, budgets: Budgets) -> None:
    """Refuse limits that this suite can't measure, before any model is started.

    Raises:
        InvalidInput: A score is unknown, or a limit is out of its range.
    """
    for name, percent in budgets.min_score_percent.items():
        if name not in suite.score_names:
            known = ", ".join(suite.score_names)
            raise InvalidInput(
                f'budgets.min_score_percent: the suite "{suite.name}" has no score "{name}".',
                fix=f"It has {known}.",
            )
        if not 0 <= percent <= 100:
            raise InvalidInput(f"budgets.min_score_percent: {name} is {percent:g}; it must be 0 to 100.")
    drop, size, speed = (
        budgets.max_score_drop_points,
        budgets.min_size_reduction,
        budgets.min_tokens_per_second,
    )
    if drop is not None and not 0 <= drop <= 100:
        raise InvalidInput(f"budgets.max_score_drop_points is {drop:g}; it must be 0 to 100.")
    if size is not None and not 0 <= size < 1:
        raise InvalidInput(f"budgets.min_size_reduction is {size:g}; it must be 0 to 1: 0.6 is 60 %.")
    if speed is not None and not 0 <= speed < float("inf"):
        raise InvalidInput(f"budgets.min_tokens_per_second is {speed:g}; it must not be negative.")
    if budgets.max_memory_bytes is not None and budgets.max_memory_bytes <= 0:
        raise InvalidInput("budgets.max_memory_bytes must be more than 0.")


def judge(scores: Sequence[Score], measured: Measurements, budgets: Budgets) -> tuple[Gate, ...]:
    """Compare what was measured with the limits.

    A drop fails when it is measured above its limit. When its interval reaches beyond, a note says that so
    few prompts can't settle it. A limit on something that was not measured is not kept.
    """
    return tuple(
        [
            *_drop_gates(scores, budgets),
            *_score_gates(scores, budgets),
            *_other_gates(measured, budgets),
        ]
    )


def verdict(gates: Sequence[Gate]) -> str:
    """Say in words how it went."""
    missed = [gate for gate in gates if not gate.passed]
    unsettled = [gate for gate in gates if not gate.settled]
    doubt = f"; so few prompts can't settle {len(unsettled)} of them" if unsettled else ""
    if not gates:
        return "measured, with no limits to keep"
    if not missed:
        return ("the one limit is kept" if len(gates) == 1 else f"all {len(gates)} limits kept") + doubt
    names = f" ({missed[0].name})" if len(missed) == 1 else ""
    head = "usable, " if all(not gate.settled for gate in missed) else ""
    count = "one" if len(missed) == 1 else str(len(missed))
    return f"{head}{count} of {len(gates)} limits missed{names}{doubt}"


def _drop_gates(scores: Sequence[Score], budgets: Budgets) -> Iterator[Gate]:
    limit = budgets.max_score_drop_points
    for score in scores:
        if limit is None or score.drop_points is None:
            continue
        low, high = score.drop_low_points or 0.0, score.drop_high_points or 0.0
        passed = score.drop_points <= limit + 1e-9
        settled = high <= limit if passed else low > limit
        yield Gate(
            name=f"score drop: {score.name}",
            limit=f"at most {limit:g} points",
            measured=f"{points(score.drop_points)} points ({points(low)} to {points(high)})",
            passed=passed,
            note="" if settled else _cannot_settle(score.prompts, limit, high),
            settled=settled,
        )


def _cannot_settle(prompts: int, limit: float, high: float) -> str:
    text = f"{prompts} prompts can't settle {limit:g} points: the interval reaches {points(high)}"
    if limit > 0 and prompts < (needed := prompts_to_settle(limit / 100)):
        text += f"; at least {needed} prompts are needed"
    return text


def _score_gates(scores: Sequence[Score], budgets: Budgets) -> Iterator[Gate]:
    by_name = {score.name: score for score in scores}
    for name, limit in budgets.min_score_percent.items():
        score = by_name.get(name)
        if score is None:
            yield Gate(f"score: {name}", f"at least {limit:g} %", "not measured", False)
            continue
        low, high = score.deployed_low_percent, score.deployed_high_percent
        passed = score.deployed_percent >= limit - 1e-9
        settled = low >= limit if passed else high < limit
        yield Gate(
            name=f"score: {name}",
            limit=f"at least {limit:g} %",
            measured=f"{score.deployed_percent:.1f} % ({low:.0f} to {high:.0f} %)",
            passed=passed,
            note="" if settled else f"{score.prompts} prompts can't settle {limit:g} %",
            settled=settled,
        )


def _other_gates(measured: Measurements, budgets: Budgets) -> Iterator[Gate]:
    if (limit := budgets.min_size_reduction) is not None:
        size = measured.size_reduction
        words = "not measured" if size is None else f"{100 * size:.1f} % smaller"
        passed = size is not None and size >= limit
        yield Gate("size reduction", f"at least {100 * limit:g} % smaller than 16 bit", words, passed)
    if (limit := budgets.min_tokens_per_second) is not None:
        speed = measured.tokens_per_second
        words = "not measured" if speed is None else f"{speed:.1f} tokens/s"
        passed = speed is not None and speed >= limit
        yield Gate("generation speed", f"at least {limit:g} tokens/s", words, passed)
    if budgets.max_memory_bytes is not None:
        memory = measured.memory_bytes
        words = "not measured" if memory is None else f"{memory / 1e9:.2f} GB"
        passed = memory is not None and memory <= budgets.max_memory_bytes
        yield Gate("memory", f"at most {budgets.max_memory_bytes / 1e9:g} GB", words, passed)


def points(value: float) -> str:
    """Write percentage points with one decimal and a proper minus sign; never "-0.0"."""
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "−")
