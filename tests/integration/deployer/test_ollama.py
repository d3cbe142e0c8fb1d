"""The deployer on the real Ollama."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from integration.deployer.deployer_stack import Stack, ask, deployed, server_of
from servers.fixtures import MakeProxy, program
from servers.runtimes import ollama
from unit.deployer.records import record
from web4.lora.v1 import deployer_pb2, jobs_pb2
from web4lora_chassis.artifacts import hash_file
from web4lora_chassis.errors import DataLoss, FailedPrecondition, Unavailable
from web4lora_deployer.deployments import Deployment, Parameters
from web4lora_deployer.gguf_file import read_facts
from web4lora_deployer.runtimes.base import State
from web4lora_deployer.runtimes.ollama import OllamaRuntime
from web4lora_deployer.runtimes.ollama_api import OllamaApi
from web4lora_deployer.runtimes.tokens import Tokenizer, tokenizer_of
from web4lora_deployer.settings import DeployerSettings
from web4lora_deployer.template_gate import Difference, Served, compare
from web4lora_deployer.templates import go_template
from web4lora_llamacpp import LlamaCpp
from web4lora_packager.modelfile import ModelParameters, modelfile

__all__ = ["ollama"]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def settings(settings: DeployerSettings, ollama: str) -> DeployerSettings:
    return settings.model_copy(update={"ollama": ollama})


@pytest.fixture
def runtime(settings: DeployerSettings) -> OllamaRuntime:
    return OllamaRuntime(settings)


@pytest.fixture(scope="module")
def tokenizer(
    llama_cpp: LlamaCpp, gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tokenizer]:
    """The model's own tokenizer."""
    with tokenizer_of(llama_cpp, gguf, tmp_path_factory.mktemp("tokens") / "log") as tokenizer:
        yield tokenizer


def served_by(api: OllamaApi, model: str) -> Served:
    return Served(
        lambda messages: api.prompt_tokens(model, messages), lambda messages: api.render(model, messages)
    )


