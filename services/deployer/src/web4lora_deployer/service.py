"""The deployer's calls beside its jobs: suites and runtimes, and what is deployed."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from web4.lora.v1 import deployer_pb2, deployer_pb2_grpc, deployments_pb2, deployments_pb2_grpc
from web4lora_chassis.artifacts import open_store
from web4lora_chassis.rpc import ref_of

from web4lora_deployer.deployment_messages import deployment_message, runtime_message
from web4lora_deployer.records.deployments import Deployment, Deployments
from web4lora_deployer.runtimes import RUNTIMES, open_runtime
from web4lora_deployer.serving import promotion
from web4lora_deployer.serving.adapters import set_scales
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.specs import check_ref
from web4lora_deployer.testing.check_suite import check_suite

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]


class DeployerService(deployer_pb2_grpc.DeployerServiceServicer):
    """Answers the contract's DeployerService.

    Args:
        settings: Where runtimes and store are.
    """

    def __init__(self, settings: DeployerSettings) -> None:
        self._settings = settings

    async def GetDeployerInfo(
        self, _request: deployer_pb2.GetDeployerInfoRequest, _context: Context
    ) -> deployer_pb2.GetDeployerInfoResponse:
        """Look for all runtimes at once."""
        found = await asyncio.gather(
            *(asyncio.to_thread(make(self._settings).probe) for make in RUNTIMES.values())
        )
        return deployer_pb2.GetDeployerInfoResponse(
            version=version("web4lora-deployer"),
            runtimes=[runtime_message(status) for status in found],
            target=self._settings.target,
        )

    async def CheckSuite(
        self, request: deployer_pb2.CheckSuiteRequest, _context: Context
    ) -> deployer_pb2.CheckSuiteResponse:
        """Read a suite before anything is trained for it."""
        check_ref("suite", request.suite, "suite")
        store = open_store(self._settings)
        return deployer_pb2.CheckSuiteResponse(
            scores=await asyncio.to_thread(check_suite, ref_of(request.suite), store)
        )


class DeploymentService(deployments_pb2_grpc.DeploymentServiceServicer):
    """Answers the contract's DeploymentService.

    Args:
        settings: Where records and runtimes are.
    """

    def __init__(self, settings: DeployerSettings) -> None:
        self._settings = settings
        self._deployments = Deployments(settings.deployer_home)

    async def ListDeployments(
        self, _request: deployments_pb2.ListDeploymentsRequest, _context: Context
    ) -> deployments_pb2.ListDeploymentsResponse:
        """List deployments, each asked how it does, all at once."""
        records = await asyncio.to_thread(self._deployments.list)
        messages = await asyncio.gather(*(self._message(record) for record in records))
        return deployments_pb2.ListDeploymentsResponse(deployments=messages)

    async def GetDeployment(
        self, request: deployments_pb2.GetDeploymentRequest, _context: Context
    ) -> deployments_pb2.GetDeploymentResponse:
        """Return a deployment by id or name."""
        record = await asyncio.to_thread(self._deployments.find, request.id)
        return deployments_pb2.GetDeploymentResponse(deployment=await self._message(record))

    async def PromoteDeployment(
        self, request: deployments_pb2.PromoteDeploymentRequest, _context: Context
    ) -> deployments_pb2.PromoteDeploymentResponse:
        """Point a deployment's name at it."""
        record = await asyncio.to_thread(promotion.promote, request.id, self._settings)
        return deployments_pb2.PromoteDeploymentResponse(deployment=await self._message(record))

    async def RollbackDeployment(
        self, request: deployments_pb2.RollbackDeploymentRequest, _context: Context
    ) -> deployments_pb2.RollbackDeploymentResponse:
        """Point a name back at the candidate before."""
        record = await asyncio.to_thread(
            promotion.roll_back, request.name, self._settings, from_id=request.from_id
        )
        return deployments_pb2.RollbackDeploymentResponse(deployment=await self._message(record))

    async def DeleteDeployment(
        self, request: deployments_pb2.DeleteDeploymentRequest, _context: Context
    ) -> deployments_pb2.DeleteDeploymentResponse:
        """Take a deployment out, and its name's place when it has it."""
        await asyncio.to_thread(promotion.delete, request.id, self._settings)
        return deployments_pb2.DeleteDeploymentResponse()

    async def SetAdapters(
        self, request: deployments_pb2.SetAdaptersRequest, _context: Context
    ) -> deployments_pb2.SetAdaptersResponse:
        """Set how strongly a deployment's adapters are applied."""
        record = await asyncio.to_thread(set_scales, request.id, dict(request.scales), self._settings)
        return deployments_pb2.SetAdaptersResponse(deployment=await self._message(record))

    async def _message(self, record: Deployment) -> deployments_pb2.Deployment:
        runtime = open_runtime(record.target, self._settings)
        health = await asyncio.to_thread(runtime.health, record)
        return deployment_message(
            record, health, self._deployments.name(record.name), self._deployments.scales(record)
        )
