from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis.artifacts import ArtifactStore, open_store
from web4lora_chassis.settings import Settings
from web4lora_deployer.measure import last_report


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(Settings(home=tmp_path / "home", store=(tmp_path / "store").as_uri()))


def put(store: ArtifactStore, folder: Path, deployment: str, file: str = "eval.json") -> None:
    (folder / file).write_text(json.dumps({"of": deployment}))
    store.put("report", "demo", {file: folder / file}, parameters={"deployment": deployment}, link=False)


def test_the_last_deployed_version_is_compared_with_not_the_last_candidate(
    store: ArtifactStore, tmp_path: Path
) -> None:
    def last(*prefer: str) -> Any:
        return last_report(store, "demo", tmp_path / "work", prefer)

    assert last("demo:v1") is None
    put(store, tmp_path, "demo:v1")
    put(store, tmp_path, "demo:v2")
    put(store, tmp_path, "demo:v3-that-failed")
    put(store, tmp_path, "demo:v4", file="loss.csv")  # no report of a test
    assert last("demo:v2", "demo:v1") == {"of": "demo:v2"}
    assert last("demo:v0", "demo:v1") == {"of": "demo:v1"}, "the one before, when that was never tested"
    assert last() == {"of": "demo:v3-that-failed"}
    assert last("demo:v0") == {"of": "demo:v3-that-failed"}, "better than nothing, and it is named"
