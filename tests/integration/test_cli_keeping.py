"""`web4lora gc`, `runs delete`, `runs keep`, and what `status` and `doctor` say of a full disk."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from web4.lora.v1 import artifacts_pb2, gateway_pb2
from web4lora.main import main
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.rpc import ref_message

from tests.integration import scripted_gateway as scripted
from tests.integration.scripted_gateway import RUN_ID, ScriptedGateway

Command = Callable[..., str]
OLD = ArtifactRef("gguf", "old", "cd" * 32, 2_000_000)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[tuple[ScriptedGateway, int]]:
    server, port, made = scripted.play(tmp_path / "home")
    made.plan(gateway_pb2.Pipeline(name="web4-demo"))
    yield made, port
    server.stop(0)


@pytest.fixture
def command(
    gateway: tuple[ScriptedGateway, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    for name in [name for name in os.environ if name.startswith("WEB4LORA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WEB4LORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WEB4LORA_GATEWAY_ADDRESS", f"127.0.0.1:{gateway[1]}")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)

    def run(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["web4lora", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        assert (caught.value.code or 0) == code, said
        return said.out + said.err

    return run


def garbage(gateway: ScriptedGateway) -> None:
    Found, Artifact = artifacts_pb2.CollectGarbageResponse, artifacts_pb2.CollectedArtifact
    reasons = [RUN_ID, "run_2", "run_3", "run_4"]
    gateway.garbage = [
        Found(artifact=Artifact(ref=ref_message(scripted.GGUF), kept_for=reasons)),
        Found(artifact=Artifact(ref=ref_message(OLD))),
        Found(upload=artifacts_pb2.CutOffUpload(place="artifacts/gguf/cut/0123", size_bytes=1_000_000)),
    ]


def test_gc_says_what_would_go_and_on_request_what_the_rest_is_kept_for(
    gateway: tuple[ScriptedGateway, int], command: Command
) -> None:
    garbage(gateway[0])
    said = command("gc")
    assert f"{OLD}  2.0 MB" in said
    assert "artifacts/gguf/cut/0123  1.0 MB, an upload that was cut off" in said
    assert "1 artifact and 1 cut-off upload, 3.0 MB, would go; nothing is deleted yet." in said
    assert str(scripted.GGUF) not in said
    assert gateway[0].called[-1] == artifacts_pb2.CollectGarbageRequest(dry_run=True, keep_runs=10)
    assert f"kept for {RUN_ID}; run_2; run_3, and 1 more" in command("gc", "--kept")


def test_gc_deletes_when_told_to(gateway: tuple[ScriptedGateway, int], command: Command) -> None:
    garbage(gateway[0])
    assert "3.0 MB freed." in command("gc", "--delete", "--keep-runs", "3")
    assert gateway[0].called[-1] == artifacts_pb2.CollectGarbageRequest(dry_run=False, keep_runs=3)
    data = json.loads(command("gc", "--json"))
    assert data["deleted"] is False
    assert data["size_bytes"] == 3_000_000
    assert [each["name"] for each in data["artifacts"]] == ["old"]
    assert data["kept"][0]["kept_for"][0] == RUN_ID
    gateway[0].garbage = gateway[0].garbage[:1]
    assert "Nothing to free: all 1 artifact are needed." in command("gc")


def test_runs_are_kept_let_go_and_deleted(gateway: tuple[ScriptedGateway, int], command: Command) -> None:
    assert f"{RUN_ID} is kept." in command("runs", "keep")
    assert "is kept" in command("runs", "delete", RUN_ID, code=1)
    assert f"{RUN_ID} is no longer kept." in command("runs", "keep", "--release", RUN_ID)
    assert f"{RUN_ID} was deleted." in command("runs", "delete", RUN_ID)
    assert "There is no run" in command("runs", "delete", RUN_ID, code=1)


def test_status_and_doctor_warn_of_a_disk_that_is_nearly_full(
    gateway: tuple[ScriptedGateway, int], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway[0].warnings = ["the disk of /data has 1.2 GB left (wanted: 5 GB)"]
    assert "the disk of /data has 1.2 GB left" in command("status", code=1)
    assert "has 1.2 GB left" in json.loads(command("status", "--json", code=1))["services"][0]["warnings"][0]
    monkeypatch.setenv("WEB4LORA_KEEP_FREE_GB", "1e9")
    from web4lora import doctor
    from web4lora.home import load_settings

    assert "`web4lora gc` says what can go" in doctor._disk(load_settings()).text
