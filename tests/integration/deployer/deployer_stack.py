"""A real deployer in a process of its own, that can be killed and started again, and what asks it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import grpc
import httpx2
import psutil
from web4.lora.v1 import (
    deployer_pb2,
    deployer_pb2_grpc,
    deployments_pb2,
    deployments_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
)
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, open_store
from web4lora_chassis.rpc import channel, ref_message
from web4lora_deployer.settings import DeployerSettings

T = TypeVar("T")


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

    @property
    def deployments(self) -> deployments_pb2_grpc.DeploymentServiceStub:
        assert self._channel is not None
        return deployments_pb2_grpc.DeploymentServiceStub(self._channel)

    @property
    def jobs(self) -> jobs_pb2_grpc.JobServiceStub:
        assert self._channel is not None
        return jobs_pb2_grpc.JobServiceStub(self._channel)

    def start(self) -> None:
        settings = self.settings
        env = {
            **os.environ,
            "WEB4LORA_HOME": str(settings.home),
            "WEB4LORA_STORE": settings.store,
            "WEB4LORA_DEPLOYER_ADDRESS": settings.deployer_address,
            "WEB4LORA_LLAMA_SERVER_FIRST_PORT": str(settings.llama_server_first_port),
            "WEB4LORA_OLLAMA": settings.ollama,
            "WEB4LORA_DOCKER_MODEL_RUNNER": settings.docker_model_runner,
            "WEB4LORA_GUARD_INTERVAL_SECONDS": str(settings.guard_interval_seconds),
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

    def deploy(
        self,
        ref: ArtifactRef,
        name: str = "demo",
        adapters: Mapping[str, ArtifactRef] | None = None,
        **how: Any,
    ) -> jobs_pb2.Job:
        how = {"target": "llama-server", "context_tokens": 512, "parallel": 1, **how}
        request = jobs_pb2.CreateJobRequest(
            request_id=os.urandom(8).hex(),
            spec=jobs_pb2.JobSpec(
                deploy=deployer_pb2.DeploySpec(
                    name=name,
                    gguf=ref_message(ref),
                    deploy=deployer_pb2.DeploySettings(**how),
                    adapters=[
                        deployer_pb2.AdapterSpec(name=each, gguf=ref_message(gguf))
                        for each, gguf in (adapters or {}).items()
                    ],
                )
            ),
        )
        return self.finish(self.jobs.CreateJob(request).job.id)

    def finish(self, job_id: str) -> jobs_pb2.Job:
        job = jobs_pb2.Job()
        for snapshot in self.jobs.WatchJob(jobs_pb2.WatchJobRequest(id=job_id)):
            job = snapshot.job
        return job

    def promote(self, deployment: deployments_pb2.Deployment) -> deployments_pb2.Deployment:
        return self.deployments.PromoteDeployment(
            deployments_pb2.PromoteDeploymentRequest(id=deployment.id)
        ).deployment

    def roll_back(self, name: str = "demo", from_id: str = "") -> deployments_pb2.Deployment:
        request = deployments_pb2.RollbackDeploymentRequest(name=name, from_id=from_id)
        return self.deployments.RollbackDeployment(request).deployment

    def delete(self, deployment_id: str) -> None:
        self.deployments.DeleteDeployment(deployments_pb2.DeleteDeploymentRequest(id=deployment_id))

    def set_adapters(self, name: str, **scales: float) -> dict[str, float]:
        request = deployments_pb2.SetAdaptersRequest(id=name, scales=scales)
        return scales_of(self.deployments.SetAdapters(request).deployment)

    def get(self, name: str) -> deployments_pb2.Deployment:
        return self.deployments.GetDeployment(deployments_pb2.GetDeploymentRequest(id=name)).deployment


def scales_of(deployment: deployments_pb2.Deployment) -> dict[str, float]:
    return {adapter.name: adapter.scale for adapter in deployment.adapters}


def deployed(job: jobs_pb2.Job) -> deployments_pb2.Deployment:
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    return job.result.deploy.deployment


def changed(gguf: Path, folder: Path, word: str = "Another") -> Path:
    """Write the same model as other bytes: its own name, which nothing reads, begins with another word."""
    data = bytearray(gguf.read_bytes())
    place = data.index(b"Smollm2 135M 8k Lc100K Mix1 Ep2")
    data[place : place + 7] = word.encode().ljust(7)[:7]
    file = folder / f"{word}.gguf"
    file.write_bytes(data)
    return file


def ask(deployment: deployments_pb2.Deployment) -> str:
    answer = httpx2.post(
        f"{deployment.endpoint}/chat/completions",
        json={
            "model": deployment.model,
            "messages": [{"role": "user", "content": "What is gravity?"}],
            "max_tokens": 6,
            "temperature": 0,
        },
        timeout=240,
    )
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"]).lower()


def listener(deployment: deployments_pb2.Deployment) -> psutil.Process | None:
    """Return the process that listens where a deployment answers."""
    port = int(deployment.endpoint.rsplit(":", 1)[1].removesuffix("/v1"))
    for connection in psutil.net_connections("tcp"):
        if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN and connection.pid:
            return psutil.Process(connection.pid)
    return None


def server_of(deployment: deployments_pb2.Deployment) -> psutil.Process:
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


def serving(stack: Stack, name: str) -> Callable[[], deployments_pb2.Deployment | None]:
    def look() -> deployments_pb2.Deployment | None:
        deployment = stack.get(name)
        return deployment if deployment.state == deployments_pb2.DEPLOYMENT_STATE_SERVING else None

    return look
