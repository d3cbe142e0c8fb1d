"""Runs through the real gateway: success, failure, reuse, retry, queue, requests."""

from __future__ import annotations

import json
import re

import grpc
import pytest
from web4.lora.v1 import artifacts_pb2, deployments_pb2, gateway_pb2
from web4lora_chassis.errors import AlreadyExists, FailedPrecondition, InvalidInput, NotFound, Unavailable
from web4lora_chassis.rpc import error_of

SUCCEEDED = ["SUCCEEDED"] * 6
REUSED = ["REUSED"] * 5 + ["SUCCEEDED"]  # what the name stands for is looked at in every run
ARTIFACTS = {"adapter_config.json", "adapter_model.safetensors", "merged_model.gguf", "model.Q4_K_M.gguf"}
PUBLISHED = {
    "logs/loss.csv", "logs/run.log", "Modelfile", "SHA256SUMS", "eval_log.md", "eval.json",
    "drawio_diagram.png", "run.json",
}  # fmt: skip


def test_a_run_succeeds_and_leaves_its_folder(stack, states, stage):
    stack.start()
    run = stack.create()
    assert re.fullmatch(r"run_\d{4}-\d{2}-\d{2}_1", run.id)

    seen = stack.watch(run.id)

    last = seen[-1]
    assert last.state == gateway_pb2.RUN_STATE_SUCCEEDED, last.error
    assert states(last) == SUCCEEDED
    revisions = [run.revision for run in seen]
    assert revisions == sorted(set(revisions))
    assert stage(last, "train").train_result.final_loss == 0.5
    assert stage(last, "deploy").deploy_result.deployment.gguf.name == "demo-q4_k_m"
    assert last.pipeline.train.learning_rate == pytest.approx(2e-4)

    folder = stack.outputs / run.id
    assert last.output_dir == str(folder)
    assert (stack.outputs / "latest").resolve() == folder
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == PUBLISHED | ARTIFACTS
    facts = json.loads((folder / "run.json").read_text())
    assert facts["state"] == "SUCCEEDED"
    assert facts["package"]["quantized"][0]["type"] == "Q4_K_M"
    assert facts["versions"]["torch"] == "2"
    assert facts["stages"]["train"]["seconds"] > 0
    told_to_verify = json.loads((folder / "eval.json").read_text())
    assert told_to_verify["deploy"]["id"] == facts["deploy"]["id"]
    assert "verify" not in told_to_verify
    assert set(stack.store.published(run.id)) == PUBLISHED
    assert "DBOS" not in stack.log


def test_a_context_beyond_the_model_ends_the_run_once_prepared_and_what_was_prepared_is_kept(
    stack, states, stage
):
    stack.start()
    pipeline = stack.pipeline()
    pipeline.package.context_tokens = 8193
    failed = stack.finish(stack.create(pipeline).id)
    assert states(failed) == ["FAILED"] + ["PENDING"] * 5
    assert failed.error.metadata["field"] == "package.context_tokens"
    assert "8193 is more than the 8192" in failed.error.message
    again = stack.finish(stack.create(pipeline).id)
    assert states(again)[0] == "FAILED", "a result that was taken over is checked too"
    pipeline.package.context_tokens = 8192
    assert states(stack.finish(stack.create(pipeline).id)) == ["REUSED"] + ["SUCCEEDED"] * 5


def test_without_outputs_no_folder_is_written_but_the_store_has_the_small_files(stack):
    stack.env["WEB4LORA_OUTPUTS"] = ""
    stack.start()
    run = stack.finish(stack.create().id)
    assert run.state == gateway_pb2.RUN_STATE_SUCCEEDED, run.error
    assert run.output_dir == ""
    assert not stack.outputs.exists()
    assert "eval_log.md" in stack.store.published(run.id)
    assert not list((stack.root / "home").glob("gateway/runs/**/*.gguf"))


