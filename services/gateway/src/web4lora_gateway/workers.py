"""The trainer, the packager and the deployer as the gateway calls them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from web4.lora.v1 import (
    deployer_pb2,
    deployer_pb2_grpc,
    deployments_pb2,
    deployments_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    packager_pb2,
    packager_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.errors import Unavailable, Web4Error
from web4lora_chassis.rpc import async_channel, error_of, ref_message
from web4lora_chassis.rpc.errors import answered
from web4lora_chassis.settings import Settings

from web4lora_gateway.settings import GatewaySettings

AWAY = "SERVICE_AWAY"
"""Reason of the error that a worker can't be reached, as against one that it passes on."""

LOAD_TIMEOUT_SECONDS = 900.0
"""Of calls that load a large model, or wait for another's load, as deleting one may."""
SET_TIMEOUT_SECONDS = 30.0
"""Of setting adapters: llama-server takes their scales between two batches."""

_CALL_TIMEOUT_SECONDS = 10.0
_SUITE_TIMEOUT_SECONDS = 90.0  # a large one is fetched and read
_HEALTH_TIMEOUT_SECONDS = 3.0
_PAGE_SIZE = 200
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
_TERMINAL = (
    jobs_pb2.JOB_STATE_SUCCEEDED,
    jobs_pb2.JOB_STATE_FAILED,
    jobs_pb2.JOB_STATE_CANCELLED,
)

Q = TypeVar("Q")
R = TypeVar("R")


