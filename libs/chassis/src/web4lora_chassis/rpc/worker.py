"""The process of a service: settings read, jobs taken up again, calls answered until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from web4.lora.v1 import jobs_pb2_grpc

from web4lora_chassis.errors import Web4Error
from web4lora_chassis.jobs import JobRunner
from web4lora_chassis.rpc.housekeeping import Housekeeping, Prune
from web4lora_chassis.rpc.jobs import Check, JobService
from web4lora_chassis.rpc.server import Registration, serve
from web4lora_chassis.settings import S, Settings, load_service
from web4lora_chassis.telemetry import metrics, start


@dataclass(frozen=True)
class Worker:
    """What one worker service has of its own.

    Attributes:
        name: trainer, packager or deployer.
        address: Where it listens.
        own: Its own services of the contract, beside its jobs.
        runner: Its jobs.
        checks: What refuses a spec before its job is accepted, by each kind of job that it does.
        beside: What goes on while it serves; entered before jobs are taken up again, left after they ended.
        prune: Removes what it keeps besides its jobs, when it is no longer kept.
    """

    name: str
    address: str
    own: Sequence[Registration]
    runner: JobRunner
    checks: Mapping[str, Check]
    beside: contextlib.AbstractAsyncContextManager[None] = field(default_factory=contextlib.nullcontext)
    prune: Prune | None = None


async def serve_worker(worker: Worker, settings: Settings) -> None:
    """Serve a worker until a signal; each lane does one job at a time, the others wait in order."""
    house = Housekeeping(settings.home, worker.runner, settings, worker.prune)
    jobs = Registration(
        "web4.lora.v1.JobService",
        jobs_pb2_grpc.add_JobServiceServicer_to_server,
        JobService(worker.name, worker.runner, worker.checks, lambda: house.notice),
    )
    async with worker.beside:
        await worker.runner.start()
        keeping = asyncio.create_task(house.run())
        try:
            with (
                metrics.shown(metrics.JOBS, worker.runner.waiting),
                metrics.shown(metrics.JOB_MEMORY, worker.runner.memory_bytes),
            ):
                await serve(worker.address, [*worker.own, jobs], settings, name=worker.name)
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await worker.runner.stop()


def worker_process(name: str, kind: type[S], make: Callable[[S], Worker]) -> int:
    """Be a worker's process; return its exit code.

    Args:
        name: trainer, packager or deployer.
        kind: Its settings.
        make: Makes it of them.
    """

    def run(settings: S) -> None:
        asyncio.run(serve_worker(make(settings), settings))

    return service_process(name, kind, run)


def service_process(name: str, kind: type[S], run: Callable[[S], None]) -> int:
    """Be a service's process: read its settings and serve until told to stop; return its exit code."""
    try:
        settings = load_service(kind)
        start(name, settings)
        run(settings)
    except Web4Error as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0
