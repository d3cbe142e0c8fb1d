"""Promote: the name people call is pointed at what was deployed, when the policy and the tests say so.

A candidate that failed its tests and serves under the name already, because the same file was promoted
before, is rolled back. What to do is decided before it is done, so that a crash in between changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from web4.lora.v1 import deployer_pb2, gateway_pb2
from web4lora_chassis.errors import FailedPrecondition, NotFound, Unavailable

from web4lora_gateway.stages.base import Calls, Inputs, Stage
from web4lora_gateway.workers import AWAY, Workers

_PROMOTE, _KEEP, _ROLL_BACK = "promote", "keep", "roll back"
_NO_EARLIER = "NO_EARLIER_CANDIDATE"


async def _decide(inputs: Inputs, workers: Workers) -> Mapping[str, Any]:
    """Return what to do and why."""
    policy = inputs.pipeline.deploy.promote
    if policy == "never":
        return {"do": _KEEP, "why": "the pipeline file says `promote: never`"}
    if inputs.pipeline.suite is None:
        return {"do": _PROMOTE, "why": "it answers; the pipeline file names no suite to test it with"}
    tests = inputs.result("verify", deployer_pb2.VerifyResult())
    if tests.passed:
        return {"do": _PROMOTE, "why": "every limit was kept"}
    missed = f"{sum(not gate.passed for gate in tests.gates)} of {len(tests.gates)} limits were missed"
    if policy == "always":
        return {"do": _PROMOTE, "why": f"{missed}, and the pipeline file says `promote: always`"}
    found = await workers.deployment(_candidate(inputs).id)
    return {"do": _ROLL_BACK if found.promoted else _KEEP, "why": missed}


async def _act(inputs: Inputs, workers: Workers, decision: Mapping[str, Any]) -> gateway_pb2.PromoteResult:
    """Do what was decided.

    Raises:
        FailedPrecondition: The candidate, or the earlier one, does not answer, or its runtime is away.
        Unavailable: The deployer is out of reach.
    """
    candidate, name, why = _candidate(inputs).id, inputs.pipeline.name, decision["why"]
    try:
        if decision["do"] == _PROMOTE:
            serving = await workers.promote(candidate)
            return _result("PROMOTED", candidate, serving, f"{name} stands for {candidate} now: {why}.")
        if decision["do"] == _ROLL_BACK:
            try:
                serving = await workers.roll_back(name, candidate)
            except FailedPrecondition as error:
                if error.reason != _NO_EARLIER:
                    raise
                return await _kept(workers, candidate, name, f"{why}, but there is no earlier one")
            text = f"{candidate} served under {name} already, and {why}: {serving.id} serves again."
            return _result("ROLLED_BACK", candidate, serving, f"{text} {_anyway(candidate)}")
        return await _kept(workers, candidate, name, why)
    except Unavailable as error:
        if error.reason == AWAY:  # the deployer: it is waited for
            raise
        raise FailedPrecondition(error.message, fix=error.fix, reason=error.reason) from error


async def _kept(workers: Workers, candidate: str, name: str, why: str) -> gateway_pb2.PromoteResult:
    """Return the result for a name that was left as it was."""
    serving: deployer_pb2.Deployment | None = None
    try:
        found = await workers.deployment(name)
        serving = found if found.promoted else None
    except NotFound:  # deleted since
        pass
    if serving is None:
        text = f"{candidate} is not promoted: {why}. Nothing serves under {name} yet."
    elif serving.id == candidate:
        return _result("KEPT", candidate, serving, f"{candidate} goes on serving under {name}: {why}.")
    else:
        text = f"{candidate} is not promoted: {why}. {serving.id} goes on serving under {name}."
    text = f"{text} Try the new one as {candidate}; {_anyway(candidate)}"
    return _result("KEPT", candidate, serving, text)


def _anyway(candidate: str) -> str:
    return f"`web4lora deployments promote {candidate}` promotes it all the same."


def _result(
    outcome: str, candidate: str, serving: deployer_pb2.Deployment | None, summary: str
) -> gateway_pb2.PromoteResult:
    return gateway_pb2.PromoteResult(
        outcome=gateway_pb2.PromoteOutcome.Value(f"PROMOTE_OUTCOME_{outcome}"),
        candidate=candidate,
        serving=serving,
        summary=summary,
    )


def _candidate(inputs: Inputs) -> deployer_pb2.Deployment:
    return inputs.result("deploy", deployer_pb2.DeployResult()).deployment


def _told(result: gateway_pb2.PromoteResult) -> str:
    return result.summary


def _no_job(_: Inputs) -> None:
    return None


STAGE = Stage(
    name="promote",
    worker="deployer",
    spec=_no_job,
    result=gateway_pb2.PromoteResult,
    calls=Calls(_decide, _act, _told),
)
