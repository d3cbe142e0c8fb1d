"""Serve the deployer: `python -m web4lora_deployer`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator

from web4.lora.v1 import deployer_pb2_grpc, deployments_pb2_grpc
from web4lora_chassis.errors import Web4Error
from web4lora_chassis.jobs import JobRunner
from web4lora_chassis.rpc import Registration, Worker, worker_process

from web4lora_deployer.records.deployments import Deployments
from web4lora_deployer.runtimes import open_runtime
from web4lora_deployer.runtimes.llama_server_supervisor import Supervisor
from web4lora_deployer.service import DeployerService, DeploymentService
from web4lora_deployer.serving import promotion
from web4lora_deployer.serving.guard import Guard
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.specs import checks

log = logging.getLogger(__name__)


def deployer(settings: DeployerSettings) -> Worker:
    """Return the deployer as its process serves it."""
    return Worker(
        "deployer",
        settings.deployer_address,
        [
            Registration(
                "web4.lora.v1.DeployerService",
                deployer_pb2_grpc.add_DeployerServiceServicer_to_server,
                DeployerService(settings),
            ),
            Registration(
                "web4.lora.v1.DeploymentService",
                deployments_pb2_grpc.add_DeploymentServiceServicer_to_server,
                DeploymentService(settings),
            ),
        ],
        JobRunner(
            settings.deployer_home / "jobs", "web4lora_deployer.worker", attempts=settings.job_attempts
        ),
        checks(settings),
        beside=_care(settings),
    )


@contextlib.asynccontextmanager
async def _care(settings: DeployerSettings) -> AsyncIterator[None]:
    """Care for the deployments while the deployer serves: a job that goes on finds them cared for."""
    supervisor = Supervisor(settings)
    guard = Guard(settings)
    supervisor.start()
    guard.start()
    restoring = asyncio.create_task(asyncio.to_thread(_restore, settings))
    try:
        yield
    finally:
        await asyncio.to_thread(guard.stop)
        await asyncio.to_thread(supervisor.stop)
        await restoring


def _restore(settings: DeployerSettings) -> None:
    """Give the deployments back what a restart took from them, and finish what a crash left half done."""
    promotion.settle(settings)
    for record in Deployments(settings.deployer_home).list():
        if not record.loaded:
            continue
        try:
            open_runtime(record.target, settings).restore(record)
        except Web4Error as error:  # its health says so to whoever asks
            log.warning("restoring %s: %s", record.id, error)


if __name__ == "__main__":
    sys.exit(worker_process("deployer", DeployerSettings, deployer))
