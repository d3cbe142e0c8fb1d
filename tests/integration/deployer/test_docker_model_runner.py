"""The deployer on the real Docker Model Runner."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from web4.lora.v1 import deployments_pb2
from web4lora_chassis.artifacts import hash_file
from web4lora_chassis.errors import DataLoss, FailedPrecondition, Unavailable
from web4lora_deployer.records.deployments import Deployment
from web4lora_deployer.runtimes import docker_model_runner
from web4lora_deployer.runtimes.base import State
from web4lora_deployer.runtimes.docker_model_runner import DockerModelRunnerRuntime
from web4lora_deployer.settings import DeployerSettings
from web4lora_llamacpp import LlamaCpp

from tests import trained_base
from tests.integration.deployer.deployer_stack import Stack, ask, deployed
from tests.servers.fixtures import MakeProxy, program
from tests.servers.runtimes import model_runner
from tests.unit.deployer.sample_records import record

__all__ = ["model_runner"]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def settings(settings: DeployerSettings, model_runner: str) -> DeployerSettings:
    return settings.model_copy(update={"docker_model_runner": model_runner})


@pytest.fixture
def runtime(settings: DeployerSettings) -> DockerModelRunnerRuntime:
    return DockerModelRunnerRuntime(settings)


@pytest.fixture
def wanted(gguf: Path) -> Deployment:
    sha256 = hash_file(gguf)
    return record(
        "a", id=f"demo:v{sha256[:8]}", model=f"demo:v{sha256[:8]}", sha256=sha256, target="docker",
        size_bytes=gguf.stat().st_size, file=f"x/{gguf.name}", context_tokens=512, parallel=2,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _emptied(model_runner: str) -> Iterator[None]:
    """Leave nothing to the next test."""
    yield
    for model in httpx2.get(f"{model_runner}/models").json():
        httpx2.delete(f"{model_runner}/models/{model['id']}", params={"force": "true"})


def test_deploy_promote_answer_and_delete(stack: Stack, gguf: Path, model_runner: str) -> None:
    deployment = deployed(stack.deploy(stack.put(gguf), target="auto"))
    assert deployment.target == "docker"  # "auto" takes it where Ollama is not
    assert deployment.endpoint == f"{model_runner}/engines/v1"
    assert "gravity" in ask(deployment)
    # Asked for a bare name that has no tag, it would show whatever model has that name under any tag.
    assert httpx2.get(f"{model_runner}/models/demo:latest").status_code == 404
    stack.promote(deployment)
    candidate = httpx2.get(f"{model_runner}/models/{deployment.id}").json()
    assert candidate == httpx2.get(f"{model_runner}/models/demo").json()
    assert candidate["config"]["context_size"] == 512
    assert stack.get("demo").state == deployments_pb2.DEPLOYMENT_STATE_SERVING
    stack.deployments.DeleteDeployment(deployments_pb2.DeleteDeploymentRequest(id=deployment.id))
    assert httpx2.get(f"{model_runner}/models").json() == []


def test_other_parameters_leave_what_serves_as_it_is(stack: Stack, gguf: Path, model_runner: str) -> None:
    first = stack.promote(deployed(stack.deploy(stack.put(gguf), target="docker")))
    shown = httpx2.get(f"{model_runner}/models/demo:latest").json()
    second = deployed(stack.deploy(stack.put(gguf), target="docker", context_tokens=256))
    assert second.id != first.id
    assert httpx2.get(f"{model_runner}/models/{first.id}").json() == shown
    assert httpx2.get(f"{model_runner}/models/{second.id}-new").status_code == 404
    stack.promote(second)
    assert httpx2.get(f"{model_runner}/models/demo:latest").json()["config"]["context_size"] == 256


def test_a_tag_that_is_somebody_else_s_is_refused_and_left_alone(
    stack: Stack, gguf: Path, wanted: Deployment, model_runner: str
) -> None:
    made = deployed(stack.deploy(stack.put(gguf), name="theirs", target="docker"))
    theirs = httpx2.get(f"{model_runner}/models/{made.id}").json()["id"]

    def take(tag: str) -> None:
        place = {"repo": "demo", "tag": tag}
        httpx2.post(f"{model_runner}/models/{theirs}/tag", params=place).raise_for_status()

    take("latest")
    job = stack.deploy(stack.put(gguf), target="docker")
    assert job.error.reason == "NAME_TAKEN"
    assert "`docker model rm demo:latest`" in job.error.fix
    elsewhere = stack.promote(deployed(stack.deploy(stack.put(gguf), target="llama-server")))
    stack.delete(elsewhere.id)
    assert httpx2.get(f"{model_runner}/models/demo:latest").json()["id"] == theirs
    httpx2.delete(f"{model_runner}/models/demo:latest").raise_for_status()
    ours = stack.promote(deployed(stack.deploy(stack.put(gguf), target="docker")))
    take("latest")
    stack.stop()
    stack.start()
    stack.delete(ours.id)
    assert httpx2.get(f"{model_runner}/models/demo:latest").json()["id"] == theirs
    assert httpx2.get(f"{model_runner}/models/{ours.id}").status_code == 404


def test_what_it_shows_is_what_was_asked(
    runtime: DockerModelRunnerRuntime, wanted: Deployment, gguf: Path, model_runner: str
) -> None:
    runtime.deploy(wanted, gguf, lambda _: None)
    config = httpx2.get(f"{model_runner}/models/{wanted.id}").json()["config"]
    assert config["context_size"] == 512
    assert config["architecture"] == "llama"
    about = config["gguf"]
    assert about["general.name"] == "demo"
    assert about["general.version"] == wanted.id.partition(":")[2]
    assert about["general.license"] == "Apache-2.0"
    assert "made by Web4 LoRA Core" in about["general.description"]


def test_it_answers_through_docker_model_runner_s_own_client(
    runtime: DockerModelRunnerRuntime, wanted: Deployment, gguf: Path, model_runner: str, tmp_path: Path
) -> None:
    runtime.deploy(wanted, gguf, lambda _: None)
    runtime.promote(wanted)
    env = {**os.environ, "MODEL_RUNNER_HOST": model_runner, "HOME": str(tmp_path)}

    def dmr(*words: str) -> str:
        done = subprocess.run(
            [program("dmr"), *words], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    assert "gravity" in dmr("run", "demo", "What is gravity?").lower()
    assert "demo" in dmr("list")
    assert json.loads(dmr("inspect", "demo"))["config"]["context_size"] == 512


def test_prompts_of_another_length_than_training_s_are_refused(
    runtime: DockerModelRunnerRuntime, wanted: Deployment, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if Model Runner began each prompt twice: it does not, so its count is changed on the way."""
    real = docker_model_runner.prompt_tokens
    monkeypatch.setattr(docker_model_runner, "prompt_tokens", lambda *words: real(*words) + 1)
    with pytest.raises(FailedPrecondition, match="may be doubled or missing") as caught:
        runtime.deploy(wanted, gguf, lambda _: None)
    assert caught.value.reason == "TEMPLATE_DIFFERS"
    assert runtime.health(wanted).broken  # it never got its id


