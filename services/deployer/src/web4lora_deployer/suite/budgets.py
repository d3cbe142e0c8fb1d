"""The limits that a verdict goes by, and whether they were kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from web4lora_chassis.errors import InvalidInput

from web4lora_deployer.suite.scores import Score
from web4lora_deployer.suite.spec import Suite
from web4lora_deployer.suite.statistics import prompts_for_drop, prompts_for_score

NOT_MEASURED = "not measured"
_TOLERANCE = 1e-7  # of percentage points: what floats add to a value that is exactly at its limit


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


class State(StrEnum):
    """How a limit, or all of them together, came out; the names of the contract's TestState."""

    PASSED = "PASSED"
    UNDECIDED = "UNDECIDED"
    FAILED = "FAILED"


@dataclass(frozen=True)
class Gate:
    """One limit and whether it was kept; see the contract's Gate.

    Attributes:
        name: Name of the limit.
        limit: The limit in words.
        measured: What was measured, in words.
        state: Passed, failed, or undecided: the interval reaches to both sides, or nothing was measured.
        note: Why it is undecided, and what would settle it.
        prompts_needed: How many prompts would settle it, if they go as those asked; 0: no number would.
    """

    name: str
    limit: str
    measured: str
    state: State
    note: str = ""
    prompts_needed: int = 0

    @property
    def passed(self) -> bool:
        """Whether the limit was shown to be kept."""
        return self.state is State.PASSED


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

    A score of few prompts is known within an interval only. The limit is passed when the whole interval keeps
    it, failed when the whole interval misses it, else undecided: by the measured value alone, two equally
    good models would differ as a coin falls. What was not measured is undecided too.
    """
    return tuple(
        [
            *_drop_gates(scores, budgets),
            *_score_gates(scores, budgets),
            *_other_gates(measured, budgets),
        ]
    )


def state_of(gates: Sequence[Gate]) -> State:
    """Return how all limits together came out: as the worst of them. Without limits nothing is missed."""
    states = {gate.state for gate in gates}
    return next((state for state in (State.FAILED, State.UNDECIDED) if state in states), State.PASSED)


def verdict(gates: Sequence[Gate]) -> str:
    """Say in words how it went."""
    if not gates:
        return "measured, with no limits to keep"
    kept, undecided, missed = (
        [gate for gate in gates if gate.state is state]
        for state in (State.PASSED, State.UNDECIDED, State.FAILED)
    )
    if len(kept) == len(gates):
        return (
            "passed: the one limit is kept"
            if len(gates) == 1
            else f"passed: all {len(gates)} limits are kept"
        )
    open_ = f"{len(undecided)} undecided" if undecided else ""
    if missed:
        names = f" ({missed[0].name})" if len(missed) == 1 else ""
        parts = [f"{len(missed)} of {len(gates)} limits missed{names}", f"{len(kept)} kept", open_]
        return f"failed: {', '.join(filter(None, parts))}"
    return f"undecided: no limit missed, {len(kept)} of {len(gates)} kept, {open_}"


def _drop_gates(scores: Sequence[Score], budgets: Budgets) -> Iterator[Gate]:
    limit = budgets.max_score_drop_points
    if limit is None:
        return
    words = f"at most {limit:g} points"
    if scores and all(score.drop_points is None for score in scores):
        note = "nothing to compare with was measured"
        yield Gate("score drop", words, NOT_MEASURED, State.UNDECIDED, note)
    for score in scores:
        if score.drop_points is None:
            continue
        low, high = score.drop_low_points or 0.0, score.drop_high_points or 0.0
        state = _state(high <= limit + _TOLERANCE, low > limit + _TOLERANCE)
        note, needed = "", 0
        if state is State.UNDECIDED:
            changed, drop = (score.changed_percent or 0.0) / 100, score.drop_points / 100
            needed = prompts_for_drop((changed + drop) / 2, (changed - drop) / 2, limit / 100) or 0
            note = _undecided(score.prompts, needed)
        yield Gate(
            name=f"score drop: {score.name}",
            limit=words,
            measured=f"{points(score.drop_points)} points ({points(low)} to {points(high)})",
            state=state,
            note=note,
            prompts_needed=needed,
        )


def _score_gates(scores: Sequence[Score], budgets: Budgets) -> Iterator[Gate]:
    by_name = {score.name: score for score in scores}
    for name, limit in budgets.min_score_percent.items():
        score = by_name.get(name)
        words = f"at least {limit:g} %"
        if score is None:
            yield Gate(f"score: {name}", words, NOT_MEASURED, State.UNDECIDED, "no prompt was checked for it")
            continue
        low, high = score.deployed_low_percent, score.deployed_high_percent
        state = _state(low >= limit - _TOLERANCE, high < limit - _TOLERANCE)
        note, needed = "", 0
        if state is State.UNDECIDED:
            needed = prompts_for_score(score.deployed_percent / 100, limit / 100) or 0
            note = _undecided(score.prompts, needed)
        yield Gate(
            name=f"score: {name}",
            limit=words,
            measured=f"{score.deployed_percent:.1f} % ({low:.0f} to {high:.0f} %)",
            state=state,
            note=note,
            prompts_needed=needed,
        )


def _state(kept: bool, missed: bool) -> State:
    return State.PASSED if kept else State.FAILED if missed else State.UNDECIDED


def _undecided(prompts: int, needed: int) -> str:
    if needed:
        return f"{prompts} prompts can't tell; about {max(needed, prompts + 1):,} that go the same way would"
    return f"{prompts} prompts can't tell, nor would more: it is right at the limit"


def _other_gates(measured: Measurements, budgets: Budgets) -> Iterator[Gate]:
    if (limit := budgets.min_size_reduction) is not None:
        size = measured.size_reduction
        wanted = f"at least {100 * limit:g} % smaller than 16 bit"
        text = None if size is None else f"{100 * size:.1f} % smaller"
        yield _plain_gate("size reduction", wanted, text, size is not None and size >= limit)
    if (limit := budgets.min_tokens_per_second) is not None:
        speed = measured.tokens_per_second
        text = None if speed is None else f"{speed:.1f} tokens/s"
        kept = speed is not None and speed >= limit
        yield _plain_gate("generation speed", f"at least {limit:g} tokens/s", text, kept)
    if budgets.max_memory_bytes is not None:
        memory = measured.memory_bytes
        text = None if memory is None else f"{memory / 1e9:.2f} GB"
        kept = memory is not None and memory <= budgets.max_memory_bytes
        yield _plain_gate("memory", f"at most {budgets.max_memory_bytes / 1e9:g} GB", text, kept)


def _plain_gate(name: str, limit: str, measured: str | None, kept: bool) -> Gate:
    """Return the gate of a figure that is no sample's; None when it was not measured."""
    if measured is None:
        return Gate(name, limit, NOT_MEASURED, State.UNDECIDED, "the suite or the runtime does not tell it")
    return Gate(name, limit, measured, _state(kept, not kept))


def points(value: float) -> str:
    """Write percentage points with one decimal and a proper minus sign; never "-0.0"."""
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "−")
