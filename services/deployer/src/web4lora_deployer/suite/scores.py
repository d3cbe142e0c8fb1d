"""From answers to scores: per cent passed, and the paired drop with its interval."""

from __future__ import annotations

from dataclasses import dataclass

from web4lora_chassis.graders import GRADERS

from web4lora_deployer.suite.result import SuiteResult
from web4lora_deployer.suite.spec import Suite
from web4lora_deployer.suite.statistics import Interval, clustered_drop_interval, clustered_interval


@dataclass(frozen=True)
class Score:
    """One score, over the same prompts for each model; see the contract's Score.

    Attributes:
        name: Name of the check.
        title: Its name for people.
        core: The core it belongs to; "" for one about all answers.
        prompts: Prompts it was measured on.
        deployed_percent: Passed by the deployed model.
        deployed_low_percent: Lower end of that score's own 95 % interval.
        deployed_high_percent: Upper end of it.
        reference_percent: Passed by the 16-bit model; None when it was not run.
        drop_points: Paired drop, positive when the deployed model is worse.
        drop_low_points: Lower end of the drop's 95 % interval.
        drop_high_points: Upper end of it.
        base_percent: Passed by the untrained base model; None when it was not run.
        lost: Prompts that the 16-bit model passed and the deployed one failed, or failed more often.
        gained: Prompts the other way round.
        changed_percent: Answers that only one of the two passed; None without a 16-bit model.
    """

    name: str
    title: str
    core: str
    prompts: int
    deployed_percent: float
    deployed_low_percent: float
    deployed_high_percent: float
    reference_percent: float | None = None
    drop_points: float | None = None
    drop_low_points: float | None = None
    drop_high_points: float | None = None
    base_percent: float | None = None
    lost: int = 0
    gained: int = 0
    changed_percent: float | None = None


def score_suite(
    suite: Suite, deployed: SuiteResult, reference: SuiteResult | None, base: SuiteResult | None
) -> tuple[Score, ...]:
    """Score the checks that have a limit of their own.

    Args:
        suite: What was run.
        deployed: The deployed model's answers.
        reference: The 16-bit model's, or None.
        base: The untrained base model's, or None.

    Returns:
        A score for each of `suite.score_titles` that some prompt was checked for.
    """
    return tuple(
        score
        for name, title in suite.score_titles.items()
        if (score := _score(name, title, _core(suite, name), deployed, reference, base))
    )


def score_details(
    suite: Suite, core: str, deployed: SuiteResult, reference: SuiteResult | None, base: SuiteResult | None
) -> tuple[Score, ...]:
    """Score the further checks of a core, such as each rule of a house style."""
    titles = GRADERS[suite.core(core).grader].detail_titles
    scores = (_score(name, title, core, deployed, reference, base) for name, title in titles.items())
    return tuple(score for score in scores if score)


def _core(suite: Suite, name: str) -> str:
    core = suite.core_of_score(name)
    return core.name if core else ""


def _score(
    name: str,
    title: str,
    core: str,
    deployed: SuiteResult,
    reference: SuiteResult | None,
    base: SuiteResult | None,
) -> Score | None:
    now = deployed.outcomes(name)
    if not now:
        return None
    passed, count = sum(now.values()), len(now)
    repeats = deployed.repeats_of(name)
    own = clustered_interval(list(now.values()), repeats)
    before = reference.outcomes(name) if reference else {}
    untrained = base.outcomes(name) if base else {}
    drop: Interval | None = None
    lost = gained = 0
    if before:
        lost = sum(before[key] > now[key] for key in now)
        gained = sum(before[key] < now[key] for key in now)
        drop = clustered_drop_interval([before[key] for key in now], list(now.values()), repeats)
    return Score(
        name=name,
        title=title,
        core=core,
        prompts=count,
        deployed_percent=100 * passed / count,
        deployed_low_percent=100 * own.low,
        deployed_high_percent=100 * own.high,
        reference_percent=100 * sum(before.values()) / len(before) if before else None,
        drop_points=100 * (sum(before.values()) - passed) / count if drop else None,
        drop_low_points=100 * drop.low if drop else None,
        drop_high_points=100 * drop.high if drop else None,
        base_percent=100 * sum(untrained.values()) / len(untrained) if untrained else None,
        lost=lost,
        gained=gained,
        changed_percent=100 * sum(abs(before[key] - now[key]) for key in now) / count if drop else None,
    )
