"""Trainers as messages of the contract."""

from __future__ import annotations

from collections.abc import Sequence

from web4.lora.v1 import gateway_pb2
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.rpc.jobs import timestamp

from web4lora_gateway.crew import Crew
from web4lora_gateway.places import Mode, Place, PlaceBook
from web4lora_gateway.workers import Worker, WorkerInfo


async def trainer_messages(crew: Crew, places: PlaceBook) -> list[gateway_pb2.TrainerStatus]:
    """Return all trainers, in the order in which work is given to them."""
    modes, at_work = await crew.modes(), await places.open()
    trainers = crew.workers.of_kind("trainer")
    return [_message(trainer, crew, modes.get(trainer.id, Mode.ACTIVE), at_work) for trainer in trainers]


def mode_of(mode: gateway_pb2.TrainerMode.ValueType) -> Mode:
    """Return a mode of the contract as the gateway writes it.

    Raises:
        InvalidInput: There is no such mode.
    """
    if not mode or mode not in gateway_pb2.TrainerMode.values():
        raise InvalidInput(f"{mode} is not a mode of a trainer.", metadata={"field": "mode"})
    return Mode(gateway_pb2.TrainerMode.Name(mode).removeprefix("TRAINER_MODE_"))


def _message(trainer: Worker, crew: Crew, mode: Mode, at_work: Sequence[Place]) -> gateway_pb2.TrainerStatus:
    seen = crew.seen(trainer.id)
    info = seen.info or WorkerInfo({})
    return gateway_pb2.TrainerStatus(
        name=trainer.id,
        address=trainer.address,
        mode=gateway_pb2.TrainerMode.Value(f"TRAINER_MODE_{mode}"),
        seen_time=timestamp(seen.seen_at),
        lost_time=timestamp(seen.lost_at),
        version=info.versions.get(trainer.name, ""),
        device=info.device,
        memory_bytes=info.memory_bytes,
        free_memory_bytes=info.free_memory_bytes,
        tools={name: version for name, version in info.versions.items() if name != trainer.name},
        runs=sorted({place.run_id for place in at_work if place.turn and place.worker == trainer.id}),
    )
