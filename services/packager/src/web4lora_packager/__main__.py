"""Serve the packager: `python -m web4lora_packager`."""

from __future__ import annotations

import sys

from web4.lora.v1 import packager_pb2_grpc
from web4lora_chassis.jobs import JobRunner
from web4lora_chassis.rpc import Registration, Worker, worker_process

from web4lora_packager.service import PackagerService
from web4lora_packager.settings import PackagerSettings
from web4lora_packager.specs import spec_of


def packager(settings: PackagerSettings) -> Worker:
    """Return the packager as its process serves it."""
    return Worker(
        "packager",
        settings.packager_address,
        [
            Registration(
                "web4.lora.v1.PackagerService",
                packager_pb2_grpc.add_PackagerServiceServicer_to_server,
                PackagerService(settings.cache),
            ),
        ],
        JobRunner(
            settings.home / "packager" / "jobs",
            "web4lora_packager.worker",
            env={"OPENBLAS_NUM_THREADS": "1"},  # B @ A is narrow: threads that wait for each other cost more
            attempts=settings.job_attempts,
        ),
        {"package": lambda spec, _: spec_of(spec)},
    )


if __name__ == "__main__":
    sys.exit(worker_process("packager", PackagerSettings, packager))
