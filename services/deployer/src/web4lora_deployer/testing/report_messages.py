"""Limits and results of tests as messages of the contract; apart, since only the worker knows suites."""

from __future__ import annotations

from web4.lora.v1 import deployer_pb2
from web4lora_chassis.pipeline.verify import BudgetSettings
from web4lora_chassis.rpc import ref_message

from web4lora_deployer.suite import Budgets, Score, State
from web4lora_deployer.testing.evaluate import EvaluatedModel
from web4lora_deployer.testing.verify import VerifyOutcome


def budgets_of(
    message: deployer_pb2.Budgets,
    *,
    max_score_drop_points: float | None = BudgetSettings().max_score_drop_points,
) -> Budgets:
    """Return the limits that a message holds.

    Args:
        message: The limits.
        max_score_drop_points: The largest drop where the message names none.
    """
    limits = vars(BudgetSettings.of(message))
    if not message.HasField("max_score_drop_points"):
        limits = {**limits, "max_score_drop_points": max_score_drop_points}
    return Budgets(**limits)


def evaluated_model(message: deployer_pb2.EvaluatedModel) -> EvaluatedModel:
    """Return the model to evaluate that a message names."""
    return EvaluatedModel(
        deployment=message.deployment,
        endpoint=message.endpoint,
        model=message.model,
        secret=message.secret,
        context_tokens=message.context_tokens,
        parallel=message.parallel,
    )


def result_message(outcome: VerifyOutcome) -> deployer_pb2.VerifyResult:
    """Return what the tests found as a message."""
    summary = outcome.summary
    return deployer_pb2.VerifyResult(
        scores=[_score(score) for score in summary.scores],
        gates=[
            deployer_pb2.Gate(
                name=gate.name,
                limit=gate.limit,
                measured=gate.measured,
                passed=gate.passed,
                note=gate.note,
                state=_state(gate.state),
                prompts_needed=gate.prompts_needed,
            )
            for gate in summary.gates
        ],
        passed=summary.passed,
        verdict=summary.verdict,
        report=ref_message(outcome.report),
        time_to_first_token_seconds=summary.time_to_first_token_seconds,
        tokens_per_second=summary.tokens_per_second,
        memory_bytes=summary.memory_bytes,
        samples=[
            deployer_pb2.Sample(
                core=sample.core, prompt=sample.prompt, answer=sample.answer, passed=sample.passed
            )
            for sample in summary.samples
        ],
        prompts=outcome.prompts,
        state=_state(summary.state),
        advice=summary.advice,
    )


def _state(state: State) -> deployer_pb2.TestState.ValueType:
    return deployer_pb2.TestState.Value(f"TEST_STATE_{state}")


def _score(score: Score) -> deployer_pb2.Score:
    return deployer_pb2.Score(
        name=score.name,
        title=score.title,
        prompts=score.prompts,
        reference_percent=score.reference_percent,
        deployed_percent=score.deployed_percent,
        drop_points=score.drop_points,
        drop_low_points=score.drop_low_points,
        drop_high_points=score.drop_high_points,
        base_percent=score.base_percent,
    )