def test_a_failure_is_passed_on_and_retry_takes_the_stages_before_over(stack, states, stage):
    stack.start()
    (stack.control / "fail-package").write_text("Memory ran out while merging.")
    failed = stack.finish(stack.create().id)
    assert failed.state == gateway_pb2.RUN_STATE_FAILED
    assert states(failed) == ["SUCCEEDED", "SUCCEEDED", "FAILED", "PENDING", "PENDING", "PENDING"]
    assert failed.error.reason == "OUT_OF_MEMORY"
    assert failed.error.message == "Memory ran out while merging."
    assert failed.error.fix == "Buy memory."
    facts = json.loads((stack.outputs / failed.id / "run.json").read_text())
    assert facts["state"] == "FAILED"
    assert facts["error"]["message"] == "Memory ran out while merging."
    assert (stack.outputs / failed.id / "adapter_model.safetensors").exists()

    (stack.control / "fail-package").unlink()
    request = gateway_pb2.RetryRunRequest(id="latest", request_id="again")
    retried = stack.finish(stack.api.RetryRun(request).run.id)
    assert retried.id != failed.id
    assert states(retried) == ["REUSED", "REUSED", "SUCCEEDED", "SUCCEEDED", "SUCCEEDED", "SUCCEEDED"]
    assert stage(retried, "train").reused_from_run == failed.id
    assert (stack.outputs / retried.id / "adapter_model.safetensors").exists()
    assert [job["kind"] for job in stack.jobs("trainer")] == ["prepare", "train"]
    assert stack.api.RetryRun(request).run.id == retried.id

    with pytest.raises(grpc.RpcError) as raised:
        stack.api.RetryRun(gateway_pb2.RetryRunRequest(id=retried.id))
    assert isinstance(error_of(raised.value), FailedPrecondition)
    with pytest.raises(grpc.RpcError) as raised:
        stack.api.RetryRun(gateway_pb2.RetryRunRequest(id=failed.id, from_stage="STAGE_NAME_VERIFY"))
    assert "package" in error_of(raised.value).message


def test_the_same_inputs_never_run_twice(stack, states, stage):
    stack.start()
    first = stack.finish(stack.create().id)
    assert states(first) == SUCCEEDED
    second = stack.finish(stack.create().id)
    assert states(second) == REUSED
    assert {made.reused_from_run for made in second.stages[:-1]} == {first.id}
    # What it took when it ran, not the moment that taking it over took.
    assert [made.work_seconds for made in second.stages[:-1]] == [s.work_seconds for s in first.stages[:-1]]
    assert all(made.work_seconds > 0 for made in first.stages)
    assert (stack.outputs / second.id / "model.Q4_K_M.gguf").exists()

    other = stack.finish(stack.create(stack.pipeline(epochs=2)).id)
    assert states(other) == SUCCEEDED

    forced = stack.finish(stack.create(from_stage="STAGE_NAME_DEPLOY").id)
    assert states(forced) == ["REUSED", "REUSED", "REUSED", "SUCCEEDED", "SUCCEEDED", "SUCCEEDED"]

    # What is gone is made again: the adapter, and with it what nobody serves any more.
    for path in stack.control.glob("deployment-*.json"):
        path.unlink()
    (adapter,) = [found for found in stack.store.find("adapter") if '"epochs": 1.0' in read(stack, found)]
    stack.store.delete(adapter.ref)
    again = stack.finish(stack.create().id)
    assert states(again) == ["REUSED", "SUCCEEDED", "REUSED", "SUCCEEDED", "REUSED", "SUCCEEDED"]
    assert stage(again, "train").train_result.adapter.digest == adapter.digest


def read(stack, manifest) -> str:
    folder = stack.root / "read" / manifest.digest
    stack.store.get(manifest.ref, folder)
    return (folder / "adapter_model.safetensors").read_text()


def test_a_base_that_may_have_changed_is_looked_at_again(stack, states):
    stack.start()
    pipeline = stack.pipeline()
    pipeline.base.model = "/models/mine"
    stack.finish(stack.create(pipeline).id)
    second = stack.finish(stack.create(pipeline).id)
    assert states(second) == ["SUCCEEDED", "REUSED", "REUSED", "REUSED", "REUSED", "SUCCEEDED"]


