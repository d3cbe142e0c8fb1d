"""llama.cpp's compiled tools for the tests: those in the cache, or those that WEB4LORA_LLAMA_CPP names."""

from __future__ import annotations

import pytest
from web4lora_chassis.settings import Settings, load
from web4lora_llamacpp import LlamaCpp, find

from tests.servers.fixtures import missing


@pytest.fixture(scope="session")
def llama_cpp() -> LlamaCpp:
    """The tools; without them the test is skipped, and fails in CI."""
    found = find(load(Settings).cache)
    if not found:
        missing("llama.cpp is not compiled here: python -m web4lora_llamacpp build")
    return found
