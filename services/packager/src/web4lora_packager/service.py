"""The packager's RPCs: jobs, and which llama.cpp it has. Nothing here imports torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from web4.lora.v1 import packager_pb2, packager_pb2_grpc
from web4lora_chassis.rpc import JobApi
from web4lora_llamacpp import SDIST, find

from web4lora_packager.versions import packager_version, tool_versions

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]


class PackagerService(packager_pb2_grpc.PackagerServiceServicer):
    """Answers the contract's PackagerService.

    Args:
        jobs: The job RPCs.
        cache: The cache folder of the settings, where llama.cpp is looked for.
    """

    def __init__(self, jobs: JobApi[packager_pb2.PackagerJob], cache: Path) -> None:
        self._jobs = jobs
        self._cache = cache

    async def GetPackagerInfo(
        self, _request: packager_pb2.GetPackagerInfoRequest, _context: Context
    ) -> packager_pb2.GetPackagerInfoResponse:
        """Say which llama.cpp is built, or would be."""
        llama = await asyncio.to_thread(find, self._cache)
        return packager_pb2.GetPackagerInfoResponse(
            version=packager_version(),
            llama_cpp_version=llama.version if llama else f"not built yet ({SDIST.commit})",
            llama_cpp_ready=llama is not None,
            tools=tool_versions(),
        )

    async def CreatePackagerJob(
        self, request: packager_pb2.CreatePackagerJobRequest, _context: Context
    ) -> packager_pb2.CreatePackagerJobResponse:
        """Create a job."""
        return packager_pb2.CreatePackagerJobResponse(job=await self._jobs.create(request))

    async def GetPackagerJob(
        self, request: packager_pb2.GetPackagerJobRequest, _context: Context
    ) -> packager_pb2.GetPackagerJobResponse:
        """Return a job."""
        return packager_pb2.GetPackagerJobResponse(job=self._jobs.get(request.id))

    async def ListPackagerJobs(
        self, request: packager_pb2.ListPackagerJobsRequest, _context: Context
    ) -> packager_pb2.ListPackagerJobsResponse:
        """List jobs."""
        jobs, token = self._jobs.list(request)
        return packager_pb2.ListPackagerJobsResponse(jobs=jobs, next_page_token=token)

    async def WatchPackagerJob(
        self, request: packager_pb2.WatchPackagerJobRequest, _context: Context
    ) -> AsyncIterator[packager_pb2.WatchPackagerJobResponse]:
        """Stream snapshots of a job."""
        async for job in self._jobs.watch(request.id):
            yield packager_pb2.WatchPackagerJobResponse(job=job)

    async def CancelPackagerJob(
        self, request: packager_pb2.CancelPackagerJobRequest, _context: Context
    ) -> packager_pb2.CancelPackagerJobResponse:
        """Ask a job to end."""
        return packager_pb2.CancelPackagerJobResponse(job=await self._jobs.cancel(request.id))
