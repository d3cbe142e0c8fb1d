"""The real deployer over a real socket, with real llama-servers and a real small model."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import httpx
import psutil
import pytest
import web4lora_llamacpp
from web4.lora.v1 import deployer_pb2, deployer_pb2_grpc, jobs_pb2
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, open_store
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.rpc import channel, error_of, ref_message
from web4lora_chassis.settings import load
from web4lora_deployer.settings import DeployerSettings

from tests.servers.smollm2 import smollm2_gguf

pytestmark = pytest.mark.timeout(300)
T = TypeVar("T")


@pytest.fixture(scope="session")
def gguf() -> Path:
    return smollm2_gguf()


@pytest.fixture
def settings(tmp_path: Path) -> DeployerSettings:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = load(
        DeployerSettings, home=tmp_path / "home", store=(tmp_path / "store").as_uri(),
        deployer_address=f"127.0.0.1:{port}", llama_server_first_port=min(port + 1, 65000),
    )  # fmt: skip
    web4lora_llamacpp.ensure_built(settings.cache)
    return settings


class Stack:
    """A deployer process that can be killed and started again."""

    def __init__(self, settings: DeployerSettings, log: Path) -> None:
        self.settings = settings
        self.store: ArtifactStore = open_store(settings)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None

    @property
    def api(self) -> deployer_pb2_grpc.DeployerServiceStub:
        assert self._channel is not None
        return deployer_pb2_grpc.DeployerServiceStub(self._channel)

    def start(self) -> None:
        settings = self.settings
        env = {
            **os.environ,
            "WEB4LORA_HOME": str(settings.home),
            "WEB4LORA_STORE": settings.store,
            "WEB4LORA_DEPLOYER_ADDRESS": settings.deployer_address,
            "WEB4LORA_LLAMA_SERVER_FIRST_PORT": str(settings.llama_server_first_port),
            "WEB4LORA_OLLAMA": "http://127.0.0.1:1",
            "WEB4LORA_DOCKER_MODEL_RUNNER": "http://127.0.0.1:1",
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "web4lora_deployer"], env=env, stdout=log, stderr=log
            )
        self._channel = channel(settings.deployer_address, settings)
        grpc.channel_ready_future(self._channel).result(timeout=60)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=30)
        self._process = self._channel = None

    def put(self, gguf: Path, name: str = "demo") -> ArtifactRef:
        return self.store.put("gguf", name, {"model.Q4_1.gguf": gguf}, link=False)

    def deploy(self, ref: ArtifactRef, name: str = "demo", **how: Any) -> deployer_pb2.DeployerJob:
        how = {"target": "llama-server", "context_tokens": 512, "parallel": 1, **how}
        request = deployer_pb2.CreateDeployerJobRequest(
            request_id=os.urandom(8).hex(),
            deploy=deployer_pb2.DeploySpec(
                name=name, gguf=ref_message(ref), deploy=deployer_pb2.DeploySettings(**how)
            ),
        )
        return self.finish(self.api.CreateDeployerJob(request).job.job.id)

    def finish(self, job_id: str) -> deployer_pb2.DeployerJob:
        job = deployer_pb2.DeployerJob()
        for snapshot in self.api.WatchDeployerJob(deployer_pb2.WatchDeployerJobRequest(id=job_id)):
            job = snapshot.job
        return job

    def get(self, name: str) -> deployer_pb2.Deployment:
        return self.api.GetDeployment(deployer_pb2.GetDeploymentRequest(id=name)).deployment


@pytest.fixture
def stack(settings: DeployerSettings, tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(settings, tmp_path / "deployer.log")
    stack.start()
    yield stack
    stack.stop()
    sys.stderr.write((tmp_path / "deployer.log").read_text())


def deployed(job: deployer_pb2.DeployerJob) -> deployer_pb2.Deployment:
    assert job.job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.job.error
    return job.deploy_result.deployment


def ask(deployment: deployer_pb2.Deployment) -> str:
    answer = httpx.post(
        f"{deployment.endpoint}/chat/completions",
        json={
            "model": deployment.model,
            "messages": [{"role": "user", "content": "What is gravity?"}],
            "max_tokens": 24,
            "temperature": 0,
        },
        timeout=60,
    )
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"]).lower()


def listener(deployment: deployer_pb2.Deployment) -> psutil.Process | None:
    """Return the process that listens where a deployment answers."""
    port = int(deployment.endpoint.rsplit(":", 1)[1].removesuffix("/v1"))
    for connection in psutil.net_connections("tcp"):
        if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN and connection.pid:
            return psutil.Process(connection.pid)
    return None


def server_of(deployment: deployer_pb2.Deployment) -> psutil.Process:
    server = listener(deployment)
    assert server is not None
    return server


def eventually(condition: Callable[[], T | None], seconds: float = 60) -> T:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (value := condition()) is not None:
            return value
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def serving(stack: Stack, name: str) -> Callable[[], deployer_pb2.Deployment | None]:
    def look() -> deployer_pb2.Deployment | None:
        deployment = stack.get(name)
        return deployment if deployment.state == deployer_pb2.DEPLOYMENT_STATE_SERVING else None

    return look


def test_a_deployed_model_answers_under_its_name(stack: Stack, gguf: Path) -> None:
    deployment = deployed(stack.deploy(stack.put(gguf)))
    assert deployment.id.startswith("demo:v")
    assert deployment.state == deployer_pb2.DEPLOYMENT_STATE_SERVING
    assert "gravity" in ask(deployment)
    assert stack.get("demo") == stack.get(deployment.id)
    listed = stack.api.ListDeployments(deployer_pb2.ListDeploymentsRequest()).deployments
    assert [item.id for item in listed] == [deployment.id]


def test_deploying_the_same_again_disturbs_nothing(stack: Stack, gguf: Path) -> None:
    ref = stack.put(gguf)
    first = deployed(stack.deploy(ref))
    server = server_of(first)
    second = deployed(stack.deploy(ref))
    assert second.endpoint == first.endpoint
    assert server_of(second) == server


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
    changed = tmp_path / "changed.gguf"
    data = bytearray(gguf.read_bytes())
    place = data.index(b"Smollm2 135M 8k Lc100K Mix1 Ep2")  # the model's own name, which nothing reads
    data[place : place + 7] = b"Another"
    changed.write_bytes(data)
    new = deployed(stack.deploy(stack.put(changed)))
    assert new.id != old.id
    assert stack.get("demo").id == new.id
    assert "gravity" in ask(new)
    eventually(lambda: True if stack.get(old.id).state == deployer_pb2.DEPLOYMENT_STATE_STOPPED else None)
    with pytest.raises(httpx.ConnectError):
        eventually(lambda: None if ask(old) else True, seconds=10)
    back = deployed(stack.deploy(stack.put(gguf)))
    assert stack.get("demo").id == back.id == old.id


def test_deleting_stops_the_server_and_frees_the_file(stack: Stack, gguf: Path) -> None:
    deployment = deployed(stack.deploy(stack.put(gguf)))
    server = server_of(deployment)
    for _ in range(2):
        stack.api.DeleteDeployment(deployer_pb2.DeleteDeploymentRequest(id=deployment.id))
    assert not server.is_running()
    assert not list((stack.settings.deployer_home / "models").rglob("*.gguf"))
    with pytest.raises(grpc.RpcError) as caught:
        stack.get("demo")
    assert isinstance(error_of(caught.value), NotFound)


def test_a_file_that_is_no_model_fails_with_a_reason_and_leaves_nothing(stack: Stack, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\0" * 16)
    job = stack.deploy(stack.put(broken))
    assert job.job.state == jobs_pb2.JOB_STATE_FAILED
    assert job.job.error.reason == "MODEL_NOT_SERVED"
    assert "model.Q4_1.gguf" in job.job.error.message
    assert not stack.api.ListDeployments(deployer_pb2.ListDeploymentsRequest()).deployments
    assert not list((stack.settings.deployer_home / "models").rglob("*.gguf"))


@pytest.mark.parametrize(
    ("name", "how", "field"),
    [
        ("Bad Name", {}, "name"),
        ("demo", {"target": "toaster"}, "deploy.target"),
        ("demo", {"parallel": 0}, "deploy.parallel"),
        ("demo", {"context_tokens": 1}, "deploy.context_tokens"),
    ],
)
def test_a_spec_out_of_bounds_is_refused(stack: Stack, name: str, how: dict[str, Any], field: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stack.deploy(ArtifactRef("gguf", "demo", "0" * 64), name=name, **how)
    error = error_of(caught.value)
    assert isinstance(error, InvalidInput)
    assert error.metadata["field"] == field


def test_the_info_names_every_runtime_and_what_was_tried(stack: Stack) -> None:
    info = stack.api.GetDeployerInfo(deployer_pb2.GetDeployerInfoRequest())
    found = {runtime.target: runtime for runtime in info.runtimes}
    assert found["llama-server"].usable
    assert found["llama-server"].version