def test_two_runs_wait_for_each_other_and_a_failed_one_blocks_nobody(stack, stage):
    stack.start()
    stack.hold("train")
    first = stack.create()
    stack.until(first.id, lambda run: stage(run, "train").progress.phase == "train", "training")
    second = stack.create(stack.pipeline(seed=5))
    waiting = stack.until(second.id, lambda run: stage(run, "train").progress.message, "to wait")
    prepared = stage(waiting, "prepare").state
    assert prepared == gateway_pb2.STAGE_STATE_SUCCEEDED, "a training held a prepare up"
    assert stage(waiting, "train").state == gateway_pb2.STAGE_STATE_QUEUED
    assert stage(waiting, "train").progress.message == "waiting for the trainer, 1 run ahead"
    assert waiting.state == gateway_pb2.RUN_STATE_QUEUED
    queued = gateway_pb2.ListRunsRequest(states=["RUN_STATE_QUEUED"])
    assert [run.id for run in stack.api.ListRuns(queued).runs] == [second.id]
    (stack.control / "fail-package").write_text("no")
    stack.release("train")
    assert stack.finish(first.id).state == gateway_pb2.RUN_STATE_FAILED
    (stack.control / "fail-package").unlink()
    assert stack.finish(second.id).stages[1].state == gateway_pb2.STAGE_STATE_SUCCEEDED
    assert second.id.endswith("_2")
    assert (stack.outputs / "latest").resolve().name == second.id
    listed = stack.api.ListRuns(gateway_pb2.ListRunsRequest(page_size=1))
    assert [run.id for run in listed.runs] == [second.id]
    rest = stack.api.ListRuns(gateway_pb2.ListRunsRequest(page_token=listed.next_page_token))
    assert [run.id for run in rest.runs] == [first.id]


def test_a_request_makes_one_run(stack):
    stack.start()
    pipeline = stack.pipeline()
    run = stack.create(pipeline, request_id="mine")
    assert stack.create(pipeline, request_id="mine").id == run.id
    with pytest.raises(grpc.RpcError) as raised:
        stack.create(stack.pipeline(epochs=3), request_id="mine")
    assert isinstance(error_of(raised.value), AlreadyExists)
    assert len(stack.api.ListRuns(gateway_pb2.ListRunsRequest()).runs) == 1


def test_run_ids_avoid_folders_that_are_there(stack):
    stack.start()
    run_id = stack.create().id
    day = run_id.rsplit("_", 1)[0]
    (stack.outputs / f"{day}_2").mkdir(parents=True)
    assert stack.create().id == f"{day}_3"


def test_a_run_goes_on_from_the_adapter_of_another(stack, states, stage):
    stack.start()
    first = stack.finish(stack.create().id)
    adapter = stage(first, "train").train_result.adapter
    for named in (first.id, adapter.digest[:12]):
        made = stack.create(stack.pipeline(**{"from": named}))
        assert getattr(made.pipeline.train, "from") == adapter.digest
        made = stack.finish(made.id)
    assert states(made)[:2] == ["REUSED", "REUSED"], "two names of the same"
    facts = json.loads((stack.outputs / made.id / "run.json").read_text())
    assert facts["train"]["from_adapter_digest"] == adapter.digest

    other = stack.pipeline(**{"from": first.id})
    other.train.lora.rank = 8
    with pytest.raises(grpc.RpcError) as raised:
        stack.create(other)
    error = error_of(raised.value)
    assert error.metadata["field"] == "train.lora.rank\ntrain.lora.alpha"
    assert "8 is not 16, with which adapter/" in error.message
    for unknown in ("run_2020-01-01_1", "0" * 64):
        with pytest.raises(grpc.RpcError) as raised:
            stack.create(stack.pipeline(**{"from": unknown}))
        assert isinstance(error_of(raised.value), NotFound)


def test_bad_requests_are_refused_by_name(stack):
    stack.start()
    wrong = stack.pipeline(learning_rate=-1.0)
    with pytest.raises(grpc.RpcError) as raised:
        stack.create(wrong)
    error = error_of(raised.value)
    assert isinstance(error, InvalidInput)
    assert error.metadata["field"] == "train.learning_rate"
    absent = stack.pipeline()
    absent.dataset.artifact.digest = "0" * 64
    with pytest.raises(grpc.RpcError) as raised:
        stack.create(absent)
    assert isinstance(error_of(raised.value), NotFound)
    for run_id in ("run_2020-01-01_1", "latest", ""):
        with pytest.raises(grpc.RpcError) as raised:
            stack.get(run_id)
        assert isinstance(error_of(raised.value), NotFound)


