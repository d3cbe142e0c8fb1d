from __future__ import annotations

import math
from random import Random

import pytest
from web4lora_deployer.suite.statistics import (
    Z_95,
    clustered_drop_interval,
    clustered_interval,
    paired_difference_interval,
    prompts_for_drop,
    prompts_for_score,
    tango_score,
    wilson_interval,
)


def test_published_paired_interval() -> None:
    # Bentur's data in Fagerland, Lydersen, Laake 2014, Statistics in Medicine 33:2850-2875.
    interval = paired_difference_interval(1, 7, 21)
    assert (interval.low, interval.high) == pytest.approx((-0.517, -0.026), abs=6e-4)


@pytest.mark.parametrize(
    ("lost", "gained", "pairs"), [(3, 1, 40), (0, 0, 20), (5, 0, 20), (0, 4, 100), (10, 10, 20)]
)
def test_both_ends_are_where_the_score_test_stops_rejecting(lost: int, gained: int, pairs: int) -> None:
    interval = paired_difference_interval(lost, gained, pairs)
    assert interval.low <= (lost - gained) / pairs <= interval.high
    assert tango_score(lost, gained, pairs, interval.low) == pytest.approx(Z_95, abs=1e-5)
    assert tango_score(lost, gained, pairs, interval.high) == pytest.approx(-Z_95, abs=1e-5)
    for difference in (interval.low, interval.high):
        assert _score_by_search(lost, gained, pairs, difference) == pytest.approx(
            tango_score(lost, gained, pairs, difference), abs=1e-3
        )


def _score_by_search(lost: int, gained: int, pairs: int, difference: float) -> float:
    """Find the likeliest probability of a gain by search, instead of by the formula."""

    def likelihood(gain: float) -> float:
        rest = 1 - difference - 2 * gain
        cells = ((lost, gain + difference), (gained, gain), (pairs - lost - gained, rest))
        return sum(count * math.log(max(share, 1e-300)) for count, share in cells if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    for _ in range(200):  # the likelihood has one peak: drop the worse third again and again
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if likelihood(left) < likelihood(right) else (low, right)
    gain = (low + high) / 2
    variance = pairs * (2 * gain + difference - difference**2)
    return (lost - gained - pairs * difference) / math.sqrt(variance)


def test_no_changed_answer_is_no_proof_of_no_drop() -> None:
    interval = paired_difference_interval(0, 0, 20)
    assert interval.high == pytest.approx(Z_95**2 / (20 + Z_95**2))
    assert interval.low == pytest.approx(-interval.high)


def test_swapping_the_models_mirrors_the_interval() -> None:
    one, other = paired_difference_interval(6, 2, 50), paired_difference_interval(2, 6, 50)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_extremes_stay_within_bounds() -> None:
    assert paired_difference_interval(20, 0, 20).high == 1.0
    assert paired_difference_interval(0, 20, 20).low == -1.0
    assert paired_difference_interval(0, 0, 0).low == -1.0


@pytest.mark.parametrize(
    ("passed", "prompts", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_wilson_intervals(passed: int, prompts: int, low: float, high: float) -> None:
    interval = wilson_interval(passed, prompts)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_the_prompts_that_settle_something_are_the_fewest_that_do() -> None:
    needed = prompts_for_drop(0.0, 0.0, 0.02)
    assert needed == 189
    assert (
        paired_difference_interval(0, 0, needed).high
        <= 0.02
        < paired_difference_interval(0, 0, needed - 1).high
    )
    needed = prompts_for_score(1.0, 0.95)
    assert needed == 73
    assert wilson_interval(needed, needed).low >= 0.95 > wilson_interval(needed - 1, needed - 1).low
    assert prompts_for_drop(0.1, 0.0, 0.1) is prompts_for_drop(0.0, 0.0, 0.0) is None
    assert prompts_for_score(0.8, 0.8) is prompts_for_score(1.0, 1.0) is None


def test_prompts_asked_once_get_the_plain_intervals() -> None:
    shares = [1.0] * 15 + [0.0] * 5
    assert clustered_interval(shares, 1) == wilson_interval(15, 20)
    before, now = [1.0] * 18 + [0.0] * 2, [1.0] * 15 + [0.0] * 4 + [1.0]
    assert clustered_drop_interval(before, now, 1) == paired_difference_interval(3, 1, 20)


def test_repeats_that_agree_tell_nothing_new() -> None:
    # The variance between prompts divides by n - 1, so the effective number may not exceed n either way.
    shares = [1.0] * 15 + [0.0] * 5
    assert clustered_interval(shares, 5) == wilson_interval(15, 20)
    assert clustered_interval([1.0] * 20, 5) == wilson_interval(20, 20)


def test_repeats_that_vary_like_coins_count_as_answers() -> None:
    # Each of 20 prompts passed 2 of 4 times: no prompt differs from another.
    assert clustered_interval([0.5] * 20, 4) == wilson_interval(40, 80)


def test_clustered_intervals_hold_their_level() -> None:
    # Prompts have chances of their own to pass; three repeats each. A plain interval over all 90 answers
    # would hold the truth too rarely. Seeded, so the shares are always the same.
    random = Random(20261122)
    prompts, repeats, rounds = 30, 3, 1500
    truth = 0.7  # mean of the chances below
    clustered = plain = paired = 0
    for _ in range(rounds):
        chances = [random.choice((0.1, 0.9, 0.9, 0.9)) for _ in range(prompts)]
        shares, others = (
            [sum(random.random() < chance for _ in range(repeats)) / repeats for chance in chances]
            for _ in range(2)
        )
        own = clustered_interval(shares, repeats)
        clustered += own.low <= truth <= own.high
        every = wilson_interval(sum(shares) * repeats, prompts * repeats)
        plain += every.low <= truth <= every.high
        drop = clustered_drop_interval(shares, others, repeats)
        paired += drop.low <= 0 <= drop.high
    assert clustered / rounds == pytest.approx(0.95, abs=0.02)
    assert plain / rounds < 0.85
    assert 0.93 <= paired / rounds <= 1
