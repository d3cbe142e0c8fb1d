from __future__ import annotations

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.pipeline.deploy import TARGET
from web4lora_chassis.settings import load
from web4lora_deployer.runtimes import AUTO, RUNTIMES, open_runtime
from web4lora_deployer.settings import DeployerSettings


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("http://127.0.0.1:11434", "http://127.0.0.1:11434"),
        ("127.0.0.1:11434", "http://127.0.0.1:11434"),
        ("localhost", "http://localhost:11434"),
        ("", "http://127.0.0.1:11434"),
        (":11435", "http://127.0.0.1:11435"),
        (" '0.0.0.0:8000' ", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:11434"),  # noqa: S104
        ("::1", "http://[::1]:11434"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("[::]", "http://127.0.0.1:11434"),
        ("https://ollama.example.com", "https://ollama.example.com"),
        ("http://10.0.0.2", "http://10.0.0.2"),
        ("http://host:1/base/", "http://host:1/base"),
        ("host.docker.internal:11434", "http://host.docker.internal:11434"),
    ],
)
def test_ollamas_address_is_read_as_ollama_reads_its_own(text: str, meant: str) -> None:
    assert DeployerSettings(ollama=text).ollama == meant


@pytest.mark.parametrize(
    "text",
    [
        "ftp://host",
        "host:port",
        "host:99999",
        "http://user:key@host",
        "a b",
        "11434",
        "http://[::1",
        "host?x=1",
    ],
)
def test_what_is_no_address_names_the_variable(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB4LORA_OLLAMA", text)
    with pytest.raises(InvalidInput, match=r"WEB4LORA_OLLAMA: .*is not an address"):
        load(DeployerSettings)


def test_model_runners_address_is_read_alike_and_stays_empty() -> None:
    assert DeployerSettings(docker_model_runner="localhost").docker_model_runner == "http://localhost:12434"
    assert DeployerSettings(docker_model_runner=" ").docker_model_runner == ""


@pytest.mark.parametrize("target", ["vllm", AUTO, ""])
def test_a_runtime_that_is_none_is_refused_in_the_words_of_the_pipelines_rule(target: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        open_runtime(target, DeployerSettings())
    assert caught.value.message == (f"deploy.target: {target!r} must be one of ollama, docker, llama-server.")
    assert caught.value.metadata["field"] == "deploy.target"


def test_the_target_is_one_of_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(TARGET.words) == {AUTO, *RUNTIMES}
    monkeypatch.setenv("WEB4LORA_TARGET", "vllm")
    with pytest.raises(InvalidInput, match=r"WEB4LORA_TARGET: .*must be one of auto, ollama"):
        load(DeployerSettings)
