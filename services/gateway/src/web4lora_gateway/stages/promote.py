"""Promote: the name people call is pointed at what was deployed, when the policy and the tests say so.

A candidate that failed its tests and serves under the name already, because the same file was promoted
before, is rolled back. What to do is decided before it is done, so that a crash in between changes nothing.
"""

from __future__ import annotations

from web4.lora.v1 import deployer_pb2, deployments_pb2, gateway_pb2
from web4lora_chassis.errors import FailedPrecondition, NotFound, Unavailable

from web4lora_gateway.outcomes import Decision, Do
from web4lora_gateway.stages.base import CallStage, Inputs
from web4lora_gateway.stages.deploy import Deploy
from web4lora_gateway.stages.verify import Verify
from web4lora_gateway.workers import AWAY, Deployer

_NO_EARLIER = "NO_EARLIER_CANDIDATE"


class Promote(CallStage[gateway_pb2.PromoteResult]):
    """The name, pointed somewhere or left alone."""

    name = "promote"
    made = gateway_pb2.PromoteResult

    async def decide(self, inputs: Inputs, deployer: Deployer) -> Decision:
        """Say what to do and why, by the policy and the tests."""
        policy = inputs.pipeline.deploy.promote
        if policy == "never":
            return Decision(Do.KEEP, "the pipeline file says `promote: never`")
        if inputs.pipeline.suite is None:
            return Decision(Do.PROMOTE, "it answers; the pipeline file names no suite to test it with")
        tests = inputs.of_stage(Verify)
        state, count = _state(tests), len(tests.gates)
        if state == deployer_pb2.TEST_STATE_PASSED:
            return Decision(Do.PROMOTE, "every limit was kept")
        if state == deployer_pb2.TEST_STATE_UNDECIDED:
            undecided = sum(gate.state == deployer_pb2.TEST_STATE_UNDECIDED for gate in tests.gates)
            why = f"no limit was missed, {undecided} of {count} are undecided"
            if policy == "proven":
                return Decision(Do.KEEP, f"{why}, and the pipeline file says `promote: proven`")
            return Decision(Do.PROMOTE, why)
        missed = sum(_missed(gate) for gate in tests.gates)
        why = f"{missed} of {count} limits were missed"
        if policy == "always":
            return Decision(Do.PROMOTE, f"{why}, and the pipeline file says `promote: always`")
        found = await deployer.deployment(inputs.of_stage(Deploy).deployment.id)
        return Decision(Do.ROLL_BACK if found.promoted else Do.KEEP, why)

    async def act(self, inputs: Inputs, deployer: Deployer, decision: Decision) -> gateway_pb2.PromoteResult:
        """Do what was decided.

        Raises:
            FailedPrecondition: The candidate, or the earlier one, does not answer, or its runtime is away.
            Unavailable: The deployer is out of reach.
        """
        candidate, name, why = inputs.of_stage(Deploy).deployment.id, inputs.pipeline.name, decision.why
        try:
            if decision.do is Do.PROMOTE:
                serving = await deployer.promote(candidate)
                return _result("PROMOTED", candidate, serving, f"{name} stands for {candidate} now: {why}.")
            if decision.do is Do.ROLL_BACK:
                return await _rolled_back(deployer, candidate, name, why)
            return await _kept(deployer, candidate, name, why)
        except Unavailable as error:
            if error.reason == AWAY:  # the deployer: it is waited for
                raise
            raise FailedPrecondition(error.message, fix=error.fix, reason=error.reason) from error

    def summary(self, result: gateway_pb2.PromoteResult) -> str:
        """Return what was done and why."""
        return result.summary

    def although_cancelled(self, result: gateway_pb2.PromoteResult) -> gateway_pb2.PromoteResult:
        """Say that the run was cancelled while this was being done."""
        said = gateway_pb2.PromoteResult()
        said.CopyFrom(result)
        said.summary = f"{result.summary} The cancel came too late for that."
        return said


def _state(tests: deployer_pb2.VerifyResult) -> deployer_pb2.TestState.ValueType:
    """Return how tests came out; results from before states were told have `passed` alone."""
    if tests.state:
        return tests.state
    return deployer_pb2.TEST_STATE_PASSED if tests.passed else deployer_pb2.TEST_STATE_FAILED


def _missed(gate: deployer_pb2.Gate) -> bool:
    return gate.state == deployer_pb2.TEST_STATE_FAILED if gate.state else not gate.passed


async def _rolled_back(deployer: Deployer, candidate: str, name: str, why: str) -> gateway_pb2.PromoteResult:
    """Return the result of going back to the candidate before, or that there is none."""
    try:
        serving = await deployer.roll_back(name, candidate)
    except FailedPrecondition as error:
        if error.reason != _NO_EARLIER:
            raise
        return await _kept(deployer, candidate, name, f"{why}, but there is no earlier one")
    text = f"{candidate} served under {name} already, and {why}: {serving.id} serves again."
    return _result("ROLLED_BACK", candidate, serving, f"{text} {_anyway(candidate)}")


async def _kept(deployer: Deployer, candidate: str, name: str, why: str) -> gateway_pb2.PromoteResult:
    """Return the result for a name that was left as it was."""
    serving: deployments_pb2.Deployment | None = None
    try:
        found = await deployer.deployment(name)
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
    outcome: str, candidate: str, serving: deployments_pb2.Deployment | None, summary: str
) -> gateway_pb2.PromoteResult:
    return gateway_pb2.PromoteResult(
        outcome=gateway_pb2.PromoteOutcome.Value(f"PROMOTE_OUTCOME_{outcome}"),
        candidate=candidate,
        serving=serving,
        summary=summary,
    )
