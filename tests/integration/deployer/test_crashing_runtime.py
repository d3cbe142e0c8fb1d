"""The target "auto" where a runtime is there, and what it runs for a model crashes on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from web4.lora.v1 import deployments_pb2, jobs_pb2
from web4lora_chassis import process
from web4lora_deployer.settings import DeployerSettings
from web4lora_llamacpp import LlamaCpp

from tests.integration.deployer.deployer_stack import Stack, ask, deployed
from tests.servers.runtimes import running_model_runner, running_ollama

pytestmark = pytest.mark.timeout(600)

RUNTIMES = {"ollama": ("ollama", running_ollama), "docker": ("docker_model_runner", running_model_runner)}


@pytest.fixture(params=sorted(RUNTIMES))
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def crashing(tmp_path: Path, llama_cpp: LlamaCpp) -> LlamaCpp:
    """The real tools, but for a llama-server that is killed by SIGSEGV once it is to serve a model."""
    folder = tmp_path / "crashing"
    folder.mkdir()
    for tool in llama_cpp.bin.iterdir():
        (folder / tool.name).symlink_to(tool)
    server = folder / "llama-server"
    server.unlink()
    server.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) exec {llama_cpp.server} "$@";; esac\nkill -SEGV $$\n'
    )
    server.chmod(0o755)
    return replace(llama_cpp, bin=folder)


@pytest.fixture
def settings(
    settings: DeployerSettings, tmp_path: Path, target: str, crashing: LlamaCpp
) -> Iterator[DeployerSettings]:
    setting, running = RUNTIMES[target]
    (tmp_path / "runtime").mkdir()
    with running(tmp_path / "runtime", crashing) as address:
        yield settings.model_copy(update={setting: address})


def test_auto_goes_on_to_the_next_runtime_and_says_so(stack: Stack, gguf: Path, target: str) -> None:
    job = stack.deploy(stack.put(gguf), target="auto")
    deployment = deployed(job)
    assert deployment.target == "llama-server"
    assert "gravity" in ask(deployment)
    (said,) = job.result.deploy.passed_over
    assert said.startswith(f"{target}: ")
    listed = stack.deployments.ListDeployments(deployments_pb2.ListDeploymentsRequest()).deployments
    assert [each.target for each in listed] == ["llama-server"]


def test_a_target_that_was_named_is_not_left(stack: Stack, gguf: Path, target: str) -> None:
    job = stack.deploy(stack.put(gguf), target=target)
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    assert job.error.reason in (process.CRASHED, "MODEL_NOT_LOADABLE"), job.error
    assert "try again" not in f"{job.error.message} {job.error.fix}".lower()
