from __future__ import annotations

from pathlib import Path

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_deployer.suite import (
    Answer,
    Budgets,
    Gate,
    Measurements,
    Reply,
    Suite,
    SuiteResult,
    check_budgets,
    judge,
    load_suite,
    score_suite,
    verdict,
)
from web4lora_deployer.suite.check import Check

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
    assert judge([score], NOTHING, Budgets()) == ()


def gate(suite: Suite, deployed: str, reference: str, limit: float = 2.0) -> Gate:
    scores = score_suite(suite, result(deployed), result(reference), None)
    (only,) = judge(scores, NOTHING, Budgets(max_score_drop_points=limit))
    return only


def test_a_kept_drop_of_few_prompts_says_what_it_cannot_settle(suite: Suite) -> None:
    found = gate(suite, "+" * 20, "+" * 20)
    assert found.passed
    assert not found.settled
    assert "20 prompts can't settle 2 points" in found.note
    assert "at least 189" in found.note


def test_many_prompts_settle_it(suite: Suite) -> None:
    found = gate(suite, "+" * 200, "+" * 200)
    assert (found.passed, found.settled, found.note) == (True, True, "")


def test_a_measured_drop_above_the_limit_fails(suite: Suite) -> None:
    found = gate(suite, "-" + "+" * 19, "+" * 20)
    assert not found.passed
    assert not found.settled
    certain = gate(suite, "-" * 15 + "+" * 5, "+" * 20)
    assert (certain.passed, certain.settled, certain.note) == (False, True, "")


def test_a_drop_right_at_the_limit_is_kept(suite: Suite) -> None:
    assert gate(suite, "-" + "+" * 49, "+" * 50).passed
    assert gate(suite, "-" * 3 + "+" * 7, "+" * 10, limit=30).passed


def test_other_limits(suite: Suite) -> None:
    scores = score_suite(suite, result("+" * 19 + "-"), None, None)
    budgets = Budgets(
        min_size_reduction=0.6,
        min_tokens_per_second=10,
        max_memory_bytes=100,
        min_score_percent={"guardrail.refuses": 95, "tool_call.valid": 10},
    )
    kept = judge(scores, Measurements(0.6, 10.0, 100), budgets)
    assert {g.name: g.passed for g in kept} == {
        "score: guardrail.refuses": True,
        "score: tool_call.valid": False,
        "size reduction": True,
        "generation speed": True,
        "memory": True,
    }
    missed = judge(scores, Measurements(0.599, 9.9, 101), budgets)
    assert not any(g.passed for g in missed[2:])
    unknown = judge(scores, NOTHING, budgets)
    assert [g.measured for g in unknown[1:]] == ["not measured"] * 4
    assert not any(g.passed for g in unknown[1:])


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
    kept, doubtful = Gate("a", "", "", True), Gate("b", "", "", True, "n", False)
    missed, close = Gate("c", "", "", False), Gate("d", "", "", False, "n", False)
    assert verdict([]) == "measured, with no limits to keep"
    assert verdict([kept, kept]) == "all 2 limits kept"
    assert verdict([kept, doubtful]) == "all 2 limits kept; so few prompts can't settle 1 of them"
    assert verdict([kept, missed]) == "one of 2 limits missed (c)"
    assert verdict([kept, close]).startswith("usable, one of 2 limits missed (d)")
    assert verdict([missed, close]).startswith("2 of 2 limits missed")
