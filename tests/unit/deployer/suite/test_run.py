from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.graders.tool_call import ANY_CALL
from web4lora_chassis.jobs import Progress
from web4lora_deployer.suite import Endpoint, Suite, load_suite, run_suite, score_suite

EXAMPLES = Path(__file__).parents[4] / "examples" / "web4"


@pytest.fixture(scope="module")
def suite() -> Suite:
    return load_suite(EXAMPLES)


def oracle(suite: Suite, **last: Any) -> Any:
    """Answer each of the suite's prompts as wanted, and others with a word."""
    wanted = {prompt.question: prompt.expected for prompt in suite.prompts}

    def respond(handler: Any, body: Any) -> None:
        handler.say(wanted.get(body["messages"][-1]["content"], "Yes"), " ", last=last or None)

    return respond


def test_right_answers_pass_everything(suite: Suite, chat_server: Any) -> None:
    chat_server.respond = oracle(suite)
    seen: list[Progress] = []
    result = run_suite(
        suite, Endpoint(chat_server.url, "m"), report=seen.append, max_parallel=4, extras=False
    )
    assert [answer.id for answer in result.answers] == [prompt.id for prompt in suite.prompts]
    assert all(answer.passed for answer in result.answers)
    assert len(chat_server.requests) == 100
    assert all(body["messages"][-1]["role"] == "user" for body in chat_server.requests)
    limits = {core.name: core.max_tokens for core in suite.cores}
    assert {body["max_tokens"] for body in chat_server.requests} == set(limits.values())
    assert (seen[0].done, seen[-1].done, seen[-1].total, seen[-1].unit) == (0, 100, 100, "prompts")
    assert (result.robustness, result.latency) == ((), ())


def test_requests_go_out_together_up_to_the_limit(suite: Suite, chat_server: Any) -> None:
    # Three requests wait for each other: the run ends only if they really are under way at once.
    barrier = threading.Barrier(3, timeout=20)
    answer = oracle(suite)

    def respond(handler: Any, body: Any) -> None:
        if len(chat_server.requests) <= 3:
            barrier.wait()
        answer(handler, body)

    chat_server.respond = respond
    run_suite(suite, Endpoint(chat_server.url, "m"), max_parallel=3, extras=False)
    assert chat_server.most_active == 3


def test_an_answer_that_never_ends_is_found(suite: Suite, chat_server: Any) -> None:
    chat_server.respond = lambda handler, body: handler.say("la la", finish_reason="length")
    result = run_suite(suite, Endpoint(chat_server.url, "m"), max_parallel=4, extras=False)
    assert not any(result.outcomes("answers.ends").values())
    assert len(result.outcomes("answers.ends")) == 100
    assert not any(result.outcomes("tool_call.valid").values())


def test_one_refused_prompt_fails_its_checks_only(suite: Suite, chat_server: Any) -> None:
    answer, bad = oracle(suite), suite.prompts[3]

    def respond(handler: Any, body: Any) -> None:
        if body["messages"][-1]["content"] == bad.question:
            handler.fail(400, "too long")
        else:
            answer(handler, body)

    chat_server.respond = respond
    result = run_suite(suite, Endpoint(chat_server.url, "m"), max_parallel=2, extras=False)
    assert [a.id for a in result.answers if not a.passed] == [bad.id]
    assert all("too long" in check.reason for check in result.answers[3].checks)


def test_all_refused_is_an_error(suite: Suite, chat_server: Any) -> None:
    chat_server.respond = lambda handler, body: handler.fail(422, "no seed here")
    with pytest.raises(FailedPrecondition, match="no seed here"):
        run_suite(suite, Endpoint(chat_server.url, "m"), max_parallel=4, extras=False)


def test_the_first_error_ends_the_run(suite: Suite, chat_server: Any) -> None:
    chat_server.respond = lambda handler, body: handler.fail(404, "model not found")
    with pytest.raises(FailedPrecondition, match="model not found"):
        run_suite(suite, Endpoint(chat_server.url, "m"), max_parallel=2)
    assert len(chat_server.requests) < 100


