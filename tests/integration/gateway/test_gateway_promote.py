"""The last stage of a run: what the name people call stands for afterwards."""

from __future__ import annotations

import json

import grpc
import pytest
import sqlalchemy as sa
from web4.lora.v1 import deployments_pb2, gateway_pb2
from web4lora_chassis.errors import NotFound
from web4lora_chassis.rpc import error_of


def promoted(stack) -> list[str]:
    answer = stack.deployments.ListDeployments(deployments_pb2.ListDeploymentsRequest())
    return [deployment.id for deployment in answer.deployments if deployment.promoted]


def outcome(run, stage) -> tuple[str, str]:
    result = stage(run, "promote").promote_result
    return gateway_pb2.PromoteOutcome.Name(result.outcome)[16:], result.summary


def with_policy(stack, policy: str, **train):
    pipeline = stack.pipeline(**train)
    pipeline.deploy.promote = policy
    return pipeline


def test_what_keeps_its_limits_is_promoted(stack, stage):
    stack.start()
    run = stack.finish(stack.create().id)
    result = stage(run, "promote").promote_result
    candidate = stage(run, "deploy").deploy_result.deployment.id
    assert outcome(run, stage) == ("PROMOTED", f"demo stands for {candidate} now: every limit was kept.")
    assert result.candidate == result.serving.id == candidate
    assert promoted(stack) == [candidate]
    facts = json.loads((stack.outputs / run.id / "run.json").read_text())
    assert facts["promote"]["outcome"] == "promoted"
    assert facts["promote"]["serving"] == candidate
    assert result.summary in (stack.outputs / run.id / "logs" / "run.log").read_text()


def test_what_misses_a_limit_is_not_promoted_and_is_told_how_to_be(stack, stage):
    stack.start()
    first = stack.finish(stack.create().id)
    (stack.control / "miss-limits").touch()
    run = stack.finish(stack.create(stack.pipeline(epochs=2)).id)
    assert run.state == gateway_pb2.RUN_STATE_SUCCEEDED
    old, new = (stage(each, "deploy").deploy_result.deployment.id for each in (first, run))
    assert old != new
    assert promoted(stack) == [old]
    assert outcome(run, stage) == (
        "KEPT",
        f"{new} is not promoted: 1 of 2 limits were missed. {old} goes on serving under demo. Try the new "
        f"one as {new}; `web4lora deployments promote {new}` promotes it all the same.",
    )
    request = deployments_pb2.PromoteDeploymentRequest(id=new)
    assert stack.deployments.PromoteDeployment(request).deployment.promoted
    assert promoted(stack) == [new]

    # Tested again, it serves already: the one before takes the name back.
    request = gateway_pb2.RetryRunRequest(id=run.id, from_stage="STAGE_NAME_PROMOTE")
    retried = stack.finish(stack.api.RetryRun(request).run.id)
    assert [each.state for each in retried.stages[:-1]] == [gateway_pb2.STAGE_STATE_REUSED] * 5
    told = outcome(retried, stage)
    assert told[0] == "ROLLED_BACK"
    assert told[1].startswith(f"{new} served under demo already, and 1 of 2 limits were missed: {old} serves")
    assert promoted(stack) == [old]


def test_without_an_earlier_one_what_serves_already_goes_on(stack, stage):
    stack.start()
    stack.finish(stack.create(with_policy(stack, "always")).id)
    (stack.control / "miss-limits").touch()
    run = stack.finish(stack.create(from_stage="STAGE_NAME_VERIFY").id)
    told = outcome(run, stage)
    assert told[0] == "KEPT"
    assert "goes on serving under demo: 1 of 2 limits were missed, but there is no earlier one" in told[1]


@pytest.mark.parametrize(("policy", "word"), [("always", "PROMOTED"), ("never", "KEPT")])
def test_the_policy_decides_without_the_tests(stack, stage, policy, word):
    stack.start()
    if policy == "always":
        (stack.control / "miss-limits").touch()
    run = stack.finish(stack.create(with_policy(stack, policy)).id)
    told = outcome(run, stage)
    assert told[0] == word
    assert f"promote: {policy}" in told[1]
    assert bool(promoted(stack)) is (policy == "always")
    if policy == "never":
        assert "Nothing serves under demo yet." in told[1]


