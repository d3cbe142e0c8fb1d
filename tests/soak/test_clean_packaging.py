"""Twenty adapters packaged as they should be: no gate raises an alarm."""

from __future__ import annotations

from pathlib import Path

import pytest
from web4lora_llamacpp import LlamaCpp

from tests.planted import Trained

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("seed", range(20))
def test_a_clean_run_raises_no_alarm(llama_cpp: LlamaCpp, tmp_path: Path, seed: int) -> None:
    trained = Trained(llama_cpp, tmp_path).write(seed)
    assert trained.stopped_at(trained.merge(tmp_path / "right.gguf")) == ("", "")
