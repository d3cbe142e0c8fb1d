"""Fixtures of the fault tests on a whole deployer and real runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest
from web4lora_llamacpp import LlamaCpp
from web4lora_packager.convert import convert

from tests import tiny_llama
from tests.integration.deployer.conftest import gguf, settings, stack
from tests.servers.llama_cpp import llama_cpp
from tests.servers.runtimes import model_runner, ollama

__all__ = ["gguf", "llama_cpp", "model_runner", "ollama", "settings", "stack"]


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, llama_cpp: LlamaCpp) -> Path:
    """A model that loads at once. It talks nonsense, but every runtime takes it."""
    folder = tmp_path_factory.mktemp("tiny")
    base = tiny_llama.write_base(folder / "base", tied=False)
    convert(
        llama_cpp, base, folder / "tiny.gguf",
        gguf_type="BF16", name="tiny", log=folder / "log", report=lambda _: None,
    )  # fmt: skip
    return folder / "tiny.gguf"
