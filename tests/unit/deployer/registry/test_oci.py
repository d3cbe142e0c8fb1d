import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from web4lora_chassis.model_files.gguf import GgufHeader, GgufTensor
from web4lora_deployer.records.deployments import Deployment
from web4lora_deployer.registry.oci import OciModel, build, tar_chunks, tar_size_bytes
from web4lora_deployer.runtimes.docker_model_runner import configuration, normalise

from tests.unit.deployer.sample_records import record

HEADER = GgufHeader(
    {"general.architecture": "llama", "general.file_type": 15}, [GgufTensor("t", (134_515_008,))]
)
DATA = b"GGUF" + bytes(range(256)) * 3


@pytest.fixture
def deployment() -> Deployment:
    return record(sha256=hashlib.sha256(DATA).hexdigest(), size_bytes=len(DATA))


@pytest.fixture
def model(tmp_path: Path, deployment: Deployment) -> OciModel:
    file = tmp_path / "model.gguf"
    file.write_bytes(DATA)
    return build(deployment, file, HEADER)


def test_the_manifest_is_what_model_runner_reads(model: OciModel, deployment: Deployment) -> None:
    manifest = json.loads(model.manifest)
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.docker.ai.model.config.v0.1+json"
    assert manifest["config"]["size"] == len(bytes(model.config.source))
    gguf, license_layer = manifest["layers"]
    assert gguf == {
        "mediaType": "application/vnd.docker.ai.gguf.v3",
        "size": len(DATA),
        "digest": f"sha256:{deployment.sha256}",
        "annotations": {"org.cncf.model.filepath": "model.gguf"},
    }
    assert license_layer["mediaType"] == "application/vnd.docker.ai.license"


def test_the_config_bounds_the_context_and_lists_the_layers(model: OciModel) -> None:
    config = json.loads(bytes(model.config.source))
    assert config["config"]["context_size"] == 2048
    assert config["config"]["quantization"] == "Q4_K_M"
    assert config["config"]["parameters"] == "134.52 M"
    assert set(map(type, config["config"]["gguf"].values())) == {str}
    assert config["descriptor"] == {"created": "2026-11-22T00:00:00+00:00"}
    layers = [layer["digest"] for layer in json.loads(model.manifest)["layers"]]
    assert config["rootfs"] == {"type": "rootfs", "diff_ids": layers}


def test_the_same_deployment_gives_the_same_bytes(model: OciModel, deployment: Deployment) -> None:
    again = build(deployment, Path("elsewhere"), HEADER)
    assert again.digest == model.digest == f"sha256:{hashlib.sha256(model.manifest).hexdigest()}"


def test_the_tar_holds_each_blob_under_its_digest_and_is_as_long_as_said(model: OciModel) -> None:
    sent: list[int] = []
    data = b"".join(tar_chunks(model, sent.append))
    assert len(data) == tar_size_bytes(model)
    assert sum(sent) == len(DATA)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        names = archive.getnames()
        for name in names[:-1]:
            content = archive.extractfile(name)
            assert content is not None
            assert name == f"blobs/sha256/{hashlib.sha256(content.read()).hexdigest()}"
        manifest = archive.extractfile("manifest.json")
        assert manifest is not None
        assert manifest.read() == model.manifest
    assert names[-1] == "manifest.json"


def test_every_request_gets_its_whole_context() -> None:
    asked = configuration(record(context_tokens=2048, parallel=4))
    assert asked["context-size"] == 8192
    assert asked["runtime-flags"][:2] == ["--parallel", "4"]


@pytest.mark.parametrize(
    ("given", "listed"),
    [
        ("demo", "docker.io/ai/demo:latest"),
        ("demo:v1234abcd", "docker.io/ai/demo:v1234abcd"),
        ("web4/demo:prod", "docker.io/web4/demo:prod"),
        ("docker.io/web4/demo:prod", "docker.io/web4/demo:prod"),
        ("localhost:5000/web4/demo", "localhost:5000/web4/demo:latest"),
    ],
)
def test_names_are_compared_as_model_runner_lists_them(given: str, listed: str) -> None:
    assert normalise(given) == listed
