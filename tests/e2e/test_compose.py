"""The stack in containers on a real Docker Engine, its trainer on this machine, a real small model."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import yaml
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.artifacts.s3 import S3Backend
from web4lora_chassis.process import run
from web4lora_chassis.stack_secrets import KEYS, OWN

from tests.servers.compose import ROOT, ComposeStack, require_engine
from tests.servers.fixtures import free_port, program

pytestmark = pytest.mark.timeout(5400)
SERVICES = {"minio", "postgres", "gateway", "packager", "deployer"}
_LONG_SECONDS = 900.0
_SHOW = ("python", "-m", "web4lora_chassis.stack_secrets", "show")
_CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
    print("connected")
except OSError as error:
    print(error)
"""
Json = dict[str, Any]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeStack]:
    """The stack, up and healthy, with its trainer."""
    require_engine()
    stack = ComposeStack(tmp_path_factory.mktemp("compose"), f"web4lora-test-{os.getpid()}")
    try:
        stack.build()
        stack.compose("up", "--detach")
        _wait(lambda: _healthy(stack), "every service is healthy")
        stack.take_secrets()
        stack.web4lora("trainer", "start")
        yield stack
    finally:
        if os.environ.get("WEB4LORA_TEST_KEEP") != "1":
            stack.remove()


