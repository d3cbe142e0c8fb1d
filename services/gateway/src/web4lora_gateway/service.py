"""The gateway's calls; what each does is told by the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from web4.lora.v1 import (
    deployments_pb2,
    deployments_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
)
from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.rpc.auth import ON_BEHALF_OF, caller, require_owner
from web4lora_chassis.rpc.bounds import fitting
from web4lora_chassis.rpc.callers import require_open_base
from web4lora_chassis.rpc.jobs import page_size

from web4lora_gateway.deletion import RunDeleter
from web4lora_gateway.info import gateway_info
from web4lora_gateway.records import RunRecord, RunState, StageState
from web4lora_gateway.retention import Retention
from web4lora_gateway.run_creation import RunCreator
from web4lora_gateway.run_listing import conditions
from web4lora_gateway.run_messages import run_message
from web4lora_gateway.runs import RunBook, page_token
from web4lora_gateway.scheduler import Scheduler
from web4lora_gateway.stages.train import Train
from web4lora_gateway.trainer_messages import mode_of, trainer_messages
from web4lora_gateway.workers import LOAD_TIMEOUT_SECONDS, SET_TIMEOUT_SECONDS, Deployer, Workers

Context = grpc.aio.ServicerContext[Any, Any]


class GatewayService(gateway_pb2_grpc.GatewayServiceServicer):
    """Answers calls about runs.

    Args:
        book: The runs.
        creator: Makes new ones.
        workers: The other services.
        store_url: Address of the artifact store.
        deleter: Deletes runs.
        retention: Knows of disks that are nearly full.
        scheduler: Gives work to the other services.
    """

    def __init__(
        self,
        book: RunBook,
        creator: RunCreator,
        workers: Workers,
        store_url: str,
        deleter: RunDeleter,
        retention: Retention,
        scheduler: Scheduler,
    ) -> None:
        self._deleter = deleter
        self._retention = retention
        self._book = book
        self._creator = creator
        self._workers = workers
        self._store_url = store_url
        self._scheduler = scheduler

    async def GetGatewayInfo(
        self, _request: gateway_pb2.GetGatewayInfoRequest, _: Context
    ) -> gateway_pb2.GetGatewayInfoResponse:
        """See the contract."""
        info = await gateway_info(self._workers, self._store_url)
        info.warnings.extend(self._retention.warnings)
        return info

    async def CreateRun(
        self, request: gateway_pb2.CreateRunRequest, context: Context
    ) -> gateway_pb2.CreateRunResponse:
        """See the contract."""
        require_open_base(request.pipeline.base.model, self._creator.settings, context)
        if request.validate_only:
            pipeline = await self._creator.check(request)
            run = gateway_pb2.Run(pipeline=pipeline, labels=request.labels)
            return gateway_pb2.CreateRunResponse(run=run)
        record = await self._creator.create(request, caller().name)
        return gateway_pb2.CreateRunResponse(run=run_message(record))

    async def GetRun(self, request: gateway_pb2.GetRunRequest, _: Context) -> gateway_pb2.GetRunResponse:
        """See the contract."""
        return gateway_pb2.GetRunResponse(run=run_message(await self._book.find(request.id)))

    async def ListRuns(
        self, request: gateway_pb2.ListRunsRequest, _: Context
    ) -> gateway_pb2.ListRunsResponse:
        """See the contract."""
        runs, token = await self._book.page(page_size(request), request.page_token, conditions(request))
        tokens = {run.id: page_token(run) for run in runs}
        messages, token = fitting([run_message(run) for run in runs], token, lambda run: tokens[run.id])
        return gateway_pb2.ListRunsResponse(runs=messages, next_page_token=token)

    async def WatchRun(
        self, request: gateway_pb2.WatchRunRequest, _: Context
    ) -> AsyncIterator[gateway_pb2.WatchRunResponse]:
        """See the contract."""
        async for record in self._book.watch(request.id):
            yield gateway_pb2.WatchRunResponse(run=run_message(record))

    async def CancelRun(
        self, request: gateway_pb2.CancelRunRequest, _: Context
    ) -> gateway_pb2.CancelRunResponse:
        """See the contract."""
        found = await self._book.get(request.id)
        require_owner(found.owner, found.id)
        if request.keep:
            return gateway_pb2.CancelRunResponse(run=run_message(await self._end_training(found)))

        def cancel(record: RunRecord) -> RunRecord:
            if record.state.terminal or record.state is RunState.CANCELLING:
                return record
            return record.changed(state=RunState.CANCELLING)

        record = await self._book.change(found.id, cancel)
        return gateway_pb2.CancelRunResponse(run=run_message(record))

    async def _end_training(self, record: RunRecord) -> RunRecord:
        """Have a run's training end early; the run itself goes on with what it made."""
        if record.state.terminal:
            return record
        train = record.stage(Train.name)
        places = {place.run_id: place for place in await self._scheduler.places.open() if place.turn}
        place = places.get(record.id)  # it names the trainer; a run does one thing at a time
        at_work = place is not None and train.state is StageState.RUNNING and bool(train.job_id)
        if place is None or not at_work or record.state is RunState.CANCELLING:
            raise FailedPrecondition(
                f"{record.id} is not training: there is no training to end early.",
                fix=f"`web4lora runs show {record.id}` tells where it is; `web4lora runs cancel` ends it.",
                metadata={"run": record.id},
            )
        await self._workers.by_id[place.worker].cancel(train.job_id, keep=True)
        return record

    async def RetryRun(
        self, request: gateway_pb2.RetryRunRequest, context: Context
    ) -> gateway_pb2.RetryRunResponse:
        """See the contract."""
        if request.HasField("pipeline"):
            require_open_base(request.pipeline.base.model, self._creator.settings, context)
        record = await self._creator.retry(request, caller().name)
        return gateway_pb2.RetryRunResponse(run=run_message(record))

    async def DeleteRun(
        self, request: gateway_pb2.DeleteRunRequest, _: Context
    ) -> gateway_pb2.DeleteRunResponse:
        """See the contract."""
        await self._deleter.delete(request.id, require_owner)
        return gateway_pb2.DeleteRunResponse()

    async def KeepRun(self, request: gateway_pb2.KeepRunRequest, _: Context) -> gateway_pb2.KeepRunResponse:
        """See the contract."""
        keep = not request.release

        def change(record: RunRecord) -> RunRecord:
            return record if record.kept == keep else record.changed(kept=keep)

        found = await self._book.get(request.id)
        require_owner(found.owner, found.id)
        record = await self._book.change(found.id, change)
        return gateway_pb2.KeepRunResponse(run=run_message(record))

    async def ListTrainers(
        self, _request: gateway_pb2.ListTrainersRequest, _: Context
    ) -> gateway_pb2.ListTrainersResponse:
        """See the contract."""
        trainers = await trainer_messages(self._scheduler.crew, self._scheduler.places)
        return gateway_pb2.ListTrainersResponse(trainers=trainers)

    async def SetTrainerMode(
        self, request: gateway_pb2.SetTrainerModeRequest, _: Context
    ) -> gateway_pb2.SetTrainerModeResponse:
        """See the contract."""
        crew = self._scheduler.crew
        trainer = await crew.set_mode(request.name, mode_of(request.mode))
        trainers = await trainer_messages(crew, self._scheduler.places)
        found = next(each for each in trainers if each.name == trainer.id)
        return gateway_pb2.SetTrainerModeResponse(trainer=found)


