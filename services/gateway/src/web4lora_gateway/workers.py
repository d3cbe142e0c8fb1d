"""The trainer, the packager and the deployer as the gateway calls them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from web4.lora.v1 import (
    deployer_pb2,
    deployer_pb2_grpc,
    jobs_pb2,
    packager_pb2,
    packager_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)
from web4lora_chassis.errors import Unavailable, Web4Error
from web4lora_chassis.rpc import async_channel, error_of
from web4lora_chassis.rpc.errors import answered
from web4lora_chassis.settings import Settings

AWAY = "SERVICE_AWAY"
"""Reason of the error that a worker can't be reached, as against one that it passes on."""

_CALL_TIMEOUT_SECONDS = 10.0
_LOAD_TIMEOUT_SECONDS = 900.0  # a large model is loaded, and deleting one may wait for another's load
_SET_TIMEOUT_SECONDS = 30.0  # llama-server takes the scales of adapters between two batches
_LOOK_TIMEOUT_SECONDS = 3.0
_PAGE_SIZE = 200
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
_TERMINAL = (
    jobs_pb2.JOB_STATE_SUCCEEDED,
    jobs_pb2.JOB_STATE_FAILED,
    jobs_pb2.JOB_STATE_CANCELLED,
)


def ended(job: jobs_pb2.Job) -> bool:
    """Tell whether a job is in a terminal state."""
    return job.state in _TERMINAL


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says of itself: the Get…Info answer and its versions by name."""

    message: Any
    versions: Mapping[str, str]


class Worker:
    """One worker service. The contract names the job calls of all workers alike: Create<Name>Job and so on.

    Args:
        name: trainer, packager or deployer.
        address: Where it listens.
        stub: Its generated stub.
        messages: The module of its messages.
        channel: The channel of the stub.
    """

    def __init__(
        self, name: str, address: str, stub: Any, messages: ModuleType, channel: grpc.aio.Channel
    ) -> None:
        self.name = name
        self.address = address
        self.stub = stub
        self._messages: Any = messages
        self._health: Any = health_pb2_grpc.HealthStub(channel)
        self._title = name.capitalize()

    async def create(self, request_id: str, kind: str, spec: Mapping[str, Any]) -> Any:
        """Create a job, or find the one that this request_id made, and return its message.

        Raises:
            Unavailable: The worker is out of reach.
            Web4Error: The worker's own error.
        """
        request = self._request("Create{}Job")
        request.request_id = request_id
        ParseDict(dict(spec), getattr(request, kind))
        return (await self._call("Create{}Job", request)).job

    async def watch(self, job_id: str) -> AsyncIterator[Any]:
        """Yield the messages of a job until it ends; errors as for `create`."""
        request = self._request("Watch{}Job")
        request.id = job_id
        try:
            async for answer in getattr(self.stub, f"Watch{self._title}Job")(request):
                yield answer.job
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error

    async def cancel(self, job_id: str) -> Any:
        """Ask a job to end and return its message; errors as for `create`."""
        request = self._request("Cancel{}Job")
        request.id = job_id
        return (await self._call("Cancel{}Job", request)).job

    async def find(self, request_id: str) -> str:
        """Return the id of the job that a request_id made, or nothing; errors as for `create`."""
        request = self._request("List{}Jobs")
        request.page_size = _PAGE_SIZE
        while True:
            answer = await self._call("List{}Jobs", request)
            for message in answer.jobs:
                if message.job.request_id == request_id:
                    return str(message.job.id)
            if not answer.next_page_token:
                return ""
            request.page_token = answer.next_page_token

    async def info(self, timeout_seconds: float = _CALL_TIMEOUT_SECONDS) -> WorkerInfo:
        """Ask the worker what it is; errors as for `create`."""
        answer = await self._call("Get{}Info", self._request("Get{}Info"), timeout_seconds)
        versions = dict(getattr(answer, "tools", {}))
        if getattr(answer, "llama_cpp_version", ""):
            versions["llama.cpp"] = answer.llama_cpp_version
        return WorkerInfo(answer, {self.name: answer.version, **versions})

    async def serving(self) -> bool:
        """Tell whether its health service says SERVING; errors as for `create`."""
        request = health_pb2.HealthCheckRequest()
        try:
            answer = await self._health.Check(request, timeout=_LOOK_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def _call(self, name: str, request: Any, timeout_seconds: float = _CALL_TIMEOUT_SECONDS) -> Any:
        try:
            return await getattr(self.stub, name.format(self._title))(request, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error

    def _request(self, name: str) -> Any:
        return getattr(self._messages, f"{name.format(self._title)}Request")()

    def _error(self, call: grpc.aio.AioRpcError) -> Web4Error:
        service = f"the {self.name} at {self.address}"
        if call.code() in _GONE and not answered(call):
            return Unavailable(
                f"{service[0].upper()}{service[1:]} is out of reach.",
                fix=f"Start it (`web4lora up`), or correct WEB4LORA_{self.name.upper()}_ADDRESS.",
                reason=AWAY,
                metadata={"service": self.name, "address": self.address, "details": call.details() or ""},
            )
        return error_of(call, service)


class Workers:
    """The three workers, each with a channel of its own."""

    def __init__(self, settings: Settings) -> None:
        self._channels: list[grpc.aio.Channel] = []
        self.trainer = self._open(
            "trainer", settings.trainer_address, trainer_pb2_grpc.TrainerServiceStub, trainer_pb2, settings
        )
        self.packager = self._open(
            "packager",
            settings.packager_address,
            packager_pb2_grpc.PackagerServiceStub,
            packager_pb2,
            settings,
        )
        self.deployer = self._open(
            "deployer",
            settings.deployer_address,
            deployer_pb2_grpc.DeployerServiceStub,
            deployer_pb2,
            settings,
        )
        self.by_name = {worker.name: worker for worker in (self.trainer, self.packager, self.deployer)}

    async def deployment(self, deployment_id: str) -> deployer_pb2.Deployment:
        """Return a deployment; NotFound when there is none of that id."""
        request = deployer_pb2.GetDeploymentRequest(id=deployment_id)
        answer = await self.deployer._call("GetDeployment", request)
        found: deployer_pb2.Deployment = answer.deployment
        return found

    async def deployments(self) -> list[deployer_pb2.Deployment]:
        """Return what is deployed, newest first."""
        answer = await self.deployer._call("ListDeployments", deployer_pb2.ListDeploymentsRequest())
        return list(answer.deployments)

    async def promote(self, deployment_id: str) -> deployer_pb2.Deployment:
        """Point a deployment's name at it; safe to repeat. Errors as the contract names them."""
        request = deployer_pb2.PromoteDeploymentRequest(id=deployment_id)
        answer = await self.deployer._call("PromoteDeployment", request, _LOAD_TIMEOUT_SECONDS)
        found: deployer_pb2.Deployment = answer.deployment
        return found

    async def roll_back(self, name: str, from_id: str) -> deployer_pb2.Deployment:
        """Point a name back at the candidate before; safe to repeat when `from_id` is given."""
        request = deployer_pb2.RollbackDeploymentRequest(name=name, from_id=from_id)
        answer = await self.deployer._call("RollbackDeployment", request, _LOAD_TIMEOUT_SECONDS)
        found: deployer_pb2.Deployment = answer.deployment
        return found

    async def delete(self, deployment_id: str) -> None:
        """Take a deployment out of its runtime; what is gone already is no error."""
        request = deployer_pb2.DeleteDeploymentRequest(id=deployment_id)
        await self.deployer._call("DeleteDeployment", request, _LOAD_TIMEOUT_SECONDS)

    async def set_adapters(self, deployment_id: str, scales: Mapping[str, float]) -> deployer_pb2.Deployment:
        """Set how strongly a deployment's adapters are applied; safe to repeat."""
        request = deployer_pb2.SetAdaptersRequest(id=deployment_id, scales=scales)
        answer = await self.deployer._call("SetAdapters", request, _SET_TIMEOUT_SECONDS)
        found: deployer_pb2.Deployment = answer.deployment
        return found

    async def create_deployer_job(
        self, request: deployer_pb2.CreateDeployerJobRequest
    ) -> deployer_pb2.DeployerJob:
        """Create a job of the deployer as a client asked for it; errors as for `Worker.create`."""
        job: deployer_pb2.DeployerJob = (await self.deployer._call("CreateDeployerJob", request)).job
        return job

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            await channel.close()

    def _open(self, name: str, address: str, stub: Any, messages: ModuleType, settings: Settings) -> Worker:
        channel = async_channel(address, settings)
        self._channels.append(channel)
        return Worker(name, address, stub(channel), messages, channel)
