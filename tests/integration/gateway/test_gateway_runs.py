"""Runs through the real gateway: success, failure, reuse, retry, queue, requests."""

from __future__ import annotations

import json
import re

import grpc
import pytest
from web4.lora.v1 import artifacts_pb2, gateway_pb2
from web4lora_chassis.errors import AlreadyExists, FailedPrecondition, InvalidInput, NotFound
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
    waiting = stack.until(second.id, lambda run: stage(run, "prepare").progress.message, "a message")
    assert stage(waiting, "prepare").progress.message == "waiting in the trainer's queue"
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

    answer = stack.api.ListDeployments(gateway_pb2.GatewayServiceListDeploymentsRequest())
    assert [deployment.name for deployment in answer.deployments] == ["demo"]

    adapters = stack.artifacts.ListArtifacts(artifacts_pb2.ListArtifactsRequest(kind="ARTIFACT_KIND_ADAPTER"))
    (adapter,) = adapters.artifacts
    for name in (f"adapter/demo@{adapter.ref.digest}", adapter.ref.digest[:8]):
        got = stack.artifacts.GetArtifact(artifacts_pb2.GetArtifactRequest(name=name)).artifact
        assert got == adapter
    with pytest.raises(grpc.RpcError) as raised:
        stack.artifacts.GetArtifact(artifacts_pb2.GetArtifactRequest(name="adapter/demo"))
    assert isinstance(error_of(raised.value), InvalidInput)
