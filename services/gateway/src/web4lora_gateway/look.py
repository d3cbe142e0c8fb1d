"""Look at the workers: who serves, in which version, with what; an answer within seconds whoever is down."""

from __future__ import annotations

import asyncio
from typing import Any

from web4.lora.v1 import deployer_pb2, gateway_pb2
from web4lora_chassis.errors import Web4Error

from web4lora_gateway import __version__
from web4lora_gateway.workers import Worker, Workers

_TIMEOUT_SECONDS = 3.0


async def look(workers: Workers, store_url: str) -> gateway_pb2.GetGatewayInfoResponse:
    """Return what the gateway sees of its store and services."""
    looks = await asyncio.gather(*(_look_at(worker) for worker in workers.by_name.values()))
    runtimes: list[deployer_pb2.Runtime] = []
    for status, answer in looks:
        if status.name == "deployer" and answer is not None:
            runtimes = list(answer.runtimes)
    return gateway_pb2.GetGatewayInfoResponse(
        version=__version__, store=store_url, services=[status for status, _ in looks], runtimes=runtimes
    )


async def _look_at(worker: Worker) -> tuple[gateway_pb2.ServiceStatus, Any]:
    status = gateway_pb2.ServiceStatus(name=worker.name, address=worker.address)
    try:
        status.serving = await worker.serving()
        info = await worker.info(_TIMEOUT_SECONDS)
    except Web4Error as error:
        status.detail = f"{error.message} {error.fix}".rstrip()
        return status, None
    status.version = info.versions.get(worker.name, "")
    status.detail = _detail(info.message)
    return status, info.message


def _detail(answer: object) -> str:
    """Return a worker's own words on what it is and has."""
    if device := getattr(answer, "device", ""):
        free = getattr(answer, "free_memory_bytes", 0)
        return f"{device}, {free / 1e9:.1f} GB free" if free else device
    if version := getattr(answer, "llama_cpp_version", ""):
        ready = getattr(answer, "llama_cpp_ready", False)
        return f"llama.cpp {version}" + ("" if ready else ", compiled by the first job")
    runtimes = getattr(answer, "runtimes", ())
    usable = [f"{runtime.target} {runtime.version}".rstrip() for runtime in runtimes if runtime.usable]
    return ", ".join(usable) or "no runtime found"
