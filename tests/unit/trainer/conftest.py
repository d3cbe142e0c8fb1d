"""The tiny base model, made once, and one thread to train it on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_base import make_base


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Train tiny models on one thread: more of them would only wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random tiny Llama."""
    folder = tmp_path_factory.mktemp("tiny_base")
    make_base(folder)
    return folder
