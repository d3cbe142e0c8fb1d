"""Serve the trainer: `python -m web4lora_trainer`."""

from __future__ import annotations

import functools
import os
import sys

from web4.lora.v1 import trainer_pb2_grpc
from web4lora_chassis.environment import HUB_TOKEN
from web4lora_chassis.jobs import JobRunner
from web4lora_chassis.rpc import Registration, Worker, worker_process
from web4lora_chassis.settings import Settings

from web4lora_trainer.beside import LANES, lacks
from web4lora_trainer.device import require_one_process, worker_environment
from web4lora_trainer.service import TrainerService
from web4lora_trainer.specs import checks
from web4lora_trainer.trainings import prune_trainings

_MEMORY_RETRIES = 3


def trainer(settings: Settings) -> Worker:
    """Return the trainer as its process serves it.

    Raises:
        FailedPrecondition: A launcher started it as one of several processes.
    """
    require_one_process(os.environ)
    return Worker(
        "trainer",
        settings.trainer_address,
        [
            Registration(
                "web4.lora.v1.TrainerService",
                trainer_pb2_grpc.add_TrainerServiceServicer_to_server,
                TrainerService(),
            ),
        ],
        JobRunner(
            settings.home / "trainer" / "jobs",
            "web4lora_trainer.worker",
            lanes=LANES,
            lacks=lacks,
            memory_retries=_MEMORY_RETRIES,
            env=worker_environment(),
            secrets=HUB_TOKEN,
            attempts=settings.job_attempts,
            can_end_early=("train",),
        ),
        checks(settings),
        prune=functools.partial(prune_trainings, settings.home / "trainer" / "trainings"),
    )


if __name__ == "__main__":
    sys.exit(worker_process("trainer", Settings, trainer))
