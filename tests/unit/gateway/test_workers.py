"""Workers over a real socket."""

from __future__ import annotations

import asyncio

import pytest
from web4.lora.v1 import jobs_pb2, trainer_pb2, trainer_pb2_grpc
from web4lora_chassis.errors import Unavailable
from web4lora_chassis.rpc import Registration, serve
from web4lora_chassis.settings import Settings
from web4lora_gateway.workers import AWAY, Trainer


class Earlier(trainer_pb2_grpc.TrainerServiceServicer):
    async def GetTrainerInfo(self, request, context):
        return trainer_pb2.GetTrainerInfoResponse(version="0.0.9", device="cpu", tools={"torch": "2"})


def test_a_worker_of_a_version_without_the_call_is_waited_for():
    async def main() -> None:
        port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()

        async def ready(number: int) -> None:
            port.set_result(number)

        add = trainer_pb2_grpc.add_TrainerServiceServicer_to_server
        registration = Registration("web4.lora.v1.TrainerService", add, Earlier())
        serving = asyncio.create_task(
            serve("127.0.0.1:0", [registration], Settings(), name="trainer", ready=ready, stop=stop)
        )
        trainer = Trainer(f"127.0.0.1:{await port}", Settings())
        assert await trainer.serving()
        info = await trainer.info()
        assert (info.versions, info.detail) == ({"trainer": "0.0.9", "torch": "2"}, "cpu")
        with pytest.raises(Unavailable, match="is of another version than the gateway") as caught:
            await trainer.create(jobs_pb2.CreateJobRequest(request_id="x"))
        assert caught.value.reason == AWAY
        assert "start it again" in caught.value.fix.lower()
        with pytest.raises(Unavailable):
            async for _ in trainer.watch("x"):
                pass
        await trainer.channel.close()
        stop.set()
        await serving

    asyncio.run(main())
