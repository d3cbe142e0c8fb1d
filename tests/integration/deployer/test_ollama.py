"""The deployer on the real Ollama."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import httpx2
import pytest
from web4.lora.v1 import deployments_pb2, jobs_pb2
from web4lora_chassis.artifacts import hash_file
from web4lora_chassis.errors import DataLoss, FailedPrecondition, Unavailable
from web4lora_chassis.model_files.gguf import read_gguf
from web4lora_chassis.rpc import error_of
from web4lora_deployer.prompts.gate import Difference, Finding, Served, compare, prompts
from web4lora_deployer.prompts.go_template import chat_template
from web4lora_deployer.records.deployments import Deployment, Parameters
from web4lora_deployer.runtimes.base import State
from web4lora_deployer.runtimes.ollama import OllamaRuntime
from web4lora_deployer.runtimes.ollama_api import OllamaApi
from web4lora_deployer.runtimes.tokens import Tokenizer, tokenizer_of
from web4lora_deployer.serving.first_answer import first_answer
from web4lora_deployer.settings import DeployerSettings
from web4lora_llamacpp import LlamaCpp
from web4lora_packager.modelfile import ModelParameters, modelfile

from tests import trained_base
from tests.integration.deployer.deployer_stack import Stack, ask, deployed
from tests.servers.fixtures import MakeProxy, program
from tests.servers.runtimes import ollama
from tests.trained_base import CHATML, WITH_DEFAULT
from tests.unit.deployer.sample_records import record

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


def difference(api: OllamaApi, model: str, file: Path, tokenizer: Tokenizer) -> Finding | None:
    """Compare what Ollama makes of conversations with what the model's own template does."""
    served = Served(
        lambda messages, tools: api.prompt_tokens(model, messages, tools),
        lambda messages, tools: api.render(model, messages, tools),
        tokenizer.ends,
        512,
    )
    return compare(prompts([], read_gguf(file), tokenizer, lambda _: None), tokenizer, served)


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
    old = read_gguf(gguf).chat_template.encode()
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
    assert stack.get("demo").state == deployments_pb2.DEPLOYMENT_STATE_SERVING
    stack.deployments.DeleteDeployment(deployments_pb2.DeleteDeploymentRequest(id=deployment.id))
    assert api.digest("demo") == api.digest(deployment.id) == ""


def test_the_same_file_on_another_target_is_another_candidate(stack: Stack, gguf: Path, ollama: str) -> None:
    ref, api = stack.put(gguf), OllamaApi(ollama)
    first = stack.promote(deployed(stack.deploy(ref, target="llama-server")))
    second = deployed(stack.deploy(ref, target="ollama"))
    assert second.id != first.id
    assert not second.promoted
    assert stack.get("demo").id == first.id
    assert "gravity" in ask(first)
    stack.promote(second)
    assert api.digest("demo") == api.digest(second.id) != ""
    assert stack.get("demo").target == "ollama"
    back = stack.roll_back(from_id=second.id)
    assert back.id == first.id
    assert api.digest("demo") == ""  # the name is where the model is
    assert api.digest(second.id)
    assert "gravity" in ask(back)


def test_other_parameters_leave_what_serves_as_it_is(stack: Stack, gguf: Path, ollama: str) -> None:
    ref, api = stack.put(gguf), OllamaApi(ollama)
    first = stack.promote(deployed(stack.deploy(ref, target="ollama")))
    digest = api.digest("demo")
    second = deployed(stack.deploy(ref, target="ollama", context_tokens=256))
    assert second.id != first.id
    assert api.digest("demo") == api.digest(first.id) == digest
    assert stack.promote(second).promoted
    assert "num_ctx                        256" in str(api.show("demo")["parameters"])
    assert api.digest(f"{second.id}-new") == ""


def put_theirs(api: OllamaApi, model: str, gguf: Path) -> str:
    """Make somebody's own model under a name; return its digest."""
    sha256 = hash_file(gguf)
    if not api.has_blob(sha256):
        api.put_blob(sha256, gguf, lambda _: None)
    api.create({"model": model, "files": {"m.gguf": f"sha256:{sha256}"}, "system": "Mine."}, lambda _: None)
    return api.digest(model)


def test_a_name_that_is_somebody_else_s_is_refused_and_left_alone(
    stack: Stack, gguf: Path, ollama: str
) -> None:
    api = OllamaApi(ollama)
    theirs = put_theirs(api, "Demo", gguf)  # Ollama compares names without case
    job = stack.deploy(stack.put(gguf), target="ollama")
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    assert job.error.reason == "NAME_TAKEN"
    assert "Web4 LoRA Core did not make" in job.error.message
    assert "`ollama rm demo:latest`" in job.error.fix
    elsewhere = stack.promote(deployed(stack.deploy(stack.put(gguf), target="llama-server")))
    stack.stop()
    stack.start()
    stack.delete(elsewhere.id)
    assert api.digest("demo") == theirs
    assert [model["name"] for model in _models(ollama)] == ["Demo:latest"]


