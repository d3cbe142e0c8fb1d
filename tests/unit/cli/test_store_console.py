from __future__ import annotations

from web4.lora.v1 import gateway_pb2
from web4lora.store_console import run_folders
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.rpc import ref_message
from web4lora_chassis.settings import Settings

RUN = gateway_pb2.Run(id="run_2026-01-01_1")
REF = ArtifactRef("adapter", "demo", "ab" * 32)


def test_every_folder_has_an_address() -> None:
    run = gateway_pb2.Run(id=RUN.id)
    run.stages.add().train_result.adapter.CopyFrom(ref_message(REF))
    settings = Settings(store="s3+http://127.0.0.1:9000/web4lora", console="http://127.0.0.1:9001/")
    assert run_folders(run, settings) == [
        ("run", "http://127.0.0.1:9001/browser/web4lora/runs/run_2026-01-01_1/"),
        ("adapter", "http://127.0.0.1:9001/browser/web4lora/artifacts/adapter/demo/abababababab/"),
    ]


def test_without_a_console_there_are_none() -> None:
    assert run_folders(RUN, Settings(store="s3+http://127.0.0.1:9000/web4lora")) == []
