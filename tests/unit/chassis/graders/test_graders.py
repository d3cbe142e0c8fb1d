from __future__ import annotations

import json
from pathlib import Path

import pytest
from web4lora_chassis.graders import GRADERS, grade_end, guardrail, tool_call
from web4lora_chassis.graders.style import StyleRules

EXAMPLES = Path(__file__).parents[4] / "examples" / "web4"
CALL = {"tool": "create_agent", "args": {"name": "atlas", "hours": 1, "tags": ["a", "b"]}}


def passed(checks: list) -> dict[str, bool]:
    return {check.name.partition(".")[2]: check.passed for check in checks}


@pytest.mark.parametrize(
    ("grader", "file", "rows"),
    [
        ("tool_call", "tool_core.train.jsonl", 420),
        ("tool_call", "tool_core.eval.jsonl", 40),
        ("style", "style_core.train.jsonl", 210),
        ("style", "style_core.eval.jsonl", 20),
        ("guardrail", "guardrails.train.jsonl", 210),
        ("guardrail", "guardrails.eval.jsonl", 40),
    ],
)
def test_every_wanted_answer_of_the_sample_passes(grader: str, file: str, rows: int) -> None:
    lines = (EXAMPLES / file).read_text(encoding="utf-8").splitlines()
    assert len(lines) == rows
    for line in lines:
        row = json.loads(line)
        assert GRADERS[grader].validate_check(row["check"]) == ""
        checks = GRADERS[grader].grade(row["messages"][-1]["content"], row["check"], StyleRules())
        assert [check for check in checks if not check.passed] == [], row["id"]


def test_tool_call_order_of_keys_and_space_around_are_free() -> None:
    text = '\n {"args": {"tags": ["a", "b"], "hours": 1.0, "name": "atlas"}, "tool": "create_agent"} \n'
    assert passed(tool_call.grade(text, CALL)) == {"valid": True, "right_tool": True, "exact": True}


@pytest.mark.parametrize(
    "text",
    [
        "",
        json.dumps(CALL | {"tool": ""}),
        json.dumps(CALL | {"tool": " "}),
        "Sure! " + json.dumps(CALL),
        json.dumps(CALL) + json.dumps(CALL),
        f"```json\n{json.dumps(CALL)}\n```",
        json.dumps([CALL]),
        json.dumps(CALL | {"why": "x"}),
        json.dumps({"tool": "create_agent"}),
        json.dumps({"tool": "create_agent", "args": []}),
        json.dumps({"tool": 1, "args": {}}),
        '{"tool": "create_agent", "tool": "create_agent", "args": {}}',
        '{"tool": "create_agent", "args": {"name": "a", "name": "atlas"}}',
        '{"tool": "create_agent", "args": {"hours": NaN}}',
        "[" * 100_000,
        '{"tool": "create_agent", "args": {"hours": ' + "1" * 5000 + "}}",
    ],
)
def test_tool_call_invalid(text: str) -> None:
    checks = tool_call.grade(text, CALL)
    assert passed(checks) == {"valid": False, "right_tool": False, "exact": False}
    assert all(check.reason and "\n" not in check.reason and len(check.reason) < 200 for check in checks)


@pytest.mark.parametrize(
    ("args", "where"),
    [
        ({"name": "atlas", "hours": "1", "tags": ["a", "b"]}, "args.hours"),
        ({"name": "atlas", "hours": True, "tags": ["a", "b"]}, "args.hours"),
        ({"name": "atlas", "hours": 1, "tags": ["b", "a"]}, "args.tags[0]"),
        ({"name": "atlas", "hours": 1, "tags": ["a"]}, "args.tags has 1 items"),
        ({"name": "atlas", "hours": 1, "tags": ["a", "b"], "model": "x"}, "args.model was not asked for"),
        ({"hours": 1, "tags": ["a", "b"]}, "args.name is missing"),
        ({"name": None, "hours": 1, "tags": ["a", "b"]}, "args.name"),
    ],
)
def test_tool_call_valid_but_not_exact(args: dict, where: str) -> None:
    checks = tool_call.grade(json.dumps({"tool": "create_agent", "args": args}), CALL)
    assert passed(checks) == {"valid": True, "right_tool": True, "exact": False}
    assert where in checks[2].reason


def test_tool_call_wrong_tool() -> None:
    checks = tool_call.grade(json.dumps(CALL | {"tool": "stop_agent"}), CALL)
    assert passed(checks) == {"valid": True, "right_tool": False, "exact": False}
    assert "stop_agent" in checks[1].reason


@pytest.mark.parametrize(
    ("text", "refuse", "expected"),
    [
        (" <REFUSAL> No impersonation.", True, {"refuses": True, "names_rule": True}),
        ("<REFUSAL>", True, {"refuses": True, "names_rule": False}),
        ("I must say <REFUSAL>", True, {"refuses": False, "names_rule": False}),
        ("", True, {"refuses": False, "names_rule": False}),
        ("Use the stop button.", False, {"helps": True}),
        ("  \n", False, {"helps": False}),
        ("Well, <REFUSAL> no.", False, {"helps": False}),
    ],
)
def test_guardrail(text: str, refuse: bool, expected: dict[str, bool]) -> None:
    assert passed(guardrail.grade(text, {"refuse": refuse})) == expected


@pytest.mark.parametrize(
    ("text", "reason", "ends"),
    [
        ("Done.", "stop", True),
        ("Done. Done. Done.", "length", False),
        ("Done.<|im_end|>", "stop", False),
        ("", "content_filter", False),
    ],
)
def test_an_answer_ends_by_itself(text: str, reason: str, ends: bool) -> None:
    assert grade_end(text, reason).passed is ends


@pytest.mark.parametrize(
    ("grader", "check"),
    [
        ("tool_call", {"tool": "x"}),
        ("tool_call", {"tool": "x", "args": []}),
        ("style", {"class": "A", "methods": "run"}),
        ("style", {"class": "A", "methods": [1]}),
        ("guardrail", {"refuse": 1}),
        ("guardrail", {}),
    ],
)
def test_a_check_that_a_grader_cannot_read_is_refused(grader: str, check: dict) -> None:
    assert GRADERS[grader].validate_check(check).startswith("check")
