"""A deployment's record for unit tests."""

from __future__ import annotations

from typing import Any

from web4lora_chassis.artifacts import ArtifactRef
from web4lora_deployer.records.deployments import Deployment, Parameters


def record(digit: str = "a", **fields: Any) -> Deployment:
    """Return a record of the model "demo" whose file's digest is made of one digit."""
    values: dict[str, Any] = {
        "id": f"demo:v{digit * 8}",
        "name": "demo",
        "target": "llama-server",
        "gguf": ArtifactRef("gguf", "demo", digit * 64, 1000),
        "file": f"{digit * 16}/model.Q4_K_M.gguf",
        "sha256": digit * 64,
        "size_bytes": 1000,
        "parameters": Parameters(stop=("<|im_end|>",), license="Apache-2.0"),
        "context_tokens": 2048,
        "parallel": 4,
        "generation": "g1",
        "endpoint": "http://127.0.0.1:1/v1",
        "model": f"demo:v{digit * 8}",
        "created_at": 1_795_305_600.0,
    }
    return Deployment(**{**values, **fields})
