"""What `web4lora deploy` makes of its source, with runs as the gateway tells them and a store in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from web4.lora.v1 import deployer_pb2, deployments_pb2, gateway_pb2, packager_pb2
from web4lora.client.deployable import adapter_spec, deploy_spec
from web4lora.commands.deploy import called, own_command, request_of
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, open_store
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, NotFound
from web4lora_chassis.rpc import ref_message, ref_of
from web4lora_chassis.settings import Settings

GGUF = ArtifactRef("gguf", "web4-demo", "ab" * 32, 100)
FILES = ArtifactRef("report", "web4-demo", "cd" * 32, 10)


def run_of(run_id: str) -> gateway_pb2.Run:
    if run_id not in ("run_1", "run_2"):
        raise NotFound(f"There is no run {run_id!r}.")
    run = gateway_pb2.Run(id=run_id, pipeline=gateway_pb2.Pipeline(name="web4-demo"))
    run.stages.add(name=gateway_pb2.STAGE_NAME_TRAIN)
    if run_id == "run_1":
        package = packager_pb2.PackageResult(files=ref_message(FILES))
        package.quantized.add(type="Q4_K_M", artifact=ref_message(GGUF))
        run.stages.add(name=gateway_pb2.STAGE_NAME_PACKAGE, package_result=package)
    return run


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(Settings(home=tmp_path / "home"))


def spec_of(source: Path | str, store: ArtifactStore, name: str = "") -> deployer_pb2.DeploySpec:
    return deploy_spec(source, name, run_of=run_of, open_store=lambda: store)


def test_a_run_brings_its_model_its_report_and_its_name(store: ArtifactStore, tmp_path: Path) -> None:
    spec = spec_of("run_1", store)
    assert (spec.name, ref_of(spec.gguf), ref_of(spec.files)) == ("web4-demo", GGUF, FILES)
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "run_1"}))
    assert spec_of(tmp_path, store, "other").name == "other"


def test_a_file_is_stored_once_whatever_it_is_called(store: ArtifactStore, tmp_path: Path) -> None:
    refs = []
    for name in ("a.gguf", "b.bin"):
        (tmp_path / name).write_bytes(b"GGUF and more")
        refs.append(ref_of(spec_of(tmp_path / name, store, "other").gguf))
    assert refs[0] == refs[1]
    assert [manifest.ref for manifest in store.find("gguf")] == refs[:1]


def test_what_can_t_be_deployed_is_said(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_bytes(b"text")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for source, name, kind, why in (
        ("run_2", "", FailedPrecondition, "has no packaged model"),
        ("run_9", "", NotFound, "no run"),
        (tmp_path, "", NotFound, "no run's folder"),
        (tmp_path / "gone.gguf", "a", NotFound, "is not there"),
        (tmp_path / "text.gguf", "a", InvalidInput, "no GGUF file"),
        (tmp_path / "a.gguf", "", InvalidInput, "without a name"),
    ):
        with pytest.raises(kind, match=why):
            spec_of(source, store, name)


def test_a_file_of_a_run_is_the_run_s_own_artifact(store: ArtifactStore, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "adapter.gguf").write_bytes(b"GGUF and more")
    base = ArtifactRef("base_model", "base", "b" * 64)
    made = store.put(
        "gguf", "web4-demo", {"adapter.gguf": folder / "adapter.gguf"}, inputs=[base], link=False
    )

    def run_with_it(_: str) -> gateway_pb2.Run:
        run = gateway_pb2.Run(id="run_3")
        file = packager_pb2.GgufFile(artifact=ref_message(made), file_name="adapter.gguf")
        package = packager_pb2.PackageResult(adapter_gguf=file)
        run.stages.add(name=gateway_pb2.STAGE_NAME_PACKAGE, package_result=package)
        return run

    def spec() -> deployer_pb2.AdapterSpec:
        return adapter_spec("tool", folder / "adapter.gguf", run_of=run_with_it, open_store=lambda: store)

    elsewhere = ref_of(spec().gguf)
    assert (elsewhere.name, elsewhere == made) == ("tool", False)  # the folder is no run's yet
    (folder / "run.json").write_text(json.dumps({"run_id": "run_3"}))
    assert ref_of(spec().gguf) == made
    (folder / "adapter.gguf").write_bytes(b"GGUF of its own")
    assert ref_of(spec().gguf) not in (made, elsewhere)
    for name, file, kind, why in (
        ("", folder / "adapter.gguf", InvalidInput, "without a name"),
        ("tool", folder / "gone.gguf", NotFound, "is not there"),
        ("tool", folder / "run.json", InvalidInput, "no GGUF file"),
    ):
        with pytest.raises(kind, match=why):
            adapter_spec(name, file, run_of=run_of, open_store=lambda: store)


@pytest.mark.parametrize(
    ("target", "promoted", "name", "command"),
    [
        ("ollama", True, "demo", "ollama run demo 'Say hi.'"),
        ("ollama", False, "demo:v12345678", "ollama run demo:v12345678 'Say hi.'"),
        ("docker", True, "demo", "docker model run demo 'Say hi.'"),
        ("llama-server", True, "demo:v12345678", ""),
    ],
)
def test_each_runtime_s_own_way_to_ask_is_told(target: str, promoted: bool, name: str, command: str) -> None:
    deployment = deployments_pb2.Deployment(
        name="demo", model="demo:v12345678", target=target, promoted=promoted, endpoint="http://h/v1"
    )
    assert called(deployment) == name
    assert own_command(deployment) == command
    assert request_of(deployment)["url"] == "http://h/v1/chat/completions"
    assert request_of(deployment)["body"]["model"] == name
