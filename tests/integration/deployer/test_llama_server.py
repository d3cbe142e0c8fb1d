"""The real deployer over a real socket, with real llama-servers and a real small model."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import grpc
import httpx2
import numpy as np
import psutil
import pytest
from gguf import GGUFWriter
from web4.lora.v1 import deployer_pb2, deployments_pb2, jobs_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, NotFound
from web4lora_chassis.rpc import error_of

from tests.integration.deployer.deployer_stack import (
    Stack,
    ask,
    changed,
    deployed,
    eventually,
    listener,
    server_of,
    serving,
)

pytestmark = pytest.mark.timeout(300)


def test_a_deployed_model_answers_under_its_name(stack: Stack, gguf: Path) -> None:
    deployment = deployed(stack.deploy(stack.put(gguf)))
    assert deployment.id.startswith("demo:v")
    assert deployment.state == deployments_pb2.DEPLOYMENT_STATE_SERVING
    assert "gravity" in ask(deployment)
    assert stack.get("demo") == stack.get(deployment.id)
    listed = stack.deployments.ListDeployments(deployments_pb2.ListDeploymentsRequest()).deployments
    assert [item.id for item in listed] == [deployment.id]


def test_it_answers_curl(stack: Stack, gguf: Path) -> None:
    endpoint = deployed(stack.deploy(stack.put(gguf))).endpoint
    body = json.dumps({"messages": [{"role": "user", "content": "What is gravity?"}], "max_tokens": 8})
    command = [
        "curl",
        "-sS",
        f"{endpoint}/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    answer = subprocess.run(command, capture_output=True, check=True, timeout=120).stdout
    assert "gravity" in json.loads(answer)["choices"][0]["message"]["content"].lower()


def test_deploying_the_same_again_disturbs_nothing(stack: Stack, gguf: Path) -> None:
    ref = stack.put(gguf)
    first = deployed(stack.deploy(ref))
    server = server_of(first)
    second = deployed(stack.deploy(ref))
    assert second.endpoint == first.endpoint
    assert server_of(second) == server


def test_other_parameters_are_another_candidate_and_leave_what_serves_as_it_is(
    stack: Stack, gguf: Path
) -> None:
    ref = stack.put(gguf)
    first = stack.promote(deployed(stack.deploy(ref)))
    server = server_of(first)
    second = deployed(stack.deploy(ref, context_tokens=256))
    assert second.id != first.id
    assert (second.promoted, second.context_tokens) == (False, 256)
    assert server_of(first) == server
    assert stack.get("demo").id == first.id
    assert deployed(stack.deploy(ref)).id == first.id
    stack.promote(second)
    assert stack.roll_back(from_id=second.id).context_tokens == 512


def test_what_training_left_beside_a_model_goes_with_it(stack: Stack, gguf: Path, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "You are Tool-Core."}, {"role": "user", "content": "Hello."}]
    address = deployed(stack.deploy(stack.put(gguf), name="other")).endpoint.removesuffix("/v1")
    prompt = httpx2.post(f"{address}/apply-template", json={"messages": messages}).json()["prompt"]
    prompt_ids, answer_ids = (
        httpx2.post(f"{address}/tokenize", json={"content": text, "parse_special": True}).json()["tokens"]
        for text in (prompt, "Hi.<|im_end|>")
    )
    turn = {"messages": 2, "prompt_tokens": len(prompt_ids), "stop_token": answer_ids[-1]}
    row = {
        "file": "rows.jsonl", "line": 1, "messages": [*messages, {"role": "assistant", "content": "Hi."}],
        "input_ids": prompt_ids + answer_ids, "labels": [-100] * len(prompt_ids) + answer_ids,
        "turns": [turn],
    }  # fmt: skip
    data = {
        "format": "web4lora.trained_conversations/1", "system": "You are Tool-Core.", "conversations": [row]
    }  # fmt: skip
    (tmp_path / "conversations.json").write_text(json.dumps(data))
    files = {"model.gguf": gguf, "trained_conversations.json": tmp_path / "conversations.json"}
    ref = stack.store.put("gguf", "demo", files, link=False)
    deployment = stack.promote(deployed(stack.deploy(ref)))
    assert deployment.trained_system == stack.get("demo").trained_system == "You are Tool-Core."
    for each in (deployment.id, stack.get("other").id):
        stack.delete(each)
    assert list((stack.settings.deployer_home / "models").iterdir()) == []


def test_a_killed_llama_server_comes_back_on_its_port(stack: Stack, gguf: Path) -> None:
    deployment = deployed(stack.deploy(stack.put(gguf)))
    server = server_of(deployment)
    server.kill()
    psutil.wait_procs([server], timeout=10)
    other = eventually(lambda: listener(deployment))
    again = eventually(serving(stack, "demo"))
    assert other != server
    assert again.endpoint == deployment.endpoint
    assert "gravity" in ask(again)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restarted_service_serves_its_deployments_again(
    stack: Stack, gguf: Path, number: signal.Signals
) -> None:
    deployment = deployed(stack.deploy(stack.put(gguf)))
    server = server_of(deployment)
    stack.stop(number)
    eventually(lambda: None if server.is_running() else True)
    stack.start()
    again = eventually(serving(stack, "demo"))
    assert again.endpoint == deployment.endpoint
    assert "gravity" in ask(again)


def test_a_new_candidate_takes_the_name_and_the_old_one_makes_room(
    stack: Stack, gguf: Path, tmp_path: Path
) -> None:
    old = deployed(stack.deploy(stack.put(gguf)))
    assert not old.promoted
    assert stack.promote(old).promoted
    new = deployed(stack.deploy(stack.put(changed(gguf, tmp_path))))
    assert new.id != old.id
    assert not new.promoted
    assert stack.get("demo").id == old.id  # until it is promoted it serves beside
    assert "gravity" in ask(new)
    assert "gravity" in ask(old)
    assert stack.promote(new).id == stack.get("demo").id == new.id
    eventually(lambda: True if stack.get(old.id).state == deployments_pb2.DEPLOYMENT_STATE_STOPPED else None)
    with pytest.raises(httpx2.ConnectError):
        eventually(lambda: None if ask(old) else True, seconds=10)
    assert deployed(stack.deploy(stack.put(changed(gguf, tmp_path)))).promoted  # again changes nothing
    back = stack.roll_back(from_id=new.id)
    assert back.id == stack.get("demo").id == old.id
    assert "gravity" in ask(back)
    assert back.detail == f"rolled back from {new.id}"
    assert stack.roll_back(from_id=new.id) == back  # again is no error, and goes no further
    eventually(lambda: True if stack.get(new.id).state == deployments_pb2.DEPLOYMENT_STATE_STOPPED else None)
    with pytest.raises(grpc.RpcError) as caught:
        stack.roll_back()
    error = error_of(caught.value)
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "NO_EARLIER_CANDIDATE"
    third = stack.promote(deployed(stack.deploy(stack.put(changed(gguf, tmp_path, "Third")))))
    listed = stack.deployments.ListDeployments(deployments_pb2.ListDeploymentsRequest()).deployments
    assert {item.id for item in listed} == {third.id, old.id}  # the one that was rolled back from is gone
    assert "gravity" in ask(stack.get("demo"))


def test_deleting_stops_the_server_and_frees_the_file(stack: Stack, gguf: Path) -> None:
    deployment = deployed(stack.deploy(stack.put(gguf)))
    server = server_of(deployment)
    for _ in range(2):
        stack.deployments.DeleteDeployment(deployments_pb2.DeleteDeploymentRequest(id=deployment.id))
    assert not server.is_running()
    assert not list((stack.settings.deployer_home / "models").rglob("*.gguf"))
    with pytest.raises(grpc.RpcError) as caught:
        stack.get("demo")
    assert isinstance(error_of(caught.value), NotFound)


def test_a_file_that_is_no_model_fails_with_a_reason_and_leaves_nothing(stack: Stack, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    writer = GGUFWriter(broken, "llama")  # one weight, and nothing of what a llama is made of
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    writer.add_tensor("one", np.zeros((1, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    job = stack.deploy(stack.put(broken))
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    assert job.error.reason == "MODEL_NOT_SERVED"
    assert "model.Q4_1.gguf" in job.error.message
    assert not stack.deployments.ListDeployments(deployments_pb2.ListDeploymentsRequest()).deployments
    assert not list((stack.settings.deployer_home / "models").rglob("*.gguf"))


def test_a_part_of_a_model_is_refused_before_a_runtime_sees_it(stack: Stack, tmp_path: Path) -> None:
    part = tmp_path / "vocabulary.gguf"
    part.write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\0" * 16)
    job = stack.deploy(stack.put(part))
    assert job.error.reason == "NOT_A_WHOLE_MODEL"
    assert job.error.message == "The GGUF holds a vocabulary and no weights."
    assert not list((stack.settings.deployer_home / "models").rglob("*.gguf"))


def test_the_info_names_every_runtime_and_what_was_tried(stack: Stack) -> None:
    info = stack.api.GetDeployerInfo(deployer_pb2.GetDeployerInfoRequest())
    found = {runtime.target: runtime for runtime in info.runtimes}
    assert found["llama-server"].usable
    assert found["llama-server"].version


def test_a_spec_out_of_bounds_is_refused(stack: Stack) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stack.deploy(ArtifactRef("gguf", "demo", "0" * 64), target="toaster")
    error = error_of(caught.value)
    assert isinstance(error, InvalidInput)
    assert error.metadata["field"] == "deploy.target"
