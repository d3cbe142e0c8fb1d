"""What the gateway sees of the workers: who serves, in which version, with what; quick, whoever is down."""

from __future__ import annotations

import asyncio

from web4.lora.v1 import deployer_pb2, gateway_pb2
from web4lora_chassis.errors import Web4Error

from web4lora_gateway import __version__
from web4lora_gateway.workers import Worker, Workers

_TIMEOUT_SECONDS = 3.0


async def gateway_info(workers: Workers, store_url: str) -> gateway_pb2.GetGatewayInfoResponse:
    """Return what the gateway sees of its store and services."""
    answers = await asyncio.gather(*(_ask(worker) for worker in workers.by_id.values()))
    return gateway_pb2.GetGatewayInfoResponse(
        version=__version__,
        store=store_url,
        services=[status for status, _ in answers],
        runtimes=[runtime for _, runtimes in answers for runtime in runtimes],
    )


async def _ask(worker: Worker) -> tuple[gateway_pb2.ServiceStatus, tuple[deployer_pb2.Runtime, ...]]:
    status = gateway_pb2.ServiceStatus(name=worker.id, address=worker.address)
    try:
        status.serving = await worker.serving()
        info = await worker.info(_TIMEOUT_SECONDS)
    except Web4Error as error:
        status.detail = f"{error.message} {error.fix}".rstrip()
        return status, ()
    status.version = info.versions[worker.name]
    status.detail = info.detail
    return status, info.runtimes
