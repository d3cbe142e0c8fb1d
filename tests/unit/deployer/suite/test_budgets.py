from __future__ import annotations

from math import factorial
from pathlib import Path

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.graders.check import Check
from web4lora_deployer.suite import (
    Answer,
    Budgets,
    Gate,
    Measurements,
    Reply,
    State,
    Suite,
    SuiteResult,
    check_budgets,
    judge,
    load_suite,
    score_suite,
    state_of,
    verdict,
)

NOTHING = Measurements(None, None, None)


@pytest.fixture(scope="module")
def suite() -> Suite:
    return load_suite(Path(__file__).parents[4] / "examples" / "web4")


def result(outcomes: str, name: str = "guardrail.refuses") -> SuiteResult:
    """Make answers that passed (+) or failed (-) one check."""
    return SuiteResult(
        tuple(
            Answer(
                str(number), "guardrail", Reply(), (Check(name, sign == "+", "" if sign == "+" else "no"),)
            )
            for number, sign in enumerate(outcomes)
        )
    )


def test_a_drop_is_paired(suite: Suite) -> None:
    (score,) = score_suite(suite, result("++--+"), result("+++++"), result("-----"))
    assert (score.name, score.core, score.prompts) == ("guardrail.refuses", "guardrail", 5)
    assert (score.reference_percent, score.deployed_percent, score.base_percent) == (100, 60, 0)
    assert (score.drop_points, score.lost, score.gained) == (40, 2, 0)
    assert score.drop_low_points is not None
    assert score.drop_high_points is not None
    assert score.drop_low_points < 40 < score.drop_high_points


def test_the_same_score_by_other_prompts_is_less_certain(suite: Suite) -> None:
    (same,) = score_suite(suite, result("+++++-----"), result("+++++-----"), None)
    (other,) = score_suite(suite, result("+++++-----"), result("-----+++++"), None)
    assert same.drop_points == other.drop_points == 0
    assert (other.lost, other.gained) == (5, 5)
    assert (other.drop_high_points or 0) > (same.drop_high_points or 0)


def test_without_a_reference_there_is_no_drop(suite: Suite) -> None:
    (score,) = score_suite(suite, result("+-"), None, None)
    assert (score.reference_percent, score.drop_points, score.base_percent) == (None, None, None)
    (gate,) = judge([score], NOTHING, Budgets())
    assert (gate.state, gate.measured) == (State.UNDECIDED, "not measured")
    assert judge([score], NOTHING, Budgets(max_score_drop_points=None)) == ()


def gate(suite: Suite, deployed: str, reference: str, limit: float = 2.0) -> Gate:
    scores = score_suite(suite, result(deployed), result(reference), None)
    (only,) = judge(scores, NOTHING, Budgets(max_score_drop_points=limit))
    return only


def test_a_drop_that_so_few_prompts_cannot_tell_is_undecided(suite: Suite) -> None:
    found = gate(suite, "+" * 20, "+" * 20)
    assert (found.state, found.passed, found.prompts_needed) == (State.UNDECIDED, False, 189)
    assert found.note == "20 prompts can't tell; about 189 that go the same way would"


def test_a_drop_is_judged_by_its_whole_interval(suite: Suite) -> None:
    passed = gate(suite, "+" * 200, "+" * 200)
    assert (passed.state, passed.note, passed.prompts_needed) == (State.PASSED, "", 0)
    # One of 20 lost is 5 points, more than 2, and proves nothing; nor does one gained.
    assert gate(suite, "-" + "+" * 19, "+" * 20).state is State.UNDECIDED
    assert gate(suite, "+" * 20, "-" + "+" * 19).state is State.UNDECIDED
    assert gate(suite, "-" * 15 + "+" * 5, "+" * 20).state is State.FAILED


