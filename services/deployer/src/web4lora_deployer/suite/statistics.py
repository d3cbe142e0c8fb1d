"""Intervals for scores of few prompts.

A score is a proportion: Wilson's interval (Wilson 1927, JASA 22:209-212), which keeps its level for few
prompts and for scores near 100 %. A drop is a difference of paired proportions, both models having answered
the same prompts: Tango's score interval (Tango 1998, Statistics in Medicine 17:891-908), which keeps its
level for few pairs and, unlike the square-and-add interval, stays wide when no pair differs.

Where prompts are asked repeatedly, the repeats of a prompt are one cluster: the same intervals, with the
number of prompts replaced by the effective one (Korn and Graubard 1998, Survey Methodology 24:193-201). That
is the number of prompts when each prompt's repeats agree, and more, up to all answers, where they don't.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
TOLERANCE = 1e-9
_MOST_PROMPTS = 100_000


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, as proportions."""

    low: float
    high: float


def clustered_interval(shares: Sequence[float], repeats: int) -> Interval:
    """Return the interval of a score.

    Args:
        shares: Of each prompt's repeats, the share that passed.
        repeats: Repeats of each prompt; 1 gives Wilson's interval.
    """
    if not shares:
        return Interval(0.0, 1.0)
    share = statistics.fmean(shares)
    effective = _effective_prompts(shares, share * (1 - share), repeats)
    return wilson_interval(share * effective, effective)


def clustered_drop_interval(before: Sequence[float], now: Sequence[float], repeats: int) -> Interval:
    """Return the interval of a paired drop.

    Args:
        before: The first model's share passed, prompt by prompt.
        now: The second model's, for the same prompts.
        repeats: Repeats of each prompt; 1 gives Tango's interval.
    """
    drops = [first - second for first, second in zip(before, now, strict=True)]
    if not drops:
        return Interval(-1.0, 1.0)
    lost, gained = sum(max(d, 0.0) for d in drops), sum(max(-d, 0.0) for d in drops)
    mean = statistics.fmean(drops)
    effective = _effective_prompts(drops, (lost + gained) / len(drops) - mean**2, repeats)
    scale = effective / len(drops)
    return paired_difference_interval(lost * scale, gained * scale, effective)


def _effective_prompts(values: Sequence[float], single_variance: float, repeats: int) -> float:
    """Return how many prompts, asked once each, tell as much as these do.

    Args:
        values: What was found of each prompt, the mean of its repeats.
        single_variance: Variance of what is found when a prompt is asked once.
        repeats: Repeats of each prompt.
    """
    count = len(values)
    if repeats == 1 or count < 2 or single_variance <= 0:
        return float(count)
    variance = statistics.variance(values)
    if variance * repeats <= single_variance:
        return float(count * repeats)
    return max(float(count), count * single_variance / variance)


def wilson_interval(passed: float, prompts: float) -> Interval:
    """Return the interval of a single proportion, `passed` of `prompts`."""
    if prompts == 0:
        return Interval(0.0, 1.0)
    share, z2 = passed / prompts, Z_95**2
    middle = (share + z2 / (2 * prompts)) / (1 + z2 / prompts)
    half = Z_95 / (1 + z2 / prompts) * math.sqrt(share * (1 - share) / prompts + z2 / (4 * prompts**2))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def paired_difference_interval(lost: float, gained: float, prompts: float) -> Interval:
    """Return the interval of a paired drop, (lost - gained) / prompts.

    Args:
        lost: Prompts that only the first model passed.
        gained: Prompts that only the second one passed.
        prompts: All prompts, those with equal results included.

    Returns:
        The differences that Tango's score test does not reject at the 5 % level.
    """
    if prompts == 0:
        return Interval(-1.0, 1.0)
    estimate = (lost - gained) / prompts

    def score(difference: float) -> float:
        return tango_score(lost, gained, prompts, difference)

    low = -1.0 if estimate <= -1 else _root(lambda d: score(d) - Z_95, -1.0, estimate)
    high = 1.0 if estimate >= 1 else _root(lambda d: score(d) + Z_95, estimate, 1.0)
    return Interval(low, high)


def tango_score(lost: float, gained: float, prompts: float, difference: float) -> float:
    """Return Tango's test statistic for a true drop of `difference`; about standard normal if it is true."""
    # The probability of a gain that is likeliest under the hypothesis: the larger root of a quadratic.
    a = 2 * prompts
    b = (2 * prompts - lost + gained) * difference - lost - gained
    c = -gained * difference * (1 - difference)
    gain = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = prompts * (2 * gain + difference * (1 - difference))
    numerator = lost - gained - prompts * difference
    if variance <= 0:
        return math.copysign(math.inf, numerator) if numerator else 0.0
    return numerator / math.sqrt(variance)


def prompts_for_drop(lost: float, gained: float, limit: float) -> int | None:
    """Return how many prompts would settle a drop, if they go as those that were asked.

    Args:
        lost: Share of the prompts that only the first model passed.
        gained: Share that only the second one passed.
        limit: Largest drop, a proportion.

    Returns:
        The fewest prompts whose interval lies on one side of the limit; None when no number would do.
    """

    def settled(count: int) -> bool:
        interval = paired_difference_interval(lost * count, gained * count, count)
        return interval.high <= limit + TOLERANCE or interval.low > limit + TOLERANCE

    return _fewest(settled)


def prompts_for_score(share: float, floor: float) -> int | None:
    """Return how many prompts would settle a score, if they go as those that were asked.

    Args:
        share: Share of the prompts that passed.
        floor: Lowest score, a proportion.

    Returns:
        The fewest prompts whose interval lies on one side of the floor; None when no number would do.
    """

    def settled(count: int) -> bool:
        interval = wilson_interval(share * count, count)
        return interval.low >= floor - TOLERANCE or interval.high < floor - TOLERANCE

    return _fewest(settled)


def _fewest(settled: Callable[[int], bool]) -> int | None:
    """Return the smallest count from which on something holds; None above `_MOST_PROMPTS`."""
    high = 1
    while not settled(high):
        high *= 2
        if high > _MOST_PROMPTS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if settled(middle) else (middle, high)
    return high


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Find where a falling function crosses zero, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
