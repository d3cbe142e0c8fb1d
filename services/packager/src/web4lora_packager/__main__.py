"""Serve the packager: `python -m web4lora_packager`."""

from __future__ import annotations

import asyncio
import logging
import sys

from web4.lora.v1 import packager_pb2, packager_pb2_grpc
from web4lora_chassis.errors import Web4Error
from web4lora_chassis.jobs import JobRunner
from web4lora_chassis.rpc import JobApi, Registration, serve
from web4lora_chassis.settings import load

from web4lora_packager.service import PackagerService
from web4lora_packager.settings import PackagerSettings
from web4lora_packager.specs import check


async def run(settings: PackagerSettings) -> None:
    """Serve until a signal; one job at a time, the others wait in order."""
    runner = JobRunner(
        settings.home / "packager" / "jobs",
        "web4lora_packager.worker",
        env={"OPENBLAS_NUM_THREADS": "1"},  # B @ A is narrow: threads that wait for each other cost more
    )
    registration = Registration(
        packager_pb2.DESCRIPTOR.services_by_name["PackagerService"].full_name,
        packager_pb2_grpc.add_PackagerServiceServicer_to_server,
        PackagerService(JobApi(runner, packager_pb2.PackagerJob, check), settings.cache),
    )
    await runner.start()
    try:
        await serve(settings.packager_address, [registration], settings)
    finally:
        await runner.stop()


def main() -> int:
    """Read the settings and serve."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(run(load(PackagerSettings)))
    except Web4Error as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