@pytest.fixture(scope="module")
def pipeline(stack: ComposeStack) -> Path:
    """A pipeline of a few steps: real training, real quantization, real answers, and no patience needed."""
    source, folder = ROOT / "examples" / "web4", stack.folder / "pipeline"
    folder.mkdir()
    for name, rows in (("tool_core.train.jsonl", 60), ("tool_core.eval.jsonl", 6)):
        lines = (source / name).read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    suite = {"name": "small", "cores": {"tool": {"check": "tool_call", "prompts": "tool_core.eval.jsonl",
                                                 "max_tokens": 48}}}  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    wanted = {
        "name": "compose-test",
        "dataset": {"train_files": ["tool_core.train.jsonl"], "eval_files": ["tool_core.eval.jsonl"]},
        "base": {"model": "smollm2-135m-instruct"},
        "train": {"max_steps": 6, "learning_rate": 1e-3, "max_length_tokens": 512, "checkpoint_steps": 2},
        "package": {"quantizations": ["Q4_K_M"], "context_tokens": 1024},
        "deploy": {"target": "llama-server", "context_tokens": 1024, "parallel": 2, "promote": "always"},
        "verify": {"suite_file": "suite.yaml"},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(wanted), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(stack: ComposeStack, pipeline: Path) -> Json:
    """A run of it that has succeeded."""
    made: Json = json.loads(stack.web4lora("run", str(pipeline), "--json"))
    assert made["state"] == "RUN_STATE_SUCCEEDED", made
    return made


def test_dockerfiles_are_clean() -> None:
    files = [ROOT / "Dockerfile", *sorted((ROOT / "docker").glob("*.Dockerfile"))]
    files += sorted((ROOT / "tests" / "e2e" / "images").glob("*.Dockerfile"))
    hadolint = Path(sys.executable).parent / "hadolint"
    assert run([hadolint, "--failure-threshold", "style", *files]).strip() == ""


def test_configuration_is_clean_and_needs_no_settings(stack: ComposeStack) -> None:
    assert stack.compose("--profile", "*", "config", "--quiet").strip() == ""
    assert stack.docker("compose", "--env-file", "/dev/null", "config", "--quiet").strip() == ""
    text = stack.compose("--profile", "*", "config")
    for name in ("token", "s3_secret_key", "minio_root_password", "postgres_password"):
        assert stack.secret(name) not in text


def test_each_container_is_given_its_own_secrets_alone(stack: ComposeStack) -> None:
    for service in sorted(SERVICES):
        assert set(stack.compose("exec", "-T", service, "ls", "/run/secrets").split()) == set(OWN[service])
        environment = stack.compose("exec", "-T", service, "env")
        for name in KEYS:
            assert stack.secret(name) not in environment, (service, name)
    shown = {name: stack.compose("run", "--rm", "-T", "secrets", *_SHOW, name) for name in KEYS}
    kept = {name: text.splitlines()[-1] for name, text in shown.items()}  # behind what building prints
    assert kept == {name: stack.secret(name) for name in KEYS}


def test_who_has_no_business_with_another_cannot_reach_it(stack: ComposeStack) -> None:
    ports = {"minio": 9000, "postgres": 5432, "gateway": 8461, "packager": 8463, "deployer": 8464}
    allowed = {
        "gateway": {"minio", "postgres", "packager", "deployer"},
        "packager": {"minio", "gateway", "deployer"},
        "deployer": {"minio", "gateway", "packager"},
    }
    for service, wanted in allowed.items():
        others = ports.keys() - {service}
        assert {other for other in others if _connects(stack, service, other, ports[other])} == wanted, (
            service
        )
    # Where the trainer listens. Docker lets every container reach this machine: the trainer asks for a token.
    assert _connects(stack, "gateway", "host.docker.internal", stack.trainer_port)


def test_gateway_and_deployer_are_small(stack: ComposeStack) -> None:
    for service in ("gateway", "deployer"):
        size_bytes = json.loads(stack.docker("inspect", f"web4lora-{service}"))[0]["Size"]
        assert size_bytes < 300e6, f"{service}: {size_bytes / 1e6:.0f} MB"


def test_no_container_runs_as_root_or_can_write_its_image(stack: ComposeStack) -> None:
    containers = stack.containers()
    assert set(containers) == SERVICES | {"minio-setup", "secrets"}
    for service in SERVICES:
        found = containers[service]
        lines = stack.docker("top", found["Id"], "-eo", "uid,pid,args").splitlines()[1:]
        assert lines, service
        assert all(line.split()[0] != "0" for line in lines), (service, lines)
        host = found["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert "no-new-privileges:true" in host["SecurityOpt"], service


def test_no_port_is_open_beyond_the_loopback(stack: ComposeStack) -> None:
    published = {}
    for service, found in stack.containers().items():
        for bindings in (found["NetworkSettings"]["Ports"] or {}).values():
            for binding in bindings or ():
                assert binding["HostIp"] == "127.0.0.1", (service, binding)
                published.setdefault(service, []).append(int(binding["HostPort"]))
    assert set(published) == {"minio", "gateway", "deployer"}
    ours = [each.address for name, addresses in psutil.net_if_addrs().items() for each in addresses
            if each.family == socket.AF_INET and not each.address.startswith("127.")]  # fmt: skip
    assert ours, "this machine has no address but the loopback's to look from"
    for port in (port for ports in published.values() for port in ports):
        for address in ours:
            with pytest.raises((ConnectionRefusedError, TimeoutError)):
                socket.create_connection((address, port), timeout=5).close()
    for port in stack.ports.values():
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_the_run_is_in_the_bucket_and_intact(stack: ComposeStack, finished: Json) -> None:
    store = _store(stack)
    published = store.published(finished["id"])
    assert {"run.json", "Modelfile", "SHA256SUMS", "eval_log.md", "drawio_diagram.png", "logs/loss.csv",
            "logs/loss.png"} <= set(published)  # fmt: skip
    refs = list(_refs(finished))
    assert {"dataset", "base_model", "adapter", "gguf", "report"} <= {ref.kind for ref in refs}
    for ref in refs:
        store.get(ref, stack.folder / "got" / ref.digest)  # raises when a byte is not what its digest says


def test_the_key_opens_one_bucket_and_nothing_else(stack: ComposeStack) -> None:
    from minio import Minio
    from minio.error import S3Error

    address = f"127.0.0.1:{stack.ports['minio']}"
    client = Minio(address, stack.secret("s3_access_key"), stack.secret("s3_secret_key"), secure=False)
    assert client.bucket_exists("web4lora")
    with pytest.raises(S3Error, match="AccessDenied"):
        client.make_bucket("another")
    with pytest.raises(S3Error, match="AccessDenied"):
        client.remove_bucket("web4lora")


def test_the_deployed_model_answers_this_machine(stack: ComposeStack, finished: Json) -> None:
    deployed = json.loads(stack.web4lora("deployments", "list", "--json"))
    assert [each["name"] for each in deployed] == ["compose-test"]
    assert deployed[0]["endpoint"] == f"http://127.0.0.1:{stack.model_port}/v1"
    said = json.loads(stack.web4lora("chat", "compose-test", "What is the capital of France?", "--json"))
    assert said["answer"].strip()


def test_grpcurl_calls_the_gateway_with_the_token(stack: ComposeStack) -> None:
    grpcurl = program("grpcurl")
    call = [stack.gateway, "web4.lora.v1.GatewayService/GetGatewayInfo"]
    token = ["-H", f"authorization: Bearer {stack.secret('token')}"]
    info = json.loads(run([grpcurl, "-plaintext", *token, *call], timeout_seconds=60))
    assert {each["name"]: each["serving"] for each in info["services"]} == {
        "trainer": True, "packager": True, "deployer": True,
    }  # fmt: skip
    with pytest.raises(Exception, match="Unauthenticated"):
        run([grpcurl, "-plaintext", *call], timeout_seconds=60)


def test_status_shows_every_service(stack: ComposeStack) -> None:
    services = json.loads(stack.web4lora("status", "--json"))["services"]
    assert {each["name"] for each in services} == {"gateway", "trainer", "packager", "deployer"}
    assert all(each["serving"] and each["version"] for each in services), services


def test_a_person_sees_the_run_in_the_console(stack: ComposeStack, finished: Json) -> None:
    from playwright.sync_api import sync_playwright

    shown = stack.web4lora("runs", "show", finished["id"])
    folder = f"{stack.console}/browser/web4lora/runs/{finished['id']}/"
    assert folder in shown.replace("\n", "")
    pictures = Path(os.environ.get("WEB4LORA_TEST_PICTURES") or stack.folder)
    port = free_port()
    browser_id = stack.docker(
        "run", "--detach", "--rm", "--network=host", "web4lora-test-chromium",
        f"--remote-debugging-port={port}",
    ).strip()  # fmt: skip
    try:
        _wait(lambda: _answers(f"http://127.0.0.1:{port}/json/version"), "Chromium answers")
        with sync_playwright() as playwright:
            browser = playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{port}")
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(60_000)
            page.goto(f"{stack.console}/login")
            page.fill("#accessKey", stack.secret("s3_access_key"))
            page.fill("#secretKey", stack.secret("s3_secret_key"))
            page.click("button[type=submit]")
            page.wait_for_url(lambda url: "/login" not in url)
            page.get_by_role("button", name="Acknowledge").click()  # MinIO's licence, at the first log-in
            page.goto(folder)
            try:
                for name in (
                    "run.json",
                    "Modelfile",
                    "SHA256SUMS",
                    "eval_log.md",
                    "drawio_diagram.png",
                    "logs",
                ):
                    page.get_by_text(name, exact=True).first.wait_for()
            finally:
                page.screenshot(path=pictures / "console.png")
            browser.close()
    finally:
        stack.docker("stop", "--time", "1", browser_id)


def test_down_and_up_keep_runs_artifacts_and_the_model(stack: ComposeStack, finished: Json) -> None:
    stack.compose("down", "--timeout", "20")
    assert not stack.containers()
    stack.compose("up", "--detach")
    _wait(lambda: _healthy(stack), "every service is healthy again")
    again = json.loads(stack.web4lora("runs", "show", finished["id"], "--json"))
    assert again["state"] == "RUN_STATE_SUCCEEDED"
    assert _store(stack).published(finished["id"])
    _wait(
        lambda: "answer" in stack.web4lora("chat", "compose-test", "Hello", "--json", ok=False), "it answers"
    )


def test_each_container_may_die_during_a_run(stack: ComposeStack, pipeline: Path, finished: Json) -> None:
    """Each is killed while the run needs it; Docker brings it back, and the run finishes with what it had."""
    before = {name: found["RestartCount"] for name, found in stack.containers().items()}
    started = json.loads(stack.web4lora("run", str(pipeline), "--detach", "--json", "--set", "train.seed=18",
                                        "--set", "train.max_steps=20"))  # fmt: skip
    for stage, victims in (("TRAIN", ("postgres", "minio", "gateway")), ("PACKAGE", ("packager",)),
                           ("VERIFY", ("deployer",))):  # fmt: skip
        _wait(lambda stage=stage: _at_work(stack, started["id"], stage), f"{stage} is at work")
        for victim in victims:
            stack.crash(victim)
    ended = _wait(lambda: _ended(stack, started["id"]), "the run has ended")
    assert ended["state"] == "RUN_STATE_SUCCEEDED", ended
    _wait(lambda: _healthy(stack), "every service is healthy again")
    after = {name: found["RestartCount"] for name, found in stack.containers().items()}
    assert {name for name in SERVICES if after[name] > before[name]} == SERVICES


def test_the_stacks_own_ollama_serves_too(stack: ComposeStack, pipeline: Path, finished: Json) -> None:
    """The last one: it takes the model out of llama-server, and Ollama is gone afterwards."""
    stack.compose("--profile", "ollama", "up", "--detach", "ollama")
    _wait(lambda: _state(stack, "ollama") == "healthy", "Ollama is healthy")
    lines = stack.docker("top", stack.containers()["ollama"]["Id"], "-eo", "uid,pid").splitlines()[1:]
    assert all(line.split()[0] != "0" for line in lines), lines
    made = json.loads(stack.web4lora("run", str(pipeline), "--json", "--set", "deploy.target=ollama"))
    assert made["state"] == "RUN_STATE_SUCCEEDED", made
    states = {stage["name"]: stage["state"] for stage in made["stages"]}
    assert states["STAGE_NAME_PACKAGE"] == "STAGE_STATE_REUSED"
    assert "compose-test" in stack.compose("exec", "-T", "ollama", "ollama", "list")
    stack.compose("--profile", "ollama", "rm", "--stop", "--force", "ollama")


def _wait(condition: Callable[[], Any], what: str, seconds: float = _LONG_SECONDS) -> Any:
    """Wait until a condition holds; return what it gave."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.5)
    return value


def _healthy(stack: ComposeStack) -> bool:
    return all(_state(stack, name) == "healthy" for name in SERVICES)


def _state(stack: ComposeStack, service: str) -> str:
    """Return a container's health; empty when there is none."""
    return str(stack.containers().get(service, {}).get("State", {}).get("Health", {}).get("Status", ""))


def _connects(stack: ComposeStack, service: str, host: str, port: int) -> bool:
    """Tell whether a container reaches an address."""
    command = ["exec", "-T", service, "python", "-c", _CONNECT, host, str(port)]
    return stack.compose(*command).strip() == "connected"


def _show(stack: ComposeStack, run_id: str) -> Json:
    """Return a run; an empty one while the gateway is away."""
    text = stack.web4lora("runs", "show", run_id, "--json", ok=False)
    return json.loads(text) if text.startswith("{") else {}


def _at_work(stack: ComposeStack, run_id: str, stage: str) -> bool:
    found = _show(stack, run_id)
    assert found.get("state") not in ("RUN_STATE_FAILED", "RUN_STATE_CANCELLED"), found
    return any(
        each["name"] == f"STAGE_NAME_{stage}"
        and each["state"] in ("STAGE_STATE_RUNNING", "STAGE_STATE_SUCCEEDED")
        for each in found.get("stages", ())
    )


def _ended(stack: ComposeStack, run_id: str) -> Json | None:
    found = _show(stack, run_id)
    return found if found.get("state") in ("RUN_STATE_SUCCEEDED", "RUN_STATE_FAILED") else None


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=2).status_code == httpx2.codes.OK
    except httpx2.HTTPError:
        return False


def _store(stack: ComposeStack) -> ArtifactStore:
    return ArtifactStore(
        S3Backend(
            endpoint=f"127.0.0.1:{stack.ports['minio']}", bucket="web4lora", region="us-east-1", secure=False,
            access_key=stack.secret("s3_access_key"), secret_key=stack.secret("s3_secret_key"),
        )
    )  # fmt: skip


def _refs(data: Any) -> Iterator[ArtifactRef]:
    """Yield every artifact that a run's JSON names."""
    if isinstance(data, list):
        for each in data:
            yield from _refs(each)
    elif isinstance(data, dict):
        if {"kind", "name", "digest"} <= data.keys():
            kind = data["kind"].removeprefix("ARTIFACT_KIND_").lower()
            yield ArtifactRef(kind, data["name"], data["digest"])
        else:
            for each in data.values():
                yield from _refs(each)
