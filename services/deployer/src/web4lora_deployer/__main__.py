"""Serve the deployer: `python -m web4lora_deployer`."""

from __future__ import annotations

import asyncio
import logging
import sys

from web4.lora.v1 import deployer_pb2, deployer_pb2_grpc
from web4lora_chassis.errors import Web4Error
from web4lora_chassis.jobs import JobRunner
from web4lora_chassis.rpc import JobApi, Registration, serve
from web4lora_chassis.settings import load

from web4lora_deployer import promotion
from web4lora_deployer.deployments import Deployments
from web4lora_deployer.guard import Guard
from web4lora_deployer.runtimes import open_runtime
from web4lora_deployer.service import DeployerService, check
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.supervisor import Supervisor

log = logging.getLogger(__name__)


async def run(settings: DeployerSettings) -> None:
    """Serve until a signal: deployments first, so that a job that goes on finds them cared for."""
    supervisor = Supervisor(settings)
    guard = Guard(settings)
    runner = JobRunner(settings.deployer_home / "jobs", "web4lora_deployer.worker")
    jobs = JobApi(runner, deployer_pb2.DeployerJob, check)
    registration = Registration(
        deployer_pb2.DESCRIPTOR.services_by_name["DeployerService"].full_name,
        deployer_pb2_grpc.add_DeployerServiceServicer_to_server,
        DeployerService(jobs, settings),
    )
    supervisor.start()
    guard.start()
    restoring = asyncio.create_task(asyncio.to_thread(_restore, settings))
    await runner.start()
    try:
        await serve(settings.deployer_address, [registration], settings)
    finally:
        await runner.stop()
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


def main() -> int:
    """Read the settings and serve."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        asyncio.run(run(load(DeployerSettings)))
    except Web4Error as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