def test_a_name_that_somebody_took_since_is_neither_moved_nor_deleted(
    stack: Stack, gguf: Path, ollama: str
) -> None:
    api = OllamaApi(ollama)
    first = stack.promote(deployed(stack.deploy(stack.put(gguf), target="ollama")))
    second = deployed(stack.deploy(stack.put(gguf), target="ollama", context_tokens=256))
    theirs = put_theirs(api, "demo", gguf)
    with pytest.raises(grpc.RpcError) as caught:
        stack.promote(second)
    error = error_of(caught.value)
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "NAME_TAKEN"
    stack.stop()
    stack.start()  # which finishes what a crash left of a promotion
    for each in (second, first):
        stack.delete(each.id)
    assert [model["name"] for model in _models(ollama)] == ["demo:latest"]
    assert api.digest("demo") == theirs


def test_a_candidate_s_id_that_somebody_took_is_not_promoted(stack: Stack, gguf: Path, ollama: str) -> None:
    api = OllamaApi(ollama)
    deployment = deployed(stack.deploy(stack.put(gguf), target="ollama"))
    theirs = put_theirs(api, deployment.id, gguf)
    with pytest.raises(grpc.RpcError) as caught:
        stack.promote(deployment)
    assert getattr(error_of(caught.value), "reason", "") == "NAME_TAKEN"
    assert stack.deploy(stack.put(gguf), target="ollama").error.reason == "NAME_TAKEN"
    stack.delete(deployment.id)
    assert api.digest(deployment.id) == theirs
    assert api.digest("demo") == ""


def test_a_state_of_the_version_before_is_gone_on_with(stack: Stack, gguf: Path, ollama: str) -> None:
    """It kept no notes of what it made, and its ids were of the file alone."""
    api = OllamaApi(ollama)
    old = stack.promote(deployed(stack.deploy(stack.put(gguf), target="ollama")))
    home = stack.settings.deployer_home
    shutil.rmtree(home / "made")
    stack.stop()
    stack.start()
    assert api.digest("demo") == api.digest(old.id) != ""
    new = stack.promote(deployed(stack.deploy(stack.put(gguf), target="ollama", context_tokens=256)))
    assert api.digest("demo") == api.digest(new.id)
    assert stack.roll_back(from_id=new.id).id == old.id
    assert api.digest("demo") == api.digest(old.id)
    for each in (old, new):
        stack.delete(each.id)
    assert _models(ollama) == []


def _models(ollama: str) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = httpx2.get(f"{ollama}/api/tags", trust_env=False).json()["models"]
    return models


