"""Train: an adapter on the base model.

The key leaves the trainer's libraries out: a newer torch doesn't make hours of training wrong, and who wants
to train anew says so with from_stage.
"""

from __future__ import annotations

from web4.lora.v1 import trainer_pb2
from web4lora_chassis.rpc import ref_message

from web4lora_gateway.stages.base import Inputs, Ref, Stage


def _spec(inputs: Inputs) -> trainer_pb2.TrainSpec:
    return trainer_pb2.TrainSpec(
        name=inputs.pipeline.name,
        dataset=ref_message(inputs.pipeline.dataset),
        base=inputs.result("prepare", trainer_pb2.PrepareResult()).base,
        train=inputs.pipeline.train,
    )


def _artifacts(result: trainer_pb2.TrainResult) -> tuple[Ref, ...]:
    return (result.adapter,)


STAGE = Stage(
    name="train",
    worker="trainer",
    spec=_spec,
    result=trainer_pb2.TrainResult,
    artifacts=_artifacts,
    files=_artifacts,
)
