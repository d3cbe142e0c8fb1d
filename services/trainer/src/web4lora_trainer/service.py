"""The trainer's RPCs: jobs, and what this trainer trains on. Nothing here imports torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from web4.lora.v1 import trainer_pb2, trainer_pb2_grpc
from web4lora_chassis.rpc import JobApi

from web4lora_trainer import __version__
from web4lora_trainer.device import describe_without_torch

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

_TOOLS = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "safetensors", "gguf")


def tool_versions() -> dict[str, str]:
    """Return the versions of the libraries that training depends on."""
    found = {}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


class TrainerService(trainer_pb2_grpc.TrainerServiceServicer):
    """Answers the contract's TrainerService.

    Args:
        jobs: The job RPCs.
    """

    def __init__(self, jobs: JobApi[trainer_pb2.TrainerJob]) -> None:
        self._jobs = jobs

    async def GetTrainerInfo(
        self, _request: trainer_pb2.GetTrainerInfoRequest, _context: Context
    ) -> trainer_pb2.GetTrainerInfoResponse:
        """Say what this trainer trains on."""
        device, memory_bytes, free_bytes = await asyncio.to_thread(describe_without_torch)
        return trainer_pb2.GetTrainerInfoResponse(
            version=__version__,
            device=device,
            memory_bytes=memory_bytes,
            free_memory_bytes=free_bytes,
            tools=tool_versions(),
        )

    async def CreateTrainerJob(
        self, request: trainer_pb2.CreateTrainerJobRequest, _context: Context
    ) -> trainer_pb2.CreateTrainerJobResponse:
        """Create a job."""
        return trainer_pb2.CreateTrainerJobResponse(job=await self._jobs.create(request))

    async def GetTrainerJob(
        self, request: trainer_pb2.GetTrainerJobRequest, _context: Context
    ) -> trainer_pb2.GetTrainerJobResponse:
        """Return a job."""
        return trainer_pb2.GetTrainerJobResponse(job=self._jobs.get(request.id))

    async def ListTrainerJobs(
        self, request: trainer_pb2.ListTrainerJobsRequest, _context: Context
    ) -> trainer_pb2.ListTrainerJobsResponse:
        """List jobs."""
        jobs, token = self._jobs.list(request)
        return trainer_pb2.ListTrainerJobsResponse(jobs=jobs, next_page_token=token)

    async def WatchTrainerJob(
        self, request: trainer_pb2.WatchTrainerJobRequest, _context: Context
    ) -> AsyncIterator[trainer_pb2.WatchTrainerJobResponse]:
        """Stream snapshots of a job."""
        async for job in self._jobs.watch(request.id):
            yield trainer_pb2.WatchTrainerJobResponse(job=job)

    async def CancelTrainerJob(
        self, request: trainer_pb2.CancelTrainerJobRequest, _context: Context
    ) -> trainer_pb2.CancelTrainerJobResponse:
        """Ask a job to end."""
        return trainer_pb2.CancelTrainerJobResponse(job=await self._jobs.cancel(request.id))