def test_info_deployments_and_artifacts(stack):
    stack.start("packager", "deployer", "trainer", "gateway")
    stack.finish(stack.create().id)
    stack.kill("packager")
    info = stack.api.GetGatewayInfo(gateway_pb2.GetGatewayInfoRequest())
    services = {service.name: service for service in info.services}
    assert services["trainer"].serving
    assert services["trainer"].detail == "stand-in"
    assert not services["packager"].serving
    assert "web4lora up" in services["packager"].detail
    assert [runtime.target for runtime in info.runtimes] == ["llama-server"]
    assert info.store == stack.store.url

    answer = stack.deployments.ListDeployments(deployments_pb2.ListDeploymentsRequest())
    assert [deployment.name for deployment in answer.deployments] == ["demo"]

    adapters = stack.artifacts.ListArtifacts(artifacts_pb2.ListArtifactsRequest(kind="ARTIFACT_KIND_ADAPTER"))
    (adapter,) = adapters.artifacts
    for name in (f"adapter/demo@{adapter.ref.digest}", adapter.ref.digest[:8]):
        got = stack.artifacts.GetArtifact(artifacts_pb2.GetArtifactRequest(name=name)).artifact
        assert got == adapter
    with pytest.raises(grpc.RpcError) as raised:
        stack.artifacts.GetArtifact(artifacts_pb2.GetArtifactRequest(name="adapter/demo"))
    assert isinstance(error_of(raised.value), InvalidInput)


def test_a_run_without_a_target_goes_where_the_deployer_is_set_to(stack, states, stage):
    (stack.control / "target").write_text("ollama")
    stack.start()
    first = stack.finish(stack.create().id)
    assert stage(first, "deploy").deploy_result.deployment.target == "ollama"
    (stack.control / "target").write_text("docker")  # the deployer's setting is another one from now on
    second = stack.finish(stack.create().id)
    assert stage(second, "deploy").deploy_result.deployment.target == "docker"
    assert states(second)[:3] == ["REUSED"] * 3


def test_a_run_stopped_by_a_setting_and_corrected_takes_over_what_was_finished(stack, states, stage):
    (stack.control / "fail-package").write_text("no such context")
    stack.start()
    pipeline = stack.pipeline()
    pipeline.package.context_tokens = 8192
    failed = stack.finish(stack.create(pipeline).id)
    assert states(failed)[:3] == ["SUCCEEDED", "SUCCEEDED", "FAILED"]
    (stack.control / "fail-package").unlink()
    pipeline.package.context_tokens = 2048
    corrected = stack.finish(stack.create(pipeline).id)
    assert states(corrected)[:3] == ["REUSED", "REUSED", "SUCCEEDED"]
    assert stage(corrected, "train").reused_from_run == failed.id


def test_a_limit_on_a_score_that_the_suite_does_not_give_makes_no_run(stack):
    stack.start()
    pipeline = stack.pipeline()
    pipeline.verify.budgets.min_score_percent["tool_call.vald"] = 95
    with pytest.raises(grpc.RpcError) as raised:
        stack.create(pipeline)
    error = error_of(raised.value)
    assert isinstance(error, InvalidInput)
    assert error.metadata["field"] == "verify.budgets.min_score_percent.tool_call.vald"
    assert "did you mean tool_call.valid?" in error.message
    assert not stack.api.ListRuns(gateway_pb2.ListRunsRequest()).runs


def test_with_a_suite_the_deployer_is_asked_first(stack):
    stack.start("trainer", "packager", "gateway")
    with pytest.raises(grpc.RpcError) as raised:
        stack.create()
    error = error_of(raised.value)
    assert isinstance(error, Unavailable)
    assert "The deployer at" in error.message


def test_a_training_ended_early_is_kept_and_the_run_goes_on(stack, states, stage):
    stack.start()
    stack.hold("train")
    run = stack.create()
    stack.until(run.id, lambda run: stage(run, "train").progress.done > 0, "its training")
    answer = stack.api.CancelRun(gateway_pb2.CancelRunRequest(id=run.id, keep=True)).run
    assert answer.state == gateway_pb2.RUN_STATE_RUNNING
    done = stack.finish(run.id)
    assert states(done) == ["SUCCEEDED"] * 6
    assert stage(done, "train").train_result.ended_early

    # It is less than these inputs make: the next run trains anew.
    stack.release("train")
    again = stack.finish(stack.create().id)
    assert states(again)[:2] == ["REUSED", "SUCCEEDED"]
    assert not stage(again, "train").train_result.ended_early


def test_only_a_run_that_trains_can_end_its_training_early(stack, stage):
    stack.start()
    stack.hold("prepare")
    run = stack.create()
    stack.until(run.id, lambda run: stage(run, "prepare").progress.done > 0, "being prepared")
    request = gateway_pb2.CancelRunRequest(id=run.id, keep=True)
    with pytest.raises(grpc.RpcError) as raised:
        stack.api.CancelRun(request)
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "is not training: there is no training to end early" in raised.value.details()
    stack.release("prepare")
    done = stack.finish(run.id)
    assert stack.api.CancelRun(request).run == done
