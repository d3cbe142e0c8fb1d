"""Train: an adapter on the base model.

The key leaves the trainer's libraries out: a newer torch doesn't make hours of training wrong, and who wants
to train anew says so with from_stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from web4.lora.v1 import trainer_pb2
from web4lora_chassis.rpc import ref_message

from web4lora_gateway.stages.base import Inputs, JobStage, Ref
from web4lora_gateway.stages.prepare import Prepare


class Train(JobStage[trainer_pb2.TrainSpec, trainer_pb2.TrainResult]):
    """A train job."""

    name = "train"
    worker = "trainer"
    lane = "train"
    made = trainer_pb2.TrainResult
    revision = 2  # every answer is trained up to its own end of turn; a few conversations are kept

    def spec(self, inputs: Inputs) -> trainer_pb2.TrainSpec:
        """Train on the dataset from the prepared base."""
        return trainer_pb2.TrainSpec(
            name=inputs.pipeline.name,
            dataset=ref_message(inputs.pipeline.dataset),
            base=inputs.of_stage(Prepare).base,
            train=inputs.pipeline.train,
        )

    def identity(self, inputs: Inputs, spec: trainer_pb2.TrainSpec) -> Mapping[str, Any]:
        """Leave out who is told of the steps: the adapter is the same."""
        data = super().identity(inputs, spec)
        train = {key: value for key, value in data["train"].items() if key != "report_to"}
        return {**data, "train": train}

    def needs(self, inputs: Inputs) -> tuple[int, float]:
        """Return what preparing estimated."""
        estimate = inputs.of_stage(Prepare).estimate
        return estimate.peak_memory_bytes, estimate.seconds

    def complete_result(self, result: trainer_pb2.TrainResult) -> bool:
        """Tell whether all planned steps were made."""
        return not result.ended_early

    def artifacts(self, result: trainer_pb2.TrainResult) -> tuple[Ref, ...]:
        """Return the adapter."""
        return (result.adapter,)

    def files(self, result: trainer_pb2.TrainResult) -> tuple[Ref, ...]:
        """Return the adapter."""
        return (result.adapter,)
