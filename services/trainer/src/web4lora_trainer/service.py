"""The trainer's own RPC: what it trains on. Nothing here imports torch."""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from web4.lora.v1 import trainer_pb2, trainer_pb2_grpc

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
    """Answers the contract's TrainerService."""

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
