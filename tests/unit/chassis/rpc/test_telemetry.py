"""Calls over a real socket: how they are counted, and what they carry of the work that they are for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY
from web4.lora.v1 import jobs_pb2, jobs_pb2_grpc
from web4lora_chassis import telemetry
from web4lora_chassis.errors import NotFound
from web4lora_chassis.rpc import Registration, async_channel, channel, serve
from web4lora_chassis.settings import Settings
from web4lora_chassis.telemetry import work

SERVICE = "web4.lora.v1.JobService"


class Servicer(jobs_pb2_grpc.JobServiceServicer):
    """Answers with the run that a call is for; there is no job "none"."""

    async def GetJob(self, request: Any, context: Any) -> jobs_pb2.GetJobResponse:
        if request.id == "none":
            raise NotFound("There is no such job.")
        return jobs_pb2.GetJobResponse(job=jobs_pb2.Job(id=work.current().get("run", "")))

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        for _ in range(2):
            await asyncio.sleep(0)
            yield jobs_pb2.WatchJobResponse(job=jobs_pb2.Job(id=work.current().get("run", "")))
        if request.id == "endless":
            await asyncio.Event().wait()


def served(test: Any, settings: Settings | None = None) -> None:
    """Serve on a free port, and run a coroutine function with that and the settings."""
    wanted = settings or Settings()

    async def main() -> None:
        stop = asyncio.Event()

        async def ready(port: int) -> None:
            try:
                await test(port, wanted)
            finally:
                stop.set()

        add = jobs_pb2_grpc.add_JobServiceServicer_to_server
        registration = Registration(SERVICE, add, Servicer())
        await serve("127.0.0.1:0", [registration], wanted, name="gateway", ready=ready, stop=stop)

    asyncio.run(main())


def answered(method: str, code: str) -> float:
    return REGISTRY.get_sample_value("web4lora_rpc_seconds_count", {"method": method, "code": code}) or 0.0


async def get(port: int, settings: Settings, job: str = "x", **options: Any) -> str:
    async with async_channel(f"127.0.0.1:{port}", settings) as opened:
        stub = jobs_pb2_grpc.JobServiceStub(opened)
        return (await stub.GetJob(jobs_pb2.GetJobRequest(id=job), timeout=20, **options)).job.id


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_calls_are_counted_by_how_they_ended() -> None:
    method = f"{SERVICE}/GetJob"
    before = answered(method, "OK"), answered(method, "NOT_FOUND")

    async def calls(port: int, settings: Settings) -> None:
        await get(port, settings)
        with pytest.raises(grpc.RpcError):
            await get(port, settings, "none")

    served(calls)
    assert (answered(method, "OK"), answered(method, "NOT_FOUND")) == (before[0] + 1, before[1] + 1)


def test_a_watch_counts_when_it_ends_and_when_its_client_goes() -> None:
    method = f"{SERVICE}/WatchJob"
    ok, cancelled = answered(method, "OK"), answered(method, "CANCELLED")

    async def calls(port: int, settings: Settings) -> None:
        async with async_channel(f"127.0.0.1:{port}", settings) as opened:
            stub = jobs_pb2_grpc.JobServiceStub(opened)
            assert len([each async for each in stub.WatchJob(jobs_pb2.WatchJobRequest(id="x"))]) == 2
            endless = stub.WatchJob(jobs_pb2.WatchJobRequest(id="endless"))
            await endless.read()
            assert REGISTRY.get_sample_value("web4lora_rpcs_at_work") == 1
            endless.cancel()
            await until(lambda: answered(method, "CANCELLED") == cancelled + 1)
            assert REGISTRY.get_sample_value("web4lora_rpcs_at_work") == 0

    served(calls)
    assert answered(method, "OK") == ok + 1


def test_who_is_refused_adds_no_name_to_the_metrics() -> None:
    before = answered("", "UNAUTHENTICATED")

    async def calls(port: int, _: Settings) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
            for method in ("/web4.lora.v1.JobService/GetJob", "/made/up"):
                with pytest.raises(grpc.RpcError):
                    await opened.unary_unary(method)(b"", timeout=20)

    served(calls, Settings(token="secret"))
    assert answered("", "UNAUTHENTICATED") == before + 2
    assert not answered("made/up", "UNAUTHENTICATED")


def test_a_call_says_which_run_it_is_for() -> None:
    async def calls(port: int, settings: Settings) -> None:
        assert await get(port, settings) == ""
        with telemetry.belongs_to(run="run_1", job="never told"):
            assert await get(port, settings) == "run_1"
            async with async_channel(f"127.0.0.1:{port}", settings) as opened:
                watch = jobs_pb2_grpc.JobServiceStub(opened).WatchJob(jobs_pb2.WatchJobRequest())
                assert [each.job.id async for each in watch] == ["run_1", "run_1"]

            def blocking() -> str:
                with channel(f"127.0.0.1:{port}", settings) as opened:
                    stub = jobs_pb2_grpc.JobServiceStub(opened)
                    return stub.GetJob(jobs_pb2.GetJobRequest(), timeout=20).job.id

            assert await asyncio.to_thread(blocking) == "run_1"

    served(calls)


def test_what_is_too_long_for_a_log_is_left_out() -> None:
    async def calls(port: int, settings: Settings) -> None:
        assert await get(port, settings, metadata=(("web4lora-run", "x" * 1000),)) == ""

    served(calls)
