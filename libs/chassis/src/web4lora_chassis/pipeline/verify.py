"""How to test: every setting of `verify`, its bounds and its default."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from web4.lora.v1 import deployer_pb2

from web4lora_chassis.pipeline.rules import Flag, Number, Percents, Problem, StageSettings, setting

BAD_SUITE = "BAD_SUITE"
"""Reason of the error that a suite can't be used; its lines begin with a file of the suite and a line."""


@dataclass(frozen=True)
class BudgetSettings(StageSettings):
    """Limits that the verdict goes by; None sets no limit.

    Attributes:
        max_score_drop_points: Largest drop of a score from 16 bit to the deployed model.
        min_size_reduction: Smallest reduction of the file's size from 16 bit: 0.6 is 60 %.
        min_tokens_per_second: Slowest generation of one request.
        max_memory_bytes: Largest resident memory of the runtime.
        min_score_percent: Lowest score by name of the check.
    """

    max_score_drop_points: float = setting(Number(2.0, low=0, high=100))
    min_size_reduction: float | None = setting(Number(low=0, below=1))
    min_tokens_per_second: float | None = setting(Number(low=0))
    max_memory_bytes: int | None = setting(Number(low=1))
    min_score_percent: Mapping[str, float] = setting(Percents())


@dataclass(frozen=True)
class VerifySettings(StageSettings):
    """How to test.

    Attributes:
        compare_base: Test the untrained base model too.
        budgets: Limits of the verdict.
    """

    compare_base: bool = setting(Flag(False))
    budgets: BudgetSettings = field(default_factory=BudgetSettings)


def without_suite(verify: deployer_pb2.VerifySettings) -> Iterator[Problem]:
    """Yield the limits of a pipeline without a suite, which nothing would ever be measured for."""
    budgets = verify.budgets
    given = [f"min_score_percent.{name}" for name in sorted(budgets.min_score_percent)]
    given += [
        name
        for name in ("min_size_reduction", "min_tokens_per_second", "max_memory_bytes")
        if budgets.HasField(name)
    ]
    for name in given:
        yield Problem(
            f"verify.budgets.{name}",
            "no suite is named, so nothing is measured.",
            "Name verify.suite_file, or take the limit out.",
            between=True,
        )


def unknown_scores(verify: deployer_pb2.VerifySettings, scores: Iterable[str]) -> Iterator[Problem]:
    """Yield the limits on scores that a suite does not give.

    Args:
        verify: The settings.
        scores: What the suite measures.
    """
    known = tuple(scores)
    for name in sorted(set(verify.budgets.min_score_percent) - set(known)):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)  # a slip, not another score
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}."
        yield Problem(f"verify.budgets.min_score_percent.{name}", f"the suite measures no such score; {hint}")
