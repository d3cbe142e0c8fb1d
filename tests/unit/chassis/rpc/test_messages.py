"""References in messages, at any depth."""

from __future__ import annotations

from web4.lora.v1 import gateway_pb2
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.rpc import ref_message
from web4lora_chassis.rpc.artifact_messages import refs_in


def test_every_artifact_of_a_run_is_found() -> None:
    dataset, adapter = ArtifactRef("dataset", "data", "1" * 64), ArtifactRef("adapter", "demo", "2" * 64)
    run = gateway_pb2.Run(id="run_2026-01-01_1")
    run.pipeline.dataset.artifact.CopyFrom(ref_message(dataset))
    run.stages.add(name=gateway_pb2.STAGE_NAME_TRAIN).train_result.adapter.CopyFrom(ref_message(adapter))
    run.stages.add(name=gateway_pb2.STAGE_NAME_PACKAGE)
    assert {ref.digest for ref in refs_in(run)} == {dataset.digest, adapter.digest}