@pytest.mark.parametrize(("policy", "word"), [("passed", "PROMOTED"), ("proven", "KEPT")])
def test_an_undecided_candidate_is_promoted_unless_proof_is_asked_for(stack, stage, policy, word):
    stack.start()
    (stack.control / "undecided").touch()
    run = stack.finish(stack.create(with_policy(stack, policy)).id)
    told = outcome(run, stage)
    assert told[0] == word
    assert "no limit was missed, 1 of 2 are undecided" in told[1]
    assert bool(promoted(stack)) is (word == "PROMOTED")


def test_proof_is_asked_for_and_given(stack, stage):
    stack.start()
    run = stack.finish(stack.create(with_policy(stack, "proven")).id)
    assert outcome(run, stage)[0] == "PROMOTED"


def test_the_policy_changes_nothing_that_was_deployed_or_tested(stack, states):
    stack.start()
    stack.finish(stack.create(with_policy(stack, "never")).id)
    run = stack.finish(stack.create(with_policy(stack, "passed")).id)
    assert states(run) == ["REUSED"] * 5 + ["SUCCEEDED"]
    assert promoted(stack)


def test_without_a_suite_it_is_promoted_once_it_answers(stack, stage, states):
    stack.start()
    pipeline = stack.pipeline()
    pipeline.verify.ClearField("suite")
    run = stack.finish(stack.create(pipeline).id)
    assert states(run) == ["SUCCEEDED"] * 6, run.error
    assert "nothing was tested" in stage(run, "verify").verify_result.verdict
    assert outcome(run, stage)[0] == "PROMOTED"
    assert "names no suite" in outcome(run, stage)[1]
    facts = json.loads((stack.outputs / run.id / "run.json").read_text())
    assert "verify" not in facts
    assert len(stack.jobs("deployer")) == 1


def test_a_deployer_that_is_away_is_waited_for(stack, stage):
    stack.start()
    stack.hold("verify")
    run = stack.create()
    stack.until(run.id, lambda run: stage(run, "verify").progress.phase == "verify", "the tests")
    stack.kill("deployer")
    stack.release("verify")
    waiting = stack.until(
        run.id, lambda run: stage(run, "verify").progress.message.startswith("waiting"), "it"
    )
    assert not stage(waiting, "promote").HasField("promote_result")
    stack.start("deployer")
    assert stack.finish(run.id).state == gateway_pb2.RUN_STATE_SUCCEEDED
    assert len(promoted(stack)) == 1


def test_a_candidate_that_is_gone_fails_the_stage_and_can_be_deployed_again(stack, stage):
    stack.start()
    run = stack.finish(stack.create(with_policy(stack, "never")).id)
    candidate = stage(run, "deploy").deploy_result.deployment.id
    request = deployments_pb2.DeleteDeploymentRequest(id=candidate)
    stack.deployments.DeleteDeployment(request)
    with pytest.raises(grpc.RpcError) as raised:
        stack.deployments.PromoteDeployment(deployments_pb2.PromoteDeploymentRequest(id=candidate))
    assert isinstance(error_of(raised.value), NotFound)


def test_runs_made_before_the_stage_was_there_are_still_told_and_can_be_promoted(stack, stage):
    stack.start()
    run = stack.finish(stack.create(with_policy(stack, "never")).id)
    stack.kill("gateway")
    engine = sa.create_engine(f"sqlite:///{stack.root / 'home' / 'gateway' / 'gateway.sqlite'}")
    with engine.begin() as connection:
        document = json.loads(connection.execute(sa.text("SELECT document FROM web4lora_runs")).scalar_one())
        document["stages"] = document["stages"][:-1]
        del document["pipeline"]["deploy"]["promote"]
        connection.execute(sa.text("UPDATE web4lora_runs SET document = :d"), {"d": json.dumps(document)})
    engine.dispose()
    stack.start("gateway")
    old = stack.get(run.id)
    assert len(old.stages) == 5
    assert old.state == gateway_pb2.RUN_STATE_SUCCEEDED
    request = gateway_pb2.RetryRunRequest(id=run.id, from_stage="STAGE_NAME_PROMOTE")
    retried = stack.finish(stack.api.RetryRun(request).run.id)
    assert outcome(retried, stage)[0] == "PROMOTED"