def test_extras_measure_speed_memory_and_odd_prompts(suite: Suite, chat_server: Any) -> None:
    figures = {
        "usage": {"prompt_tokens": 80, "completion_tokens": 2},
        "timings": {"predicted_per_second": 50.0},
    }
    answer = oracle(suite, **figures)
    chat_server.respond = answer
    memory = iter([5, 9, 7])
    result = run_suite(
        suite,
        Endpoint(chat_server.url, "m", context_tokens=1000),
        max_parallel=4,
        memory=lambda: next(memory, 1),
    )
    assert result.memory_bytes == 9
    assert [latency.requests_at_once for latency in result.latency] == [1, 4]
    assert all(latency.tokens_per_second == 50 and latency.timed_by_server for latency in result.latency)
    starts = [body["messages"][0]["content"][:40] for body in chat_server.requests[-16:]]
    assert len(set(starts)) == 16, "each timed prompt starts with something new"
    odd = {answer.id: answer for answer in result.robustness}
    assert len(odd) == 5
    # This server claims to have read 80 tokens of some 700: as one does that cuts prompts silently.
    assert "the server cut the prompt" in odd["long-prompt"].checks[0].reason
    assert odd["unicode-4"].passed
    long = max(chat_server.requests, key=lambda body: len(str(body)))
    assert "Note 1:" in long["messages"][-1]["content"]


def test_an_unknown_context_is_said(suite: Suite, chat_server: Any) -> None:
    chat_server.respond = oracle(suite)
    result = run_suite(suite, Endpoint(chat_server.url, "m"), max_parallel=4)
    assert any("no long prompt" in note for note in result.notes)
    assert len(result.robustness) == 4


def test_repeats_ask_everything_again_and_keep_what_differs(suite: Suite, chat_server: Any) -> None:
    fickle = suite.prompts[0]
    answer, asked = oracle(suite), itertools.count(1)

    def respond(handler: Any, body: Any) -> None:
        if body["messages"][-1]["content"] == fickle.question and next(asked) == 2:
            handler.say("something else")
        else:
            answer(handler, body)

    chat_server.respond = respond
    result = run_suite(
        replace(suite, repeats=3), Endpoint(chat_server.url, "m"), max_parallel=4, extras=False
    )
    assert len(chat_server.requests) == 300
    assert [[a.id for a in asked] for asked in result.passes] == [[p.id for p in suite.prompts]] * 3
    shares = result.outcomes("tool_call.valid")
    assert shares.pop(fickle.id) == pytest.approx(2 / 3)
    assert set(shares.values()) == {1.0}
    score = score_suite(suite, result, None, None)[0]
    assert (score.name, score.prompts) == ("tool_call.valid", 40)
    assert score.deployed_percent == pytest.approx(100 * (39 + 2 / 3) / 40)


def constrained(suite: Suite) -> Suite:
    cores = [replace(c, json_schema=ANY_CALL) if c.name == "tool" else c for c in suite.cores]
    return replace(suite, cores=tuple(cores))


def test_constrained_answers_have_scores_of_their_own(suite: Suite, chat_server: Any) -> None:
    answer = oracle(suite)

    def respond(handler: Any, body: Any) -> None:
        if "response_format" not in body and body["max_tokens"] == suite.core("tool").max_tokens:
            handler.say("I would rather not.")
        else:
            answer(handler, body)

    chat_server.respond = respond
    result = run_suite(constrained(suite), Endpoint(chat_server.url, "m"), max_parallel=4, extras=False)
    scores = {s.name: s.deployed_percent for s in score_suite(constrained(suite), result, result, None)}
    assert (scores["tool_call.valid"], scores["tool_call_constrained.valid"]) == (0, 100)
    assert scores["tool_call_constrained.exact"] == 100
    asked = [body["response_format"] for body in chat_server.requests if "response_format" in body]
    assert len(asked) == 40
    assert asked[0]["json_schema"]["schema"] == ANY_CALL
    assert list(scores)[:4] == [
        "tool_call.valid", "tool_call.right_tool", "tool_call.exact", "tool_call_constrained.valid",
    ]  # fmt: skip


def test_a_server_without_schemas_is_said_so(suite: Suite, chat_server: Any) -> None:
    answer = oracle(suite)

    def respond(handler: Any, body: Any) -> None:
        if "response_format" in body:
            handler.fail(400, "response_format is unknown")
        else:
            answer(handler, body)

    chat_server.respond = respond
    result = run_suite(constrained(suite), Endpoint(chat_server.url, "m"), max_parallel=4, extras=False)
    assert result.constrained == ()
    assert any("response_format is unknown" in note for note in result.notes)
    names = [score.name for score in score_suite(constrained(suite), result, None, None)]
    assert not any("constrained" in name for name in names)