class DeployerJobs(jobs_pb2_grpc.JobServiceServicer):
    """Answers JobService for clients: the deployer's jobs, passed on, for work outside of a run."""

    def __init__(self, deployer: Deployer) -> None:
        self._deployer = deployer

    async def CreateJob(self, request: jobs_pb2.CreateJobRequest, _: Context) -> jobs_pb2.CreateJobResponse:
        """See the contract."""
        behalf = ((ON_BEHALF_OF, caller().name),)
        return await self._deployer.call(self._deployer.jobs.CreateJob, request, metadata=behalf)

    async def GetJob(self, request: jobs_pb2.GetJobRequest, _: Context) -> jobs_pb2.GetJobResponse:
        """See the contract."""
        return await self._deployer.call(self._deployer.jobs.GetJob, request)

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, _: Context) -> jobs_pb2.ListJobsResponse:
        """See the contract."""
        return await self._deployer.call(self._deployer.jobs.ListJobs, request)

    async def WatchJob(
        self, request: jobs_pb2.WatchJobRequest, _: Context
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        """See the contract."""
        async for job in self._deployer.watch(request.id):
            yield jobs_pb2.WatchJobResponse(job=job)

    async def CancelJob(self, request: jobs_pb2.CancelJobRequest, _: Context) -> jobs_pb2.CancelJobResponse:
        """See the contract."""
        asked = jobs_pb2.GetJobRequest(id=request.id)
        job = (await self._deployer.call(self._deployer.jobs.GetJob, asked)).job
        require_owner(job.owner, job.id)
        return await self._deployer.call(self._deployer.jobs.CancelJob, request)


class DeployerDeployments(deployments_pb2_grpc.DeploymentServiceServicer):
    """Answers DeploymentService for clients: the deployer's deployments, passed on."""

    def __init__(self, deployer: Deployer) -> None:
        self._deployer = deployer

    async def ListDeployments(
        self, request: deployments_pb2.ListDeploymentsRequest, _: Context
    ) -> deployments_pb2.ListDeploymentsResponse:
        """See the contract."""
        return await self._deployer.call(self._deployer.deployments.ListDeployments, request)

    async def GetDeployment(
        self, request: deployments_pb2.GetDeploymentRequest, _: Context
    ) -> deployments_pb2.GetDeploymentResponse:
        """See the contract."""
        return await self._deployer.call(self._deployer.deployments.GetDeployment, request)

    async def PromoteDeployment(
        self, request: deployments_pb2.PromoteDeploymentRequest, _: Context
    ) -> deployments_pb2.PromoteDeploymentResponse:
        """See the contract."""
        return await self._deployer.call(
            self._deployer.deployments.PromoteDeployment, request, LOAD_TIMEOUT_SECONDS
        )

    async def RollbackDeployment(
        self, request: deployments_pb2.RollbackDeploymentRequest, _: Context
    ) -> deployments_pb2.RollbackDeploymentResponse:
        """See the contract."""
        return await self._deployer.call(
            self._deployer.deployments.RollbackDeployment, request, LOAD_TIMEOUT_SECONDS
        )

    async def DeleteDeployment(
        self, request: deployments_pb2.DeleteDeploymentRequest, _: Context
    ) -> deployments_pb2.DeleteDeploymentResponse:
        """See the contract."""
        return await self._deployer.call(
            self._deployer.deployments.DeleteDeployment, request, LOAD_TIMEOUT_SECONDS
        )

    async def SetAdapters(
        self, request: deployments_pb2.SetAdaptersRequest, _: Context
    ) -> deployments_pb2.SetAdaptersResponse:
        """See the contract."""
        return await self._deployer.call(self._deployer.deployments.SetAdapters, request, SET_TIMEOUT_SECONDS)
