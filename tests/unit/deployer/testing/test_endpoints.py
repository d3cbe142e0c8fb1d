from __future__ import annotations

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.testing.endpoints import require_allowed

SETTINGS = DeployerSettings(
    ollama="gpu-box:11434",
    docker_model_runner="http://runner.internal",
    evaluate_hosts="api.example.org, b:8000",
)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8480/v1", "http://localhost/v1", "http://[::1]:9/v1", "http://GPU-BOX:11434/v1",
        "http://runner.internal/engines/v1", "http://model-runner.docker.internal/engines/v1",
        "https://api.example.org/v1", "http://api.example.org:81/v1", "http://b:8000/v1",
    ],
)  # fmt: skip
def test_this_machine_the_runtimes_and_allowed_hosts_may_be_asked(url: str) -> None:
    require_allowed(url, SETTINGS, "model")


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/v1", "http://gpu-box:22/v1", "http://b/v1",
        "http://b:8001/v1", "http://api.example.org.evil.example/v1", "http://0.0.0.0:8480/v1",
        "http://2130706433/v1", "http://127.1/v1", "http://0x7f000001/v1", "http://localhost@evil.example/v1",
        "http://[::ffff:10.0.0.1]/v1", "http://[fe80::1%25eth0]/v1", "http://host:99999999/v1", "http://[/v1",
        "http:///v1", "http://127.0.0.1.evil.example/v1",
    ],
)  # fmt: skip
def test_no_other_address_may_be_asked(url: str) -> None:
    with pytest.raises(InvalidInput, match="may not send requests") as caught:
        require_allowed(url, SETTINGS, "against[0]")
    assert caught.value.metadata["field"] == "against[0]"
    assert "WEB4LORA_EVALUATE_HOSTS" in caught.value.fix


def test_nothing_is_allowed_by_an_empty_setting() -> None:
    with pytest.raises(InvalidInput):
        require_allowed("http:///v1", DeployerSettings(), "model")
