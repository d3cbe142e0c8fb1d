from __future__ import annotations

import time

from web4.lora.v1 import gateway_pb2
from web4lora.commands.gc import unneeded
from web4lora.store_console import refs_in
from web4lora_chassis.artifacts import ArtifactRef, FileEntry, Manifest
from web4lora_chassis.rpc import ref_message

OLD = time.time() - 86_400


def _manifest(name: str, *inputs: ArtifactRef, created_at: float = OLD) -> Manifest:
    entry = FileEntry("file", "0" * 64, 1)
    return Manifest("gguf", name, (entry,), inputs=inputs, created_at=created_at)


def test_what_a_root_was_made_from_stays() -> None:
    base = _manifest("base")
    adapter = _manifest("adapter", base.ref)
    other = _manifest("other", base.ref)
    assert unneeded([base, adapter, other], [adapter.ref]) == [other]
    assert unneeded([base, adapter, other], []) == [base, adapter, other]


def test_the_young_stay() -> None:
    assert unneeded([_manifest("young", created_at=time.time())], []) == []


def test_a_root_that_is_gone_is_no_error() -> None:
    gone, kept = _manifest("gone"), _manifest("kept")
    assert unneeded([kept], [gone.ref, kept.ref]) == []


def test_every_artifact_of_a_run_is_found() -> None:
    dataset, adapter = _manifest("dataset").ref, _manifest("adapter").ref
    run = gateway_pb2.Run(id="run_2026-01-01_1")
    run.pipeline.dataset.artifact.CopyFrom(ref_message(dataset))
    run.stages.add(name=gateway_pb2.STAGE_NAME_TRAIN).train_result.adapter.CopyFrom(ref_message(adapter))
    run.stages.add(name=gateway_pb2.STAGE_NAME_PACKAGE)
    assert {ref.digest for ref in refs_in(run)} == {dataset.digest, adapter.digest}
