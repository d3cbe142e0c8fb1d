"""The packager's own RPC: which llama.cpp it has. Nothing here imports torch."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from web4.lora.v1 import packager_pb2, packager_pb2_grpc
from web4lora_llamacpp import SDIST, find

from web4lora_packager.versions import packager_version, tool_versions

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]


class PackagerService(packager_pb2_grpc.PackagerServiceServicer):
    """Answers the contract's PackagerService.

    Args:
        cache: The cache folder of the settings, where llama.cpp is looked for.
    """

    def __init__(self, cache: Path) -> None:
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