def client_of(ollama: str, *words: str, folder: Path | None = None) -> str:
    """Run the program `ollama` as people do; return what it printed."""
    env = {**os.environ, "OLLAMA_HOST": ollama}
    done = subprocess.run(
        [program("ollama"), *words], env=env, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def wanted(file: Path, **fields: object) -> Deployment:
    sha256 = hash_file(file)
    values: dict[str, object] = {
        "id": f"demo:v{sha256[:8]}", "model": f"demo:v{sha256[:8]}", "sha256": sha256, "target": "ollama",
        "size_bytes": file.stat().st_size, "file": f"x/{file.name}", "context_tokens": 512,
    }  # fmt: skip
    return record("a", **{**values, **fields})


@pytest.fixture
def other_template(gguf: Path, tmp_path: Path) -> Path:
    """The same model with a chat template that Ollama knows nothing like, and a default system message."""
    template = (
        "{% if messages[0].role != 'system' %}{{ 'Be \"kind\".\n' }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ m.content + '\n' }}"
        "{% elif m.role == 'user' %}{{ '### Ask {{x}}:\n' + m.content }}"
        "{% else %}{{ '\n### Say:\n' + m.content + '\n' }}{% endif %}{% endfor %}{{ '\n### Say:\n' }}"
    )
    old = read_facts(gguf).chat_template.encode()
    new = template.encode()
    assert len(new) <= len(old)
    file = tmp_path / "other.gguf"
    file.write_bytes(gguf.read_bytes().replace(old, new + b" " * (len(old) - len(new)), 1))
    return file


def test_deploy_promote_answer_and_delete(stack: Stack, gguf: Path, ollama: str) -> None:
    deployment = deployed(stack.deploy(stack.put(gguf), target="auto"))
    assert deployment.target == "ollama"  # "auto" prefers it when it is there
    assert deployment.endpoint == f"{ollama}/v1"
    assert "gravity" in ask(deployment)
    api = OllamaApi(ollama)
    assert api.digest("demo") == ""
    stack.promote(deployment)
    assert api.digest("demo") == api.digest(deployment.id) != ""
    assert stack.get("demo").state == deployer_pb2.DEPLOYMENT_STATE_SERVING
    stack.api.DeleteDeployment(deployer_pb2.DeleteDeploymentRequest(id=deployment.id))
    assert api.digest("demo") == api.digest(deployment.id) == ""


def test_another_target_takes_over_and_the_old_one_lets_go(stack: Stack, gguf: Path, ollama: str) -> None:
    ref = stack.put(gguf)
    first = stack.promote(deployed(stack.deploy(ref, target="llama-server")))
    server = server_of(first)
    second = deployed(stack.deploy(ref, target="ollama"))
    assert second.id == first.id
    assert second.promoted  # the name moves with it
    assert OllamaApi(ollama).digest("demo") == OllamaApi(ollama).digest(first.id) != ""
    assert not server.is_running()
    assert stack.get("demo").target == "ollama"
    back = deployed(stack.deploy(ref, target="llama-server"))
    assert stack.get("demo").endpoint == back.endpoint
    assert OllamaApi(ollama).digest("demo") == OllamaApi(ollama).digest(first.id) == ""
    assert "gravity" in ask(back)


def test_a_model_that_someone_else_removed_says_so(stack: Stack, gguf: Path, ollama: str) -> None:
    deployment = deployed(stack.deploy(stack.put(gguf), target="ollama"))
    OllamaApi(ollama).delete(deployment.id)
    found = stack.get("demo")
    assert found.state == deployer_pb2.DEPLOYMENT_STATE_FAILED
    assert "deploy it again" in found.detail
    deployed(stack.deploy(stack.put(gguf), target="ollama"))
    assert stack.get("demo").state == deployer_pb2.DEPLOYMENT_STATE_SERVING


def test_its_prompts_are_training_s(
    runtime: OllamaRuntime, settings: DeployerSettings, gguf: Path, tokenizer: Tokenizer
) -> None:
    deployment = wanted(gguf)
    runtime.deploy(deployment, gguf, lambda _: None)
    api = OllamaApi(settings.ollama)
    assert compare(read_facts(gguf), tokenizer, served_by(api, deployment.id)) is None
    assert "SmolLM" in str(api.show(deployment.id)["system"])  # what its Jinja adds, and Ollama would not
    runtime.delete(deployment)


def test_an_unknown_template_is_rendered_as_trained(
    runtime: OllamaRuntime, settings: DeployerSettings, other_template: Path, tokenizer: Tokenizer
) -> None:
    deployment = wanted(other_template)
    runtime.deploy(deployment, other_template, lambda _: None)
    api = OllamaApi(settings.ollama)
    facts = read_facts(other_template)
    assert "### Ask" in facts.chat_template
    assert compare(facts, tokenizer, served_by(api, deployment.id)) is None
    runtime.delete(deployment)


def test_a_prompt_that_differs_is_named_by_its_first_token(
    runtime: OllamaRuntime, ollama: str, gguf: Path, tokenizer: Tokenizer
) -> None:
    deployment = wanted(gguf)
    runtime.deploy(deployment, gguf, lambda _: None)
    api = OllamaApi(ollama)
    files = {"model.gguf": f"sha256:{deployment.sha256}"}
    api.create({"model": "bare", "files": files}, lambda _: None)  # without the system message
    difference = compare(read_facts(gguf), tokenizer, served_by(api, "bare"))
    assert isinstance(difference, Difference)
    assert str(difference).startswith("with one question, in turn 1 (user), token 1: trained")
    assert '"<|im_start|>" then "system"' in str(difference)
    assert '"<|im_start|>" then "user"' in str(difference)
    api.delete("bare")
    runtime.delete(deployment)


def test_a_system_message_of_one_s_own_is_served(runtime: OllamaRuntime, ollama: str, gguf: Path) -> None:
    deployment = wanted(gguf, parameters=Parameters(system="You are brief."))
    runtime.deploy(deployment, gguf, lambda _: None)
    prompt = OllamaApi(ollama).render(deployment.id, [{"role": "user", "content": "Hello."}])
    assert prompt.startswith("<|im_start|>system\nYou are brief.<|im_end|>\n")
    runtime.delete(deployment)


def test_the_modelfile_makes_the_same_model_by_hand(
    runtime: OllamaRuntime, ollama: str, gguf: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    facts = read_facts(gguf)
    own = go_template(facts)
    assert own is not None
    parameters = ModelParameters(("<|im_end|>",), own.system, 0.0, 512, "Apache License\n  Version 2.0")
    (tmp_path / "Modelfile").write_text(modelfile("model.Q4_1.gguf", parameters))
    (tmp_path / "model.Q4_1.gguf").symlink_to(gguf)
    client_of(ollama, "create", "by-hand", "-f", "Modelfile", folder=tmp_path)
    api = OllamaApi(ollama)
    assert compare(facts, tokenizer, served_by(api, "by-hand")) is None
    shown = api.show("by-hand")
    assert shown["license"] == parameters.licence
    assert shown["system"] == own.system

    deployment = wanted(gguf, parameters=Parameters(stop=("<|im_end|>",), license=parameters.licence))
    runtime.deploy(deployment, gguf, lambda _: None)
    question = [{"role": "user", "content": "Hello."}]
    assert api.render("by-hand", question) == api.render(deployment.id, question)
    mine = api.show(deployment.id)
    for key in ("template", "system", "license"):
        assert shown[key] == mine[key]
    assert set(str(shown["parameters"]).splitlines()) == set(str(mine["parameters"]).splitlines())
    runtime.delete(deployment)
    api.delete("by-hand")


def test_it_answers_through_ollama_s_own_client(runtime: OllamaRuntime, ollama: str, gguf: Path) -> None:
    deployment = wanted(gguf)
    runtime.deploy(deployment, gguf, lambda _: None)
    runtime.promote(deployment)
    assert "gravity" in client_of(ollama, "run", "demo", "What is gravity?").lower()
    assert "demo:latest" in client_of(ollama, "list")
    runtime.withdraw(deployment)
    runtime.delete(deployment)


def test_nothing_is_uploaded_twice(
    runtime: OllamaRuntime, settings: DeployerSettings, ollama: str, toxiproxy: MakeProxy, gguf: Path
) -> None:
    deployment = wanted(gguf)
    runtime.deploy(deployment, gguf, lambda _: None)
    proxy = toxiproxy(ollama.removeprefix("http://"))
    through = settings.model_copy(update={"ollama": f"http://{proxy.address}"})
    OllamaRuntime(through).deploy(deployment, gguf, lambda _: None)
    assert proxy.received_bytes() < 1 << 20
    runtime.delete(deployment)


def test_memory_is_told_and_freed(runtime: OllamaRuntime, settings: DeployerSettings, gguf: Path) -> None:
    deployment = wanted(gguf)
    runtime.deploy(deployment, gguf, lambda _: None)  # comparing the templates loads it
    assert runtime.memory_bytes(deployment) > 50_000_000
    runtime.unload(deployment)
    assert runtime.memory_bytes(deployment) == 0
    runtime.delete(deployment)
    runtime.unload(deployment)  # what is gone already is no error
    runtime.delete(deployment)


def test_wrong_bytes_are_named(runtime: OllamaRuntime, gguf: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf.read_bytes()[: 4 << 20])
    with pytest.raises(DataLoss, match="digest mismatch"):
        runtime.deploy(replace(wanted(short), sha256="1" * 64), short, lambda _: None)


def test_an_error_inside_a_stream_that_began_well_is_found(ollama: str) -> None:
    body = {"model": "demo:v11111111", "files": {"x.gguf": f"sha256:{'1' * 64}"}}
    with pytest.raises(FailedPrecondition, match="no such file"):
        OllamaApi(ollama).create(body, lambda _: None)
    assert OllamaApi(ollama).digest("demo:v11111111") == ""


def test_a_connection_cut_while_uploading_is_said_and_again_finishes(
    settings: DeployerSettings, ollama: str, toxiproxy: MakeProxy, gguf: Path, tmp_path: Path
) -> None:
    file = tmp_path / "fresh.gguf"
    file.write_bytes(gguf.read_bytes() + bytes(8))  # bytes that Ollama has not
    proxy = toxiproxy(ollama.removeprefix("http://"))
    runtime = OllamaRuntime(settings.model_copy(update={"ollama": f"http://{proxy.address}"}))
    proxy.cut_after(20 << 20, "upstream")
    with pytest.raises(Unavailable, match="Ollama"):
        runtime.deploy(wanted(file), file, lambda _: None)
    proxy.heal()
    deployment = wanted(file)
    runtime.deploy(deployment, file, lambda _: None)
    assert runtime.health(deployment).state is State.SERVING
    runtime.delete(deployment)


class _SaysVersion(BaseHTTPRequestHandler):
    """An Ollama of some version, as far as its version goes."""

    version = ""

    def do_GET(self) -> None:
        body = json.dumps({"version": self.version}).encode()
        self.send_response(httpx.codes.OK)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def versioned() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _SaysVersion)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("version", "usable", "detail"),
    [
        ("0.29.1", False, "0.31.2 or newer is needed"),
        ("0.31.1", False, "0.31.2 or newer is needed"),
        ("0.31.2", True, ""),
        ("0.34.9", True, ""),
        ("0.35.0", True, "newer than 0.34"),
        ("1.0.0-rc1", True, "newer than 0.34"),
        ("dev", False, "not Ollama, or not a released one"),
    ],
)
def test_versions_are_gated(
    settings: DeployerSettings, versioned: str, version: str, usable: bool, detail: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(_SaysVersion, "version", version)
    status = OllamaRuntime(settings.model_copy(update={"ollama": versioned})).probe()
    assert status.usable is usable
    assert detail in status.detail


def test_an_ollama_that_is_not_there_fails_the_job_with_what_to_do(
    stack: Stack, gguf: Path, settings: DeployerSettings
) -> None:
    stack.stop()
    stack.settings = settings.model_copy(update={"ollama": "http://127.0.0.1:1"})
    stack.start()
    job = stack.deploy(stack.put(gguf), target="ollama")
    assert job.job.state == jobs_pb2.JOB_STATE_FAILED
    assert job.job.error.reason == "RUNTIME_NOT_USABLE"
    assert "WEB4LORA_OLLAMA" in job.job.error.message
