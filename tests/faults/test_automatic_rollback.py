"""A promoted model that fails for good is rolled back by itself, on each of the three real runtimes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from web4.lora.v1 import deployments_pb2
from web4lora_deployer.records.deployments import Deployments
from web4lora_deployer.runtimes.ollama_api import OllamaApi
from web4lora_deployer.settings import DeployerSettings

from tests.integration.deployer.deployer_stack import (
    Stack,
    ask,
    changed,
    deployed,
    eventually,
    listener,
    server_of,
)
from tests.servers.fixtures import MakeProxy, Proxy

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def settings(settings: DeployerSettings, request: pytest.FixtureRequest) -> DeployerSettings:
    """Settings with a guard that looks often, and the runtime that the test names."""
    update: dict[str, object] = {"guard_interval_seconds": 0.5}
    for name in ("ollama", "model_runner"):
        if name in request.fixturenames:
            field = "docker_model_runner" if name == "model_runner" else name
            update[field] = request.getfixturevalue(name)
    return settings.model_copy(update=update)


@pytest.fixture
def two(stack: Stack, gguf: Path, tmp_path: Path) -> Callable[[str], list[deployments_pb2.Deployment]]:
    """Deploys and promotes two models one after the other: returns the older one and the one that serves."""

    def deploy(target: str) -> list[deployments_pb2.Deployment]:
        files = [changed(gguf, tmp_path, word) for word in ("Older", "Newer")]
        return [stack.promote(deployed(stack.deploy(stack.put(file), target=target))) for file in files]

    return deploy


@pytest.fixture
def log(tmp_path: Path) -> Callable[[], str]:
    return (tmp_path / "deployer.log").read_text


def rolled_back(stack: Stack, old: deployments_pb2.Deployment) -> deployments_pb2.Deployment:
    def look() -> deployments_pb2.Deployment | None:
        found = stack.get("demo")
        return found if found.id == old.id else None

    return eventually(look, seconds=240)


def check(
    stack: Stack,
    old: deployments_pb2.Deployment,
    new: deployments_pb2.Deployment,
    log: Callable[[], str],
    why: str,
) -> None:
    """See that the older one serves, that people are told, and that it is told once."""
    found = rolled_back(stack, old)
    assert found.promoted
    assert found.detail.startswith(f"rolled back from {new.id}: ")
    assert why in found.detail
    assert "gravity" in ask(found)
    told = "rolled back by itself"
    eventually(lambda: told in log() or None)  # once the one that failed is unloaded too
    (line,) = [line for line in log().splitlines() if told in line]
    assert f"demo: rolled back by itself from {new.id} to {old.id}: " in line
    assert not stack.get(new.id).promoted


def test_a_llama_server_that_ends_again_and_again(
    stack: Stack, two: Callable[[str], list[deployments_pb2.Deployment]], log: Callable[[], str]
) -> None:
    old, new = two("llama-server")
    deployments = Deployments(stack.settings.deployer_home)
    file = deployments.path(deployments.get(new.id))
    file.unlink()  # the store may hold a link to it
    file.write_bytes(b"GGUF, or not")
    server_of(new).kill()
    rolled_back(stack, old)
    check(stack, old, new, log, "llama-server ended")


def test_a_llama_server_that_ends_once_is_only_started_again(
    stack: Stack, two: Callable[[str], list[deployments_pb2.Deployment]], log: Callable[[], str]
) -> None:
    _, new = two("llama-server")
    for _ in range(2):
        before = server_of(new)
        before.kill()
        eventually(lambda before=before: _other(stack, before.pid))
    assert stack.get("demo").id == new.id
    assert "rolled back" not in log()


def _other(stack: Stack, pid: int) -> bool | None:
    found = stack.get("demo")
    if found.state != deployments_pb2.DEPLOYMENT_STATE_SERVING:
        return None
    try:
        return True if server_of(found).pid != pid else None
    except AssertionError:
        return None


def test_a_model_that_ollama_lost(
    stack: Stack, two: Callable[[str], list[deployments_pb2.Deployment]], ollama: str, log: Callable[[], str]
) -> None:
    old, new = two("ollama")
    api = OllamaApi(ollama)
    api.delete(new.id)
    rolled_back(stack, old)
    check(stack, old, new, log, "no longer has it")
    assert api.digest("demo") == api.digest(old.id) != ""
    for each in (old, new):
        stack.delete(each.id)


def test_a_model_that_model_runner_lost(
    stack: Stack,
    two: Callable[[str], list[deployments_pb2.Deployment]],
    model_runner: str,
    log: Callable[[], str],
) -> None:
    old, new = two("docker")
    httpx2.delete(f"{model_runner}/models/{new.id}", params={"force": "true"}, timeout=60).raise_for_status()
    rolled_back(stack, old)
    check(stack, old, new, log, "no longer has it")
    named = httpx2.get(f"{model_runner}/models/demo").json()
    assert named["id"] == httpx2.get(f"{model_runner}/models/{old.id}").json()["id"]
    for each in (old, new):
        stack.delete(each.id)


@pytest.fixture
def ollama_proxy(ollama: str, toxiproxy: MakeProxy) -> Proxy:
    return toxiproxy(ollama.removeprefix("http://"))


def test_an_ollama_that_is_out_of_reach_is_waited_for(
    stack: Stack,
    two: Callable[[str], list[deployments_pb2.Deployment]],
    settings: DeployerSettings,
    ollama_proxy: Proxy,
    log: Callable[[], str],
) -> None:
    stack.stop()
    stack.settings = settings.model_copy(update={"ollama": f"http://{ollama_proxy.address}"})
    stack.start()
    old, new = two("ollama")
    ollama_proxy.cut()
    assert "out of reach" in stack.get("demo").detail
    time.sleep(5)  # ten looks of the guard
    assert stack.get("demo").id == new.id
    ollama_proxy.heal()
    assert "gravity" in ask(stack.get("demo"))
    assert "rolled back" not in log()
    for each in (old, new):
        stack.delete(each.id)


def test_a_model_that_ollama_can_not_load(
    stack: Stack, two: Callable[[str], list[deployments_pb2.Deployment]], ollama: str, log: Callable[[], str]
) -> None:
    """As after an update of Ollama, or on a broken disk: it still lists the model."""
    old, new = two("ollama")
    sha256 = Deployments(stack.settings.deployer_home).get(new.id).sha256
    blob = _models_of(ollama) / "blobs" / f"sha256-{sha256}"
    whole = blob.read_bytes()
    stack.stop()  # before the model is unloaded: the guard may be asking it, which loads it again
    eventually(lambda: _unloaded(ollama))
    blob.write_bytes(whole[: len(whole) // 2])
    stack.start()  # a model that has answered is asked again when the deployer starts
    rolled_back(stack, old)
    check(stack, old, new, log, "")
    for each in (old, new):
        stack.delete(each.id)
    blob.unlink(missing_ok=True)


def _unloaded(ollama: str) -> bool | None:
    loaded = httpx2.get(f"{ollama}/api/ps").raise_for_status().json()["models"]
    for model in loaded:
        OllamaApi(ollama).unload(model["name"])
    return None if loaded else True


def _models_of(ollama: str) -> Path:
    """Return the folder in which an Ollama keeps its models."""
    server = listener(deployments_pb2.Deployment(endpoint=f"{ollama}/v1"))
    assert server is not None
    return Path(server.environ()["OLLAMA_MODELS"])
