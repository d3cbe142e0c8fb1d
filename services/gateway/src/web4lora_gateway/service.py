"""The gateway's calls; what each does is told by the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from web4.lora.v1 import gateway_pb2, gateway_pb2_grpc
from web4lora_chassis.rpc.jobs import page

from web4lora_gateway.look import look
from web4lora_gateway.messages import run_message
from web4lora_gateway.records import RunRecord, RunState
from web4lora_gateway.requests import Requests
from web4lora_gateway.runs import RunBook
from web4lora_gateway.workers import Workers

Context = grpc.aio.ServicerContext[Any, Any]


class GatewayService(gateway_pb2_grpc.GatewayServiceServicer):
    """Answers calls about runs.

    Args:
        book: The runs.
        requests: Makes new ones.
        workers: The other services.
        store_url: Address of the artifact store.
    """

    def __init__(self, book: RunBook, requests: Requests, workers: Workers, store_url: str) -> None:
        self._book = book
        self._requests = requests
        self._workers = workers
        self._store_url = store_url

    async def GetGatewayInfo(
        self, _request: gateway_pb2.GetGatewayInfoRequest, _: Context
    ) -> gateway_pb2.GetGatewayInfoResponse:
        """See the contract."""
        return await look(self._workers, self._store_url)

    async def CreateRun(
        self, request: gateway_pb2.CreateRunRequest, _: Context
    ) -> gateway_pb2.CreateRunResponse:
        """See the contract."""
        return gateway_pb2.CreateRunResponse(run=run_message(await self._requests.create(request)))

    async def GetRun(self, request: gateway_pb2.GetRunRequest, _: Context) -> gateway_pb2.GetRunResponse:
        """See the contract."""
        return gateway_pb2.GetRunResponse(run=run_message(await self._book.get(request.id)))

    async def ListRuns(
        self, request: gateway_pb2.ListRunsRequest, _: Context
    ) -> gateway_pb2.ListRunsResponse:
        """See the contract."""
        ids, token = page(await self._book.ids(), request, lambda run_id: run_id)
        runs = [run_message(await self._book.get(run_id)) for run_id in ids]
        return gateway_pb2.ListRunsResponse(runs=runs, next_page_token=token)

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

        def cancel(record: RunRecord) -> RunRecord:
            if record.state.terminal or record.state is RunState.CANCELLING:
                return record
            return record.changed(state=RunState.CANCELLING)

        run_id = (await self._book.get(request.id)).id
        record = await self._book.change(run_id, cancel)
        if not record.state.terminal:
            self._book.cancelled(run_id).set()
        return gateway_pb2.CancelRunResponse(run=run_message(record))

    async def RetryRun(
        self, request: gateway_pb2.RetryRunRequest, _: Context
    ) -> gateway_pb2.RetryRunResponse:
        """See the contract."""
        return gateway_pb2.RetryRunResponse(run=run_message(await self._requests.retry(request)))

    async def ListDeployments(
        self, _request: gateway_pb2.GatewayServiceListDeploymentsRequest, _: Context
    ) -> gateway_pb2.GatewayServiceListDeploymentsResponse:
        """See the contract."""
        deployments = await self._workers.deployments()
        return gateway_pb2.GatewayServiceListDeploymentsResponse(deployments=deployments)

    async def PromoteDeployment(
        self, request: gateway_pb2.GatewayServicePromoteDeploymentRequest, _: Context
    ) -> gateway_pb2.GatewayServicePromoteDeploymentResponse:
        """See the contract."""
        deployment = await self._workers.promote(request.id)
        return gateway_pb2.GatewayServicePromoteDeploymentResponse(deployment=deployment)

    async def RollbackDeployment(
        self, request: gateway_pb2.GatewayServiceRollbackDeploymentRequest, _: Context
    ) -> gateway_pb2.GatewayServiceRollbackDeploymentResponse:
        """See the contract."""
        deployment = await self._workers.roll_back(request.name, request.from_id)
        return gateway_pb2.GatewayServiceRollbackDeploymentResponse(deployment=deployment)

    async def DeleteDeployment(
        self, request: gateway_pb2.GatewayServiceDeleteDeploymentRequest, _: Context
    ) -> gateway_pb2.GatewayServiceDeleteDeploymentResponse:
        """See the contract."""
        await self._workers.delete(request.id)
        return gateway_pb2.GatewayServiceDeleteDeploymentResponse()

    async def SetAdapters(
        self, request: gateway_pb2.GatewayServiceSetAdaptersRequest, _: Context
    ) -> gateway_pb2.GatewayServiceSetAdaptersResponse:
        """See the contract."""
        deployment = await self._workers.set_adapters(request.id, request.scales)
        return gateway_pb2.GatewayServiceSetAdaptersResponse(deployment=deployment)

    async def CreateDeployerJob(
        self, request: gateway_pb2.GatewayServiceCreateDeployerJobRequest, _: Context
    ) -> gateway_pb2.GatewayServiceCreateDeployerJobResponse:
        """See the contract."""
        job = await self._workers.create_deployer_job(request.request)
        return gateway_pb2.GatewayServiceCreateDeployerJobResponse(job=job)

    async def WatchDeployerJob(
        self, request: gateway_pb2.GatewayServiceWatchDeployerJobRequest, _: Context
    ) -> AsyncIterator[gateway_pb2.GatewayServiceWatchDeployerJobResponse]:
        """See the contract."""
        async for job in self._workers.deployer.watch(request.id):
            yield gateway_pb2.GatewayServiceWatchDeployerJobResponse(job=job)

    async def CancelDeployerJob(
        self, request: gateway_pb2.GatewayServiceCancelDeployerJobRequest, _: Context
    ) -> gateway_pb2.GatewayServiceCancelDeployerJobResponse:
        """See the contract."""
        job = await self._workers.deployer.cancel(request.id)
        return gateway_pb2.GatewayServiceCancelDeployerJobResponse(job=job)