def ended(job: jobs_pb2.Job) -> bool:
    """Tell whether a job is in a terminal state."""
    return job.state in _TERMINAL


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says of itself.

    Attributes:
        versions: Its own version, by its name, and those of its tools.
        detail: What it is and has, for people.
        target: Where the deployer's deployments go that name no target; empty for others.
        runtimes: What the deployer found; empty for others.
        device: What the trainer trains on; empty for others.
        memory_bytes: Memory of that device; 0 when it is not known.
        free_memory_bytes: Memory free on it now.
    """

    versions: Mapping[str, str]
    detail: str = ""
    target: str = ""
    runtimes: tuple[deployer_pb2.Runtime, ...] = ()
    device: str = ""
    memory_bytes: int = 0
    free_memory_bytes: int = 0


class Worker(ABC):
    """One worker service: its jobs, and how it does. Every call raises the same errors.

    Raises:
        Unavailable: The worker is out of reach.
        Web4Error: The worker's own error.
    """

    name: ClassVar[str]

    def __init__(self, address: str, settings: Settings, id: str = "") -> None:
        self.address = address
        self.id = id or self.name
        self.channel = async_channel(address, settings, settings.worker_token(self.name))
        self.jobs = jobs_pb2_grpc.JobServiceStub(self.channel)
        self._health: Any = health_pb2_grpc.HealthStub(self.channel)

    def __str__(self) -> str:
        """Return who it is, for messages."""
        named = "" if self.id == self.name else f" {self.id}"
        return f"the {self.name}{named} at {self.address}"

    @abstractmethod
    async def info(self, timeout_seconds: float = _CALL_TIMEOUT_SECONDS) -> WorkerInfo:
        """Ask the worker what it is."""

    async def create(self, request: jobs_pb2.CreateJobRequest) -> jobs_pb2.Job:
        """Create a job, or find the one that this request_id made."""
        return (await self.call(self.jobs.CreateJob, request)).job

    async def watch(self, job_id: str) -> AsyncIterator[jobs_pb2.Job]:
        """Yield a job's snapshots until it ends."""
        try:
            async for answer in self.jobs.WatchJob(jobs_pb2.WatchJobRequest(id=job_id)):
                yield answer.job
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error

    async def cancel(self, job_id: str, *, keep: bool = False) -> jobs_pb2.Job:
        """Ask a job to end and return it; with `keep` to end early, with a result."""
        request = jobs_pb2.CancelJobRequest(id=job_id, keep=keep)
        return (await self.call(self.jobs.CancelJob, request)).job

    async def find(self, request_id: str) -> str:
        """Return the id of the job that a request_id made, or nothing."""
        request = jobs_pb2.ListJobsRequest(page_size=_PAGE_SIZE)
        while True:
            answer = await self.call(self.jobs.ListJobs, request)
            for job in answer.jobs:
                if job.request_id == request_id:
                    return job.id
            if not answer.next_page_token:
                return ""
            request.page_token = answer.next_page_token

    async def serving(self) -> bool:
        """Tell whether its health service says SERVING."""
        request = health_pb2.HealthCheckRequest()
        answer = await self.call(self._health.Check, request, _HEALTH_TIMEOUT_SECONDS)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Q, R],
        request: Q,
        timeout_seconds: float = _CALL_TIMEOUT_SECONDS,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> R:
        """Make a call of one of its stubs."""
        try:
            return await method(request, timeout=timeout_seconds, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error

    @property
    def _setting(self) -> str:
        return "WEB4LORA_TRAINERS" if self.id != self.name else f"WEB4LORA_{self.name.upper()}_ADDRESS"

    def _error(self, call: grpc.aio.AioRpcError) -> Web4Error:
        service = str(self)
        if call.code() in _GONE and not answered(call):
            return Unavailable(
                f"{service[0].upper()}{service[1:]} is out of reach.",
                fix=f"Start it (`web4lora up`), or correct {self._setting}.",
                reason=AWAY,
                metadata={"service": self.name, "address": self.address, "details": call.details() or ""},
            )
        if call.code() is grpc.StatusCode.UNIMPLEMENTED:
            return Unavailable(
                f"{service[0].upper()}{service[1:]} is of another version than the gateway.",
                fix="Start it again with the gateway's version.",
                reason=AWAY,
                metadata={"service": self.name, "address": self.address},
            )
        return error_of(call, service)


class Trainer(Worker):
    """The trainer."""

    name = "trainer"

    async def info(self, timeout_seconds: float = _CALL_TIMEOUT_SECONDS) -> WorkerInfo:
        """Ask on what it trains."""
        stub = trainer_pb2_grpc.TrainerServiceStub(self.channel)
        answer = await self.call(stub.GetTrainerInfo, trainer_pb2.GetTrainerInfoRequest(), timeout_seconds)
        free = answer.free_memory_bytes
        detail = f"{answer.device}, {free / 1e9:.1f} GB free" if free else answer.device
        return WorkerInfo(
            {self.name: answer.version, **answer.tools},
            detail,
            device=answer.device,
            memory_bytes=answer.memory_bytes,
            free_memory_bytes=free,
        )


class Packager(Worker):
    """The packager."""

    name = "packager"

    async def info(self, timeout_seconds: float = _CALL_TIMEOUT_SECONDS) -> WorkerInfo:
        """Ask which llama.cpp it has."""
        stub = packager_pb2_grpc.PackagerServiceStub(self.channel)
        answer = await self.call(stub.GetPackagerInfo, packager_pb2.GetPackagerInfoRequest(), timeout_seconds)
        later = "" if answer.llama_cpp_ready else ", compiled by the first job"
        versions = {self.name: answer.version, **answer.tools, "llama.cpp": answer.llama_cpp_version}
        return WorkerInfo(versions, f"llama.cpp {answer.llama_cpp_version}{later}")


class Deployer(Worker):
    """The deployer, which also has the deployments."""

    name = "deployer"

    def __init__(self, address: str, settings: Settings) -> None:
        super().__init__(address, settings)
        self.deployments = deployments_pb2_grpc.DeploymentServiceStub(self.channel)
        self._stub = deployer_pb2_grpc.DeployerServiceStub(self.channel)

    async def info(self, timeout_seconds: float = _CALL_TIMEOUT_SECONDS) -> WorkerInfo:
        """Ask which runtimes it has."""
        request = deployer_pb2.GetDeployerInfoRequest()
        answer = await self.call(self._stub.GetDeployerInfo, request, timeout_seconds)
        usable = [f"{each.target} {each.version}".rstrip() for each in answer.runtimes if each.usable]
        detail = ", ".join(usable) or "no runtime found"
        return WorkerInfo({self.name: answer.version}, detail, answer.target, tuple(answer.runtimes))

    async def suite_scores(self, suite: ArtifactRef) -> tuple[str, ...]:
        """Return the names of the scores that a suite gives, once it has been read.

        Raises:
            InvalidInput: Something in it is wrong; the message names file and line.
        """
        request = deployer_pb2.CheckSuiteRequest(suite=ref_message(suite))
        return tuple((await self.call(self._stub.CheckSuite, request, _SUITE_TIMEOUT_SECONDS)).scores)

    async def all_deployments(self) -> list[deployments_pb2.Deployment]:
        """Return what is deployed, newest first."""
        request = deployments_pb2.ListDeploymentsRequest()
        return list((await self.call(self.deployments.ListDeployments, request)).deployments)

    async def deployment(self, deployment_id: str) -> deployments_pb2.Deployment:
        """Return a deployment; NotFound when there is none of that id."""
        request = deployments_pb2.GetDeploymentRequest(id=deployment_id)
        return (await self.call(self.deployments.GetDeployment, request)).deployment

    async def promote(self, deployment_id: str) -> deployments_pb2.Deployment:
        """Point a deployment's name at it; safe to repeat. Errors as the contract names them."""
        request = deployments_pb2.PromoteDeploymentRequest(id=deployment_id)
        answer = await self.call(self.deployments.PromoteDeployment, request, LOAD_TIMEOUT_SECONDS)
        return answer.deployment

    async def roll_back(self, name: str, from_id: str) -> deployments_pb2.Deployment:
        """Point a name back at the candidate before; safe to repeat when `from_id` is given."""
        request = deployments_pb2.RollbackDeploymentRequest(name=name, from_id=from_id)
        answer = await self.call(self.deployments.RollbackDeployment, request, LOAD_TIMEOUT_SECONDS)
        return answer.deployment


class Workers:
    """All workers, each with a channel of its own.

    Attributes:
        trainer: The first of the trainers.
        by_id: All of them by their names, the trainers first: the kind alone, but for further trainers.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        trainers = [Trainer(address, settings, name) for name, address in settings.trainer_addresses.items()]
        self.trainer = trainers[0]
        self.packager = Packager(settings.packager_address, settings)
        self.deployer = Deployer(settings.deployer_address, settings)
        everyone: tuple[Worker, ...] = (*trainers, self.packager, self.deployer)
        self.by_id = {worker.id: worker for worker in everyone}

    def of_kind(self, kind: str) -> list[Worker]:
        """Return the workers of a kind: "trainer", "packager" or "deployer"."""
        return [worker for worker in self.by_id.values() if worker.name == kind]

    async def info_of(self, kind: str) -> WorkerInfo:
        """Ask the first worker of a kind that is in reach what it is.

        Raises:
            Unavailable: All of them are out of reach.
        """
        away: Unavailable | None = None
        for worker in self.of_kind(kind):
            try:
                return await worker.info()
            except Unavailable as error:
                away = away or error
        assert away is not None
        raise away