def test_what_training_used_is_what_docker_model_runner_serves(
    runtime: DockerModelRunnerRuntime, settings: DeployerSettings, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    """Ids and ends are compared, and the count besides; a record of other training is found."""
    base = trained_base.write_base(tmp_path / "base")
    file = trained_base.gguf_of(llama_cpp, base)
    sha256 = hash_file(file)
    deployment = record(
        "a", id=f"demo:v{sha256[:8]}", model=f"demo:v{sha256[:8]}", sha256=sha256, target="docker",
        size_bytes=file.stat().st_size, file=f"x/{file.name}", context_tokens=512, parallel=1,
        records=("x/trained_conversations.json",),
    )  # fmt: skip
    path = settings.deployer_home / "models" / deployment.records[0]
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(trained_base.record_of(base)))
    runtime.deploy(deployment, file, lambda _: None)
    other = trained_base.record_of(base)
    for conversation in other["conversations"]:  # as many tokens, another one
        conversation["input_ids"][1] += 1
    path.write_text(json.dumps(other))
    with pytest.raises(FailedPrecondition, match="would not be served the prompts") as caught:
        runtime.deploy(deployment, file, lambda _: None)
    assert caught.value.reason == "TEMPLATE_DIFFERS"
    for conversation in other["conversations"]:
        conversation["input_ids"][1] -= 1
        for turn in conversation["turns"]:
            turn["stop_token"] = conversation["input_ids"][turn["prompt_tokens"]]  # the answer's first word
    path.write_text(json.dumps(other))
    with pytest.raises(FailedPrecondition, match="would not end its answers"):
        runtime.deploy(deployment, file, lambda _: None)


