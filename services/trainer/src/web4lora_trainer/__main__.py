"""Serve the trainer: `python -m web4lora_trainer`."""

from __future__ import annotations

import asyncio
import logging
import sys

from web4.lora.v1 import trainer_pb2, trainer_pb2_grpc
from web4lora_chassis.errors import Web4Error
from web4lora_chassis.jobs import JobRunner
from web4lora_chassis.rpc import JobApi, Registration, serve
from web4lora_chassis.settings import Settings, load

from web4lora_trainer.device import worker_environment
from web4lora_trainer.service import TrainerService
from web4lora_trainer.specs import check

_MEMORY_RETRIES = 3


async def run(settings: Settings) -> None:
    """Serve until a signal; one job at a time, the others wait in order."""
    runner = JobRunner(
        settings.home / "trainer" / "jobs",
        "web4lora_trainer.worker",
        memory_retries=_MEMORY_RETRIES,
        env=worker_environment(),
    )
    registration = Registration(
        trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name,
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server,
        TrainerService(JobApi(runner, trainer_pb2.TrainerJob, check)),
    )
    await runner.start()
    try:
        await serve(settings.trainer_address, [registration], settings)
    finally:
        await runner.stop()


def main() -> int:
    """Read the settings and serve."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(run(load(Settings)))
    except Web4Error as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
