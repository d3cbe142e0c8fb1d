"""The real Ollama and Docker Model Runner, on free loopback ports, with our llama.cpp beside them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from web4lora_llamacpp import LlamaCpp

from servers.fixtures import free_port, program, started


@pytest.fixture(scope="session")
def ollama(tmp_path_factory: pytest.TempPathFactory, llama_cpp: LlamaCpp) -> Iterator[str]:
    """An Ollama of the session's own; its address."""
    folder = tmp_path_factory.mktemp("ollama")
    for place in (folder / "bin", folder / "lib" / "ollama"):
        place.mkdir(parents=True)
    command = folder / "bin" / "ollama"
    shutil.copy(program("ollama"), command)  # it looks for its tools beside itself, through links
    for tool in llama_cpp.bin.iterdir():
        (folder / "lib" / "ollama" / tool.name).symlink_to(tool)
    address = f"127.0.0.1:{free_port()}"
    env = {
        "HOME": str(folder),
        "OLLAMA_HOST": address,
        "OLLAMA_MODELS": str(folder / "models"),
        "OLLAMA_NOPRUNE": "1",
    }
    with started([command, "serve"], f"http://{address}/api/version", folder, env):
        yield f"http://{address}"


@pytest.fixture(scope="session")
def model_runner(tmp_path_factory: pytest.TempPathFactory, llama_cpp: LlamaCpp) -> Iterator[str]:
    """A Docker Model Runner of the session's own; its address."""
    folder = tmp_path_factory.mktemp("modelrunner")
    port = free_port()
    env = {
        "HOME": str(folder),
        "MODEL_RUNNER_PORT": str(port),
        "LLAMA_SERVER_PATH": str(llama_cpp.bin),
        "MODELS_PATH": str(folder / "models"),
    }
    with started([program("modelrunner")], f"http://127.0.0.1:{port}/engines/status", folder, env):
        yield f"http://127.0.0.1:{port}"
