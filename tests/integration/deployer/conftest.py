"""Fixtures of the deployer's integration tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from web4lora_chassis.settings import load
from web4lora_deployer.settings import DeployerSettings
from web4lora_llamacpp import LlamaCpp

from tests.integration.deployer.deployer_stack import Stack
from tests.servers.fixtures import free_port
from tests.servers.llama_cpp import llama_cpp
from tests.servers.smollm2 import smollm2_gguf

__all__ = ["llama_cpp"]


@pytest.fixture(scope="session")
def gguf() -> Path:
    """A real small model."""
    return smollm2_gguf()


@pytest.fixture
def settings(tmp_path: Path, llama_cpp: LlamaCpp) -> DeployerSettings:
    """A home of the test's own, and no runtime but llama-server."""
    return load(
        DeployerSettings,
        home=tmp_path / "home",
        store=(tmp_path / "store").as_uri(),
        deployer_address=f"127.0.0.1:{free_port()}",
        llama_server_first_port=free_port(),
        ollama="http://127.0.0.1:1",
        docker_model_runner="http://127.0.0.1:1",
    )


@pytest.fixture
def stack(settings: DeployerSettings, tmp_path: Path) -> Iterator[Stack]:
    """A deployer that runs; its log is shown when the test fails."""
    log = tmp_path / "deployer.log"
    stack = Stack(settings, log)
    stack.start()
    yield stack
    stack.stop()
    sys.stderr.write(log.read_text())