@pytest.fixture(autouse=True)
def _emptied(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave nothing to the next test, which has another home and would find it to be somebody else's."""
    yield
    if "ollama" in request.fixturenames:
        ollama = request.getfixturevalue("ollama")
        for model in _models(ollama):
            OllamaApi(ollama).delete(model["name"])


def test_a_model_that_someone_else_removed_says_so(stack: Stack, gguf: Path, ollama: str) -> None:
    deployment = deployed(stack.deploy(stack.put(gguf), target="ollama"))
    OllamaApi(ollama).delete(deployment.id)
    found = stack.get("demo")
    assert found.state == deployments_pb2.DEPLOYMENT_STATE_FAILED
    assert "deploy it again" in found.detail
    deployed(stack.deploy(stack.put(gguf), target="ollama"))
    assert stack.get("demo").state == deployments_pb2.DEPLOYMENT_STATE_SERVING


def test_its_prompts_are_training_s(
    runtime: OllamaRuntime, settings: DeployerSettings, gguf: Path, tokenizer: Tokenizer
) -> None:
    deployment = wanted(gguf)
    runtime.deploy(deployment, gguf, lambda _: None)
    api = OllamaApi(settings.ollama)
    assert difference(api, deployment.id, gguf, tokenizer) is None
    assert "SmolLM" in str(api.show(deployment.id)["system"])  # what its Jinja adds, and Ollama would not
    runtime.delete(deployment)


def test_an_unknown_template_is_rendered_as_trained(
    runtime: OllamaRuntime, settings: DeployerSettings, other_template: Path, tokenizer: Tokenizer
) -> None:
    deployment = wanted(other_template)
    runtime.deploy(deployment, other_template, lambda _: None)
    api = OllamaApi(settings.ollama)
    assert "### Ask" in read_gguf(other_template).chat_template
    assert difference(api, deployment.id, other_template, tokenizer) is None
    runtime.delete(deployment)


def test_a_prompt_that_differs_is_named_by_its_first_token(
    runtime: OllamaRuntime, ollama: str, gguf: Path, tokenizer: Tokenizer
) -> None:
    deployment = wanted(gguf)
    runtime.deploy(deployment, gguf, lambda _: None)
    api = OllamaApi(ollama)
    files = {"model.gguf": f"sha256:{deployment.sha256}"}
    api.create({"model": "bare", "files": files}, lambda _: None)  # without the system message
    found = difference(api, "bare", gguf, tokenizer)
    assert isinstance(found, Difference)
    assert str(found).startswith("with one question, in turn 1 (user), token 1: trained")
    assert '"<|im_start|>" then "system"' in str(found)
    assert '"<|im_start|>" then "user"' in str(found)
    api.delete("bare")
    runtime.delete(deployment)


@dataclass(frozen=True)
class Trained:
    """A base, its GGUF, and where a deployer would have the record of its training."""

    folder: Path
    gguf: Path


@pytest.fixture(scope="module")
def chatml(llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = trained_base.write_base(tmp_path_factory.mktemp("chatml") / "base")
    return Trained(folder, trained_base.gguf_of(llama_cpp, folder))


def trained(settings: DeployerSettings, file: Path, record: object, **fields: object) -> Deployment:
    path = settings.deployer_home / "models" / "x" / "trained_conversations.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return wanted(file, records=("x/trained_conversations.json",), **fields)


ODD = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n' }}{% elif m.role == 'user' %}"
    "{{ '### Ask {{x}}:\\n' + m.content }}{% else %}{{ '\\n### Say:\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n### Say:\\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, WITH_DEFAULT, ODD])
@pytest.mark.parametrize("system", ["", "You are brief."])
def test_what_training_used_is_what_ollama_serves(
    runtime: OllamaRuntime, settings: DeployerSettings, chatml: Trained, tmp_path: Path, template: str,
    system: str,
) -> None:  # fmt: skip
    file = trained_base.with_template(chatml.gguf, chatml.folder, template, tmp_path / "x.gguf")
    record = trained_base.record_of(chatml.folder, template=template)
    deployment = trained(settings, file, record, parameters=Parameters(system=system))
    runtime.deploy(deployment, file, lambda _: None)
    prompt = OllamaApi(settings.ollama).render(deployment.id, [{"role": "user", "content": "Hello."}])
    assert system in prompt
    runtime.delete(deployment)


@pytest.mark.parametrize("other", [WITH_DEFAULT, CHATML.replace("<|im_end|>\\n", "<|im_end|>")])
def test_what_training_did_not_use_is_found_on_ollama(
    runtime: OllamaRuntime, settings: DeployerSettings, chatml: Trained, other: str
) -> None:
    assert other != CHATML
    record = trained_base.record_of(chatml.folder, template=other)
    deployment = trained(settings, chatml.gguf, record)
    with pytest.raises(FailedPrecondition, match="would not be served the prompts") as caught:
        runtime.deploy(deployment, chatml.gguf, lambda _: None)
    assert caught.value.reason == "TEMPLATE_DIFFERS"
    runtime.delete(deployment)


def test_an_answer_that_would_not_end_is_found_on_ollama(
    runtime: OllamaRuntime, settings: DeployerSettings, chatml: Trained, tmp_path: Path
) -> None:
    """A control token is never shown as text, so a stop of that text does not end the answer either."""
    template = CHATML.replace("<|im_end|>", "<gh_stars>")
    file = trained_base.with_template(chatml.gguf, chatml.folder, template, tmp_path / "x.gguf")
    record = trained_base.record_of(chatml.folder, stop="<gh_stars>", template=template)
    deployment = trained(settings, file, record, parameters=Parameters(stop=("<gh_stars>",)))
    with pytest.raises(FailedPrecondition, match="would not end its answers"):
        runtime.deploy(deployment, file, lambda _: None)
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
    system = chat_template(read_gguf(gguf)).default_system()
    assert "SmolLM" in system
    parameters = ModelParameters(("<|im_end|>",), system, 0.0, 512, "Apache License\n  Version 2.0")
    (tmp_path / "Modelfile").write_text(modelfile("model.Q4_1.gguf", parameters))
    (tmp_path / "model.Q4_1.gguf").symlink_to(gguf)
    client_of(ollama, "create", "by-hand", "-f", "Modelfile", folder=tmp_path)
    api = OllamaApi(ollama)
    assert difference(api, "by-hand", gguf, tokenizer) is None
    shown = api.show("by-hand")
    assert shown["license"] == parameters.licence
    assert shown["system"] == system

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
    first_answer(runtime.deploy(deployment, gguf, lambda _: None))
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
        self.send_response(httpx2.codes.OK)
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
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    assert job.error.reason == "RUNTIME_NOT_USABLE"
    assert "WEB4LORA_OLLAMA" in job.error.message
