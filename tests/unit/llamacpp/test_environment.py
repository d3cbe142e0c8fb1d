from __future__ import annotations

from pathlib import Path

import pytest
from web4lora_llamacpp.converter import environment


def test_tools_get_what_they_need_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = (
        "WEB4LORA_TOKEN",
        "WEB4LORA_S3_SECRET_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "LLAMA_ARG_HOST",
    )
    for name in (*secrets, "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "set")
    given = environment(tmp_path)
    assert given["HOME"] == str(tmp_path)
    assert given["OMP_NUM_THREADS"] == given["CUDA_VISIBLE_DEVICES"] == "set"
    assert not set(secrets) & set(given)
