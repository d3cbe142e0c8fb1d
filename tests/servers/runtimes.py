"""The real Ollama and Docker Model Runner, on free loopback ports, with our llama.cpp beside them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from web4lora_llamacpp import LlamaCpp

from tests.servers.fixtures import free_port, program, started


@contextmanager
def running_ollama(folder: Path, llama_cpp: LlamaCpp, models: Path | None = None) -> Iterator[str]:
    """An Ollama with its files below a folder, and its models in another if one is named; its address."""
    for place in (folder / "bin", folder / "lib" / "ollama"):
        place.mkdir(parents=True, exist_ok=True)
    command = folder / "bin" / "ollama"
    if not command.exists():
        shutil.copy(program("ollama"), command)  # it looks for its tools beside itself, through links
        for tool in llama_cpp.bin.iterdir():
            (folder / "lib" / "ollama" / tool.name).symlink_to(tool)
    address = f"127.0.0.1:{free_port()}"
    env = {
        "HOME": str(folder),
        "OLLAMA_HOST": address,
        "OLLAMA_MODELS": str(models or folder / "models"),
        "OLLAMA_NOPRUNE": "1",
    }
    with started([command, "serve"], f"http://{address}/api/version", folder, env):
        yield f"http://{address}"


@contextmanager
def running_model_runner(folder: Path, llama_cpp: LlamaCpp, models: Path | None = None) -> Iterator[str]:
    """A Docker Model Runner, likewise."""
    port = free_port()
    env = {
        "HOME": str(folder),
        "MODEL_RUNNER_PORT": str(port),
        "LLAMA_SERVER_PATH": str(llama_cpp.bin),
        "MODELS_PATH": str(models or folder / "models"),
    }
    with started([program("dmr"), "serve"], f"http://127.0.0.1:{port}/engines/status", folder, env):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def ollama(tmp_path_factory: pytest.TempPathFactory, llama_cpp: LlamaCpp) -> Iterator[str]:
    """An Ollama of the session's own; its address."""
    with running_ollama(tmp_path_factory.mktemp("ollama"), llama_cpp) as address:
        yield address


@pytest.fixture(scope="session")
def model_runner(tmp_path_factory: pytest.TempPathFactory, llama_cpp: LlamaCpp) -> Iterator[str]:
    """A Docker Model Runner of the session's own; its address."""
    with running_model_runner(tmp_path_factory.mktemp("modelrunner"), llama_cpp) as address:
        yield address
