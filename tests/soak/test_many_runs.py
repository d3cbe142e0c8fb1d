"""A thousand runs, two hundred watchers, three trainers, and two gateways on one PostgreSQL, killed in turn.

WEB4LORA_MANY_RUNS sets how many runs there are, WEB4LORA_MANY_WATCHERS how many watch.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import psycopg
import pytest
from web4.lora.v1 import gateway_pb2, gateway_pb2_grpc
from web4lora_chassis.rpc import async_channel

from tests.integration.gateway.conftest import TERMINAL, WORKERS
from tests.integration.gateway.test_gateway_random import check_ended

RUNS = int(os.environ.get("WEB4LORA_MANY_RUNS", "1000"))
WATCHERS = int(os.environ.get("WEB4LORA_MANY_WATCHERS", "200"))
GATEWAYS = ("gateway", "gateway-2")
TRAINERS = ("trainer", "gpu-1", "gpu-2")
SEEDS = 20
SUBMITTED_AT_ONCE = 8
RUNS_A_KILL = 25
LOOK_SECONDS = 1.0
STUCK_SECONDS = 300.0
"""No run ended for so long, though one of the gateways always is there to find those that the other left."""
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""What a call to a gateway that is killed meanwhile ends with."""


@dataclass
class Crowd:
    """All that call the gateways, whichever is there."""

    stack: Any
    apis: list[gateway_pb2_grpc.GatewayServiceStub]
    database: str
    pipeline: gateway_pb2.Pipeline
    random: random.Random = field(default_factory=lambda: random.Random(1))
    run_ids: list[str] = field(default_factory=list)
    ended: int = 0
    counted: Counter[str] = field(default_factory=Counter)

    async def call(self, method: str, request: Any) -> Any:
        """Make a repeatable call until a gateway answers."""
        while True:
            try:
                return await getattr(self.random.choice(self.apis), method)(request)
            except grpc.aio.AioRpcError as error:
                if error.code() not in AWAY:
                    raise
                self.counted[f"{method} again"] += 1
                await asyncio.sleep(0.2)

    async def submit(self) -> None:
        """Make all runs: most do all of their stages, the others may take over what there is."""
        numbers = iter(range(RUNS))

        async def client() -> None:
            for number in numbers:
                request = gateway_pb2.CreateRunRequest(pipeline=self.pipeline, request_id=f"request-{number}")
                request.pipeline.train.seed = number % SEEDS
                if number % 4:
                    request.from_stage = gateway_pb2.STAGE_NAME_PREPARE
                self.run_ids.append((await self.call("CreateRun", request)).run.id)

        await asyncio.gather(*(client() for _ in range(SUBMITTED_AT_ONCE)))

    async def watch(self, number: int) -> None:
        """Watch a run to its end, at the other gateway where one goes away."""
        while number >= len(self.run_ids):
            await asyncio.sleep(0.1)
        run_id, newest = self.run_ids[number], 0
        while True:
            try:
                before = 0
                async for answer in self.random.choice(self.apis).WatchRun(
                    gateway_pb2.WatchRunRequest(id=run_id)
                ):
                    run = answer.run
                    assert run.id == run_id
                    assert run.revision > before, f"{run_id} went back from {before} to {run.revision}"
                    before = run.revision
                    newest = max(newest, before)
                    self.counted["snapshots"] += 1
                    if run.state in TERMINAL:
                        assert run.revision >= newest, f"{run_id} ended before what was seen of it"
                        return
            except grpc.aio.AioRpcError as error:
                if error.code() not in AWAY:
                    raise
            self.counted["watches again"] += 1
            await asyncio.sleep(0.2)

    async def look(self) -> None:
        """Look for ever how many runs have ended, in the database itself: to list them all would be work."""
        query = "SELECT count(*) FROM web4lora_runs WHERE ended"
        async with await psycopg.AsyncConnection.connect(self.database, autocommit=True) as connection:
            while True:
                (self.ended,) = await (await connection.execute(query)).fetchone() or (0,)
                await asyncio.sleep(LOOK_SECONDS)

    async def kill_in_turn(self) -> None:
        """Kill the gateway that lived longest and start it again, whenever so many more runs have ended."""
        for number in range(RUNS // RUNS_A_KILL):
            while self.ended <= number * RUNS_A_KILL:
                await asyncio.sleep(LOOK_SECONDS)
            name = GATEWAYS[number % 2]
            await asyncio.to_thread(self.stack.kill, name)
            self.counted["kills"] += 1
            await asyncio.to_thread(self.stack.start, name)

    async def all_ended(self) -> None:
        """Wait until every run has ended."""
        most, since = 0, time.monotonic()
        while self.ended < RUNS:
            if self.ended > most:
                most, since = self.ended, time.monotonic()
                sys.stdout.write(f"{most} of {RUNS} runs have ended, {self.counted['kills']} kills\n")
            if time.monotonic() - since > STUCK_SECONDS:
                stuck = [(run.id, run.state) for run in await self.list() if run.state not in TERMINAL]
                raise AssertionError(f"stuck: {stuck}\n{self.stack._logs()}")
            await asyncio.sleep(10 * LOOK_SECONDS)

    async def list(self) -> list[gateway_pb2.Run]:
        runs: list[gateway_pb2.Run] = []
        request = gateway_pb2.ListRunsRequest(page_size=1000)
        while True:
            page = await self.call("ListRuns", request)
            runs.extend(page.runs)
            if not page.next_page_token:
                return runs
            request.page_token = page.next_page_token


@contextlib.asynccontextmanager
async def at_work(*works: Any) -> AsyncIterator[asyncio.TaskGroup]:
    """Have work go on until the block ends; an error of it is one of the block."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in works]
        yield group
        for task in tasks:
            task.cancel()


@pytest.mark.timeout(3600)
def test_many_runs(stack, postgresql):
    stack.env |= {"WEB4LORA_DATABASE": postgresql, "STAND_IN_QUICK": "1", "WEB4LORA_CALLS_PER_SECOND": "5000"}
    stack.add_gateway("gateway-2")
    for name in TRAINERS[1:]:
        stack.add_trainer(name)
    pipeline = stack.pipeline()
    stack.start(*WORKERS, *TRAINERS[1:], *GATEWAYS)

    async def main() -> list[gateway_pb2.Run]:
        async with contextlib.AsyncExitStack() as channels:
            apis = [
                gateway_pb2_grpc.GatewayServiceStub(
                    await channels.enter_async_context(async_channel(stack.addresses[name], stack.settings))
                )
                for name in GATEWAYS
            ]
            crowd = Crowd(stack, apis, postgresql, pipeline)
            began = time.monotonic()
            watched = [number * RUNS // WATCHERS for number in range(WATCHERS)]
            async with at_work(crowd.look(), crowd.kill_in_turn()), asyncio.TaskGroup() as group:
                group.create_task(crowd.submit())
                for number in watched:
                    group.create_task(crowd.watch(number))
                group.create_task(crowd.all_ended())
            runs = await crowd.list()
            seconds = time.monotonic() - began
        sys.stdout.write(
            f"{RUNS} runs in {seconds:.0f} s, {60 * RUNS / seconds:.0f} a minute; {WATCHERS} watchers; "
            f"{dict(crowd.counted)}\n"
        )
        return runs

    runs = asyncio.run(main())
    sys.stdout.write(f"{dict(check_ended(stack, runs, cancelled=()))}\n")
    trained = [
        len(list(home.glob("trainer/jobs/train-*")))
        for home in (stack.root / "home", *map(stack.root.joinpath, TRAINERS[1:]))
    ]
    sys.stdout.write(f"trainings of each trainer: {trained}\n")
    assert all(trained)