def test_nothing_is_uploaded_twice(runtime: DockerModelRunnerRuntime, wanted: Deployment, gguf: Path) -> None:
    phases: list[str] = []
    runtime.deploy(wanted, gguf, lambda progress: phases.append(progress.phase))
    assert "upload" in phases
    phases.clear()
    runtime.deploy(wanted, gguf, lambda progress: phases.append(progress.phase))
    assert "upload" not in phases
    runtime.delete(wanted)


def test_the_context_is_bounded(
    runtime: DockerModelRunnerRuntime, wanted: Deployment, gguf: Path, model_runner: str
) -> None:
    runtime.deploy(wanted, gguf, lambda _: None)
    entry = httpx2.get(f"{model_runner}/engines/_configure").json()[-1]
    assert entry["ModelID"] == httpx2.get(f"{model_runner}/models/{wanted.id}").json()["id"]
    assert entry["Config"]["context-size"] == 1024  # two requests of 512
    runtime.restore(wanted)  # again is no error
    runtime.delete(wanted)
    runtime.delete(wanted)
    assert runtime.health(wanted).state is State.FAILED


def test_wrong_bytes_are_named_and_nothing_is_kept(
    runtime: DockerModelRunnerRuntime, wanted: Deployment, gguf: Path, model_runner: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    data = bytearray(gguf.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    with pytest.raises(DataLoss):
        runtime.deploy(wanted, broken, lambda _: None)
    assert httpx2.get(f"{model_runner}/models").json() == []


def test_a_connection_cut_while_uploading_is_said_and_again_finishes(
    settings: DeployerSettings, wanted: Deployment, gguf: Path, model_runner: str, toxiproxy: MakeProxy
) -> None:
    proxy = toxiproxy(model_runner.removeprefix("http://"))
    through = settings.model_copy(update={"docker_model_runner": f"http://{proxy.address}"})
    proxy.cut_after(20 << 20, "upstream")
    with pytest.raises(Unavailable, match="Docker Model Runner"):
        DockerModelRunnerRuntime(through).deploy(wanted, gguf, lambda _: None)
    proxy.heal()
    runtime = DockerModelRunnerRuntime(through)
    runtime.deploy(wanted, gguf, lambda _: None)
    assert runtime.health(replace(wanted, endpoint="x")).state is State.SERVING
    runtime.delete(wanted)


def test_where_it_is_not_the_probe_says_what_was_tried_and_what_to_do(settings: DeployerSettings) -> None:
    nowhere = settings.model_copy(update={"docker_model_runner": "http://127.0.0.1:1"})
    status = DockerModelRunnerRuntime(nowhere).probe()
    assert not status.usable
    assert "http://127.0.0.1:1 (nothing listens there)" in status.detail
    assert "Enable Docker Model Runner" in status.detail