def test_the_prompts_that_would_settle_a_drop_do(suite: Suite) -> None:
    for deployed, reference, wanted in (
        ("-" + "+" * 19, "+" * 20, State.FAILED),
        ("--+" + "+" * 37, "++-" + "+" * 37, State.FAILED),
        ("-+" + "+" * 38, "+-" + "+" * 38, State.PASSED),
    ):
        found = gate(suite, deployed, reference)
        assert found.state is State.UNDECIDED
        times = -(-found.prompts_needed // len(deployed))
        assert gate(suite, deployed * times, reference * times).state is wanted
        fewer = found.prompts_needed // len(deployed) - 1
        assert gate(suite, deployed * fewer, reference * fewer).state is State.UNDECIDED


def test_a_drop_right_at_the_limit_is_never_settled(suite: Suite) -> None:
    for found in (gate(suite, "-" + "+" * 49, "+" * 50), gate(suite, "-" * 3 + "+" * 7, "+" * 10, limit=30)):
        assert (found.state, found.prompts_needed) == (State.UNDECIDED, 0)
        assert "nor would more" in found.note


@pytest.mark.parametrize(("prompts", "changed"), [(20, 0.1), (20, 0.3), (40, 0.1), (40, 0.3)])
def test_two_equally_good_models_do_not_fail_by_chance(suite: Suite, prompts: int, changed: float) -> None:
    """All that can happen, with its probability: as often lost as gained, `changed` of the prompts."""
    missed_by_points = failed = 0.0
    for lost in range(prompts + 1):
        for gained in range(prompts - lost + 1):
            same = prompts - lost - gained
            ways = factorial(prompts) // (factorial(lost) * factorial(gained) * factorial(same))
            chance = ways * (changed / 2) ** (lost + gained) * (1 - changed) ** same
            missed_by_points += chance * ((lost - gained) / prompts > 0.02)
            if chance > 1e-7:
                before, now = "+" * lost + "-" * gained + "+" * same, "-" * lost + "+" * (gained + same)
                failed += chance * (gate(suite, now, before).state is State.FAILED)
    assert missed_by_points > 0.25, "the coin that the measured drop alone is"
    assert failed < 0.025


def score_gate(suite: Suite, outcomes: str, floor: float) -> Gate:
    scores = score_suite(suite, result(outcomes), None, None)
    budgets = Budgets(max_score_drop_points=None, min_score_percent={"guardrail.refuses": floor})
    (only,) = judge(scores, NOTHING, budgets)
    return only


@pytest.mark.parametrize(
    ("passed", "prompts", "floor", "state"),
    [
        (40, 40, 95, State.UNDECIDED), (73, 73, 95, State.PASSED), (72, 73, 95, State.UNDECIDED),
        (38, 40, 95, State.UNDECIDED), (34, 40, 95, State.FAILED), (20, 20, 80, State.PASSED),
        (12, 20, 60, State.UNDECIDED), (0, 20, 0, State.PASSED), (20, 20, 100, State.UNDECIDED),
        (19, 20, 100, State.FAILED), (0, 20, 100, State.FAILED),
    ],
)  # fmt: skip
def test_a_floor_is_judged_by_the_whole_interval(
    suite: Suite, passed: int, prompts: int, floor: float, state: State
) -> None:
    assert score_gate(suite, "+" * passed + "-" * (prompts - passed), floor).state is state


def test_the_prompts_that_would_settle_a_floor_do(suite: Suite) -> None:
    assert score_gate(suite, "+" * 40, 95).prompts_needed == 73
    found = score_gate(suite, "+" * 39 + "-", 95)
    times = -(-found.prompts_needed // 40)
    assert score_gate(suite, ("+" * 39 + "-") * times, 95).state is State.PASSED
    assert score_gate(suite, ("+" * 39 + "-") * (times - 2), 95).state is State.UNDECIDED
    assert score_gate(suite, "+" * 20, 100).prompts_needed == 0


def test_other_limits(suite: Suite) -> None:
    scores = score_suite(suite, result("+" * 200 + "-"), None, None)
    budgets = Budgets(
        max_score_drop_points=None,
        min_size_reduction=0.6,
        min_tokens_per_second=10,
        max_memory_bytes=100,
        min_score_percent={"guardrail.refuses": 95, "tool_call.valid": 10},
    )
    kept = judge(scores, Measurements(0.6, 10.0, 100), budgets)
    assert {g.name: g.state for g in kept} == {
        "score: guardrail.refuses": State.PASSED,
        "score: tool_call.valid": State.UNDECIDED,
        "size reduction": State.PASSED,
        "generation speed": State.PASSED,
        "memory": State.PASSED,
    }
    missed = judge(scores, Measurements(0.599, 9.9, 101), budgets)
    assert {g.state for g in missed[2:]} == {State.FAILED}
    unknown = judge(scores, NOTHING, budgets)
    assert [g.measured for g in unknown[1:]] == ["not measured"] * 4
    assert {g.state for g in unknown[1:]} == {State.UNDECIDED}


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (Budgets(min_score_percent={"tool_call.vaild": 95}), "no score"),
        (Budgets(min_score_percent={"tool_call.valid": 101}), "0 to 100"),
        (Budgets(max_score_drop_points=-1), "max_score_drop_points"),
        (Budgets(max_score_drop_points=float("nan")), "max_score_drop_points"),
        (Budgets(min_size_reduction=75), "0 to 1"),
        (Budgets(min_tokens_per_second=-1), "min_tokens_per_second"),
        (Budgets(max_memory_bytes=0), "max_memory_bytes"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(suite: Suite, budgets: Budgets, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_budgets(suite, budgets)


def test_usual_limits_are_taken(suite: Suite) -> None:
    check_budgets(suite, Budgets(2.0, 0.75, 1.0, 26_000_000_000, {"tool_call.valid": 95.0}))


def test_verdicts() -> None:
    kept, missed = Gate("a", "", "", State.PASSED), Gate("c", "", "", State.FAILED)
    open_ = Gate("b", "", "", State.UNDECIDED, "n")
    for gates, state, words in (
        ([], State.PASSED, "measured, with no limits to keep"),
        ([kept], State.PASSED, "passed: the one limit is kept"),
        ([kept, kept], State.PASSED, "passed: all 2 limits are kept"),
        ([kept, open_], State.UNDECIDED, "undecided: no limit missed, 1 of 2 kept, 1 undecided"),
        ([open_], State.UNDECIDED, "undecided: no limit missed, 0 of 1 kept, 1 undecided"),
        ([kept, missed], State.FAILED, "failed: 1 of 2 limits missed (c), 1 kept"),
        ([missed, open_, missed], State.FAILED, "failed: 2 of 3 limits missed, 0 kept, 1 undecided"),
    ):
        assert (state_of(gates), verdict(gates)) == (state, words)
